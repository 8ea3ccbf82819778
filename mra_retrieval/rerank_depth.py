"""How deep to re-rank: the least k that loses next to nothing on validation, chosen once and kept beside the weights."""

import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from transformers.utils import cached_file

from .evaluation import RetrievalResult
from .metrics import retrieval_metrics
from .score_fusion import fuse_scores


logger = logging.getLogger(__name__)

FILE_NAME = "retrieval.json"

# Re-ranked images that smaller numbers are measured against, as published for CUHK-PEDES and ICFG-PEDES.
LARGEST_K = 512

# Percentage points that R@1 and mAP may each lose.
TOLERANCE = 0.05

COMPARED = ("R1", "mAP")


@dataclass(frozen=True)
class RerankDepth:
    """A choice of how many images to re-rank, and what it rests on.

    Attributes:
        rerank_k: the choice.
        chosen_on: the data that it was chosen on.
        gallery_size: images in that data's gallery.
        score_fusion: fusion of scores that it was chosen with.
        match_weight: weight of the matching log-odds that it was chosen with, where the fusion has one.
        flip: whether it was chosen with mirror images.
        tolerance: percentage points that R@1 and mAP may lose against the largest k tried.
        tried: R@1 and mAP in percent by the number of re-ranked images.
    """

    rerank_k: int
    chosen_on: str
    gallery_size: int
    score_fusion: str
    match_weight: float | None
    flip: bool
    tolerance: float
    tried: dict[int, dict[str, float]]

    def fits(self, score_fusion: str, match_weight: float, flip: bool) -> bool:
        """Whether it was chosen for this way to evaluate."""
        ways = (self.score_fusion, self.match_weight, self.flip)
        return ways == (score_fusion, _weight_of(score_fusion, match_weight), flip)

    def describe(self) -> str:
        """The choice in one line."""
        return (
            f"rerank_k {self.rerank_k} loses at most {self.tolerance} points of R@1 and mAP against {max(self.tried)} "
            f"on {self.chosen_on}"
        )

    def save(self, folder: str | Path) -> Path:
        """Write retrieval.json into a model folder, in one move."""
        path = Path(folder) / FILE_NAME
        temporary = path.with_name(f".{os.getpid()}.{FILE_NAME}")
        try:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, model: str) -> "RerankDepth | None":
        """Read the choice that was saved with a model, in a folder or on the Hub; None where there is none.

        Raises:
            ValueError: if the file is not what `save` writes.
        """
        path = cached_file(
            model,
            FILE_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return None
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if set(saved) != {item.name for item in fields(cls)}:
                raise ValueError(f"its keys are {', '.join(saved)}")
            return cls(**saved | {"tried": {int(k): metrics for k, metrics in saved["tried"].items()}})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{FILE_NAME} of model {model} is no saved choice of rerank_k ({error}): remove it to choose anew"
            ) from error


def depths_to_try(largest: int) -> list[int]:
    """Powers of two below the largest k, and the largest itself."""
    return [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]


def choose_rerank_depth(result: RetrievalResult, chosen_on: str, tolerance: float = TOLERANCE) -> RerankDepth:
    """Choose the least number of images to re-rank whose loss against all that were re-ranked can be neglected.

    No model runs: the first images of each query's top k, whose matching scores are there, are fused and ranked again.

    Args:
        result: an evaluation with re-ranking.
        chosen_on: name of its data, for the record.
        tolerance: percentage points that R@1 and mAP may each lose.

    Raises:
        ValueError: if nothing was re-ranked.
    """
    if result.match_scores is None:
        raise ValueError(
            "a number of images to re-rank can only be chosen from an evaluation with re-ranking, rerank_k > 0"
        )
    query_ids, gallery_ids = result.query_ids, result.gallery_ids
    tried = {}
    for k in depths_to_try(result.rerank_k):
        fused = fuse_scores(
            result.similarity,
            result.top_indices[:, :k],
            result.match_scores[..., :k],
            result.score_fusion,
            temperature=result.temperature,
            match_weight=result.match_weight,
        )
        metrics = retrieval_metrics(fused, query_ids, gallery_ids)
        tried[k] = {name: metrics[name] for name in COMPARED}
    best = tried[result.rerank_k]
    chosen = next(k for k in tried if all(best[name] - tried[k][name] <= tolerance for name in COMPARED))
    match_weight = _weight_of(result.score_fusion, result.match_weight)
    return RerankDepth(
        chosen, chosen_on, len(gallery_ids), result.score_fusion, match_weight, result.flip, tolerance, tried
    )


def _weight_of(score_fusion: str, match_weight: float) -> float | None:
    """The weight of the matching log-odds, where the fusion has one."""
    return match_weight if score_fusion == "posterior" else None
