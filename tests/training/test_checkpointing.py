import contextlib
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
from safetensors.torch import save_file

from modeling_mra import MRAForPreTraining
from mra.common.command_line import FullDiskError
from mra.common.recipes import read_mapping
from mra.training import checkpointing
from mra.training.checkpoint_manifest import DamagedCheckpointError, read_manifest
from mra.training.checkpointing import (
    Checkpointer,
    TrainingState,
    changed_keys,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prepare_output_dir,
    save_model,
    set_newer_aside,
    start_output_dir,
    write_recipe,
)
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


def test_a_folder_survives_a_kill_between_its_moves(tmp_path):
    (tmp_path / ".replaced-0-best").mkdir()
    (tmp_path / ".replaced-0-best" / "weights").write_text("old")
    prepare_output_dir(tmp_path, "latest", False)
    assert (tmp_path / "best" / "weights").read_text() == "old"


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


def test_no_machine_flushes_while_another_writes_the_manifest(tmp_path, monkeypatch):
    """Each machine flushes the whole folder, also what the main process is about to rename."""
    accelerator, events = fake_accelerator(), []
    accelerator.wait_for_everyone = lambda: events.append("wait")
    for name in ("write_manifest", "flush_tree"):
        original = getattr(checkpointing, name)

        def note(*arguments, name=name, original=original):
            events.append(name)
            return original(*arguments)

        monkeypatch.setattr(checkpointing, name, note)
    prepare_output_dir(tmp_path, None, False)
    Checkpointer(accelerator, tmp_path, {}).save(2)
    begin, end = events.index("write_manifest"), events.index("flush_tree")
    assert "wait" in events[begin:end] and "wait" in events[end:]


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
