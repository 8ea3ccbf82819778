"""
Runs a script under FSDP2 on CPU processes.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml tests/helpers/fsdp_on_cpu.py train_finetune.py --config ...

PyTorch shards on the CPU as it does elsewhere, but Accelerate sets FSDP up for accelerators alone: it is told that the
processes have one. `ACCELERATE_TORCH_DEVICE=cpu` keeps the tensors where they can be.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def pretend_to_have_accelerators() -> None:
    """Lets `Accelerator` treat CPU processes that talk through gloo as those of a kind of accelerator."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    pretend_to_have_accelerators()
    runpy.run_path(sys.argv[0], run_name="__main__")
