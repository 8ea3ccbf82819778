"""Retrieval metrics (R@1, R@5, R@10, mAP, mINP) as a module of the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Recall at 1, 5 and 10, mean average precision and mean inverse negative penalty of a retrieval system, in percent.
The input is the ranks of each query's right gallery entries instead of rows of scores: the metrics depend only on them, and
they are a few integers per query instead of one float per gallery entry.
"""

_KWARGS_DESCRIPTION = """
Args:
    ranks (`list[list[int]]`): for each query, the positions of all its right gallery entries in the gallery sorted by
        descending score; 1 is the first position. `mra.retrieval.metrics.match_ranks` computes them.

Returns:
    `dict` with, in percent:
        R1, R5, R10: share of queries with a right entry among the first 1, 5, 10.
        mAP: mean over queries of the average precision, the mean of j / (rank of the j-th right entry).
        mINP: mean over queries of (number of right entries) / (rank of the last one).

Raises:
    ValueError: if a query has no rank, a rank below 1 or the same rank twice.

Examples:
    >>> retrieval = evaluate.load("metrics/retrieval")
    >>> retrieval.compute(ranks=[[1, 2], [3]])["R1"]
    50.0
"""

_CITATION = ""


class Retrieval(evaluate.Metric):
    """Retrieval metrics from the ranks of the right entries."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"ranks": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, ranks: Any) -> dict[str, float]:
        average_precision, inverse_negative_penalty, first = [], [], []
        for query, query_ranks in enumerate(ranks):
            ordered = np.unique(np.asarray(query_ranks, dtype=np.int64))
            if len(ordered) == 0 or len(ordered) != len(query_ranks) or ordered[0] < 1:
                raise ValueError(
                    f"query {query}: ranks must be one or more different positions counted from 1, got {list(query_ranks)}"
                )
            average_precision.append(np.mean(np.arange(1, len(ordered) + 1) / ordered))
            inverse_negative_penalty.append(len(ordered) / ordered[-1])
            first.append(ordered[0])
        metrics = {f"R{k}": 100 * float(np.mean(np.asarray(first) <= k)) for k in (1, 5, 10)}
        metrics["mAP"] = 100 * float(np.mean(average_precision))
        metrics["mINP"] = 100 * float(np.mean(inverse_negative_penalty))
        return metrics
