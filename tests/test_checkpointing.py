from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState

from modeling_mra import MRAForPreTraining
from mra_training.checkpointing import (
    Checkpointer,
    TrainingState,
    changed_keys,
    find_checkpoint,
    list_checkpoints,
    prepare_output_dir,
    replace_folder,
    save_model,
    write_recipe,
)
from tests.tiny import tiny_config, tiny_model, tiny_processor


@pytest.fixture(autouse=True)
def logging_state():
    """The loggers ask which process they are in."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def fake_accelerator(**changes):
    """One process that writes a file where `accelerate` would save its state."""

    def save_state(folder):
        with open(f"{folder}/state", "w") as file:
            file.write("state")

    defaults = {
        "is_main_process": True,
        "device": torch.device("cpu"),
        "wait_for_everyone": lambda: None,
        "reduce": lambda tensor, reduction: tensor,
        "save_state": save_state,
    }
    return SimpleNamespace(**(defaults | changes))


@pytest.fixture
def checkpointer(tmp_path):
    prepare_output_dir(tmp_path, None, False)
    return Checkpointer(fake_accelerator(), tmp_path, {"seed": 1}, save_steps=2, save_minutes=0, save_total_limit=2)


def test_newest_are_kept_with_recipe_and_environment(checkpointer, tmp_path):
    for step in (2, 9, 10, 100):
        checkpointer.save(step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert {path.name for path in find_checkpoint("latest", tmp_path).iterdir()} == {
        "state",
        "recipe.yaml",
        "environment.json",
    }
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_a_failed_save_leaves_nothing_that_looks_finished(checkpointer, tmp_path):
    checkpointer.save(2)

    def fail(folder):
        raise OSError("no space left")

    checkpointer.accelerator.save_state = fail
    with pytest.raises(OSError, match="no space"):
        checkpointer.save(4)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    prepare_output_dir(tmp_path, "latest", False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_agreement_of_processes(checkpointer):
    assert checkpointer.agree(1, stop=False) == (False, False)
    assert checkpointer.agree(2, stop=False) == (True, False)
    assert checkpointer.agree(3, stop=True) == (True, True)
    checkpointer.accelerator.reduce = lambda tensor, reduction: tensor + torch.tensor([0.0, 1.0])  # another process
    assert checkpointer.agree(3, stop=False) == (True, True)
    checkpointer.last_step = 3
    assert checkpointer.agree(3, stop=False) == (False, True)


def test_minutes_are_counted_by_the_main_process(tmp_path):
    for is_main, expected in ((True, True), (False, False)):
        checkpointer = Checkpointer(fake_accelerator(is_main_process=is_main), tmp_path, {}, None, 10, 2)
        assert checkpointer.agree(1, stop=False) == (False, False)
        checkpointer.last_time -= 601
        assert checkpointer.agree(1, stop=False) == (expected, False)


def test_find_checkpoint(checkpointer, tmp_path):
    assert find_checkpoint(None, tmp_path) is None and find_checkpoint("latest", tmp_path) is None
    path = checkpointer.save(4)
    assert find_checkpoint("latest", tmp_path) == find_checkpoint(str(path), tmp_path) == path
    with pytest.raises(ValueError, match=r"`resume`.*checkpoint-4"):
        find_checkpoint(str(tmp_path / "checkpoints" / "checkpoint-5"), tmp_path)
    with pytest.raises(ValueError, match="`resume`"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_another_run_is_not_overwritten_unasked(checkpointer, tmp_path):
    checkpointer.save(2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--resume latest"):
        prepare_output_dir(tmp_path, None, False)
    prepare_output_dir(tmp_path, None, True)
    assert list_checkpoints(tmp_path) == [] and (tmp_path / "notes.txt").exists()


def test_replacing_a_folder_survives_a_kill_between_its_moves(tmp_path):
    for name, text in (("best", "old"), ("unfinished-best", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
    replace_folder(tmp_path / "unfinished-best", tmp_path / "best")
    assert (tmp_path / "best" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    (tmp_path / "best").rename(tmp_path / "best.replaced")  # killed after the first move
    prepare_output_dir(tmp_path, "latest", False)
    assert (tmp_path / "best" / "weights").read_text() == "new"


def test_changed_arguments_are_named(tmp_path):
    write_recipe(tmp_path / "recipe.yaml", {"seed": 1, "learning_rate": 1e-4, "output_dir": "a", "resume": None})
    now = {"seed": 2, "learning_rate": 1e-4, "output_dir": "b", "resume": "latest", "new": 3}
    assert changed_keys(now, tmp_path) == {"seed": (1, 2), "new": (None, 3)}


@pytest.mark.parametrize("backend", ["no", "eager"])
def test_model_folder_is_plain_also_when_compiled(tmp_path, backend):
    config = tiny_config()
    model, processor = tiny_model(config), tiny_processor(config)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator = Accelerator(cpu=True, dynamo_backend=backend)
    save_model(accelerator, accelerator.prepare(model), processor, tmp_path / "best", "card")
    loaded, info = MRAForPreTraining.from_pretrained(tmp_path / "best", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.state_dict().items())
    assert (tmp_path / "best" / "README.md").read_text() == "card"
    assert (tmp_path / "best" / "modeling_mra.py").is_file()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_state_goes_there_and_back():
    state = TrainingState()
    state.count_batch(8)
    state.count_batch(8)
    assert (state.micro_step, state.samples_in_epoch, state.samples_seen) == (2, 16, 16)
    state.end_epoch()
    other = TrainingState()
    other.load_state_dict(state.state_dict())
    assert other == state and (other.epoch, other.samples_in_epoch, other.samples_seen) == (1, 0, 16)
