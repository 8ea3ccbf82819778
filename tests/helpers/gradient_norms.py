"""
Run a training script and write down the norm of the gradient of every optimizer step, one a line.

    accelerate launch --config_file ... tests/helpers/gradient_norms.py norms.txt train_finetune.py --config ...

The norm is what `accelerator.clip_grad_norm_` returns, so the recipe must set `max_grad_norm`.
"""

import runpy
import sys
from pathlib import Path

from accelerate import Accelerator


def record_norms(path: str | Path) -> None:
    """Let the main process append to a file what clipping measures."""
    clip = Accelerator.clip_grad_norm_

    def clip_and_record(accelerator, *arguments, **options):
        norm = clip(accelerator, *arguments, **options)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if accelerator.is_main_process:
            with Path(path).open("a") as file:
                file.write(f"{value!r}\n")
        return norm

    Accelerator.clip_grad_norm_ = clip_and_record


def run_script(index: int, path: str, script: str, arguments: list[str]) -> None:
    """Run a script's `main` in a process that `start_forked` started."""
    record_norms(path)
    __import__(script).main(arguments)


if __name__ == "__main__":
    path, sys.argv = sys.argv[1], sys.argv[2:]
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    if "fsdp" in path:
        from tests.helpers.fsdp_on_cpu import pretend_to_have_accelerators

        pretend_to_have_accelerators()
    record_norms(path)
    runpy.run_path(sys.argv[0], run_name="__main__")
