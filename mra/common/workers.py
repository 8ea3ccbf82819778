"""Worker processes of data loaders."""

import os


def leave_process_group(worker: int) -> None:
    """Move a worker out of its run's process group, as the `worker_init_fn` of a data loader.

    SIGTERM to the group (from `timeout`, a shell or a scheduler) asks the run to save and stop, which requires live workers.
    Workers exit by themselves when the run has ended.

    Args:
        worker: index of the worker, passed by PyTorch.
    """
    os.setpgid(0, 0)
