"""DeepSpeed checkpoints on another number of processes: ZeRO shards its states for those that saved them."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger

from mra.common.files import unfinished_path


logger = get_logger(__name__)

_STATES = "pytorch_model"  # folder that DeepSpeed writes in `accelerator.save_state`


def is_cut_for_others(accelerator: Accelerator, checkpoint: Path | None) -> bool:
    """Return whether a checkpoint's ZeRO states are sharded for another number of processes."""
    if checkpoint is None or accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    parts = len(list((checkpoint / _STATES).glob("*_optim_states.pt")))
    return parts not in (0, accelerator.num_processes)


@contextlib.contextmanager
def fit_to_processes(accelerator: Accelerator, checkpoint: Path) -> Iterator[Path]:
    """Yield a folder that `accelerator.load_state` can load on this number of processes; every process must call this.

    States sharded for another number are merged by DeepSpeed's converter into a temporary "universal checkpoint", which is
    removed afterwards. The run's DeepSpeed must be configured for it (`configure_deepspeed`).

    Raises:
        RuntimeError: if the converter fails; the message holds its output.
    """
    if not is_cut_for_others(accelerator, checkpoint):
        yield checkpoint
        return
    folder = unfinished_path(
        checkpoint, "recut"
    )  # that of an interrupted run is cleaned up like any unfinished folder
    if accelerator.is_main_process:
        logger.info(f"merging the ZeRO states of {checkpoint}, saved by another number of processes")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(_STATES), copy_function=_link)
        _merge(checkpoint / _STATES, folder / _STATES)
    accelerator.wait_for_everyone()
    yield folder
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)


def _merge(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    run = subprocess.run(command, capture_output=True, text=True, env=alone)
    if run.returncode:
        raise RuntimeError(f"DeepSpeed could not merge the states in {source}:\n{run.stdout}{run.stderr}")


def _link(source: str, target: str) -> None:
    os.symlink(os.path.abspath(source), target)
