import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from mra.training.checkpointing import TrainingState
from mra.training.metrics_log import LossWindow, MetricsLog, NonFiniteLossError, read_records


def fake_accelerator(others=()):
    """This process's tensors averaged with those of others."""

    def reduce(tensor, reduction):
        assert reduction == "mean"
        alike = [other for other in others if other.shape == tensor.shape]
        return torch.stack([tensor, *alike]).mean(dim=0)

    return SimpleNamespace(
        is_main_process=True,
        reduce=reduce,
        gather=lambda tensor: tensor,
        wait_for_everyone=lambda: None,
        logged=[],
        log=lambda record, step: accelerator_log.append((step, record)),
    )


accelerator_log = []


@pytest.fixture(autouse=True)
def logging_state():
    """The loggers ask which process they are in."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def outputs(itc, itm, phrase=None):
    return {
        "loss": torch.tensor(itc + itm, requires_grad=True),
        "itc_loss": torch.tensor(itc),
        "itm_loss": torch.tensor(itm),
        "region_itc_loss": phrase,
        "image_embeds": torch.zeros(2, 2),
    }


def test_window_averages_batches_and_processes(tmp_path):
    other = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    window = LossWindow(fake_accelerator([other]), torch.nn.Linear(2, 1), tmp_path)
    window.add(outputs(1.0, 2.0), {}, TrainingState(), 8, 1e-4)
    window.add(outputs(3.0, 4.0), {}, TrainingState(step=1), 8, 2e-4)
    record = window.flush()
    assert record.pop("samples_per_second") > 0
    assert record == {"loss": 3.0, "itc_loss": 1.5, "itm_loss": 2.0, "learning_rate": 2e-4}
    window.add(outputs(1.0, 1.0), {}, TrainingState(step=2), 8, 1e-4)
    assert len(window.values) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_names_step_and_terms(tmp_path, value):
    window = LossWindow(fake_accelerator(), torch.nn.Linear(2, 1), tmp_path)
    for step, itm in ((4, 1.0), (5, value), (6, value)):
        state = TrainingState(step=step - 1, epoch=2, samples_in_epoch=8 * step)
        window.add(outputs(1.0, itm), {"identity_ids": torch.tensor([7 + step, 8])}, state, 8, 1e-4)
    with pytest.raises(NonFiniteLossError, match=r"step 5: loss, itm_loss not finite.*itc_loss 1"):
        window.flush()
    diagnostic = json.loads((tmp_path / "non_finite_step_5.json").read_text())
    assert diagnostic["step"] == 5 and diagnostic["non_finite_terms"] == ["loss", "itm_loss"]
    assert (diagnostic["epoch"], diagnostic["position_in_epoch"]) == (2, 40)
    assert diagnostic["identity_ids"] == [12, 8] and diagnostic["terms"]["itc_loss"] == 1.0
    assert [record["step"] for record in diagnostic["history"]] == [4, 5, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_noticed_in_the_step_that_broke_them(tmp_path, value):
    model = torch.nn.ModuleDict(
        {"frozen": torch.nn.Linear(2, 1).requires_grad_(False), "trained": torch.nn.Linear(2, 1)}
    )
    window = LossWindow(fake_accelerator(), model, tmp_path)
    window.add(outputs(1.0, 1.0), {}, TrainingState(step=6), 8, 1e-4)
    torch.nn.init.constant_(model["frozen"].weight, value)
    window.flush()
    window.add(outputs(1.0, 1.0), {}, TrainingState(step=7), 8, 1e-4)
    torch.nn.init.constant_(model["trained"].weight, value)
    with pytest.raises(
        NonFiniteLossError, match=r"step 8: the weights trained\.weight are not finite, though every loss"
    ):
        window.flush()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_weights_of_every_process_count(tmp_path, where):
    model = torch.nn.Linear(2, 1)
    window = LossWindow(fake_accelerator([torch.tensor([0.0, float(where == "elsewhere")])]), model, tmp_path)
    window.add(outputs(1.0, 1.0), {}, TrainingState(), 8, 1e-4)
    if where == "here":
        torch.nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"the weights bias are not finite"):
        window.flush()


def test_terms_must_not_change(tmp_path):
    window = LossWindow(fake_accelerator(), torch.nn.Linear(2, 1), tmp_path)
    window.add(outputs(1.0, 1.0), {}, TrainingState(), 8, 1e-4)
    with pytest.raises(ValueError, match="region_itc_loss"):
        window.add(outputs(1.0, 1.0, torch.tensor(1.0)), {}, TrainingState(step=1), 8, 1e-4)


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    state = TrainingState()
    log = MetricsLog(fake_accelerator(), tmp_path, state)
    for step in (1, 2, 3):
        state.step = step
        log.write(loss=0.5)
    log.write(validation={"similarity": {"R1": 50.0}})
    assert accelerator_log[-1] == (3, {"step": 3, "epoch": 0, "samples": 0, "validation/similarity/R1": 50.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    state.step, state.log_lines = 2, 2
    checkpoint = tmp_path / "checkpoint-2"  # of an earlier version, without a copy of the records
    checkpoint.mkdir()
    log.cut_back(checkpoint)
    state.step = 3
    log.write(loss=0.25)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "metrics.jsonl"]
    state.log_lines = 0
    log.cut_back(None)
    assert log.path.read_text() == ""


@pytest.mark.parametrize(
    "present", [None, "", '{"step": 1}\n{"st', "\0" * 30, '{"step": 7}\n' * 5, '{"step": 1}\n' * 5]
)
def test_records_before_the_checkpoint_come_from_it(tmp_path, present):
    checkpoint, state = tmp_path / "checkpoint-2", TrainingState(step=2, log_lines=2)
    checkpoint.mkdir()
    (checkpoint / "metrics.jsonl").write_text('{"step": 1}\n' * 2)
    log = MetricsLog(fake_accelerator(), tmp_path, state)
    if present is not None:
        log.path.write_text(present)
    log.cut_back(checkpoint)
    assert read_records(log.path) == [{"step": 1}] * 2 and state.log_lines == 2


def test_unreadable_records_of_an_earlier_version_are_dropped(tmp_path):
    state = TrainingState(step=3, log_lines=3)
    log = MetricsLog(fake_accelerator(), tmp_path, state)
    log.path.write_text('{"step": 1}\n\0\0\0\n{"step": 3}\n{"step": 4}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not a complete record"):
        read_records(log.path)
    (tmp_path / "checkpoint-3").mkdir()
    log.cut_back(tmp_path / "checkpoint-3")
    assert read_records(log.path) == [{"step": 1}] and state.log_lines == 1
