"""Order of the training rows: seeds, any permutation, and lanes that follow the row groups of files."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mra.common.streaming import StreamedTable, Streaming
from mra.training.order import KeyedSampler, LaneSampler, key_to_seed, make_sampler


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
    assert list(KeyedSampler(50, seed=2)) != first and {epoch for epoch, _ in first} == {0}
    sampler.set_position(0)
    assert list(sampler) == first  # an epoch starts at its first row


def test_a_single_row_has_one_order():
    for sampler in (KeyedSampler(1, seed=1), LaneSampler(np.array([0]), 1, 1, 1, 1)):
        assert list(sampler) == [(0, 0)]


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


def plain_lanes(sampler, epoch, buffer):
    """Lanes, runs and turns as the class describes them, in loops."""
    generator = np.random.default_rng(key_to_seed("order", sampler.seed, epoch))
    ranks = generator.permutation(sampler.row_groups.max() + 1)
    count, lanes = sampler.num_rows, [[] for _ in range(sampler.lanes)]
    run_length = max(buffer // sampler.lanes, 1)
    rows = sorted(range(count), key=lambda row: (ranks[sampler.row_groups[row]], row))
    for place, (draw, row) in enumerate(zip(generator.random(count), rows, strict=True)):
        lanes[place * sampler.lanes // count].append((draw, row))
    turns, rest = [], []
    for number, lane in enumerate(lanes):
        runs = [lane[start : start + run_length] for start in range(0, len(lane), run_length)]
        shuffled = [row for run in runs for _, row in sorted(run)]
        whole = len(lane) // sampler.batch_size * sampler.batch_size
        turns += [
            (start, number, shuffled[start : start + sampler.batch_size])
            for start in range(0, whole, sampler.batch_size)
        ]
        rest += shuffled[whole:]
    return [row for *_, batch in sorted(turns) for row in batch] + rest


@given(
    groups=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    lanes=st.integers(1, 9),
    batch_size=st.integers(1, 9),
    buffer=st.integers(1, 50),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 99),
    data=st.data(),
)
def test_lanes_are_those_of_the_plain_order(groups, lanes, batch_size, buffer, seed, epoch, data):
    """Every row once, in the order of the plain loops, wherever it is entered."""
    sampler = LaneSampler(np.repeat(np.arange(len(groups)), groups), seed, batch_size, lanes, buffer)
    order = sampler.order(epoch).tolist()
    assert order == plain_lanes(sampler, epoch, buffer) and sorted(order) == list(range(sum(groups)))
    start = data.draw(st.integers(0, sum(groups)), label="start")
    sampler.set_position(epoch, start)
    assert list(sampler) == [(epoch, row) for row in order[start:]] and len(sampler) == sum(groups) - start


@pytest.mark.parametrize("name", ["batch_size", "lanes", "buffer"])
def test_lane_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more"):
        lane_sampler(**{name: 0})


@pytest.mark.parametrize("rows", [list(range(12)), [11, 3, 3, 4]])
def test_samplers_of_tables_and_streams(tmp_path, rows):
    """A stream is read row group by row group, also where the training set draws some of its rows or one twice."""
    table = datasets.Dataset.from_dict({"image_id": list(range(12))})
    table.to_parquet(tmp_path / "train.parquet", batch_size=4)
    streamed = StreamedTable([str(tmp_path / "train.parquet")], Streaming(lanes=2, buffer=6, num_readers=1))

    class Drawn(SimpleNamespace):
        def __len__(self):
            return len(self.image_rows)

    plain = make_sampler(Drawn(dataset=table, image_rows=np.array(rows)), seed=7, batch_size=2)
    lanes = make_sampler(Drawn(dataset=streamed, image_rows=np.array(rows)), seed=7, batch_size=2)
    assert list(plain) == list(KeyedSampler(len(rows), seed=7))
    expected = LaneSampler(np.array(rows) // 4, seed=7, batch_size=2, lanes=2, buffer=6)
    assert type(plain) is KeyedSampler and list(lanes) == list(expected)
