"""Arguments of the commands that measure, compare, explain and export a model."""

from dataclasses import dataclass
from typing import Literal

from mra.common.arguments import option, require


@dataclass
class RetrievalArguments:
    """Model and split to evaluate, and how to rank."""

    model: str = option(help="folder or Hub id of an MRA model with its processor")
    dataset: str = option(help="folder or Hub id of a dataset with the columns image, captions and image_id")
    output_dir: str = option(help="folder for metrics.json, ranking.png and scores.safetensors")
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

    def __post_init__(self) -> None:
        require(self.rerank_k == "auto" or self.rerank_k >= 0, "rerank_k", "0 or more, or auto", self.rerank_k)
        weight = self.match_weight
        require(weight is None or weight >= 0, "match_weight", "0 or more, or left out", weight)
        require(
            weight is None or self.score_fusion == "posterior",
            "score_fusion",
            "posterior with match_weight, which no other fusion has",
            self.score_fusion,
        )


@dataclass
class ComparisonArguments:
    """Evaluations to compare."""

    results: list[str] = option(
        help="a row's name and the output folder of an evaluation", positional=True, metavar="NAME=DIR"
    )

    def __post_init__(self) -> None:
        names = [item.partition("=")[0] for item in self.results]
        for item, name in zip(self.results, names, strict=True):
            if "=" not in item:
                raise ValueError(f"expected NAME=DIR, got {item!r}")
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is given twice: each row needs its own name")

    @property
    def folders(self) -> dict[str, str]:
        """Folder of each row, by its name."""
        return dict(item.split("=", 1) for item in self.results)


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
