"""
Every config of `accelerate_configs/` that a CPU can run, through `accelerate launch`: trained, resumed, exported.

The model has no dropout, no BatchNorm, negatives from all processes and as many masked tokens in every caption, so that how a
batch is cut changes nothing: one process with batch 8 must go on where two with batch 4 stopped.
"""

import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from mra.training.checkpointing import list_checkpoints
from tests.helpers.runs import (
    DEEPSPEED_ON_CPU,
    FSDP_ON_CPU,
    PRETRAIN,
    ROOT,
    TIMEOUT,
    launch,
    launch_command,
    launch_environment,
    read_metrics,
    run_forked,
    write_recipe,
    write_sets,
)


CONFIGS = {  # what the banner must say, the environment, the script that runs the script
    "ddp_4x3090": ("MULTI_CPU, cpu:0", {}, ()),
    "multi_node_2x4": ("MULTI_CPU, cpu:0", {}, ()),
    "zero2_4xa100": ("DEEPSPEED, cpu", DEEPSPEED_ON_CPU, ()),
    "zero3_offload": ("DEEPSPEED, cpu", DEEPSPEED_ON_CPU, ()),
    "fsdp2": ("FSDP, cpu", FSDP_ON_CPU, ("tests/helpers/fsdp_on_cpu.py",)),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# The learning rate stays small: rounding, which differs between the ways, must not grow.
RECIPE = {
    "drop_path_rate": 0.0,
    "projection_type": "linear",
    "projection_dim": 16,
    "itm_negatives": "all",
    "mlm_mask_padding": True,
    "learning_rate": "1e-4",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sets, recipes of both stages, and in `start` what one step of pretraining gave."""
    root = tmp_path_factory.mktemp("configs")
    write_sets(root)
    architecture = PRETRAIN["model_config"]
    architecture = architecture | {"text_config": architecture["text_config"] | NO_DROPOUT}
    recipe = write_recipe(root, "pretrain", validation_dataset=None, model_config=architecture, **RECIPE)
    recipe.rename(root / "pretrain.yaml")
    write_recipe(root, "finetune", **RECIPE).rename(root / "finetune.yaml")
    arguments = ["--config", root / "pretrain.yaml", "--max_train_steps", 1, "--output_dir", root / "seed"]
    assert run_forked("train_pretrain", *arguments) == [0]
    shutil.copytree(root / "seed" / "final", root / "start")
    return root


@pytest.fixture(scope="module")
def one_process(root):
    """Records and weights of one process with batch 8."""
    arguments = ["--config", root / "finetune.yaml", "--per_device_batch_size", 8, "--output_dir", root / "one"]
    assert run_forked("train_finetune", *arguments) == [0]
    return read_metrics(root / "one"), load_file(root / "one" / "final" / "model.safetensors")


def train(config: str, stage: str, root, output_dir, *arguments, num_processes: int = 2, precision="no") -> str:
    """Runs a stage under a config and returns what it printed."""
    kind, environment, wrapper = CONFIGS[config]
    script = [*wrapper, f"train_{stage}.py"]
    arguments = [*script[1:], "--config", root / f"{stage}.yaml", "--output_dir", output_dir, *arguments]
    if config == "multi_node_2x4" and num_processes == 2:
        shown = launch_two_machines(script[0], arguments)
    else:
        options = {"num_processes": num_processes, "config": config, "env": environment, "mixed_precision": precision}
        if num_processes == 1 and kind.startswith("MULTI"):
            kind, options = "NO, cpu", {}
        shown = launch(script[0], *arguments, **options).stderr
    assert f"{num_processes} ({kind})" in shown
    return shown


def launch_two_machines(script: str, arguments: list) -> str:
    """The config of two machines, both of them this one, with a process each; returns what the first printed."""
    command = launch_command("multi_node_2x4", 2)
    runs = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), str(ROOT / script), *map(str, arguments)],
            cwd=ROOT,
            env=launch_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    shown = [run.communicate(timeout=TIMEOUT)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], shown
    return shown[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_config_trains_resumes_and_exports(root, one_process, config):
    if CONFIGS[config][1] is DEEPSPEED_ON_CPU:
        pytest.importorskip("deepspeed")
    records, weights = one_process
    output_dir = root / config
    train(config, "finetune", root, output_dir)
    compare(read_metrics(output_dir), records)
    compare_weights(output_dir, weights)
    checkpoints = list_checkpoints(output_dir)
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6"]

    damaged = max(
        (path for path in checkpoints[-1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    damaged.write_bytes(damaged.read_bytes()[:-1])
    name = damaged.relative_to(checkpoints[-1]).as_posix()
    shutil.copytree(output_dir, root / f"{config}-one")
    shutil.rmtree(root / f"{config}-one" / "checkpoints" / "checkpoint-6")
    shown = train(config, "finetune", root, output_dir, "--resume", "latest_whole")
    assert f"checkpoint-6 is damaged: {name} holds" in shown
    assert "at step 3, 24 pairs into epoch 0" in shown
    compare(read_metrics(output_dir), records)
    compare_weights(output_dir, weights)

    # on one process, with a batch of both: optimizer states must be those of all parameters
    arguments = ["--resume", "latest", "--per_device_batch_size", 8]
    shown = train(config, "finetune", root, root / f"{config}-one", *arguments, num_processes=1)
    assert "at step 3, 24 pairs into epoch 0" in shown
    assert "the random states are those of 2 processes but the run has 1" in shown
    compare(read_metrics(root / f"{config}-one"), records)
    compare_weights(root / f"{config}-one", weights)
    assert not list((root / f"{config}-one" / "checkpoints").glob(".unfinished*"))


@pytest.mark.parametrize("config", CONFIGS)
def test_config_exports_a_plain_folder_from_pretraining(root, config):
    if CONFIGS[config][1] is DEEPSPEED_ON_CPU:
        pytest.importorskip("deepspeed")
    output_dir = root / f"{config}-pretrain"
    train(config, "pretrain", root, output_dir, "--max_train_steps", 2)
    model, info = AutoModel.from_pretrained(output_dir / "final", trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "MRAModel" and not info["missing_keys"]
    assert model.config.architectures == ["MRAForPreTraining"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("config", [config for config in CONFIGS if config != "multi_node_2x4"])
def test_config_trains_in_bfloat16_and_keeps_weights_in_float32(root, one_process, config):
    if CONFIGS[config][1] is DEEPSPEED_ON_CPU:
        pytest.importorskip("deepspeed")
    output_dir = root / f"{config}-bf16"
    shown = train(config, "finetune", root, output_dir, precision="bf16")
    assert re.search(r"precision +bfloat16", shown)
    expected, records = ([r for r in run if "loss" in r] for run in (one_process[0], read_metrics(output_dir)))
    assert records[0]["itc_loss"] != expected[0]["itc_loss"]
    for ours, theirs in zip(records, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05), ours["step"]
    weights = load_file(output_dir / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


def test_averaged_weights_under_zero_2_are_those_of_one_process(root):
    pytest.importorskip("deepspeed")
    average = ["--ema_decay", 0.7]
    arguments = ["--config", root / "finetune.yaml", "--per_device_batch_size", 8, "--output_dir", root / "ema-one"]
    assert run_forked("train_finetune", *arguments, *average) == [0]
    train("zero2_4xa100", "finetune", root, root / "ema-zero2", *average)
    compare_weights(root / "ema-zero2", load_file(root / "ema-one" / "final_ema" / "model.safetensors"), "final_ema")
    shutil.rmtree(root / "ema-zero2" / "checkpoints" / "checkpoint-6")
    averaged = load_file(root / "ema-zero2" / "final_ema" / "model.safetensors")
    train("zero2_4xa100", "finetune", root, root / "ema-zero2", *average, "--resume", "latest")
    resumed = load_file(root / "ema-zero2" / "final_ema" / "model.safetensors")
    assert all(resumed[name].equal(averaged[name]) for name in averaged)


def test_one_gpu_config_runs_on_one_process(root):
    arguments = ["--config", root / "finetune.yaml", "--max_train_steps", 2, "--output_dir", root / "single"]
    assert "1 (NO, cpu)" in launch("train_finetune.py", *arguments, config="single_gpu").stderr


def compare(records: list[dict], expected: list[dict]) -> None:
    """Losses, places in the run and learning rates; validation figures may turn on the last decimal of a score."""
    records, expected = ([record for record in run if "loss" in record] for run in (records, expected))
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for ours, theirs in zip(records, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), ours["step"]


def compare_weights(output_dir, expected: dict[str, torch.Tensor], name: str = "final") -> None:
    """Final weights, as far as Adam's first steps, which rounding may turn around, let them be alike."""
    weights = load_file(output_dir / name / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
