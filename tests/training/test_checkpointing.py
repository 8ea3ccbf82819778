import contextlib
import dataclasses
import errno
import logging
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

from modeling_mra import MRAForPreTraining
from mra.common.command_line import FullDiskError
from mra.common.files import unfinished_path
from mra.common.recipes import read_mapping
from mra.retrieval import RetrievalChoice
from mra.training import checkpointing
from mra.training.checkpoint_manifest import DamagedCheckpointError, read_manifest
from mra.training.checkpointing import (
    Checkpointer,
    TrainingState,
    changed_keys,
    find_checkpoint,
    keep_aside,
    list_checkpoints,
    load_checkpoint,
    prepare_output_dir,
    save_model,
    set_newer_aside,
    start_output_dir,
    write_recipe,
)
from processing_mra import MRAProcessor
from tests.helpers.tiny import tiny_config, tiny_model, tiny_processor


@pytest.fixture(autouse=True)
def logging_state():
    """The loggers ask which process they are in."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def fake_accelerator(**changes):
    """One process that writes what `accelerate` would, the weights left out."""

    def save_state(folder):
        step = int(Path(folder).name.rpartition("-")[2])
        for name in ("model.safetensors", "optimizer.bin"):
            (Path(folder) / name).write_bytes(random.Random(name).randbytes(3000))
        states = {"random_state": random.getstate(), "numpy_random_seed": np.random.get_state(), "step": step}
        torch.save(states | {"torch_manual_seed": torch.get_rng_state()}, f"{folder}/random_states_0.pkl")
        torch.save({"last_epoch": step}, f"{folder}/custom_checkpoint_0.pkl")
        torch.save(TrainingState(step=step).state_dict(), f"{folder}/custom_checkpoint_1.pkl")

    defaults = {
        "is_main_process": True,
        "is_local_main_process": True,
        "num_processes": 1,
        "process_index": 0,
        "distributed_type": DistributedType.NO,
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
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "custom_checkpoint_1.pkl",
        "recipe.yaml",
        "environment.json",
        "manifest.json",
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


def test_a_save_that_fails_gives_its_room_back(checkpointer, tmp_path, monkeypatch):
    def full(folder):
        (Path(folder) / "optimizer.bin").write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointer.accelerator, "save_state", full)
    with pytest.raises(FullDiskError):
        checkpointer.save(3)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_agreement_of_processes(checkpointer):
    assert checkpointer.agree(1, stop=False) == (False, False)
    assert checkpointer.agree(2, stop=False) == (True, False)
    assert checkpointer.agree(3, stop=True) == (True, True)
    checkpointer.accelerator.reduce = lambda tensor, reduction: tensor + torch.tensor([0.0, 1.0])  # another process
    assert checkpointer.agree(3, stop=False) == (True, True)
    checkpointer.last_step = 3
    assert checkpointer.agree(3, stop=False) == (False, True)


@pytest.mark.parametrize("is_main", [True, False])
def test_minutes_are_counted_by_the_main_process(tmp_path, monkeypatch, is_main):
    """From the last checkpoint, or else from the start of the run."""
    now = 5000.0
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now)
    prepare_output_dir(tmp_path, None, False)
    checkpointer = Checkpointer(fake_accelerator(is_main_process=is_main), tmp_path, {}, None, 10, 2)
    for seconds, is_due in ((0, False), (599, False), (1, is_main), (500, is_main)):
        now += seconds
        assert checkpointer.agree(1, stop=False) == (is_due, False), now
    if is_main:
        checkpointer.save(1)
    else:
        checkpointer.last_time = now
    for seconds, is_due in ((599, False), (1, is_main)):
        now += seconds
        assert checkpointer.agree(2, stop=False) == (is_due, False), now


@pytest.mark.parametrize("minutes", [None, 0])
def test_nothing_is_due_unless_it_is_asked_for(tmp_path, minutes):
    checkpointer = Checkpointer(fake_accelerator(), tmp_path, {}, None, minutes)
    checkpointer.last_time -= 1e9
    assert not checkpointer.is_step_due(1) and checkpointer.agree(1, stop=False) == (False, False)


def test_steps_are_due_at_every_multiple():
    checkpointer = Checkpointer(fake_accelerator(), "run", {}, save_steps=3)
    assert [step for step in range(1, 10) if checkpointer.is_step_due(step)] == [3, 6, 9]


def test_two_checkpoints_are_kept_unless_another_number_is_given(tmp_path):
    prepare_output_dir(tmp_path, None, False)
    for number, options in ((2, {}), (3, {"save_total_limit": 3})):
        checkpointer = Checkpointer(fake_accelerator(), tmp_path, {}, **options)
        for step in range(1, 6):
            checkpointer.save(step)
        assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{s}" for s in range(6 - number, 6)]


def test_what_a_killed_save_left_is_not_kept(checkpointer, tmp_path):
    left = unfinished_path(tmp_path / "checkpoints" / "checkpoint-2", "run")
    left.mkdir()
    (left / "model-00002-of-00002.safetensors").write_text("of a save that was killed")
    assert "model-00002-of-00002.safetensors" not in {path.name for path in checkpointer.save(2).iterdir()}


def test_a_folder_of_checkpoints_that_was_removed_is_made_again(checkpointer, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints")
    assert checkpointer.save(2).is_dir()


def test_the_first_error_of_a_save_is_told(checkpointer):
    def fail(folder):
        shutil.rmtree(folder)
        raise RuntimeError("the folder was removed")

    checkpointer.accelerator.save_state = fail
    with pytest.raises(RuntimeError, match="the folder was removed"):
        checkpointer.save(2)


def test_another_process_writes_its_states_alone(checkpointer, tmp_path, monkeypatch):
    """The main process makes the folder, writes the rest, gives the folder its name, and removes what is not needed."""
    for name in ("write_recipe", "write_environment", "write_manifest", "replace_folder", "_remove"):
        if name != "write_manifest":
            monkeypatch.setattr(checkpointing, name, lambda *args, name=name: pytest.fail(name))
    monkeypatch.setattr(checkpointing, "write_manifest", lambda *args: None)
    checkpointer.accelerator.is_main_process = checkpointer.accelerator.is_local_main_process = False
    monkeypatch.setattr(checkpointing, "flush_tree", lambda folder: pytest.fail("flush_tree"))
    unfinished = unfinished_path(tmp_path / "checkpoints" / "checkpoint-2", "run")
    unfinished.mkdir()
    checkpointer.save(2)
    assert (unfinished / "optimizer.bin").is_file() and not (unfinished / "recipe.yaml").exists()
    checkpointer.accelerator.save_state = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        checkpointer.save(2)
    assert unfinished.is_dir()  # other processes may be writing to it


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
    for name in ("notes.txt", "recipe.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "best").mkdir()
    with pytest.raises(
        ValueError, match=r"holds another run .checkpoints, metrics.jsonl, best, recipe.yaml.*--resume latest"
    ):
        prepare_output_dir(tmp_path, None, False)
    prepare_output_dir(tmp_path, "latest", False)
    assert len(list_checkpoints(tmp_path)) == 1 and (tmp_path / "best").is_dir()
    prepare_output_dir(tmp_path, None, True)
    assert list_checkpoints(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "notes.txt"]


def test_the_folder_of_a_run_is_made(tmp_path):
    prepare_output_dir(tmp_path / "new" / "er", None, False)
    assert (tmp_path / "new" / "er" / "checkpoints").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^`output_dir` .*file is a file; expected a folder"):
        prepare_output_dir(tmp_path / "file", None, False)


def test_an_earlier_best_model_is_kept_aside(tmp_path):
    """Once for each resume; only the main process moves it, and all wait for it."""
    waited = []
    accelerator = fake_accelerator(wait_for_everyone=lambda: waited.append((tmp_path / "earlier_best").exists()))
    assert keep_aside(accelerator, tmp_path, 3) == tmp_path / "earlier_best" / "epoch-3"
    assert not (tmp_path / "earlier_best").exists()  # there was none
    for epoch, kept in ((3, "first"), (3, "second"), (7, "third")):
        (tmp_path / "best").mkdir(exist_ok=True)
        (tmp_path / "best" / "weights").write_text(kept)
        keep_aside(fake_accelerator(is_main_process=False), tmp_path, epoch)
        assert (tmp_path / "best").is_dir()
        keep_aside(accelerator, tmp_path, epoch)
    kept = {path.parent.name: path.read_text() for path in tmp_path.glob("earlier_best/*/weights")}
    assert kept == {"epoch-3": "first", "epoch-7": "third"} and waited == [False, True, True, True]


def test_a_folder_survives_a_kill_between_its_moves(tmp_path):
    (tmp_path / ".replaced-0-best").mkdir()
    (tmp_path / ".replaced-0-best" / "weights").write_text("old")
    prepare_output_dir(tmp_path, "latest", False)
    assert (tmp_path / "best" / "weights").read_text() == "old"


def test_changed_arguments_are_named(tmp_path):
    write_recipe(tmp_path / "recipe.yaml", {"seed": 1, "learning_rate": 1e-4, "output_dir": "a", "resume": None})
    now = {"seed": 2, "learning_rate": 1e-4, "output_dir": "b", "resume": "latest", "new": 3}
    assert list(changed_keys(now, tmp_path).items()) == [("new", (None, 3)), ("seed", (1, 2))]
    many = dict.fromkeys("hgfedcba", 1)
    assert list(changed_keys(many | {"seed": 1, "learning_rate": 1e-4}, tmp_path)) == sorted(many)


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
    assert isinstance(MRAProcessor.from_pretrained(tmp_path / "best"), MRAProcessor)
    assert not (tmp_path / "best" / "retrieval.json").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def copies_of_weights(model):
    """A state dict without shared tensors, as DeepSpeed gathers it."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def model_accelerator(**changes):
    collected = []
    options = {"unwrap_model": lambda model, keep_torch_compile: model, "is_fsdp2": False, "collected": collected}
    options["get_state_dict"] = lambda model: collected.append(model) or copies_of_weights(model)
    return fake_accelerator(**options | changes)


