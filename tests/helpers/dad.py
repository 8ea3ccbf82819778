"""Runs of the data factory's stages on a tiny base model and a tiny target set, in processes of their own."""

import functools
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from accelerate import PartialState

from data_scripts.dad.config import SECTIONS, FactoryConfig
from data_scripts.dad.tiny.make_diffusion import build
from mra.common.arguments import read_arguments
from tests.helpers.runs import ROOT, TIMEOUT, free_port
from tests.helpers.training import make_pedes


# For the one server that forks for all tests; those of the training scripts come later and ask for the last two.
PRELOADED = [f"data_scripts.dad.{name}" for name in ("train_dad", "generate", "filter", "caption", "ground", "run")]
PRELOADED += ["diffusers", "train_pretrain", "train_finetune"]
SIZE = [32, 16]
CAPTIONS = (
    "A man wearing a black jacket, blue jeans and white shoes. He is carrying a red backpack.",
    "The woman has long brown hair. She is wearing a yellow dress and red boots.",
    "a man in a green shirt and grey trousers with a blue bag",
)
CHANGES = {
    "common": {"image_size": SIZE, "condition": "white", "seed": 3},
    "train": {
        "max_train_steps": 6,
        "per_device_batch_size": 4,
        "learning_rate": "3e-3",
        "num_warmup_steps": 2,
        "num_workers": 0,
        "logging_steps": 2,
        "save_steps": 2,
        "validation_steps": 3,
        "validation_pairs": 6,
        "validation_images": 2,
    },
    "augment": {"prompts_per_caption": 4, "max_captions": 3},
    "generate": {"batch_size": 4, "num_inference_steps": 2, "scheduler": "ddim", "guidance_scale": 2.0},
}


def load_config(path: str | Path | None = None, argv: Sequence[str] = ()) -> FactoryConfig:
    """Read a configuration and options, which win over it, outside a command."""
    return FactoryConfig(*read_arguments(SECTIONS, argv, path))


def write_sources(root: Path) -> None:
    """The base model `base` and the target set `pedes` of 16 training images with speaking captions."""
    build(root / "base", channels=(8, 16))
    (root / "pedes").mkdir()
    for split, rows in (("train", 16), ("validation", 6)):
        table = make_pedes(rows, first_person=1 if split == "train" else 900, seed=len(split))
        captions = [[CAPTIONS[row % 3], CAPTIONS[(row + 1) % 3]] for row in range(rows)]
        table = table.remove_columns("captions").add_column("captions", captions)
        table.to_parquet(root / "pedes" / f"{split}-00000-of-00001.parquet")


def write_config(root: Path, work: str, **changes) -> Path:
    """A configuration with a work folder under `root`; changes by section."""
    sections = {name: values | changes.get(name, {}) for name, values in CHANGES.items()}
    sections |= {name: values for name, values in changes.items() if name not in sections}
    places = {"work_dir": str(root / work), "dataset": str(root / "pedes"), "base_model": str(root / "base")}
    sections["common"] = places | sections["common"]
    path = root / f"{work}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def make_config(root: Path, work: str, **changes) -> FactoryConfig:
    """The same, read."""
    return load_config(str(write_config(root, work, **changes)))


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a stage by their path, without what tells of the run itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "manifest.json"}


def launch_module(module: str, *arguments, num_processes: int = 2) -> subprocess.CompletedProcess:
    """`python -m data_scripts.dad.<module>` through `accelerate launch`, in processes that talk over gloo on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(num_processes), "--main_process_port", str(free_port()), "--mixed_precision"]
    command += ["no", "--dynamo_backend", "no", "-m", f"data_scripts.dad.{module}", *map(str, arguments)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def run_forked(
    module: str, config: Path, *overrides: str, kill: tuple[str, int] | None = None, num_processes: int = 1
) -> list[int]:
    """
    Runs a stage, or several by the module `run`, in forked processes.

    Args:
        module: of the stage.
        config: path of the configuration.
        overrides: of the command line.
        kill: (name of a function of the module, number of its call): SIGKILL arrives when that call begins.
        num_processes: as `accelerate launch --multi_gpu` would start them, on the CPU.

    Returns:
        Exit codes, negative where a signal ended the process.
    """
    return fork(functools.partial(_run, module, ["--config", str(config), *overrides], kill), num_processes)


def fork(work: Callable[[int], None], num_processes: int = 1, killed: bool = False) -> list[int]:
    """
    Does some work in processes forked from one that has imported everything, which saves seconds each.

    Args:
        work: gets the number of its process; it can be pickled.
        num_processes: as `accelerate launch --multi_gpu` would start them, on the CPU.
        killed: the first process kills itself, and the others are to go with it.

    Returns:
        Exit codes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    processes = [
        context.Process(target=_work, args=(work, index, num_processes, port)) for index in range(num_processes)
    ]
    for process in processes:
        process.start()
    if killed:
        processes[0].join(TIMEOUT)
        for process in processes:
            process.kill()
    for process in processes:
        process.join(TIMEOUT)
    return [process.exitcode for process in processes]


def _work(work, index, num_processes, port):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if num_processes > 1:
        ranks = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    work(index)
    assert PartialState(cpu=True).num_processes == num_processes  # a process that works alone would pass for two


def _run(module: str, argv: list[str], kill: tuple[str, int] | None, index: int) -> None:
    stage = importlib.import_module(f"data_scripts.dad.{module}")
    if kill is not None:
        name, number = kill
        original, calls = getattr(stage, name), iter(range(number, -1, -1))

        def call_or_die(*args, **options):
            if next(calls) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(stage, name, call_or_die)
    if module == "run":
        stage.main(argv)
    else:
        stage.run(load_config(argv[1], argv[2:]))
