"""Checks of output paths before a command's work, and one-line messages for its errors."""

import contextlib
import errno
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Messages of libraries that write through C++ or Rust, or in another process, and lose the error number.
_SIGNS = {
    "No space left on device": "No space left on device",
    "Disk quota exceeded": "Disk quota exceeded",
    "File too large": "File too large",
    "PytorchStreamWriter failed writing file": "PytorchStreamWriter failed writing file",
    "inline_container.cc": "a file is shorter than what was written",  # from the same writer
    "Not enough disk space": "Not enough disk space",  # of datasets, before it writes
}
# Parts of PyTorch's messages if the batches of a data loader's workers do not fit into memory that processes share.
_SHARED_MEMORY = ("out of shared memory", "shared memory(shm)", "</torch_")
_PROJECT = ("__main__", "mra", "data_scripts", "train_pretrain", "train_finetune")
_BLOCK = 1 << 16  # bytes: more than a file system stores inline


class FullDiskError(OSError):
    """Full disk; the message names what could not be written."""


def find_full_disk(error: BaseException) -> str | None:
    """Return the part of an error, or of its causes, that reports a full disk; None if there is no such part."""
    for current in _chain(error):
        if isinstance(current, OSError) and current.errno in _FULL:
            return current.strerror or os.strerror(current.errno)
        words = next((words for sign, words in _SIGNS.items() if sign in str(current)), None)
        if words is not None:
            return words
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, which may form a circle."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


@contextlib.contextmanager
def writing_to(output: str | Path) -> Iterator[None]:
    """Raise an error that names the output if the disk is full while writing it.

    Raises:
        FullDiskError: instead of the library's own error.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        words = find_full_disk(error)
        if words is None or _is_shared_memory_full(error):
            raise
        raise FullDiskError(
            f"{output} cannot be written: the disk is full ({words}; {_free_space(output)}): free some space or choose "
            "another folder, and run the command again; what was there before is unchanged"
        ) from error


@contextlib.contextmanager
def plain_errors(
    program: str,
    output: str | Path | None = None,
    errors: tuple[type[Exception], ...] = (ValueError, OSError),
    from_libraries: bool = True,
) -> Iterator[None]:
    """Exit with a one-line message for errors that the user can fix.

    Args:
        program: name at the start of the message.
        output: path that the command writes to; named if the disk is full.
        errors: types of errors to report in one line. A full disk, and a full /dev/shm, are always reported in one line.
        from_libraries: False keeps the traceback of errors that a library raised and this project did not wrap: after
            hours of training they are not caused by the arguments.

    Raises:
        SystemExit: with the message.
    """
    try:
        with writing_to(output) if output is not None else contextlib.nullcontext():
            yield
    except Exception as error:
        if _is_shared_memory_full(error):
            _free_frames(error)
            raise SystemExit(
                f"{program}: the batches of the data loader's workers do not fit into /dev/shm ({_free_space('/dev/shm')}): "
                "use --num_workers 0, or enlarge it"
            ) from None
        is_plain = isinstance(error, errors) and (from_libraries or _is_raised_here(error))
        if not is_plain and not isinstance(error, FullDiskError):
            raise
        _free_frames(error)
        raise SystemExit(f"{program}: {str(error) or repr(error)}") from None


def _is_shared_memory_full(error: BaseException) -> bool:
    """Return whether an error is that of workers of a data loader without shared memory, which PyTorch raises as others."""
    for part in _chain(error):
        if any(sign in str(part) for sign in _SHARED_MEMORY):
            return True
        module = _raised_in(part)
        if isinstance(part, OSError) and part.errno in _FULL and module == "multiprocessing.synchronize":
            return True  # a semaphore, which is a file in /dev/shm
    return False


def _free_frames(error: BaseException) -> None:
    """Free the local variables of an error and its causes, so that open progress bars end above the message."""
    for part in _chain(error):
        traceback.clear_frames(part.__traceback__)


def try_folder(folder: str | Path, option: str) -> None:
    """Check that an output folder can be written before hours of work; leave nothing there.

    Args:
        folder: folder to write to.
        option: option that gave the path, for messages.

    Raises:
        ValueError: if it is not a folder or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file; expected a folder: choose another name")
    _try_writing(folder, folder, option)


def try_output(output: str | Path, option: str) -> None:
    """Check that a file or folder can be created or replaced before hours of work; leave nothing there.

    Args:
        output: path to write; what it holds is not touched.
        option: option that gave the path, for messages.

    Raises:
        ValueError: if the folder that it is to be in cannot be written.
    """
    folder = Path(output).absolute().parent
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{option} {output} cannot be written: {folder} is a file; expected a folder: choose another name"
        )
    _try_writing(folder, output, option)


def _try_writing(folder: Path, output: str | Path, option: str) -> None:
    """Write a file to a folder, or to the first of its parents that exists."""
    try:
        existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_BLOCK))
            file.flush()
    except OSError as error:
        free = f" ({_free_space(folder)})" if error.errno in _FULL else ""
        raise ValueError(
            f"{option} {output} cannot be written: {error.strerror or error}{free}: choose another folder, or correct "
            "its permissions"
        ) from error


def try_file(file: str | Path, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Check that an output file can be written before the work; the file is not touched.

    Args:
        file: path to write to.
        option: option that gave the path, for messages.
        suffixes: allowed suffixes in lower case; empty allows any.

    Raises:
        ValueError: if it is a folder, its parent does not exist or cannot be written, or the suffix is not allowed.
    """
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder; expected a file: add a file name")
    if suffixes and file.suffix.lower() not in suffixes:
        raise ValueError(
            f"{option} {file} cannot be written with the suffix {file.suffix!r}, expected one of {', '.join(suffixes)}"
        )
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file} cannot be written: there is no folder {file.parent}")
    try_output(file, option)


def _is_raised_here(error: BaseException) -> bool:
    """Return whether an error was raised by this project's code or a built-in function that it called."""
    module = _raised_in(error).split(".")[0]
    return module in _PROJECT or module.endswith("_mra")


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an error, "" if it was not raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def _free_space(output: str | Path) -> str:
    """Return the free space on the disk of an output, which need not exist."""
    folder = next(folder for folder in (Path(output).absolute(), *Path(output).absolute().parents) if folder.is_dir())
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free in {folder}"
