"""Worker processes of data loaders."""

import os
from typing import TypeVar

import torch
from torch.utils.data import get_worker_info


Batch = TypeVar("Batch")


def share_batch(batch: Batch) -> Batch:
    """Move the tensors of a batch, a tensor or a dict, to shared memory in a worker, at the end of a `collate_fn`.

    PyTorch would move them in a thread of the worker, where the error of a full /dev/shm is lost and the run waits forever.
    """
    if get_worker_info() is not None:
        for tensor in batch.values() if isinstance(batch, dict) else [batch]:
            if isinstance(tensor, torch.Tensor):
                tensor.share_memory_()
    return batch


def leave_process_group(worker: int) -> None:
    """Move a worker out of its run's process group, as the `worker_init_fn` of a data loader.

    SIGTERM to the group (from `timeout`, a shell or a scheduler) asks the run to save and stop, which requires live workers.
    Workers exit by themselves when the run has ended.

    Args:
        worker: index of the worker, passed by PyTorch.
    """
    os.setpgid(0, 0)
