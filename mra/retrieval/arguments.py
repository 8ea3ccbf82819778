"""Arguments of the commands that measure, compare, explain and export a model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mra.common.arguments import option, require


@dataclass
class EvaluatedArguments:
    """Model and dataset to evaluate, or several of both."""

    model: list[str] = option(
        help="folder or Hub id of an MRA model with its processor; with --matrix several, each as NAME=MODEL if you want to "
        "name it"
    )
    dataset: list[str] = option(
        help="folder or Hub id of a dataset with the columns image, captions and image_id; with --matrix several, each as "
        "NAME=DATASET if you want to name it"
    )
    output_dir: str = option(
        help="folder for metrics.json, queries.parquet, ranking.png and scores.safetensors; with --matrix for matrix.md and "
        "the folders MODEL/DATASET"
    )
    matrix: bool = option(
        False,
        "evaluate every model on every dataset and print one table; pairs that are finished are not evaluated again",
    )

    def __post_init__(self) -> None:
        for name, given in (("model", self.model), ("dataset", self.dataset)):
            require(len(given) > 0, name, f"a {name} or several", given)
            require(self.matrix or len(given) == 1, name, f"one {name}, or several with --matrix", given)
        if self.matrix:
            self.named_models()
            self.named_datasets()

    def named_models(self) -> dict[str, str]:
        """Return the models of a matrix by their names.

        Raises:
            ValueError: if two have one name, or a name cannot be that of a folder.
        """
        return _by_name("model", self.model, ("best", "final"))  # folders of every training run

    def named_datasets(self) -> dict[str, str]:
        """Return the datasets of a matrix by their names; for errors see `named_models`."""
        return _by_name("dataset", self.dataset)


def _by_name(argument: str, given: list[str], says_nothing: Sequence[str] = ()) -> dict[str, str]:
    """Return paths by the name before the first `=`, or else by their last part that says something."""
    found: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or "/" in name:  # a path may hold an equals sign
            path = item
            parts = [part for part in os.path.abspath(path).split("/") if part not in says_nothing]
            name = parts[-1]
        shape = f"`{argument}`: {item!r}"
        if not path or not name or name.startswith("."):
            raise ValueError(
                f"{shape} must be a folder or Hub id, or NAME={argument.upper()} with a name that does not begin with a dot"
            )
        if name in found:
            raise ValueError(
                f"{shape} has the name {name!r}, which {found[name]} has too: give each its own, as in NAME={path}"
            )
        found[name] = path
    return found


@dataclass
class RankingArguments:
    """Split to evaluate, how to rank, and what to write."""

    split: str = option("test", "split to evaluate, or a slice like test[:200]")
    rerank_k: int | Literal["auto"] = option(
        512,
        "images re-ranked per query; 0 ranks by similarity alone; auto is the smallest number that loses at most "
        "0.05 points of R@1 and mAP on the validation split, as saved with the model, or else chosen now and saved in its "
        "folder",
    )
    flip: bool = option(True, "use the mirror image of each image too")
    score_fusion: Literal["auto", "single", "published", "posterior"] = option(
        "auto",
        "fusion of matching scores and similarity: single, the published formula; published, the result of 4 "
        "processes of the published code; posterior, the sum of weighted matching log-odds and similarity / temperature; "
        "auto, the best fusion and weight on the validation split, as saved with the model, or else chosen now and saved "
        "in its folder (published if there is no validation split)",
    )
    match_weight: float | None = option(
        None,
        "weight of the matching log-odds in `posterior`; chosen on the validation split when left out (1 if there "
        "is none)",
    )
    image_to_text: bool = option(
        False, "also report R@K of the other direction, by similarity alone: which captions fit each image"
    )
    save_scores: bool = option(False, "also write scores.safetensors")
    batch_size: int = option(64, "images or captions per forward pass")
    rerank_batch_size: int | None = option(
        None, "most pairs per forward pass of re-ranking; chosen for the device when left out"
    )
    num_workers: int = option(2, "worker processes that decode and resize images")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = option(
        "float32",
        "precision of the forward passes; the weights stay float32; auto, the faster of float32 and bfloat16 on this device; "
        "int8, the image encoder alone, on a CPU, calibrated on the first 32 images",
    )
    attn_implementation: Literal["sdpa", "eager"] = option("sdpa", "attention implementation")
    num_queries_in_picture: int = option(8, "queries shown in ranking.png, evenly spaced over all; 0 for no picture")
    num_failures_in_picture: int = option(
        0, "queries shown in failures.png, those of lowest average precision, one a person; 0 for no picture"
    )

    def __post_init__(self) -> None:
        require(self.rerank_k == "auto" or self.rerank_k >= 0, "rerank_k", "0 or more, or auto", self.rerank_k)
        failures = self.num_failures_in_picture
        require(failures >= 0, "num_failures_in_picture", "0 or more", failures)
        weight = self.match_weight
        require(weight is None or weight >= 0, "match_weight", "0 or more, or left out", weight)
        require(
            weight is None or self.score_fusion == "posterior",
            "score_fusion",
            "posterior with match_weight, which no other fusion has",
            self.score_fusion,
        )


@dataclass(kw_only=True)
class RetrievalArguments(RankingArguments):
    """One evaluation.

    Attributes:
        model: folder or Hub id.
        dataset: folder or Hub id.
        output_dir: folder to write to.
    """

    model: str
    dataset: str
    output_dir: str


# Themes of `mra evaluate` and eval_retrieval.py.
EVALUATION = (EvaluatedArguments, RankingArguments)


@dataclass
class ComparisonArguments:
    """Evaluations to compare."""

    results: list[str] = option(
        help="a row's name and the output folder of an evaluation; evaluations of one name are those of several seeds, in the "
        "same order for each name",
        positional=True,
        metavar="NAME=DIR",
    )
    words: list[str] = option(
        [],
        "groups of words: queries whose captions have one of them are also compared apart, for example "
        "bag=bag,backpack,handbag hair=hair,ponytail",
        metavar="NAME=WORD,WORD [NAME=WORD,WORD ...]",
    )
    format: Literal["markdown", "latex", "csv"] = option("markdown", "format of the tables")
    resamples: int = option(10_000, "resamples of the bootstrap")
    seed: int = option(0, "seed of the bootstrap")

    def __post_init__(self) -> None:
        for number, item in enumerate(self.results):
            if "=" not in item:
                raise ValueError(f"expected NAME=DIR, got {item!r}")
            if item in self.results[:number]:
                raise ValueError(f"{item} is given twice: each evaluation counts once")
        counts = {name: len(folders) for name, folders in self.folders.items()}
        if len(set(counts.values())) > 1:
            listing = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise ValueError(
                f"each name needs the same number of evaluations, which are compared seed by seed, got {listing}"
            )
        for item in self.words:
            name, _, words = item.partition("=")
            require(name != "" and all(words.split(",")), "words", "groups NAME=WORD,WORD", item)
        require(len(self.word_groups) == len(self.words), "words", "groups with a name of their own each", self.words)
        require(self.resamples >= 100, "resamples", "100 or more", self.resamples)
        require(self.seed >= 0, "seed", "0 or more", self.seed)

    @property
    def word_groups(self) -> dict[str, list[str]]:
        """Words of each group, by its name."""
        return {name: words.split(",") for name, _, words in (item.partition("=") for item in self.words)}

    @property
    def folders(self) -> dict[str, list[str]]:
        """Folders of each row's evaluations, by its name."""
        folders: dict[str, list[str]] = {}
        for name, _, folder in (item.partition("=") for item in self.results):
            folders.setdefault(name, []).append(folder)
        return folders


@dataclass
class ExplanationArguments:
    """Image and text to explain."""

    model: str = option(help="model folder or Hub id")
    image: str = option(help="image file of a person")
    text: str = option(help="caption to explain")
    output: str = option(help="picture to write, for example explanation.png")
    phrases: list[str] = option([], "phrases to score separately")
    num_layers: int | None = option(None, "number of last fusion layers to average; half of them when left out")


@dataclass
class ExportArguments:
    """Model to export, and the output."""

    model: str = option(help="model folder or Hub id")
    output: str | None = option(
        None, "folder to write; by default `onnx` in the model's folder, where searches find it"
    )
    opset: int | None = option(None, "version of the ONNX operators; PyTorch's default when left out")
    overwrite: bool = option(False, "replace an earlier export at --output")
