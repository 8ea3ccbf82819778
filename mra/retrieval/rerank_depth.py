"""Depth of re-ranking: the smallest k that loses almost nothing against the largest."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from mra.retrieval.evaluation import RetrievalResult


# Number of re-ranked images that smaller ones are compared with, as published for CUHK-PEDES and ICFG-PEDES.
LARGEST_K = 512

# Percentage points that R@1 and mAP may each lose.
TOLERANCE = 0.05

COMPARED = ("R1", "mAP")


def depths_to_try(largest: int) -> list[int]:
    """Return the powers of two below the largest k, and the largest itself."""
    return [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]


def choose_rerank_depth(
    result: "RetrievalResult", tolerance: float = TOLERANCE
) -> tuple[int, dict[int, dict[str, float]]]:
    """Choose the smallest number of images to re-rank with a negligible loss against all that were re-ranked.

    No model runs: matching scores exist for each query's top k, and the first of them are fused and ranked again.

    Args:
        result: an evaluation with re-ranking, with the fusion to use.
        tolerance: percentage points that R@1 and mAP may each lose.

    Returns:
        The chosen number, and R@1 and mAP in percent for every number tried.

    Raises:
        ValueError: if nothing was re-ranked.
    """
    from mra.retrieval.metrics import retrieval_metrics  # imports PyTorch, which the constants do not need

    if result.match_logits is None:
        raise ValueError("rerank_k can only be chosen from an evaluation with re-ranking, rerank_k > 0")
    tried = {}
    for k in depths_to_try(result.rerank_k):
        fused = result.fuse(result.score_fusion, result.match_weight, k)
        tried[k] = compared(retrieval_metrics(fused, result.query_ids, result.gallery_ids))
    best = tried[result.rerank_k]
    chosen = next(k for k in tried if all(best[name] - tried[k][name] <= tolerance for name in COMPARED))
    return chosen, tried


def compared(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that choices are based on, in percent."""
    return {name: metrics[name] for name in COMPARED}
