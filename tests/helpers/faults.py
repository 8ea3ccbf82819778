"""Real commands in processes of their own, the faults that meet them, and what they leave on a small disk."""

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.helpers.dad import PRELOADED


TIMEOUT = 240
MIB = 2**20
_PRELOADED = [*PRELOADED, "mra.cli", "mra.gallery.index", "mra.gallery.search", "pymilvus", "milvus_lite.db"]
_PRELOADED += ["eval_retrieval", "convert_checkpoint", "data_scripts.make_sample", "data_scripts.prepare_sda"]
_PRELOADED += ["data_scripts.prepare_pedes", "mra.retrieval.export", "onnxruntime", "onnxscript", "torch.onnx"]
_PRELOADED += ["data_scripts.dad.augment_captions", "data_scripts.dad.report", "transformers.models.bert"]
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _MNT_DETACH = 0x20000, 2
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 0x4000, 0x40000
_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")  # and what opens a file to write


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: exit code, negative where a signal ended it.
        shown: standard output and error.
        events: how often it changed the names or opened a file of its folder to write.
    """

    code: int
    shown: str
    events: int

    @property
    def sentence(self) -> str:
        """Return what the command says of its failure: the last line."""
        lines = [line for line in self.shown.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def names(self, output: str) -> bool:
        """Return whether the sentence names a file or folder."""
        return re.search(rf"(^|[\s/]){re.escape(output)}\b", self.sentence) is not None


def run(
    arguments: list[str],
    folder: Path,
    *,
    at: int | None = None,
    fault: Callable[[], object] | None = None,
    umask: int | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a command in a process forked from one that has imported everything, as if it were started in `folder`.

    Args:
        arguments: the name of the module, run as a script, and its command line.
        folder: the working folder, and the one whose changes are counted.
        at: number of a change, from 1.
        fault: what happens before that change; it can be pickled.
        umask: of the process.
        environment: variables that it gets.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        log, counter = Path(scratch, "log"), Path(scratch, "events")
        log.touch()
        (temporary := Path(scratch, "tmp")).mkdir()
        variables = {"TMPDIR": str(temporary), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        variables |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "120"} | (environment or {})
        fields = (list(arguments), str(folder), str(log), str(counter), at, fault, umask, variables)
        process = context.Process(target=_work, args=fields)
        process.start()
        process.join(TIMEOUT)
        stuck = process.exitcode is None
        with contextlib.suppress(ProcessLookupError):  # and what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.join(TIMEOUT)
        shown = log.read_text(errors="replace")
        assert not stuck, f"{arguments} does not end: {shown}"
        events = counter.stat().st_size if counter.exists() else 0
        left = sorted(path.name for path in temporary.iterdir()) if process.exitcode >= 0 else []
        assert not left, f"{arguments} left {left} among the temporary files"
        return Outcome(process.exitcode, shown, events)


def _work(arguments, folder, log, counter, at, fault, umask, variables):
    os.setsid()
    os.chdir(folder)
    if umask is not None:
        os.umask(umask)
    os.environ.update(variables)
    tempfile.tempdir = None
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    multiprocessing.set_start_method("fork", force=True)  # as in a script
    torch.set_num_threads(1)
    _watch(os.path.realpath(folder), counter, at, fault)
    module, *argv = arguments
    sys.argv = [module, *argv]
    sys.modules.pop(module, None)  # what is run as a script is not imported before
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _watch(folder: str, counter: str, at: int | None, fault: Callable[[], object] | None) -> None:
    """Count the changes below a folder, of this process and of those it forks; the fault happens before one of them."""
    events = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    busy = False

    def hook(name: str, values: tuple) -> None:
        nonlocal busy
        if busy or (name != "open" and name not in _EVENTS):
            return
        if name == "open" and not (
            isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        ):
            return
        if not isinstance(values[0], (str, bytes)) or not os.path.realpath(os.fsdecode(values[0])).startswith(folder):
            return
        busy = True
        os.write(events, b".")
        if at is not None and fault is not None and os.fstat(events).st_size == at:
            fault()
        busy = False

    sys.addaudithook(hook)


def kill() -> None:
    """Kill this process and those it started."""
    os.killpg(0, signal.SIGKILL)


def fill(folder: Path) -> None:
    """Write a file until the disk is full."""
    with open(folder / BALLAST, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB))
    with open(folder / BALLAST, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


BALLAST = "ballast"


# ---------------------------------------------------------------- disks


def leave_mounts() -> None:
    """Give this process, and those it starts, mounts of its own, which end with the last of them, however that ends.

    Raises:
        OSError: if the system does not allow it.
    """
    _check(_LIBRARY.unshare(_CLONE_NEWNS))
    _check(_LIBRARY.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))


def why_no_disks() -> str | None:
    """Return why this process cannot mount a disk; None where it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _mount(Path(folder), "size=64k")
        except OSError as error:
            return f"cannot mount a small disk: {error}"
        _unmount(Path(folder))
    return None