def test_model_folder_holds_the_choice_and_each_weight_once(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    choice = RetrievalChoice(3, "validation", 10, "posterior", 0.5, False, 0.1, {3: {"R1": 1.0, "mAP": 1.0}})
    save_model(model_accelerator(), model, processor, tmp_path / "best", choice=choice)
    loaded = RetrievalChoice.load(str(tmp_path / "best"))
    assert loaded == dataclasses.replace(choice, weights=loaded.weights)
    assert not (tmp_path / "best" / "README.md").exists()
    stored = load_file(tmp_path / "best" / "model.safetensors")
    assert not set(stored) & set(model._tied_weights_keys) and set(stored) < set(model.state_dict())


@pytest.mark.parametrize("is_main", [True, False])
def test_one_process_writes_the_model_and_all_collect_and_wait(tmp_path, is_main):
    waited = []
    accelerator = model_accelerator(
        is_main_process=is_main, wait_for_everyone=lambda: waited.append((tmp_path / "best").exists())
    )
    save_model(accelerator, tiny_model(), tiny_processor(), tmp_path / "best")
    assert len(accelerator.collected) == 1 and waited == [is_main]


def test_a_run_starts_at_nothing():
    numbers = ("step", "micro_step", "epoch", "samples_in_epoch", "samples_seen", "log_lines", "samples_per_batch")
    expected = dict.fromkeys(numbers, 0) | {"data": ""}
    for name in ("best", "best_ema"):
        expected |= {f"{name}_metric": -1, f"{name}_epoch": 0, f"{name}_measure": ""}
    assert TrainingState().state_dict() == expected


def test_state_of_older_versions_and_whole_numbers():
    state = TrainingState()
    older = TrainingState(step=3, best_metric=50).state_dict()
    for name in ("best_measure", "best_ema_metric", "best_ema_epoch", "best_ema_measure", "data"):
        del older[name]
    state.load_state_dict(older)
    assert (state.step, state.best_metric, state.data) == (3, 50, "")
    assert (state.best_ema_metric, state.best_ema_epoch, state.best_ema_measure) == (-1, 0, "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 1.0}, "`step` must be int, got 1.0"),
        ({"step": True}, "`step` must be int, got True"),
        ({"best_metric": "high"}, "`best_metric` must be float, got 'high'"),
        ({"data": 7}, "`data` must be str, got 7"),
        ({"other": 1}, "must hold step, .*, data, got .*, other$"),
    ],
)
def test_state_of_another_kind_is_refused(changes, words):
    with pytest.raises(ValueError, match=f"the position in the run.* {words}"):
        TrainingState().load_state_dict(TrainingState().state_dict() | changes)


