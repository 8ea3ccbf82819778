"""Training scripts on streamed sets: killed and resumed, by one process and two, equal to runs left alone."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.runs import read_metrics, run_forked, write_recipe, write_sets
from tests.helpers.training import make_sda


CHANGES = {"streaming": True, "streaming_lanes": 4, "streaming_buffer": 16, "validation_dataset": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The usual sets, and SDA of 32 rows again in two files of row groups of three."""
    root = tmp_path_factory.mktemp("streams")
    write_sets(root)
    rows = make_sda(32)
    (root / "shards").mkdir()
    for number, part in enumerate((rows.select(range(20)), rows.select(range(20, 32)))):
        part.to_parquet(root / "shards" / f"train-0000{number}-of-00002.parquet", batch_size=3)
    return root


def pretrain(root, name, num_processes=1, fault=None, resume=False, **changes):
    recipe = write_recipe(root, "pretrain", dataset=str(root / "shards"), **(CHANGES | changes))
    arguments = ["--config", recipe, "--output_dir", root / name, *(["--resume", "latest"] if resume else [])]
    return run_forked("train_pretrain", *arguments, num_processes=num_processes, fault=fault)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_stream_goes_on_where_it_was(root, num_processes):
    whole, killed = f"whole-{num_processes}", f"killed-{num_processes}"
    assert pretrain(root, whole, num_processes, num_workers=2) == [0] * num_processes
    steps = 16 // num_processes
    fault = (num_processes - 1, steps - 2, signal.SIGKILL)  # in the second epoch, behind a checkpoint
    assert pretrain(root, killed, num_processes, fault, num_workers=2)[num_processes - 1] == -signal.SIGKILL
    assert max(record["step"] for record in read_metrics(root / killed)) < steps
    assert pretrain(root, killed, num_processes, resume=True, num_workers=0) == [0] * num_processes
    records = read_metrics(root / whole)
    assert records == read_metrics(root / killed)
    assert (records[-1]["step"], records[-1]["samples"]) == (steps, 64)
    first, second = (load_file(root / name / "final" / "model.safetensors") for name in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fine_tuning_from_a_stream(root):
    assert pretrain(root, "start", max_train_steps=1) == [0]
    (root / "start" / "final").rename(root / "moved")
    changes = {
        "streaming": True,
        "max_train_steps": 3,
        "model_name_or_path": str(root / "moved"),
        "num_train_epochs": 1,
    }
    for name, streamed in (("streamed", True), ("table", False)):
        recipe = write_recipe(root, "finetune", **(changes | {"streaming": streamed, "dataset": str(root / "icfg")}))
        options = ["--validation_fraction", "0.3", "--output_dir", root / name]
        assert run_forked("train_finetune", "--config", recipe, *options) == [0]
    streamed, table = (read_metrics(root / name) for name in ("streamed", "table"))
    assert [record["samples"] for record in streamed] == [record["samples"] for record in table]
    assert (root / "streamed" / "best").is_dir()
