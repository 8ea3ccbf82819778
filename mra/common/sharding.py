"""Work cut into fixed batches and dealt to processes, so that the number of processes changes no number."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shard:
    """The share of one process: of batches 0, 1, 2, ... it owns those with `batch % world_size == rank`."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> "Shard":
        """Return the share of this process in the initialised process group, or all the work without a group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Return whether this process is the first."""
        return self.rank == 0

    def own(self, batches: list) -> list:
        """Return the batches of a list that this process owns, in order."""
        return batches[self.rank :: self.world_size]


def check_processes(num_processes: int) -> None:
    """Check that the processes that a launcher started form one group.

    Args:
        num_processes: in this process's group.

    Raises:
        ValueError: if each would run alone, as processes without a GPU do unless the launcher asks for the CPU.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != num_processes:
        raise ValueError(
            f"`WORLD_SIZE` is {started} but the process group has {num_processes}, so each process would do all the work: "
            "start the script with `accelerate launch --config_file accelerate_configs/cpu.yaml`, or with the file that fits "
            "your GPUs"
        )


def cut_batches(num_rows: int, batch_size: int) -> list[range]:
    """Cut 0..num_rows-1 into consecutive batches; the cut depends on nothing else.

    Raises:
        ValueError: if batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    return [range(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]


def gather_in_order(owned: list[Any], num_batches: int, shard: Shard) -> Iterator[Any]:
    """Yield the results of all batches in order on every process, from those that each process computed for its own.

    Args:
        owned: results of this process's own batches, in order (CPU tensors, or containers of them).
        num_batches: batches over all processes.
        shard: the share of this process. Where its `world_size` is above 1, every process must call this.
    """
    if shard.world_size == 1:
        yield from owned
        return
    # One batch a process at a time: the pickled copies stay small, however large the gallery.
    for first in range(0, num_batches, shard.world_size):
        own = first // shard.world_size
        received = [None] * shard.world_size
        dist.all_gather_object(received, owned[own] if own < len(owned) else None)
        yield from received[: num_batches - first]


def without_lone_row(function: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> torch.Tensor:
    """Apply a function of batches to a batch, doubling a single row and dropping the double afterwards.

    Products with one row run through CPU kernels of their own, whose last bit changes with where the memory lies: the row
    left over in a last batch would then depend on the number of processes.
    """
    lone = all(len(rows) == 1 for rows in inputs.values())
    if lone:
        inputs = {name: rows.repeat(2, *[1] * (rows.ndim - 1)) for name, rows in inputs.items()}
    return function(**inputs)[: 1 if lone else None]
