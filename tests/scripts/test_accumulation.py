"""Accumulated batches: a step follows the mean of the batches that it holds, also the last step of an epoch."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from mra.training.runtime import group_factor
from tests.helpers.distributed_step import accumulate, linear_rows, main_accumulate
from tests.helpers.gradient_norms import run_script
from tests.helpers.runs import DEEPSPEED_ON_CPU, FSDP_ON_CPU, TIMEOUT, start_forked, write_recipe, write_sets


# Weights that all but stand still, so that the gradient of a batch does not depend on the steps before it.
RECIPE = {"learning_rate": "1e-12", "num_warmup_steps": 0, "max_grad_norm": 1e6, "num_train_epochs": 1}
RECIPE |= {"save_steps": None, "save_minutes": None, "eval_every_epochs": 9, "eval_rerank_k": 0, "eval_flip": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("accumulation")
    write_sets(root)
    return root


@pytest.fixture
def make_accelerator():
    """Accelerators of one process, forgotten after the test."""

    def make(steps):
        GradientState._reset_state()
        return Accelerator(cpu=True, gradient_accumulation_steps=steps)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def descend(rows: int, rows_of_a_step: int, dropped: int = 0) -> torch.Tensor:
    """What `accumulate` must give: gradient descent along the mean over the rows of each step."""
    inputs, targets = linear_rows(rows)
    inputs, targets = inputs[: rows - dropped], targets[: rows - dropped]
    weights = torch.zeros(inputs.shape[1])
    for features, expected in zip(inputs.split(rows_of_a_step), targets.split(rows_of_a_step), strict=True):
        weights = weights - 0.1 * 2 * (features.T @ (features @ weights - expected)) / len(features)
    return weights


@pytest.mark.parametrize("batches", [1, 2, 7, 8, 10, 16])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_every_step_is_that_of_one_large_batch(make_accelerator, batches, steps):
    rows = batches * 3 + 1
    weights = accumulate(make_accelerator(steps), rows, batch_size=3)
    torch.testing.assert_close(weights, descend(rows, 3 * steps, dropped=1), rtol=1e-5, atol=1e-6)


def test_groups_start_where_a_resumed_run_starts(make_accelerator):
    accelerator = make_accelerator(8)
    assert [group_factor(accelerator, index, 10) for index in range(10)] == [1.0] * 8 + [4.0] * 2
    assert [group_factor(accelerator, index, 2) for index in range(2)] == [4.0] * 2


@pytest.mark.parametrize(
    ("kind", "distributed_type", "environment"),
    [
        ("ddp", "MULTI_CPU", {"ACCELERATE_USE_CPU": "true"}),
        pytest.param("zero2", "DEEPSPEED", DEEPSPEED_ON_CPU, marks=pytest.mark.slow),
        pytest.param("zero3", "DEEPSPEED", DEEPSPEED_ON_CPU, marks=pytest.mark.slow),
        pytest.param("fsdp2", "FSDP", FSDP_ON_CPU, marks=pytest.mark.slow),
    ],
)
def test_two_processes_accumulate_as_one_with_the_whole_batch(tmp_path, kind, distributed_type, environment):
    """10 batches by 8 on each of two processes, 43 rows in batches of 2 x 2."""
    arguments = (kind, distributed_type, 8, (43, 2), str(tmp_path / "weights"))
    processes = start_forked(main_accumulate, *arguments, num_processes=2, environment=environment)
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0, 0]
    torch.testing.assert_close(torch.load(tmp_path / "weights"), descend(43, 32, dropped=3), rtol=1e-5, atol=1e-6)


def norms_of(root, name, stage, num_processes, *arguments, **changes):
    """Norms of the steps of a run in forked processes."""
    recipe = write_recipe(root, stage, **RECIPE, **changes)
    options = ["--config", str(recipe), "--output_dir", str(root / name), *map(str, arguments)]
    path = root / f"{name}.txt"
    path.unlink(missing_ok=True)
    processes = start_forked(run_script, str(path), f"train_{stage}", options, num_processes=num_processes)
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * num_processes
    return [float(line) for line in path.read_text().split()]


@pytest.mark.parametrize(
    ("num_processes", "batch_size", "steps", "in_pairs"),
    [(1, 3, 8, [1, 5]), (2, 2, 6, [1, 4])],  # 10 batches by 8, 8 batches by 6
)
def test_last_step_follows_the_mean_of_what_is_left(root, num_processes, batch_size, steps, in_pairs):
    """Two batches are left: in steps of two they are the last step, which is whole."""
    changes = {"per_device_batch_size": batch_size, "validation_dataset": None}
    ours = norms_of(
        root, f"by-{steps}-{num_processes}", "pretrain", num_processes, gradient_accumulation_steps=steps, **changes
    )
    pairs = norms_of(
        root, f"by-2-{num_processes}", "pretrain", num_processes, gradient_accumulation_steps=2, **changes
    )
    assert (len(ours), len(pairs)) == (2, in_pairs[1])
    assert ours[1] == pytest.approx(pairs[-1], rel=1e-4)
