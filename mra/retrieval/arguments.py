"""Arguments of the commands that measure, compare, explain and export a model."""

import math
from dataclasses import dataclass
from typing import Literal

from mra.common.arguments import option, require


@dataclass
class RetrievalArguments:
    """What to evaluate, and how it is ranked."""

    model: str = option(help="Model folder or Hub id; any MRA model with its processor.")
    dataset: str = option(help="Dataset folder or Hub id with columns image, captions and image_id.")
    output_dir: str = option(help="Folder for metrics.json, ranking.png and scores.safetensors.")
    split: str = option("test", "Split to evaluate, or a slice of it such as test[:200].")
    rerank_k: int | Literal["auto"] = option(
        512,
        "Images re-ranked for each query, at most the whole gallery; 0 = similarity alone; auto = the least "
        "number that loses at most 0.05 points of R@1 and mAP on the validation split, as saved with the model or else "
        "chosen now and saved in its folder.",
    )
    flip: bool = option(True, "Use the mirror image of each gallery image too.")
    score_fusion: Literal["auto", "single", "published", "posterior"] = option(
        "auto",
        "How matching scores and similarities are combined: single, the published formula; published, what 4 "
        "processes of the published code gave; posterior, the sum of weighted matching log-odds and similarity / "
        "temperature; auto, fusion and weight that are best on the validation split, as saved with the model or else "
        "chosen now and saved in its folder (published where neither is there).",
    )
    match_weight: float | None = option(
        None,
        "Weight of the matching log-odds in `posterior`; chosen on the validation split when left out (1 where "
        "there is none).",
    )
    save_scores: bool = option(False, "Write scores.safetensors.")
    batch_size: int = option(64, "Images or captions in a forward pass.")
    rerank_batch_size: int | None = option(
        None, "Most pairs in a forward pass of the re-ranker; what suits the device when left out."
    )
    num_workers: int = option(2, "Processes that decode and resize images.")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Precision of the forward passes; the weights stay float32."
    )
    attn_implementation: Literal["sdpa", "eager"] = option("sdpa", "Attention code.")
    num_queries_in_picture: int = option(8, "Rows of ranking.png, evenly spaced over the queries; 0 = no picture.")

    def __post_init__(self) -> None:
        require(self.rerank_k == "auto" or self.rerank_k >= 0, "rerank_k", "0 or more, or auto", self.rerank_k)
        weight = self.match_weight
        require(weight is None or 0 <= weight < math.inf, "match_weight", "0 or more, or left out", weight)
        require(
            weight is None or self.score_fusion == "posterior",
            "score_fusion",
            "posterior with match_weight, which no other fusion has",
            self.score_fusion,
        )


@dataclass
class ComparisonArguments:
    """What to compare."""

    results: list[str] = option(
        help="a row's name and the output folder of an evaluation", positional=True, metavar="NAME=DIR"
    )

    def __post_init__(self) -> None:
        names = [item.partition("=")[0] for item in self.results]
        for item, name in zip(self.results, names, strict=True):
            if "=" not in item:
                raise ValueError(f"expected NAME=DIR, got {item!r}")
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is given twice: each row needs a name of its own")

    @property
    def folders(self) -> dict[str, str]:
        """Return the folder of each row."""
        return dict(item.split("=", 1) for item in self.results)


@dataclass
class ExplanationArguments:
    """What to explain."""

    model: str = option(help="model folder or Hub id")
    image: str = option(help="picture file of a person")
    text: str = option(help="caption to explain")
    output: str = option(help="picture to write, such as explanation.png")
    phrases: list[str] = option([], "phrases to score on their own")
    num_layers: int | None = option(None, "last fusion layers to average; half of them when left out")


@dataclass
class ExportArguments:
    """What to export."""

    model: str = option(help="model folder or Hub id")
    output: str = option(help="folder to write")
    format: Literal["onnx"] = option("onnx", "the only one so far")
    opset: int | None = option(None, "version of the ONNX operators; what PyTorch recommends when left out")
    overwrite: bool = option(False, "replace an earlier export at --output")
