"""Around a command's work: outputs that are tried before it, and errors that end it with one sentence."""

import contextlib
import errno
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that write through C++ or Rust, or in another process, and lose the number of the error.
_SIGNS = {
    "No space left on device": "No space left on device",
    "Disk quota exceeded": "Disk quota exceeded",
    "File too large": "File too large",
    "PytorchStreamWriter failed writing file": "PytorchStreamWriter failed writing file",
    "inline_container.cc": "a file is shorter than what was written",  # of the same writer
}
_PROJECT = ("__main__", "mra", "data_scripts", "train_pretrain", "train_finetune")
_BLOCK = 1 << 16  # bytes: more than a file system keeps beside its blocks


class FullDiskError(OSError):
    """A disk that is full, in one sentence that names what could not be written."""


def find_full_disk(error: BaseException) -> str | None:
    """Return the words in which an error, or what caused it, says that a disk is full; None if it says something else."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            return current.strerror or os.strerror(current.errno)
        words = next((words for sign, words in _SIGNS.items() if sign in str(current)), None)
        if words is not None:
            return words
        current = current.__cause__ or current.__context__
    return None


@contextlib.contextmanager
def writing_to(output: str | Path) -> Iterator[None]:
    """Name an output where a disk turns out to be full while it is written.

    Raises:
        FullDiskError: in place of whatever the library that wrote raised.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        words = find_full_disk(error)
        if words is None:
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
    """End a command with one sentence where its user can do something about an error.

    Args:
        program: name in front of the sentence.
        output: what the command writes; named where the disk is full.
        errors: kinds whose message is the sentence. A full disk is reported in one, whatever the kind.
        from_libraries: False leaves an error that a library raised, and no code of this project passed on as its own, to
            its traceback: after hours of training it is not one of the arguments.

    Raises:
        SystemExit: with the sentence.
    """
    try:
        with writing_to(output) if output is not None else contextlib.nullcontext():
            yield
    except Exception as error:
        is_plain = isinstance(error, errors) and (from_libraries or _is_raised_here(error))
        if not is_plain and not isinstance(error, FullDiskError):
            raise
        raise SystemExit(f"{program}: {str(error) or repr(error)}") from None


def try_folder(folder: str | Path, option: str) -> None:
    """Try an output folder, or where it will be made, before hours of work; nothing is left there.

    Args:
        folder: to write into.
        option: that names it, for the message.

    Raises:
        ValueError: if it is not a folder or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file, expected a folder: choose another name")
    try:
        existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_BLOCK))
            file.flush()
    except OSError as error:
        free = f" ({_free_space(folder)})" if error.errno in _FULL else ""
        raise ValueError(
            f"{option} {folder} cannot be written: {error.strerror or error}{free}: choose another folder, or correct "
            "its permissions"
        ) from error


def try_file(file: str | Path, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Try the place of an output file before the work; the file itself is left alone.

    Args:
        file: to write.
        option: that names it, for the message.
        suffixes: in lower case, one of which it must have; any where there are none.

    Raises:
        ValueError: if it is a folder, its own folder does not exist or cannot be written, or its suffix is another.
    """
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder, expected a file: add a name")
    if suffixes and file.suffix.lower() not in suffixes:
        raise ValueError(
            f"{option} {file} cannot be written with the suffix {file.suffix!r}, expected one of {', '.join(suffixes)}"
        )
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file} cannot be written: there is no folder {file.parent}")
    try_folder(file.parent, option)


def _is_raised_here(error: BaseException) -> bool:
    """Return whether code of this project raised an error, a built-in function that it called included."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "").split(".")[0]
    return module in _PROJECT or module.endswith("_mra")


def _free_space(output: str | Path) -> str:
    """Return how much is free on the disk of an output, which need not exist."""
    folder = next(folder for folder in (Path(output).absolute(), *Path(output).absolute().parents) if folder.is_dir())
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free in {folder}"
