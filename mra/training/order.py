"""Order of the training rows, a function of seed and epoch that can be entered at any position."""

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
    """Sampler of the keys (epoch, row) of one epoch, from any position.

    The order depends only on seed and epoch. Every process iterates over the whole order; accelerate's `BatchSamplerShard`
    distributes it.

    Args:
        num_rows: rows of the training set.
        seed: seed of the order.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(f"`num_rows` must be 1 or more, got {num_rows}: the training set is empty")
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Set epoch and position of the next iteration.

        Args:
            epoch: number of the epoch, from 0.
            start: rows of the epoch to skip, counted over all processes.

        Raises:
            ValueError: if either is out of range.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be 0 or more, got {epoch}")
        if not 0 <= start <= self.num_rows:
            raise ValueError(
                f"`start` must lie in 0..{self.num_rows} (the rows of an epoch), got {start}: "
                "the position belongs to another training set"
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
    """Sampler of a shuffled order that can be read from files sequentially.

    An epoch shuffles the row groups of the files and cuts their concatenated rows into lanes of equal length. Within a lane,
    runs of `buffer // lanes` rows are shuffled. Batches alternate: batch b comes from lane b % lanes. A reader of every n-th
    batch, with n a divisor of the number of lanes, therefore reads row groups that no other reader needs (except at the ends
    of lanes). The remaining rows of all lanes, too few for a batch each, come last, lane by lane.

    Args:
        row_groups: row group of each row, `(rows,)`.
        seed: seed of the order.
        batch_size: rows in a batch of one process.
        lanes: parts of an epoch that are read in parallel.
        buffer: size of the shuffle window in rows, over all lanes; about as many are held in memory.

    Raises:
        ValueError: if there are no rows or a number is below 1.
    """

    def __init__(self, row_groups: np.ndarray, seed: int, batch_size: int, lanes: int, buffer: int) -> None:
        super().__init__(len(row_groups), seed)
        for name, value in (("batch_size", batch_size), ("lanes", lanes), ("buffer", buffer)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}")
        self.row_groups = row_groups
        self.batch_size = batch_size
        self.lanes = lanes
        self.run_length = max(buffer // lanes, 1)

    def order(self, epoch: int) -> np.ndarray:
        """Return all rows in the order of an epoch, `(num_rows,)`."""
        generator = self._generator(epoch)
        ranks = generator.permutation(self.row_groups.max() + 1)
        rows = np.argsort(ranks[self.row_groups], kind="stable")
        # Lane lengths differ by at most one: position i is in lane i * lanes // rows.
        place = np.arange(self.num_rows)
        lane = place * self.lanes // self.num_rows
        within = place - np.searchsorted(lane, np.arange(self.lanes))[lane]
        rows = rows[np.lexsort((generator.random(self.num_rows), within // self.run_length, lane))]
        # Full batches alternate between lanes, then the rest follows lane by lane.
        whole = within < (np.bincount(lane, minlength=self.lanes) // self.batch_size * self.batch_size)[lane]
        return rows[np.lexsort((within, lane, np.where(whole, within // self.batch_size, self.num_rows)))]


def make_sampler(dataset: "TrainingDataset", seed: int, batch_size: int) -> KeyedSampler:
    """Build the sampler of a training set: any permutation, or a sequential one for a streamed set.

    Args:
        dataset: a [`~mra.training.data.TrainingDataset`].
        seed: seed of the order.
        batch_size: pairs in a batch of one process.
    """
    table = dataset.dataset
    if not isinstance(table, StreamedTable):
        return KeyedSampler(len(dataset), seed)
    groups = table.row_groups[dataset.image_rows]
    return LaneSampler(groups, seed, batch_size, table.streaming.lanes, table.streaming.buffer)
