"""Intervals of the difference between two rankings of the same queries, by a paired bootstrap over people and seeds."""

from dataclasses import dataclass

import numpy as np


# Numbers drawn at a time, so that memory does not grow with people and resamples: 32 MiB.
_DRAWN_AT_ONCE = 2**22


@dataclass(frozen=True)
class PairedDifference:
    """Differences of some metrics between two arms of a comparison.

    Attributes:
        mean: mean over queries and seeds, `(metrics,)`.
        deviation: standard deviation over seeds of the mean over queries, `(metrics,)`; None for one seed.
        low: lower end of the interval, `(metrics,)`.
        high: upper end, `(metrics,)`.
    """

    mean: np.ndarray
    deviation: np.ndarray | None
    low: np.ndarray
    high: np.ndarray


def paired_difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    identities: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two arms on the same queries, and on the same seeds if each arm was trained with several.

    Queries of one person share images and often words, so people are drawn with replacement and each brings all of their
    queries: the cluster bootstrap (Field and Welsh, "Bootstrapping clustered data", JRSS B 69, 2007). Both arms get the same
    people, so what makes a query hard for both cancels. The gallery is fixed.

    Drawing a few seeds with replacement would give too short an interval. The mean over seeds is instead moved by its standard
    error times a draw from Student's t with one degree of freedom less than there are seeds. One seed says nothing about
    others: the interval is then that of these two models.

    Args:
        ours: values of each query, `(metrics, seeds, queries)`.
        theirs: the same of the arm to compare with; both arms list their seeds in the same order.
        identities: person of each query, `(queries,)`.
        confidence: share of the draws between the ends of the interval, which are percentiles.
        resamples: draws.
        seed: seed of the draws, which are the same for all metrics.

    Raises:
        ValueError: if there are fewer than 2 people.
    """
    differences = ours - theirs
    _, person_of_query, num_queries = np.unique(identities, return_inverse=True, return_counts=True)
    people, seeds = len(num_queries), differences.shape[1]
    if people < 2:
        raise ValueError(f"an interval needs queries of at least 2 people, got {people}")
    sums = np.stack([np.bincount(person_of_query, weights=row) for row in differences.mean(axis=1)])
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, size := max(1, _DRAWN_AT_ONCE // people)):
        shape = (min(size, resamples - start),)
        times = generator.multinomial(people, np.full(people, 1 / people), size=shape)  # each person is drawn
        drawn.append(times @ sums.T / (times @ num_queries)[:, None])
    means = np.concatenate(drawn)  # (resamples, metrics)
    deviation = None
    if seeds > 1:
        deviation = differences.mean(axis=2).std(axis=1, ddof=1)
        means += generator.standard_t(seeds - 1, size=means.shape) * deviation / np.sqrt(seeds)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return PairedDifference(differences.mean(axis=(1, 2)), deviation, low, high)
