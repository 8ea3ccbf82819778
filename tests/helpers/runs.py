"""Runs of the training scripts on a few tiny rows, in processes of their own."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from tests.helpers.training import make_pedes, make_sda, make_tokenizer


ROOT = Path(__file__).resolve().parents[2]
FIXED = ("samples_per_second",)  # differs from run to run
DEEPSPEED_ON_CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
FSDP_ON_CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
TIMEOUT = 240

PRETRAIN = {
    "image_size": [64, 32],
    "window_size": [2, 2, 2, 1],
    "drop_path_rate": 0.2,
    "projection_dim": 16,
    "model_config": {
        "max_text_length": 24,
        "vision_config": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        "text_config": {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_fusion_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        },
    },
    "per_device_batch_size": 4,
    "num_workers": 0,
    "learning_rate": "1e-3",
    "num_warmup_steps": 2,
    "num_train_epochs": 2,
    "logging_steps": 2,
    "save_steps": 3,
    "eval_rerank_k": 4,
}
FINETUNE = {
    "label_smoothing": 0.2,
    "eda_operations": ["random_swap", "random_deletion"],
    "schedule": "step",
    "max_grad_norm": 1.0,
    **{name: value for name, value in PRETRAIN.items() if name not in ("model_config", "projection_dim")},
}


def write_sets(root: Path) -> None:
    """The tokenizer, SDA of 32 rows, and a person-retrieval set of 16 images with and without a validation split."""
    make_tokenizer().save_pretrained(root / "tokenizer")
    splits = {
        "sda": {"train": make_sda(32)},
        "pedes": {"train": make_pedes(16), "validation": make_pedes(8, first_person=900, seed=3)},
        "icfg": {"train": make_pedes(20)},
    }
    for name, tables in splits.items():
        (root / name).mkdir()
        for split, table in tables.items():
            table.to_parquet(root / name / f"{split}-00000-of-00001.parquet")


def write_recipe(root: Path, stage: str, **changes) -> Path:
    """A recipe of `pretrain` or `finetune` on the sets under a folder."""
    if stage == "pretrain":
        recipe = PRETRAIN | {"tokenizer_name": str(root / "tokenizer"), "dataset": str(root / "sda")}
        recipe |= {"validation_dataset": str(root / "pedes"), "multiplied_parts": ["cross_attention"]}
    else:
        recipe = FINETUNE | {"model_name_or_path": str(root / "start"), "dataset": str(root / "pedes")}
        recipe |= {"multiplied_parts": ["late_vision_stages", "match_head"]}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=root, delete=False) as file:
        yaml.safe_dump(recipe | changes, file)
    return Path(file.name)


def read_metrics(output_dir: Path) -> list[dict]:
    """Records of metrics.jsonl without those that differ from run to run."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in FIXED} for line in lines]


def launch(
    script: str, *arguments, num_processes: int = 1, config: str = "cpu", env=None, mixed_precision: str = "no"
) -> subprocess.CompletedProcess:
    """Runs a script through `accelerate launch`, one process or several on the CPU."""
    command = [*launch_command(config, num_processes, mixed_precision), str(ROOT / script), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=launch_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        with contextlib.suppress(ProcessLookupError):  # whatever it started ends with it, after a timeout too
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output + errors
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def launch_command(config: str, num_processes: int, mixed_precision: str = "no") -> list[str]:
    """Beginning of an `accelerate launch` under one of the configs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", mixed_precision]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    return [*command, "--num_processes", str(num_processes), "--main_process_port", str(free_port())]


def launch_environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    """Environment of a launch on the CPU; DeepSpeed looks for tools of this environment on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (changes or {})


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_forked(script: str, *arguments, num_processes: int = 1, fault=None) -> list[int]:
    """
    Runs a script's `main` in processes forked from one that has imported everything, which saves seconds each.

    Args:
        script: module name.
        arguments: of the command line.
        num_processes: as `accelerate launch --multi_gpu` would start them.
        fault: (process index, batch number, signal): the process sends itself the signal when that batch begins.

    Returns:
        Exit codes; once a process was killed the others are too.
    """
    processes = start_forked(_run, script, [str(a) for a in arguments], fault, num_processes=num_processes)
    if fault is not None and fault[2] == signal.SIGKILL:
        processes[fault[0]].join(TIMEOUT)
        for process in processes:
            process.kill()
    for process in processes:
        process.join(TIMEOUT)
    return [process.exitcode for process in processes]


def start_forked(function, *arguments, num_processes: int, environment: dict[str, str] | None = None) -> list:
    """Starts a function in processes as torchrun would; the first argument it gets is the process's index."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_pretrain", "train_finetune"])
    ranks = {"ACCELERATE_USE_CPU": "true"} | (environment or {})
    if num_processes > 1:
        ranks |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        context.Process(target=_start, args=(function, arguments, index, ranks)) for index in range(num_processes)
    ]
    for process in processes:
        process.start()
    return processes


def _start(function, arguments, index, environment):
    os.environ.update(environment)
    if "WORLD_SIZE" in environment:
        os.environ.update(RANK=str(index), LOCAL_RANK=str(index))
    multiprocessing.set_start_method("fork", force=True)  # of the data loaders' workers, as in a script
    torch.set_num_threads(1)  # as in `launch`: sums are rounded otherwise on more
    function(index, *arguments)


def _run(index, script, arguments, fault):
    module = __import__(script)
    seed_negatives = module.seed_negatives

    def seed_or_fail(generator, seed, micro_step, process_index):
        if fault is not None and (process_index, micro_step) == fault[:2]:
            os.kill(os.getpid(), fault[2])
        return seed_negatives(generator, seed, micro_step, process_index)

    module.seed_negatives = seed_or_fail
    module.main(arguments)
