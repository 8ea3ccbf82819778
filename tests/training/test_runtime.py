import os
import signal
from types import SimpleNamespace

import pytest
import torch

from mra.common.environment import describe_environment
from mra.training.arguments import RunArguments
from mra.training.runtime import StopSignal, check_trackers, create_accelerator, make_plan, seed_negatives


def run(**changes):
    defaults = {"gradient_accumulation_steps": 1, "num_train_epochs": 30, "max_train_steps": None}
    return SimpleNamespace(**(defaults | changes))


def test_plan_counts_whole_batches_of_every_process():
    plan = make_plan(68_126, 40, 4, run())
    assert (plan.samples_per_batch, plan.steps_per_epoch, plan.total_steps) == (160, 425, 12_750)
    accumulated = make_plan(68_126, 20, 4, run(gradient_accumulation_steps=2))
    assert (accumulated.samples_per_batch, accumulated.steps_per_epoch) == (80, 426)
    short = make_plan(100, 10, 1, run(max_train_steps=25))
    assert (short.total_steps, short.num_epochs) == (25, 3)
    assert short.schedule_steps(True) == 25
    with pytest.raises(ValueError, match="`per_device_batch_size`: 7 training pairs"):
        make_plan(7, 4, 2, run())


@pytest.mark.parametrize(
    "pairs, epochs, taken, counted",
    [
        (68_126, 30, 425, 426),
        (34_674, 30, 216, 217),
        (37_010, 10, 231, 232),
        (1_217_750, 32, 7610, 7611),
        (1600, 3, 10, 10),
    ],
)
def test_the_published_schedule_counts_the_dropped_batch(pairs, epochs, taken, counted):
    plan = make_plan(pairs, 40, 4, run(num_train_epochs=epochs))
    assert plan.total_steps == plan.schedule_steps(False) == taken * epochs
    assert plan.schedule_steps(True) == counted * epochs
    accumulated = make_plan(pairs, 10, 4, run(num_train_epochs=epochs, gradient_accumulation_steps=4))
    assert accumulated.schedule_steps(True) == counted * epochs


def test_negatives_depend_on_the_place_alone():
    generator = torch.Generator()
    draw = {
        place: torch.rand(4, generator=seed_negatives(generator, *place)).tolist()
        for place in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (1, 10, 0), (11, 0, 0)]
    }
    assert len({tuple(values) for values in draw.values()}) == len(draw)
    assert torch.rand(4, generator=seed_negatives(generator, 1, 0, 0)).tolist() == draw[1, 0, 0]


def test_a_second_sigterm_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = StopSignal()
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_trackers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("mra.training.runtime.get_available_trackers", list)
    with pytest.raises(ValueError, match=r"`log_with`: tensorboard is not installed.*mra-retrieval\[tracking\]"):
        check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match="unknown tracker 'paper'"):
        check_trackers(["paper"])
    assert check_trackers([]) == []


def test_environment_names_the_libraries():
    environment = describe_environment()
    assert {"torch", "transformers", "accelerate", "datasets"} <= environment["libraries"].keys()
    assert environment["python"].startswith("3.")


def test_processes_that_run_alone_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("mra.training.runtime.Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    with pytest.raises(
        ValueError, match=r"`WORLD_SIZE` is 2 but the process group has 1.*accelerate_configs/cpu\.yaml"
    ):
        create_accelerator(RunArguments(output_dir=str(tmp_path)))
