"""Manifest of a checkpoint: the list of its files, written last and verified before anything is loaded."""

import hashlib
import json
import random
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DeepSpeedPlugin, gather_object, load
from safetensors import safe_open

from mra.common.files import write_whole


MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_CHUNK = 4 * 2**20
_THREADS = 8
_RANDOM_STATES = ("random_state", "numpy_random_seed", "torch_manual_seed")
_SHARDED = {
    "zero": "pytorch_model/*_optim_states.pt",
    "fsdp": "pytorch_model_fsdp*",
}  # files that only these ways of saving write


class DamagedCheckpointError(ValueError):
    """Damaged checkpoint; the message names the files and what to do."""


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint when it was saved.

    Attributes:
        step: optimizer steps done.
        num_processes: processes that saved it.
        distributed_type: how they shared the work, as Accelerate calls it.
        zero_stage: stage of DeepSpeed's ZeRO; None without.
        devices: device of each process.
        files: size in bytes and SHA-256 of each file by its path, without the manifest itself.
    """

    step: int
    num_processes: int
    distributed_type: str
    zero_stage: int | None
    devices: list[str]
    files: dict[str, dict[str, Any]]

    def to_json(self) -> str:
        """Return the manifest as JSON; the last entry is a digest of all others."""
        content = {"format": _FORMAT, **asdict(self)}
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content, indent=2) + "\n"


# ---------------------------------------------------------------- writing


def write_manifest(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write the manifest of a checkpoint; every process must call this after all have written their files.

    Each process hashes a share of the files.

    Args:
        accelerator: the run's accelerator.
        folder: folder of the checkpoint.
        step: optimizer steps done.

    Raises:
        FileNotFoundError: if the random states of a process are missing.
    """
    views = gather_object([_list_files(folder)])
    files = {name: size for view in views for name, size in view.items()}
    for rank in range(accelerator.num_processes):
        if _random_states_file(rank) not in files:
            raise FileNotFoundError(
                f"{folder}: {_random_states_file(rank)} was not written; `output_dir` must be one folder for all machines"
            )
    largest_first = sorted(files, key=lambda name: (-files[name], name))
    # A network file system may show files of another process late.
    owners = [[rank for rank, view in enumerate(views) if name in view] for name in largest_first]
    mine = [
        name
        for place, (name, ranks) in enumerate(zip(largest_first, owners, strict=True))
        if ranks[place % len(ranks)] == accelerator.process_index
    ]
    hashes = dict(gather_object(list(zip(mine, _hash_files(folder, mine), strict=True))))
    devices = gather_object([str(accelerator.device)])
    if accelerator.is_main_process:
        manifest = Manifest(
            step,
            accelerator.num_processes,
            accelerator.distributed_type.value,
            zero_stage(accelerator),
            devices,
            {name: {"size": files[name], "sha256": hashes[name]} for name in sorted(files)},
        )
        write_whole(folder / MANIFEST_FILE, manifest.to_json())


def _list_files(folder: Path) -> dict[str, int]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _hash_files(folder: Path, names: list[str]) -> list[str]:
    """Hash files in parallel threads: hashing releases the GIL."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda name: _hash_file(folder / name), names))


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- verifying


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: if it is damaged.
        FileNotFoundError: if there is none.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        written = Manifest(**{name: value for name, value in content.items() if name not in ("format", "digest")})
        if content["format"] != _FORMAT:
            raise DamagedCheckpointError(f"{MANIFEST_FILE} has format {content['format']!r}, expected {_FORMAT}")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedCheckpointError(f"{MANIFEST_FILE} is not a complete manifest") from None
    if text != written.to_json():
        raise DamagedCheckpointError(f"{MANIFEST_FILE} was changed after it was written")
    return written


def find_damage(
    accelerator: Accelerator,
    checkpoint: Path,
    check_contents: Callable[[Path], None],
    without_manifest: str | None = None,
) -> list[str]:
    """Compare a checkpoint with its manifest; every process must call this and gets the same result.

    Every process looks for every file, hashes a share of them and reads the random states that it will load.

    Args:
        accelerator: the run's accelerator.
        checkpoint: the folder.
        check_contents: raises a `ValueError` if other small files have wrong content; called by the main process.
        without_manifest: option that accepts a checkpoint without a manifest, for the message; None accepts it and verifies
            only what its files allow.

    Returns:
        One message per damaged file; empty for an undamaged checkpoint.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    try:
        manifest = read_manifest(checkpoint)
        damage = _compare_files(checkpoint, manifest, rank, count)
        if not damage and f"checkpoint-{manifest.step}" != checkpoint.name:
            damage = [f"{MANIFEST_FILE} is that of checkpoint-{manifest.step}"]
    except DamagedCheckpointError as error:
        damage = [str(error)]
    except FileNotFoundError:
        if without_manifest is None:
            damage = _check_files_alone(checkpoint, rank, count)
        else:
            damage = [f"{MANIFEST_FILE} is missing (accept checkpoints of earlier versions with {without_manifest})"]
    if not damage:
        damage = _collect(
            *(lambda path=path: read_random_states(path) for path in _random_states(checkpoint)[rank::count]),
            *([lambda: check_contents(checkpoint)] if accelerator.is_main_process else []),
        )
    return list(dict.fromkeys(gather_object(damage)))


