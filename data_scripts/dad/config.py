"""The factory's configuration: a YAML with a section for each stage, and `section.key=value` on the command line."""

import argparse
import dataclasses
import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from data_scripts.dad.sections import (
    AugmentSection,
    CaptionSection,
    CommonSection,
    FilterSection,
    GenerateSection,
    GroundSection,
    ReportSection,
    TrainSection,
)
from mra.training.arguments import cast_values, read_mapping


SECTIONS = {
    "common": CommonSection,
    "train": TrainSection,
    "augment": AugmentSection,
    "generate": GenerateSection,
    "filter": FilterSection,
    "caption": CaptionSection,
    "ground": GroundSection,
    "report": ReportSection,
}


@dataclass
class FactoryConfig:
    """The arguments of all stages, a section each."""

    common: CommonSection
    train: TrainSection
    augment: AugmentSection
    generate: GenerateSection
    filter: FilterSection
    caption: CaptionSection
    ground: GroundSection
    report: ReportSection

    def deciding(self, section: str) -> dict[str, Any]:
        """The arguments of a section that its result depends on: name -> value."""
        values = getattr(self, section)
        return {
            item.name: getattr(values, item.name) for item in dataclasses.fields(values) if item.metadata["decides"]
        }


# ---------------------------------------------------------------- reading


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> FactoryConfig:
    """
    Reads a configuration.

    Args:
        path: of the YAML; defaults alone when absent.
        overrides: `section.key=value`, the value in YAML; the last wins, and all win over the file.

    Raises:
        ValueError: if a section or key is unknown, or a value is not what the argument takes.
    """
    values = {name: {} for name in SECTIONS}
    for section, mapping in (read_mapping(path) if path else {}).items():
        _known_section(section, str(path))
        if not isinstance(mapping, dict | None):
            raise ValueError(f"{path}: section {section!r} must be a mapping of arguments to values, got {mapping!r}.")
        values[section] |= cast_values(mapping or {}, [SECTIONS[section]], f"{path}, section {section!r}")
    for text in overrides:
        name, equals, value = text.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise ValueError(f"{text!r}: expected section.key=value, for example generate.batch_size=8.")
        _known_section(section, repr(text))
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{text!r}: the value is no YAML; put it in quotes.") from None
        parsed = None if parsed == "none" and _is_optional(section, key) else parsed
        values[section] |= cast_values({key: parsed}, [SECTIONS[section]], repr(text))
    return FactoryConfig(**{name: SECTIONS[name](**mapping) for name, mapping in values.items()})


def resolved_config(config: FactoryConfig) -> dict[str, dict[str, Any]]:
    """Every argument, as a mapping that can be saved and read as a configuration again."""
    return dataclasses.asdict(config)


def make_parser(program: str, description: str, sections: Sequence[str] = tuple(SECTIONS)) -> argparse.ArgumentParser:
    """The command line that all stages have; `--help` lists the arguments of some sections."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=_describe_sections(sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML with a section for each stage")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="arguments that win over the file")
    return parser


def _is_optional(section: str, key: str) -> bool:
    return any(item.name == key and "None" in str(item.type) for item in dataclasses.fields(SECTIONS[section]))


def _known_section(section: Any, place: str) -> None:
    if section not in SECTIONS:
        close = difflib.get_close_matches(str(section), SECTIONS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"sections are {', '.join(SECTIONS)}."
        raise ValueError(f"{place}: unknown section {section!r}; {hint}")


def _describe_sections(names: Sequence[str]) -> str:
    lines = []
    for name in names:
        section = SECTIONS[name]
        lines += ["", f"{name}: {section.__doc__}"]
        for item in dataclasses.fields(section):
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
            shown = "" if default in (None, [], "") else f" (default: {default})"
            text = f"{name}.{item.name}  {item.metadata['help']}{_describe_choices(item.type)}{shown}"
            lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="      ")
    if len(names) < len(SECTIONS):
        lines += [
            "",
            "Sections of other stages may stand in the YAML: python -m data_scripts.dad.run --help lists all.",
        ]
    return "\n".join(lines).lstrip()


def _describe_choices(kind: Any) -> str:
    literals = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    return f" One of {', '.join(map(str, get_args(literals[0])))}." if literals else ""
