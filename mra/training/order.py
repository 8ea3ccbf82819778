"""Order of the training rows: a function of seed and epoch alone, which any process can enter at any place."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from mra.common.streaming import StreamedTable


if TYPE_CHECKING:  # it imports this module
    from mra.training.data import TrainingDataset


Key = tuple[int, int]


def key_to_seed(purpose: str, *key: int) -> int:
    """Hash a purpose and integers to 63 bits, the same on every machine and Python."""
    text = ":".join([purpose, *(str(int(part)) for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class KeyedSampler(torch.utils.data.Sampler):
    """Yields the keys (epoch, row) of one epoch, from any position on.

    The order is a function of seed and epoch alone. Every process iterates all of it; sharing it out is the work of
    accelerate's `BatchSamplerShard`.

    Args:
        num_rows: rows of the training set.
        seed: of the order.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(f"`num_rows` must be 1 or more, got {num_rows}: the training set is empty.")
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: number of the epoch, from 0.
            start: rows of the epoch to leave out, counted over all processes.

        Raises:
            ValueError: if either is out of range.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be 0 or more, got {epoch}.")
        if not 0 <= start <= self.num_rows:
            raise ValueError(
                f"`start` must lie in 0..{self.num_rows} (the rows of an epoch), got {start}: "
                "the position was saved with another training set."
            )
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.num_rows - self.start

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        for row in self.order(epoch)[self.start :]:
            yield epoch, int(row)

    def order(self, epoch: int) -> np.ndarray:
        """Return all rows in the order of an epoch, `(num_rows,)`."""
        return self._generator(epoch).permutation(self.num_rows)

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng(key_to_seed("order", self.seed, epoch))


class LaneSampler(KeyedSampler):
    """Orders the rows so that they can be read from files piece by piece, yet come shuffled.

    An epoch puts the row groups of the files into random order and cuts their rows, one after the other, into lanes of
    equal length. Within a lane, runs of `buffer // lanes` rows are shuffled. Batches take turns: batch b comes from lane
    b % lanes. So a reader that is given every n-th batch, n a divisor of the lanes, reads row groups that no other reader
    needs (but for those at the ends of lanes). What is left of the lanes, too little for a batch, comes last, lane after
    lane.

    Args:
        row_groups: `(rows,)`, the row group that holds each row.
        seed: of the order.
        batch_size: rows of a batch of one process.
        lanes: parts of an epoch that are read side by side.
        buffer: rows among which a row is shuffled, over all lanes; about as many are held in memory.

    Raises:
        ValueError: if there are no rows or a number is below 1.
    """

    def __init__(self, row_groups: np.ndarray, seed: int, batch_size: int, lanes: int, buffer: int) -> None:
        super().__init__(len(row_groups), seed)
        for name, value in (("batch_size", batch_size), ("lanes", lanes), ("buffer", buffer)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}.")
        self.row_groups = row_groups
        self.batch_size = batch_size
        self.lanes = lanes
        self.run_length = max(buffer // lanes, 1)

    def order(self, epoch: int) -> np.ndarray:
        """Return all rows in the order of an epoch, `(num_rows,)`."""
        generator = self._generator(epoch)
        ranks = generator.permutation(self.row_groups.max() + 1)
        rows = np.argsort(ranks[self.row_groups], kind="stable")
        # Lanes whose lengths differ by one at most: place i stands in lane i * lanes // rows.
        place = np.arange(self.num_rows)
        lane = place * self.lanes // self.num_rows
        within = place - np.searchsorted(lane, np.arange(self.lanes))[lane]
        rows = rows[np.lexsort((generator.random(self.num_rows), within // self.run_length, lane))]
        # Whole batches in turn, then the rest lane after lane.
        whole = within < (np.bincount(lane, minlength=self.lanes) // self.batch_size * self.batch_size)[lane]
        return rows[np.lexsort((within, lane, np.where(whole, within // self.batch_size, self.num_rows)))]


def make_sampler(dataset: "TrainingDataset", seed: int, batch_size: int) -> KeyedSampler:
    """Return the order of a training set: any permutation, or one that a streamed set can be read in from pieces of files.

    Args:
        dataset: a [`~mra.training.data.TrainingDataset`].
        seed: of the order.
        batch_size: pairs of a batch of one process.
    """
    table = dataset.dataset
    if not isinstance(table, StreamedTable):
        return KeyedSampler(len(dataset), seed)
    groups = table.row_groups[dataset.image_rows]
    return LaneSampler(groups, seed, batch_size, table.streaming.lanes, table.streaming.buffer)
