"""Retrieval metrics (R@K, mAP, mINP) from scores, query ids and gallery ids; independent of any model."""

from dataclasses import dataclass

import torch


RECALL_AT = (1, 5, 10)
METRIC_NAMES = (*(f"R{k}" for k in RECALL_AT), "mAP", "mINP")

# Scores sorted at a time: 2**24 floats and their int64 order take about 200 MB for any gallery size.
SCORES_PER_CHUNK = 2**24


def match_ranks(
    scores: torch.Tensor,
    query_ids: torch.Tensor,
    gallery_ids: torch.Tensor,
    chunk_size: int | None = None,
    stable: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the ranks of each query's right gallery entries, with the gallery sorted by descending score.

    Entries with equal scores keep their gallery order (stable sort), so the result depends only on the scores.

    Args:
        scores: `(queries, gallery)`, larger is better.
        query_ids: identity of each query, `(queries,)`.
        gallery_ids: identity of each gallery entry, `(gallery,)`.
        chunk_size: queries sorted at a time, to bound memory; it does not change the result.
        stable: False sorts as in the published evaluation, where the order of equal scores depends on torch version and
            processor; without equal scores both are the same.

    Returns:
        ranks: `(right pairs,)` int64, from 1, ascending within a query, queries concatenated.
        counts: number of `ranks` of each query, `(queries,)` int64.

    Raises:
        ValueError: if shapes disagree, a score is not finite, or a query has no entry of its identity in the gallery.
    """
    query_ids = torch.as_tensor(query_ids, device=scores.device)
    gallery_ids = torch.as_tensor(gallery_ids, device=scores.device)
    expected = (len(query_ids), len(gallery_ids))
    if tuple(scores.shape) != expected:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}, but query_ids and gallery_ids require {expected} (queries, gallery)"
        )
    if 0 in expected:
        raise ValueError(f"metrics need at least one query and one gallery entry, got {expected} (queries, gallery)")
    if chunk_size is None:
        chunk_size = max(1, SCORES_PER_CHUNK // len(gallery_ids))

    ranks, counts = [], []
    for start in range(0, len(query_ids), chunk_size):
        chunk = scores[start : start + chunk_size]
        is_broken = ~chunk.isfinite().all(dim=1)
        if is_broken.any():
            query = start + int(is_broken.nonzero()[0])
            raise ValueError(
                f"scores of query {query} contain NaN or infinity: a ranking needs finite numbers; look for an overflow"
            )
        order = chunk.argsort(dim=1, descending=True, stable=stable)
        matches = gallery_ids[order] == query_ids[start : start + chunk_size, None]
        ranks.append(matches.nonzero()[:, 1].cpu() + 1)
        counts.append(matches.sum(dim=1).cpu())
    counts = torch.cat(counts)
    if not counts.all():
        query = int((counts == 0).nonzero()[0])
        raise ValueError(
            f"query {query} (identity {query_ids[query].item()}) has no image of its identity in the gallery "
            f"(nor have {int((counts == 0).sum()) - 1} more queries): recall is undefined; remove the query or add its images"
        )
    return torch.cat(ranks), counts


@dataclass(frozen=True)
class QueryMetrics:
    """Results of each query, of which R@K, mAP and mINP are the means.

    Attributes:
        first_rank: rank of the first right gallery entry, from 1, `(queries,)` int64; a hit at K is `first_rank <= K`.
        average_precision: 0 to 1, `(queries,)` float64.
        inverse_negative_penalty: 0 to 1, `(queries,)` float64.
    """

    first_rank: torch.Tensor
    average_precision: torch.Tensor
    inverse_negative_penalty: torch.Tensor

    def mean(self) -> dict[str, float]:
        """Return R@1, R@5, R@10, mAP and mINP in percent."""
        metrics = {f"R{k}": 100 * (self.first_rank <= k).double().mean().item() for k in RECALL_AT}
        metrics["mAP"] = 100 * self.average_precision.mean().item()
        metrics["mINP"] = 100 * self.inverse_negative_penalty.mean().item()
        return metrics


def query_metrics(
    scores: torch.Tensor,
    query_ids: torch.Tensor,
    gallery_ids: torch.Tensor,
    chunk_size: int | None = None,
    stable: bool = True,
) -> QueryMetrics:
    """Compute the results of each query from a score matrix `(queries, gallery)`.

    For a query with n right entries at ranks r_1 < ... < r_n, the average precision is the mean of j / r_j, and the inverse
    negative penalty is n / r_n. For arguments and errors see `match_ranks`.
    """
    ranks, counts = match_ranks(scores, query_ids, gallery_ids, chunk_size, stable)
    ends = counts.cumsum(0)
    starts = ends - counts
    query_of_rank = torch.repeat_interleave(torch.arange(len(counts)), counts)
    position = torch.arange(1, len(ranks) + 1) - starts[query_of_rank]
    precision = position.double() / ranks
    average_precision = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, query_of_rank, precision) / counts
    return QueryMetrics(ranks[starts], average_precision, counts.double() / ranks[ends - 1])


def retrieval_metrics(
    scores: torch.Tensor,
    query_ids: torch.Tensor,
    gallery_ids: torch.Tensor,
    chunk_size: int | None = None,
    stable: bool = True,
) -> dict[str, float]:
    """Compute R@1, R@5, R@10, mAP and mINP in percent from a score matrix `(queries, gallery)`.

    For arguments and errors see `match_ranks`. In a gallery smaller than K every query is a hit.
    """
    return query_metrics(scores, query_ids, gallery_ids, chunk_size, stable).mean()
