"""Worker processes of a data loader."""

import os


def leave_process_group(worker: int) -> None:
    """Move a worker out of its run's process group, as the `worker_init_fn` of a data loader.

    SIGTERM to the group (`timeout`, a shell, many schedulers) asks the run to save and stop, which it can only do while
    its workers live. A worker ends by itself when the run has ended.

    Args:
        worker: number of the worker, which PyTorch passes.
    """
    os.setpgid(0, 0)
