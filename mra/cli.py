"""The console script `mra`: one verb for each task of the toolkit besides training.

The options of every verb are defined in modules that import no heavy library. The code that does the work is imported after
the command line is read, so that `--help` and typos are answered quickly.
"""

import difflib
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_scripts.arguments import PedesArguments, SdaArguments
from mra.common.arguments import parse_arguments
from mra.common.command_line import plain_errors
from mra.common.imports import import_quickly
from mra.gallery.arguments import (
    CalibrationArguments,
    EncoderArguments,
    NewGalleryArguments,
    PlaceArguments,
    RemovalArguments,
    SearchArguments,
    ServeArguments,
    SourceArguments,
    StatsArguments,
)
from mra.retrieval.arguments import EVALUATION, ComparisonArguments, ExplanationArguments, ExportArguments
from mra.training.arguments import ConversionArguments


@dataclass(frozen=True)
class Verb:
    """A verb that runs one function of the library.

    Attributes:
        summary: line shown by `mra --help` and, with the example, by `mra VERB --help`.
        example: arguments that follow `mra VERB` in the example.
        run: `module:function`, imported after the command line is read; it takes an instance of each theme.
        themes: dataclasses of the options.
        output: options that name the output; the first one given is named if the disk is full.
    """

    summary: str
    example: str
    run: str
    themes: tuple[type, ...]
    output: tuple[str, ...] = ()

    def __call__(self, argv: list[str], program: str) -> None:
        """Read the arguments and run the verb."""
        description = f"{self.summary[0].upper()}{self.summary[1:]}.\n\n    {program} {self.example}"
        values = parse_arguments(self.themes, prog=program, description=description, argv=argv, config=False)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("mra_retrieval").setLevel(logging.INFO)
        module, _, function = self.run.partition(":")
        with plain_errors(program, self._find_output(values)):
            getattr(import_quickly(module), function)(*values)

    def _find_output(self, values: Sequence[Any]) -> str | None:
        given = (getattr(value, name, None) for name in self.output for value in values)
        return next(filter(None, given), None)


@dataclass(frozen=True)
class Script:
    """A verb that also exists as a script.

    Attributes:
        summary: line shown by `mra --help`.
        module: module that holds the script's `main`.
        themes: dataclasses of the options.
        config: whether it reads a recipe.
    """

    summary: str
    module: str
    themes: tuple[type, ...]
    config: bool = False

    def __call__(self, argv: list[str], program: str) -> None:
        """Check the arguments and run the script."""
        description = f"{self.summary[0].upper()}{self.summary[1:]}."
        # Answer --help and report typos before the slow import.
        parse_arguments(self.themes, prog=program, description=description, argv=argv, config=self.config)
        import_quickly(self.module).main(argv, program)


_INDEXED = (SourceArguments, PlaceArguments, EncoderArguments, NewGalleryArguments)
_WRITTEN = ("save", "output", "files", "gallery")

