"""Order of the training rows: seeds, any permutation, and lanes that follow the row groups of files."""

import numpy as np
import pytest

from mra.training.order import KeyedSampler, LaneSampler, key_to_seed


def test_seeds_are_stable():
    """Fixed values: a checkpoint must find the same order on another machine or Python."""
    assert key_to_seed("image", 1, 2, 3) == key_to_seed("image", np.int64(1), 2, 3) == 5150067752631899034
    assert key_to_seed("image", 1, 2, 3) != key_to_seed("image", 12, 3)


def test_sampler_order():
    sampler = KeyedSampler(50, seed=1)
    first = list(sampler)
    assert first == list(sampler) and sorted(row for _, row in first) == list(range(50)) and len(sampler) == 50
    sampler.set_position(1, 0)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1} and [row for _, row in second] != [row for _, row in first]
    sampler.set_position(1, 17)
    assert list(sampler) == second[17:] and len(sampler) == 33
    assert list(KeyedSampler(50, seed=2)) != first


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 51)])
def test_sampler_position_out_of_range(epoch, start):
    with pytest.raises(ValueError, match="must"):
        KeyedSampler(50, seed=1).set_position(epoch, start)


@pytest.mark.parametrize("left", [0, 1])
def test_sampler_starts_at_the_end_and_at_the_last_row(left):
    sampler = KeyedSampler(50, seed=1)
    every = list(sampler)
    sampler.set_position(0, 50 - left)
    assert len(sampler) == left
    assert list(sampler) == every[50 - left :]


def test_sampler_without_rows():
    with pytest.raises(ValueError, match="training set is empty"):
        KeyedSampler(0, seed=1)


# Lanes


def lane_sampler(row_groups=None, **changes):
    row_groups = np.repeat(np.arange(30), 10) if row_groups is None else row_groups
    return LaneSampler(row_groups, **{"seed": 1, "batch_size": 5, "lanes": 4, "buffer": 40, **changes})


@pytest.mark.parametrize("rows", [1, 3, 7, 60, 299, 300])
@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_lanes_hold_every_row_once(rows, lanes):
    sampler = lane_sampler(np.arange(rows) // 10, lanes=lanes)
    first, second = sampler.order(0), sampler.order(1)
    assert sorted(first) == sorted(second) == list(range(rows))
    assert rows < 60 or first.tolist() != second.tolist()
    sampler.set_position(1, rows // 2)
    assert [row for _, row in sampler] == second[rows // 2 :].tolist()


def test_a_reader_needs_few_row_groups():
    """Each of four readers meets a quarter of the row groups, the two at the ends of its lane cut; in any epoch."""
    for epoch in range(5):
        whole = lane_sampler().order(epoch)[: 4 * 5 * 15].reshape(15, 4, 5)
        for reader in range(4):
            groups = whole[:, reader].ravel() // 10
            assert len(set(groups)) <= 30 / 4 + 2
            # A run of ten rows lies in two row groups at most; runs follow each other.
            for run in groups[:70].reshape(7, 10):
                assert len(set(run)) <= 2


def test_lanes_shuffle_groups_and_rows():
    order = lane_sampler(buffer=160).order(0)
    groups = order // 10
    assert len({tuple(lane_sampler(buffer=160, seed=seed).order(0)[:5]) for seed in range(10)}) == 10
    assert len(set(groups[:20])) > 4  # each batch from another lane
    assert np.abs(np.corrcoef(order, np.arange(300))[0, 1]) < 0.3


def plain_lanes(sampler, epoch):
    """Lanes, runs and turns as the class describes them, in loops."""
    generator = np.random.default_rng(key_to_seed("order", sampler.seed, epoch))
    ranks = generator.permutation(sampler.row_groups.max() + 1)
    count, lanes = sampler.num_rows, [[] for _ in range(sampler.lanes)]
    rows = sorted(range(count), key=lambda row: (ranks[sampler.row_groups[row]], row))
    for place, (draw, row) in enumerate(zip(generator.random(count), rows, strict=True)):
        lanes[place * sampler.lanes // count].append((draw, row))
    turns, rest = [], []
    for number, lane in enumerate(lanes):
        runs = [lane[start : start + sampler.run_length] for start in range(0, len(lane), sampler.run_length)]
        shuffled = [row for run in runs for _, row in sorted(run)]
        whole = len(lane) // sampler.batch_size * sampler.batch_size
        turns += [
            (start, number, shuffled[start : start + sampler.batch_size])
            for start in range(0, whole, sampler.batch_size)
        ]
        rest += shuffled[whole:]
    return [row for *_, batch in sorted(turns) for row in batch] + rest


@pytest.mark.parametrize("changes", [{}, {"lanes": 7}, {"batch_size": 9, "buffer": 100}, {"lanes": 1, "buffer": 1}])
def test_lanes_are_those_of_the_plain_order(changes):
    sampler = lane_sampler(np.arange(309) // 10, **changes)
    assert sampler.order(2).tolist() == plain_lanes(sampler, 2)


@pytest.mark.parametrize("name", ["batch_size", "lanes", "buffer"])
def test_lane_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more"):
        lane_sampler(**{name: 0})