def test_state_goes_there_and_back():
    state = TrainingState()
    state.count_batch(8)
    state.count_batch(8)
    assert (state.micro_step, state.samples_in_epoch, state.samples_seen, state.samples_per_batch) == (2, 16, 16, 8)
    state.end_epoch()
    other = TrainingState()
    other.load_state_dict(state.state_dict())
    assert other == state and (other.epoch, other.samples_in_epoch, other.samples_seen) == (1, 0, 16)


@pytest.mark.parametrize(
    ("dataset", "saved", "now", "is_refused"),
    [
        ("set", "a", "b", True),
        ("set", "a", "a", False),
        ("set", "", "b", False),  # of an older version
        ("set", "a", "", False),  # on the Hub
        ("other", "a", "b", False),  # chosen: the arguments that differ are warned of
    ],
)
def test_a_training_set_that_changed_is_refused(tmp_path, dataset, saved, now, is_refused):
    """Rows written anew under the same path would be trained on from the middle of an epoch of others."""
    write_recipe(tmp_path / "recipe.yaml", {"dataset": "set"})
    state = TrainingState(data=now)
    accelerator = fake_accelerator(
        load_state=lambda folder: state.load_state_dict(TrainingState(step=3, data=saved).state_dict())
    )
    scheduler = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), get_last_lr=list)
    refused = pytest.raises(
        ValueError, match=r"`dataset` set: its files differ from those that .* was trained on; resume"
    )
    with refused if is_refused else contextlib.nullcontext():
        load_checkpoint(accelerator, tmp_path, {"dataset": dataset}, state, scheduler, 8)
    assert is_refused or (state.data, state.step) == (now, 3)