VERBS: dict[str, Verb | Script] = {
    "index build": Verb(
        "index a folder or dataset, encoding new and changed images",
        "--model outputs/finetune/best --images photos --gallery gallery.db --metadata people.csv",
        "mra.gallery.index_verbs:build",
        _INDEXED,
        _WRITTEN,
    ),
    "index add": Verb(
        "add images to an existing gallery",
        "--images more_photos --prefix more/ --gallery gallery.db",
        "mra.gallery.index_verbs:add",
        _INDEXED,
        _WRITTEN,
    ),
    "index remove": Verb(
        "remove images with their vectors, tokens and copies",
        """--gallery gallery.db --where 'camera == "c3"'""",
        "mra.gallery.index_verbs:remove",
        (RemovalArguments, PlaceArguments),
        _WRITTEN,
    ),
    "index stats": Verb(
        "show what a gallery holds",
        "--gallery gallery.db",
        "mra.gallery.index_verbs:stats",
        (StatsArguments, PlaceArguments),
    ),
    "index verify": Verb(
        "read every image again and compare it with the index",
        "--gallery gallery.db",
        "mra.gallery.index_verbs:verify",
        (PlaceArguments,),
    ),
    "index calibrate": Verb(
        "choose the match threshold on a labelled split",
        "--gallery gallery.db --dataset data/arrow/cuhk --split validation",
        "mra.gallery.index_verbs:calibrate",
        (CalibrationArguments, PlaceArguments, EncoderArguments),
        _WRITTEN,
    ),
    "search": Verb(
        "search a gallery by text, by an image of the person, or both",
        '"a woman in a red coat with a black backpack" --gallery gallery.db --save ranking.png',
        "mra.gallery.search_verb:search",
        (SearchArguments, PlaceArguments, EncoderArguments),
        _WRITTEN,
    ),
    "serve": Verb(
        "answer searches of programs on this machine over HTTP, with the model loaded once",
        "--gallery gallery.db",
        "mra.gallery.serve_verb:serve",
        (ServeArguments, PlaceArguments, EncoderArguments),
        _WRITTEN,
    ),
    "explain": Verb(
        "show where in an image each word looks and how well phrases match",
        '--model outputs/finetune/best --image crop.jpg --text "a red coat" --output explanation.png',
        "mra.retrieval.explain:explain",
        (ExplanationArguments,),
        _WRITTEN,
    ),
    "export": Verb(
        "export a model to ONNX, checked against PyTorch",
        "--model outputs/finetune/best",
        "mra.retrieval.export:export",
        (ExportArguments,),
        _WRITTEN,
    ),
    "evaluate": Script(
        "evaluate a model, or several on several datasets, on a labelled split",
        "eval_retrieval",
        EVALUATION,
        config=True,
    ),
    "compare": Verb(
        "print the results of several evaluations as one table, with intervals of their differences",
        "fine-tuned=outputs/eval_cuhk converted=outputs/eval_released",
        "mra.retrieval.compare:compare",
        (ComparisonArguments,),
    ),
    "prepare sda": Script(
        "convert SDA annotations and images for load_dataset", "data_scripts.prepare_sda", (SdaArguments,)
    ),
    "prepare pedes": Script(
        "convert a person-search dataset, or your own captions, for load_dataset",
        "data_scripts.prepare_pedes",
        (PedesArguments,),
    ),
    "convert": Script(
        "convert a released checkpoint to a folder for from_pretrained, or back",
        "convert_checkpoint",
        (ConversionArguments,),
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Run the verb that the command line names.

    Raises:
        SystemExit: with code 2 and a one-line message if it names none.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    words, name = list(sys.argv[1:] if argv is None else argv), ""
    while name not in VERBS:
        known = [verb.removeprefix(name).split()[0] for verb in VERBS if verb.startswith(name)]
        program = f"mra {name}".strip()
        if not words or words[0] in ("-h", "--help"):
            print(_usage(program, name))
            raise SystemExit(0 if words else 2)
        word = words.pop(0)
        if word not in known:
            close = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(dict.fromkeys(known))}"
            sys.stderr.write(f"{program}: error: unknown verb {word!r}; {hint}\n")
            raise SystemExit(2)
        name = f"{name}{word}" if f"{name}{word}" in VERBS else f"{name}{word} "
    VERBS[name](words, f"mra {name}")


def _usage(program: str, prefix: str) -> str:
    """Return the `--help` text for the verbs that begin with `prefix`."""
    verbs = {name.removeprefix(prefix): verb.summary for name, verb in VERBS.items() if name.startswith(prefix)}
    width = max(map(len, verbs))
    lines = [f"usage: {program} VERB [--OPTION VALUE ...]", "", "Find a person in images from a sentence.", ""]
    lines += [f"  {name:<{width}}  {summary}" for name, summary in verbs.items()]
    return "\n".join([*lines, "", f"{program} VERB --help lists the options of a verb."])


if __name__ == "__main__":
    main()