@contextlib.contextmanager
def small_disk(folder: Path, size: int = 64 * MIB) -> Iterator[Path]:
    """Mount a disk of some bytes, in memory, after `leave_mounts`.

    Args:
        folder: to mount it on.
        size: in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _mount(folder, f"size={size}")
    try:
        yield folder
    finally:
        _unmount(folder)


def remount(folder: Path, options: str) -> None:
    """Change the size of a disk (`size=BYTES`), or make it read-only (`ro`) or writable (`rw`)."""
    _mount(folder, options, _MS_REMOUNT)


def used_bytes(folder: Path) -> int:
    """Return how much of a disk is used."""
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def _mount(folder: Path, options: str, flags: int = 0) -> None:
    words = options.split(",")
    flags |= _MS_RDONLY if "ro" in words else 0
    data = ",".join(word for word in words if word not in ("ro", "rw"))
    _check(_LIBRARY.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), data.encode()))


def _unmount(folder: Path) -> None:
    _LIBRARY.umount2(os.fsencode(folder), _MNT_DETACH)  # also where a process lies in it


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---------------------------------------------------------------- results


_TIMES = ("timings", "samples_per_second", "seconds", "pairs_per_second", "time", "started", "date", "rows_per_second")


def names(folder: Path) -> set[str]:
    """Return the files and folders below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != BALLAST}


def unfinished(folder: Path) -> list[str]:
    """Return what lies below a folder under a temporary name."""
    ours = re.compile(r"(^|/)\.(?!database-staging)[^/]*$|\.tmp|\.partial|\.incomplete")  # the rest is of milvus-lite
    return sorted(name for name in names(folder) if ours.search(name))


def read_tree(folder: Path, left_out: tuple[str, ...] = ()) -> dict[str, object]:
    """Read all files below a folder so that two runs give the same: without times, archives by their tensors.

    Args:
        folder: to read.
        left_out: names of files of which only their existence counts.
    """
    found: dict[str, object] = {}
    for name in sorted(names(folder)):
        path = folder / name
        if path.is_dir():
            found[name] = "folder"
        elif path.name in left_out:
            found[name] = "file"
        else:
            found[name] = _read(path)
    return found


def _read(path: Path) -> object:
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".pth":
        content = torch.load(path, weights_only=True)
        tensors = {
            name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in content["model"].items()
        }
        return tensors, content["config"]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(inner) for name, inner in value.items() if name not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def read_gallery(path: Path) -> dict[str, object]:
    """Read a gallery: its images with embeddings, tokens, copies, state and files."""
    from mra.gallery.gallery import Gallery

    with Gallery(str(path)) as gallery:
        problems = gallery.verify().problems
        records = {record.key: record for record in gallery._state.store.records(embeddings=True)}
        embeddings = {key: record.embedding.tobytes() for key, record in records.items()}
        tokens = {key: gallery.image_tokens(key).tobytes() for key in records}
        hits = [(hit.key, hit.score) for hit in gallery.search("a red coat", top=40).hits]
        return {"problems": problems, "embeddings": embeddings, "tokens": tokens, "hits": hits}


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """Copy a folder for as long as it is looked at."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(folder, Path(scratch, "copy")))
