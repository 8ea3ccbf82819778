"""Fixed batches distributed over processes, so that results do not depend on the number of processes."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shard:
    """Share of one process: the batches with `batch % world_size == rank`."""

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
    """Check that all launched processes form one group.

    Args:
        num_processes: number of processes in this process's group.

    Raises:
        ValueError: if each would run alone, as happens without a GPU unless the launcher selects the CPU.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != num_processes:
        raise ValueError(
            f"`WORLD_SIZE` is {started} but the process group has {num_processes}, so each process would do all the work: "
            "start the script with `accelerate launch --config_file accelerate_configs/cpu.yaml`, or with the file that fits "
            "your GPUs"
        )


def cut_batches(num_rows: int, batch_size: int) -> list[range]:
    """Cut 0..num_rows-1 into consecutive batches.

    Raises:
        ValueError: if batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    return [range(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]


def gather_in_order(owned: list[Any], num_batches: int, shard: Shard) -> Iterator[Any]:
    """Yield the results of all batches in order on every process.

    Args:
        owned: results of this process's batches, in order (CPU tensors, or containers of them).
        num_batches: batches over all processes.
        shard: the share of this process. Every process must call this if there are several.
    """
    if shard.world_size == 1:
        yield from owned
        return
    # One batch per process at a time keeps the pickled copies small for any gallery.
    for first in range(0, num_batches, shard.world_size):
        own = first // shard.world_size
        received = [None] * shard.world_size
        dist.all_gather_object(received, owned[own] if own < len(owned) else None)
        yield from received[: num_batches - first]


def without_lone_row(function: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> torch.Tensor:
    """Apply a batch function to a batch; a single row is duplicated first and the copy dropped afterwards.

    Products with one row use other CPU kernels, which round differently depending on memory alignment: the result of a single
    row in a last batch would then depend on the number of processes.
    """
    lone = all(len(rows) == 1 for rows in inputs.values())
    if lone:
        inputs = {name: rows.repeat(2, *[1] * (rows.ndim - 1)) for name, rows in inputs.items()}
    return function(**inputs)[: 1 if lone else None]
