"""mra/retrieval/paired_bootstrap.py against scipy, the analytic standard error, and simulations."""

import numpy as np
import pytest
import scipy.stats

from mra.retrieval.paired_bootstrap import paired_difference


def draw(generator, people=60, seeds=1, of_people=6.0, of_seeds=0.0, of_queries=6.0):
    """Differences (1, seeds, queries) without a true one, and the person of each query, 2 to 8 queries a person."""
    identities = np.repeat(np.arange(people), generator.integers(2, 9, people))
    values = generator.normal(0, of_people, people)[identities] + generator.normal(0, of_seeds, (seeds, 1))
    return (values + generator.normal(0, of_queries, (seeds, len(identities))))[None], identities


def test_interval_equals_that_of_scipy_and_of_the_standard_error():
    values, identities = draw(np.random.default_rng(3), people=150)
    theirs = np.random.default_rng(4).normal(size=values.shape)
    found = paired_difference(values + 1 + theirs, theirs, 7 * identities - 20, resamples=20_000)
    assert found.deviation is None and found.mean == pytest.approx(1 + values.mean())
    counts = np.bincount(identities).astype(float)
    sums = np.bincount(identities, weights=1 + values[0, 0])
    scipys = scipy.stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    error = np.sqrt(((sums - found.mean * counts) ** 2).sum()) / counts.sum()  # of a ratio of two means
    assert (found.high - found.low)[0] == pytest.approx(2 * 1.96 * error, rel=0.04)
    ends = scipys.confidence_interval
    assert (found.low[0], found.high[0]) == pytest.approx((ends.low, ends.high), abs=0.05 * (ends.high - ends.low))


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "least", "most"), [(1, 0.0, 0.9, 0.98), (3, 1.5, 0.92, 1), (5, 3.0, 0.92, 1)]
)
def test_intervals_hold_the_true_difference_as_often_as_they_say(seeds, of_seeds, least, most):
    """No difference between the arms, but between people (and seeds); 200 draws have a standard error of 1.5%."""
    generator = np.random.default_rng(0)
    held = without_people = 0
    for _ in range(200):
        values, identities = draw(generator, seeds=seeds, of_seeds=of_seeds)
        zeros = np.zeros_like(values)
        found = paired_difference(values, zeros, identities, resamples=200)
        held += int(found.low[0] <= 0 <= found.high[0])
        error = values.mean(axis=1).std() / np.sqrt(len(identities))  # with queries as if they were independent
        without_people += int(abs(values.mean()) < 1.96 * error)
    assert least <= held / 200 <= most
    assert without_people / 200 < 0.85


@pytest.mark.parametrize("seeds", [3, 6])
def test_interval_of_seeds_alone_is_that_of_student(seeds):
    """Where all queries of a seed differ equally, only the seeds are uncertain."""
    of_seeds = np.random.default_rng(2).normal(1, 2, seeds)
    ours = np.repeat(of_seeds[None, :, None], 8, axis=2)
    found = paired_difference(ours, np.zeros_like(ours), np.arange(8), resamples=100_000)
    half = scipy.stats.t.ppf(0.975, seeds - 1) * of_seeds.std(ddof=1) / np.sqrt(seeds)
    expected = of_seeds.mean() - half, of_seeds.mean() + half
    assert (found.low[0], found.high[0]) == pytest.approx(expected, abs=0.05 * half)


def test_metrics_and_seeds_of_a_hand_computed_case():
    """Two metrics, two seeds, three people; the second metric is the same in both arms."""
    identities = np.array([5, 5, 6, 9])
    ours = np.array([[[1, 0, 1, 1], [1, 1, 1, 1]], [[2, 2, 2, 2], [3, 3, 3, 3]]], dtype=float)
    theirs = np.array([[[0, 0, 1, 0], [0, 0, 0, 0]], [[2, 2, 2, 2], [3, 3, 3, 3]]], dtype=float)
    found = paired_difference(ours, theirs, identities, resamples=1000)
    assert found.mean == pytest.approx([0.75, 0])
    assert found.deviation == pytest.approx([np.std([0.5, 1], ddof=1), 0])
    assert found.low[0] < 0.75 < found.high[0] and found.low[1] == found.high[1] == 0


def test_seed_and_batches(monkeypatch):
    values, identities = draw(np.random.default_rng(1), seeds=2)
    compute = lambda **options: paired_difference(values, -values, identities, resamples=500, **options)  # noqa: E731
    first, again, other = compute(), compute(), compute(seed=1)
    assert (first.low, first.high) == (again.low, again.high) and first.low != other.low
    assert (compute(confidence=0.5).high - compute(confidence=0.5).low) < (first.high - first.low)
    monkeypatch.setattr("mra.retrieval.paired_bootstrap._DRAWN_AT_ONCE", 7 * 60)
    assert compute().low == pytest.approx(first.low, rel=0.2)


def test_one_person_has_no_interval():
    with pytest.raises(ValueError, match="queries of at least 2 people, got 1"):
        paired_difference(np.ones((1, 1, 3)), np.ones((1, 1, 3)), np.zeros(3))
