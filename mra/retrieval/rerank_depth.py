"""How deep to re-rank: the least k that loses next to nothing against the largest one."""

from mra.retrieval.evaluation import RetrievalResult
from mra.retrieval.metrics import retrieval_metrics


# Re-ranked images that smaller numbers are measured against, as published for CUHK-PEDES and ICFG-PEDES.
LARGEST_K = 512

# Percentage points that R@1 and mAP may each lose.
TOLERANCE = 0.05

COMPARED = ("R1", "mAP")


def depths_to_try(largest: int) -> list[int]:
    """Return the powers of two below the largest k, and the largest itself."""
    return [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]


def choose_rerank_depth(
    result: RetrievalResult, tolerance: float = TOLERANCE
) -> tuple[int, dict[int, dict[str, float]]]:
    """Choose the least number of images to re-rank whose loss against all that were re-ranked can be neglected.

    No model runs: the first images of each query's top k, whose matching scores are there, are fused and ranked again.

    Args:
        result: an evaluation with re-ranking, fused as it will be used.
        tolerance: percentage points that R@1 and mAP may each lose.

    Returns:
        The choice, and R@1 and mAP in percent of every number that was tried.

    Raises:
        ValueError: if nothing was re-ranked.
    """
    if result.match_logits is None:
        raise ValueError(
            "a number of images to re-rank can only be chosen from an evaluation with re-ranking, rerank_k > 0"
        )
    tried = {}
    for k in depths_to_try(result.rerank_k):
        fused = result.fuse(result.score_fusion, result.match_weight, k)
        tried[k] = compared(retrieval_metrics(fused, result.query_ids, result.gallery_ids))
    best = tried[result.rerank_k]
    chosen = next(k for k in tried if all(best[name] - tried[k][name] <= tolerance for name in COMPARED))
    return chosen, tried


def compared(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that choices rest on, in percent."""
    return {name: metrics[name] for name in COMPARED}