@pytest.mark.parametrize(
    ("before", "now", "recipe", "words"),
    [
        (8, 8, {"seed": 1}, ()),
        (0, 8, {"seed": 1}, ()),  # of an older version
        (8, 16, {"seed": 1}, ("had 8 pairs and now has 16",)),
        (8, 8, {"seed": 2}, ("with other arguments: seed (1 before, 2 now)",)),
    ],
)
def test_a_run_that_goes_on_differently_says_so(tmp_path, caplog, before, now, recipe, words):
    prepare_output_dir(tmp_path, None, False)
    checkpoint = Checkpointer(fake_accelerator(), tmp_path, {"seed": 1}).save(4)
    state = TrainingState()
    saved = TrainingState(step=4, epoch=1, samples_per_batch=before).state_dict()
    accelerator = fake_accelerator(load_state=lambda folder: state.load_state_dict(saved), step=3)
    scheduler = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}, {"lr": 0.0}]), get_last_lr=lambda: [0.1, 0.2]
    )
    with caplog.at_level(logging.WARNING):
        load_checkpoint(accelerator, checkpoint, recipe, state, scheduler, now)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(words)
    assert all(word in caplog.text for word in words)
    assert (state.step, state.epoch, accelerator.step) == (4, 1, 0)  # accumulation starts again
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == [0.1, 0.2]


def test_random_states_that_are_not_restored_are_told(tmp_path, caplog):
    prepare_output_dir(tmp_path, None, False)
    checkpoint = Checkpointer(fake_accelerator(), tmp_path, {}).save(4)
    accelerator = fake_accelerator(num_processes=2, load_state=lambda folder: None)
    scheduler = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), get_last_lr=list)
    with caplog.at_level(logging.WARNING):
        load_checkpoint(accelerator, checkpoint, {}, TrainingState(), scheduler, 8)
    assert "the random states are those of 1 processes but the run has 2" in caplog.text