def _compare_files(folder: Path, manifest: Manifest, rank: int, count: int) -> list[str]:
    damage = []
    for name, expected in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            damage.append(f"{name} is missing" if missing else f"{name} cannot be read ({error.strerror or error})")
            continue
        if size != expected["size"]:
            damage.append(f"{name} holds {size:,} bytes instead of {expected['size']:,}")
    if damage:
        return damage

    def compare(name: str) -> str | None:
        try:
            digest = _hash_file(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        return None if digest == manifest.files[name]["sha256"] else f"{name} was changed after it was saved"

    mine = sorted(manifest.files, key=lambda name: (-manifest.files[name]["size"], name))[rank::count]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [text for text in threads.map(compare, mine) if text]


def _check_files_alone(folder: Path, rank: int, count: int) -> list[str]:
    """Verify a checkpoint without a manifest: required files, and the checksums in PyTorch's files."""
    names = _list_files(folder)
    way = saved_by(folder)
    wanted = ["recipe.yaml", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", _random_states_file(0)]
    wanted += {"plain": ["model.safetensors", "optimizer.bin"]}.get(way, [])
    damage = [f"{name} is missing" for name in wanted if name not in names]

    def open_archive(name: str) -> None:
        with zipfile.ZipFile(folder / name) as archive:
            if archive.testzip():
                raise ValueError(f"{name} was changed after it was saved")

    def check(name: str) -> None:
        try:
            if name.endswith(".safetensors"):
                safe_open(folder / name, "pt").keys()
            elif name.endswith((".bin", ".pkl", ".pt")):
                open_archive(name)
        except ValueError as error:
            raise error
        except Exception as error:
            raise ValueError(f"{name} cannot be read ({error})") from None

    return damage + _collect(*(lambda name=name: check(name) for name in sorted(names)[rank::count]))


def _collect(*checks: Callable[[], Any]) -> list[str]:
    """Run checks and return the messages of those that failed."""
    damage = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            damage.append(str(error))
    return damage


# ---------------------------------------------------------------- how it was saved


def saved_by(checkpoint: Path) -> str:
    """Return how a checkpoint was saved, judged by its files: `plain`, `zero` or `fsdp`."""
    return next((way for way, pattern in _SHARDED.items() if any(checkpoint.glob(pattern))), "plain")


def check_way(accelerator: Accelerator, checkpoint: Path) -> None:
    """Check that a run shards its states as the checkpoint does: DeepSpeed silently ignores files that it does not know.

    Raises:
        ValueError: if it does not.
    """
    ways = {DistributedType.DEEPSPEED: "zero", DistributedType.FSDP: "fsdp"}
    names = {"zero": "DeepSpeed ZeRO", "fsdp": "FSDP", "plain": "one process or data parallelism"}
    before, now = saved_by(checkpoint), ways.get(accelerator.distributed_type, "plain")
    stages = (None, None)
    if before == now == "zero" and (checkpoint / MANIFEST_FILE).is_file():
        stages = read_manifest(checkpoint).zero_stage, zero_stage(accelerator)
    if before != now or stages[0] != stages[1]:
        then, here = (
            f"{names[way]}{'' if stage is None else f'-{stage}'}"
            for way, stage in zip((before, now), stages, strict=True)
        )
        raise ValueError(
            f"`resume`: {checkpoint} was saved by {then}, but this run uses {here}; launch it with the accelerate "
            "config that saved the checkpoint"
        )


def zero_stage(accelerator: Accelerator) -> int | None:
    """Return the stage of DeepSpeed's ZeRO; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return cast(DeepSpeedPlugin, accelerator.state.deepspeed_plugin).zero_stage


# ---------------------------------------------------------------- random states


def count_processes(checkpoint: Path) -> int:
    """Return the number of processes that saved a checkpoint, from the files of their random states."""
    return len(_random_states(checkpoint))


def _random_states(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob(_random_states_file("*")))


def _random_states_file(rank: int | str) -> str:
    return f"random_states_{rank}.pkl"


def read_random_states(path: Path) -> dict[str, Any]:
    """Read the random states of one process, as saved by Accelerate.

    Raises:
        ValueError: if the file cannot be read or does not hold random states.
    """
    try:
        states = load(path, map_location="cpu")
        random.Random().setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
    except Exception as error:  # unpickling and the generators can raise anything
        message = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path.name} does not hold the random states of a process ({message})") from None
    return states


def restore_random_states(accelerator: Accelerator, checkpoint: Path) -> str | None:
    """Restore this process's random states: Accelerate continues silently if it cannot.

    Args:
        accelerator: the run's accelerator, after `load_state`.
        checkpoint: folder that [`find_damage`] has verified.

    Returns:
        What was not restored, for a warning; None if everything was restored.

    Raises:
        ValueError: if this process's file does not hold random states.
    """
    saved, device = count_processes(checkpoint), accelerator.device
    if saved != accelerator.num_processes:
        return (
            f"the random states are those of {saved} processes but the run has {accelerator.num_processes}, so "
            "dropout draws other numbers; order, augmentation and masks depend on the seed and stay the same"
        )
    states = read_random_states(checkpoint / _random_states_file(accelerator.process_index))
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if device.type == "cpu":
        return None
    before = device
    if (checkpoint / MANIFEST_FILE).is_file():
        before = torch.device(read_manifest(checkpoint).devices[accelerator.process_index])
    of_devices = states.get(f"torch_{device.type}_manual_seed", [])
    if before.type != device.type or (before.index or 0) >= len(of_devices):
        return (
            f"the random state of {device} was not saved (the process ran on {before}), so dropout draws other numbers"
        )
    torch.get_device_module(device).set_rng_state(of_devices[before.index or 0], device)
    return None