# ---------------------------------------------------------------- damaged checkpoints


FILES = (
    "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl",
    "environment.json",
    "manifest.json",
    "metrics.jsonl",
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "recipe.yaml",
)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "removed": None,
    "empty": lambda content: b"",
    "first byte": lambda content: content[:1],
    "half": lambda content: content[: len(content) // 2],
    "all but the last byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\n",
    "zeroed": lambda content: bytes(len(content)),
    "first bit flipped": lambda content: flip(content, 0),
    "middle bit flipped": lambda content: flip(content, len(content) // 2),
    "last bit flipped": lambda content: flip(content, len(content) - 1),
}


def damage(path: Path, kind: str) -> None:
    if DAMAGE[kind] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))


def run_arguments(output_dir, resume, without_manifest=False):
    return SimpleNamespace(
        output_dir=str(output_dir), resume=resume, overwrite_output_dir=False, resume_without_manifest=without_manifest
    )


def start(output_dir, resume, without_manifest=False, **changes):
    return start_output_dir(
        fake_accelerator(**changes), run_arguments(output_dir, resume, without_manifest), {"seed": 7}
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with two checkpoints and no records yet."""
    PartialState(cpu=True)
    folder = tmp_path_factory.mktemp("saved")
    prepare_output_dir(folder, None, False)
    write_recipe(folder / "recipe.yaml", {"seed": 1})
    (folder / "metrics.jsonl").write_text("")
    checkpointer = Checkpointer(fake_accelerator(), folder, {"seed": 1}, save_steps=2)
    for step in (2, 4):
        checkpointer.save(step)
    return folder


@pytest.fixture
def two(saved, tmp_path):
    """A copy of that run."""
    shutil.copytree(saved, tmp_path / "run")
    metrics = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "metrics.jsonl"
    assert metrics.is_file()
    return tmp_path / "run"


def test_manifest_lists_every_file(two):
    manifest = read_manifest(two / "checkpoints" / "checkpoint-4")
    assert sorted(manifest.files) == sorted(set(FILES) - {"manifest.json"})
    assert (manifest.step, manifest.num_processes, manifest.distributed_type, manifest.devices) == (
        4,
        1,
        "NO",
        ["cpu"],
    )
    assert start(two, "latest") == two / "checkpoints" / "checkpoint-4"


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [name for name in FILES if name != "metrics.jsonl"])
def test_damage_is_an_error_that_names_the_file_and_the_way_out(two, name, kind):
    damage(two / "checkpoints" / "checkpoint-4" / name, kind)
    recipe = (two / "recipe.yaml").read_text()
    whole = two / "checkpoints" / "checkpoint-2"
    for resume in ("latest", str(two / "checkpoints" / "checkpoint-4")):
        with pytest.raises(DamagedCheckpointError) as raised:
            start(two, resume)
        message = str(raised.value)
        assert f"checkpoint-4 is damaged: {name} " in message
        assert f"--resume {whole} or" in message and "--resume latest_whole" in message
    assert (two / "recipe.yaml").read_text() == recipe  # nothing was touched
    assert [path.name for path in list_checkpoints(two)] == ["checkpoint-2", "checkpoint-4"]
    assert start(two, str(whole)) == whole


def test_a_start_writes_recipe_and_environment(tmp_path):
    assert start(tmp_path / "run", None) is None
    assert read_mapping(tmp_path / "run" / "recipe.yaml") == {"seed": 7}
    assert (tmp_path / "run" / "environment.json").is_file()


def test_a_run_is_resumed_with_its_average_or_not_at_all(two):
    """And nothing of the folder has changed before the error."""
    arguments, before = (
        run_arguments(two, str(two / "checkpoints" / "checkpoint-2")),
        (two / "recipe.yaml").read_text(),
    )
    with pytest.raises(ValueError, match=r"`ema_decay` is 0.99, but .*checkpoint-2 holds no averaged weights"):
        start_output_dir(fake_accelerator(), arguments, {"ema_decay": 0.99})
    assert (two / "recipe.yaml").read_text() == before and len(list_checkpoints(two)) == 2


def test_a_resumed_run_is_not_overwritten(two):
    """`resume` goes before `overwrite_output_dir`, which a queue may leave in its recipe."""
    arguments = run_arguments(two, "latest")
    arguments.overwrite_output_dir = True
    assert start_output_dir(fake_accelerator(), arguments, {}) == two / "checkpoints" / "checkpoint-4"
    arguments.resume = None
    assert start_output_dir(fake_accelerator(), arguments, {}) is None and list_checkpoints(two) == []


def test_other_processes_wait_for_the_folder_and_write_nothing(tmp_path, monkeypatch):
    events = []
    for name in ("prepare_output_dir", "find_whole_checkpoint", "write_recipe", "write_environment"):
        monkeypatch.setattr(checkpointing, name, lambda *args, name=name: events.append(name))
    for is_main in (True, False):
        start(tmp_path, None, is_main_process=is_main, wait_for_everyone=lambda: events.append("wait"))
    ours = ["prepare_output_dir", "wait", "find_whole_checkpoint", "write_recipe", "write_environment", "wait"]
    assert events == [*ours, "wait", "find_whole_checkpoint", "wait"]


def test_the_newest_undamaged_one_is_named_and_taken(two):
    shutil.copytree(two / "checkpoints" / "checkpoint-4", two / "checkpoints" / "checkpoint-6")
    damage(two / "checkpoints" / "checkpoint-6" / "optimizer.bin", "half")
    with pytest.raises(
        DamagedCheckpointError, match=r"checkpoint-6 is damaged.*newest undamaged one is .*checkpoint-4:"
    ):
        start(two, "latest")
    assert start(two, "latest_whole") == two / "checkpoints" / "checkpoint-4"


def test_a_queue_falls_back_with_a_warning(two, caplog):
    damage(two / "checkpoints" / "checkpoint-4" / "random_states_0.pkl", "half")
    with caplog.at_level(logging.WARNING):
        assert start(two, "latest_whole") == two / "checkpoints" / "checkpoint-2"
    assert "checkpoint-4 is damaged: random_states_0.pkl holds" in caplog.text and "continuing from" in caplog.text
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["checkpoint-2", "set-aside-checkpoint-4"]
    checkpointer = Checkpointer(fake_accelerator(), two, {"seed": 1}, save_steps=1)
    checkpointer.save(3)
    assert (two / "checkpoints" / "set-aside-checkpoint-4").is_dir()
    checkpointer.save(4)
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("resume", ["latest", "latest_whole"])
def test_none_is_whole(two, resume):
    for step in (2, 4):
        damage(two / "checkpoints" / f"checkpoint-{step}" / "optimizer.bin", "zeroed")
    with pytest.raises(
        DamagedCheckpointError, match=r"checkpoint-4 is damaged: optimizer.bin.*no other checkpoint is undamaged"
    ):
        start(two, resume)


def test_latest_whole_starts_from_the_beginning_where_there_is_none(tmp_path):
    assert start(tmp_path / "new", "latest_whole") is None


def test_a_renamed_checkpoint_is_found_out(two):
    (two / "checkpoints" / "checkpoint-4").rename(two / "checkpoints" / "checkpoint-9")
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json is that of checkpoint-4"):
        start(two, "latest")


@pytest.mark.parametrize("key", ["random_state", "numpy_random_seed", "torch_manual_seed"])
@pytest.mark.parametrize("change", ["missing", "another value"])
def test_contents_that_were_saved_wrong_are_found_out(tmp_path, key, change):
    """The manifest fits; what a file holds does not."""

    def save_state(folder):
        fake_accelerator().save_state(folder)
        path = Path(folder) / "random_states_0.pkl"
        states = torch.load(path, weights_only=False)
        if change == "missing":
            del states[key]
        else:
            states[key] = torch.zeros(3, dtype=torch.uint8)
        torch.save(states, path)

    prepare_output_dir(tmp_path, None, False)
    Checkpointer(fake_accelerator(save_state=save_state), tmp_path, {}).save(4)
    with pytest.raises(DamagedCheckpointError, match=r"random_states_0.pkl does not hold the random states"):
        start(tmp_path, "latest")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("custom_checkpoint_1.pkl", {"step": 4}, "must hold step, micro_step"),
        ("custom_checkpoint_1.pkl", [4], "custom_checkpoint_1.pkl: the position in the run must hold"),
        ("custom_checkpoint_1.pkl", [4], "got list"),
        ("custom_checkpoint_1.pkl", TrainingState(step=3).state_dict(), "is at step 3 instead of 4"),
        ("custom_checkpoint_1.pkl", TrainingState(step=4).state_dict() | {"epoch": "x"}, "`epoch` must be int"),
        ("custom_checkpoint_1.pkl", TrainingState(step=4, log_lines=2).state_dict(), "holds 1 lines instead of 2"),
        ("custom_checkpoint_0.pkl", {"last_epoch": 5}, "is at step 5 instead of 4"),
        ("custom_checkpoint_0.pkl", [1], "is at step None instead of 4"),
    ],
)
def test_the_place_in_the_run_must_be_whole(tmp_path, name, content, words):
    def save_state(folder):
        fake_accelerator().save_state(folder)
        torch.save(content, Path(folder) / name)

    prepare_output_dir(tmp_path, None, False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    Checkpointer(fake_accelerator(save_state=save_state), tmp_path, {}).save(4)
    with pytest.raises(DamagedCheckpointError, match=re.escape(words)):
        start(tmp_path, "latest")


@pytest.mark.parametrize(("records", "log_lines"), [('{"step": 1}\n{"step": 2}\n', 2), ("", 0), (None, 2)])
def test_records_that_fit_the_place_in_the_run(tmp_path, records, log_lines):
    """As many as were written by then, or none where their file was taken away."""

    def save_state(folder):
        fake_accelerator().save_state(folder)
        torch.save(TrainingState(step=4, log_lines=log_lines).state_dict(), f"{folder}/custom_checkpoint_1.pkl")

    prepare_output_dir(tmp_path, None, False)
    if records is not None:
        (tmp_path / "metrics.jsonl").write_text(records)
    saved = Checkpointer(fake_accelerator(save_state=save_state), tmp_path, {}).save(4)
    assert start(tmp_path, "latest") == saved


def test_checkpoints_from_before_manifests(two):
    for step in (2, 4):
        (two / "checkpoints" / f"checkpoint-{step}" / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json is missing.*--resume_without_manifest true"):
        start(two, "latest")
    newest = two / "checkpoints" / "checkpoint-4"
    with pytest.raises(
        DamagedCheckpointError, match=r"model.safetensors cannot be read .*; optimizer.bin cannot be read"
    ):
        start(two, "latest", without_manifest=True)  # the fake's are noise
    torch.save({"weights": torch.rand(9)}, newest / "optimizer.bin")
    save_file({"weights": torch.rand(9)}, newest / "model.safetensors")
    assert start(two, "latest", without_manifest=True) == newest
    recipe = (newest / "recipe.yaml").read_bytes()
    damage(newest / "recipe.yaml", "half")
    with pytest.raises(DamagedCheckpointError, match=r"recipe.yaml"):
        start(two, "latest", without_manifest=True)
    (newest / "recipe.yaml").write_bytes(recipe)
    damage(newest / "optimizer.bin", "middle bit flipped")
    with pytest.raises(DamagedCheckpointError, match=r"optimizer.bin"):
        start(two, "latest", without_manifest=True)
    damage(newest / "custom_checkpoint_0.pkl", "removed")
    with pytest.raises(DamagedCheckpointError, match=r"custom_checkpoint_0.pkl is missing"):
        start(two, "latest", without_manifest=True)


@pytest.mark.parametrize("way", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_another_way_of_sharing_is_refused(two, way):
    """DeepSpeed would train on from its initial weights."""
    with pytest.raises(ValueError, match="was saved by one process or data parallelism, but this run uses"):
        start(two, "latest", distributed_type=way)


def test_newer_checkpoints_are_set_aside(two):
    set_newer_aside(two, two / "checkpoints" / "checkpoint-2")
    assert [path.name for path in list_checkpoints(two)] == ["checkpoint-2"]
    set_newer_aside(two, two / "checkpoints" / "checkpoint-2")
    assert (two / "checkpoints" / "set-aside-checkpoint-4" / "manifest.json").is_file()
    Checkpointer(fake_accelerator(), two, {"seed": 2}).save(4)  # trained to the same step once more
    (two / "checkpoints" / "set-aside-checkpoint-4").mkdir()
    (two / "checkpoints" / "set-aside-checkpoint-4" / "older").touch()
    set_newer_aside(two, two / "checkpoints" / "checkpoint-2")
    assert read_mapping(two / "checkpoints" / "set-aside-checkpoint-4" / "recipe.yaml") == {"seed": 2}
    assert not (two / "checkpoints" / "set-aside-checkpoint-4" / "older").exists()


def test_a_process_that_wrote_nothing_fails_the_save(tmp_path):
    prepare_output_dir(tmp_path, None, False)
    with pytest.raises(FileNotFoundError, match=r"random_states_1.pkl was not written.*one folder for all machines"):
        Checkpointer(fake_accelerator(num_processes=2), tmp_path, {}).save(2)
    assert list_checkpoints(tmp_path) == []


def test_everything_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    flushed, named = [], []
    monkeypatch.setattr("mra.common.files._flush", lambda path: flushed.append((str(path), list(named))))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (named.append(str(target)), rename(path, target))[1])
    prepare_output_dir(tmp_path, None, False)
    (tmp_path / "metrics.jsonl").write_text("")
    target = Checkpointer(fake_accelerator(), tmp_path, {}).save(2)
    before = {Path(path).name for path, names in flushed if str(target) not in names}
    assert before >= {*FILES, ".unfinished-run-checkpoint-2"}
    assert (str(target.parent), [str(target)]) in flushed


def test_no_process_goes_ahead_of_the_others(tmp_path, monkeypatch):
    """Between any two steps all wait: each machine flushes the whole folder, also what the main process is about to rename."""
    accelerator, events = fake_accelerator(), []
    accelerator.wait_for_everyone = lambda: events.append("wait")

    def note(name, original):
        return lambda *arguments: (events.append(name), original(*arguments))[1]

    accelerator.save_state = note("save_state", accelerator.save_state)
    for name in ("write_recipe", "write_manifest", "flush_tree", "replace_folder"):
        monkeypatch.setattr(checkpointing, name, note(name, getattr(checkpointing, name)))
    prepare_output_dir(tmp_path, None, False)
    Checkpointer(accelerator, tmp_path, {}).save(2)
    steps = [["save_state", "write_recipe"], ["write_manifest"], ["flush_tree"], ["replace_folder"]]
    assert events == ["wait", *(event for step in steps for event in (*step, "wait"))]


def test_recipe_of_a_run_shows_that_it_was_cut(tmp_path):
    path = tmp_path / "recipe.yaml"
    write_recipe(path, {"seed": 1, "learning_rate": 1e-4, "note": "ä"})
    whole = path.read_bytes()
    assert read_mapping(path) == {"seed": 1, "learning_rate": 1e-4, "note": "ä"}
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_mapping(path)
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="not readable as YAML"):
        read_mapping(path)


def test_a_full_disk_names_the_model_folder(tmp_path, monkeypatch):
    """The folder of before stays, whatever part of the new one could not be written."""
    model, processor = MRAForPreTraining(tiny_config()), tiny_processor()
    save_model(Accelerator(cpu=True), model, processor, tmp_path / "best", card="of before")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full)
    with pytest.raises(FullDiskError, match="best cannot be written: the disk is full"):
        save_model(Accelerator(cpu=True), model, processor, tmp_path / "best", card="of after")
    assert (tmp_path / "best" / "README.md").read_text() == "of before"
