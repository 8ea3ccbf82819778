"""Files and folders that survive a crash: written under another name, flushed to the disk, then renamed.

An unfinished file or folder lies beside its target as `.unfinished-TOKEN-NAME`; a folder that is being replaced lies there
as `.replaced-TOKEN-NAME` between two renames. The next write of the same target, or [`clean_folder`], removes what a
process that was killed left, and gives a replaced folder its name back where the new one never took it.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mra.common.command_line import writing_to


_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"
_NAME = re.compile(rf"({re.escape(_UNFINISHED)}|{re.escape(_REPLACED)})([0-9a-z]+)-(.+)", re.DOTALL)
_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def whole_file(path: str | Path, flush: bool = True) -> Iterator[Path]:
    """Give a path to write to, with the suffix of the target, which takes the target's name once everything is in it.

    Args:
        path: of the file; its folder is made, an older file is replaced.
        flush: write it to the disk before it is renamed. False is for what can be distinguished from a damaged file.

    Raises:
        FullDiskError: if the disk is full; the older file is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path)
    unfinished = unfinished_path(path)
    with _in_use(unfinished, unfinished.touch):
        try:
            with writing_to(path):
                yield unfinished
                if flush:
                    _flush(unfinished)
                os.replace(unfinished, path)
                if flush:
                    flush_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path, replaces: str | None = None) -> Iterator[Path]:
    """Give an empty folder that takes the name of the target, over an older folder or file, once everything is in it.

    Args:
        path: of the folder; the folder above is made.
        replaces: a file that an older folder must hold to be replaced, unless it is empty; any is when absent.

    Raises:
        ValueError: if the older folder lacks that file.
        FullDiskError: if the disk is full; the older folder is unchanged.
    """
    path = Path(path)
    if replaces is not None and path.is_dir() and any(path.iterdir()) and not (path / replaces).exists():
        raise ValueError(f"{path} is a folder without {replaces} and is not replaced: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path)
    unfinished = unfinished_path(path)
    with _in_use(unfinished, unfinished.mkdir):
        try:
            with writing_to(path):
                yield unfinished
                replace_folder(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file so that after a crash it is whole or as it was before."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_folder(source: str | Path, target: str | Path) -> None:
    """Flush a finished folder to the disk and give it its name, over an older folder or file of that name."""
    source, target = Path(source), Path(target)
    flush_tree(source)
    replaced = target.with_name(f"{_REPLACED}{secrets.token_hex(4)}-{target.name}")
    if os.path.lexists(target):
        target.rename(replaced)
    try:
        source.rename(target)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(target)
        raise
    flush_folder(target.parent)
    _remove(replaced)


def unfinished_path(path: str | Path, token: str | None = None) -> Path:
    """Return the path beside a target to write it under.

    Args:
        path: of the target.
        token: in lower case, where several processes must come to the same path; unique when absent.
    """
    path = Path(path)
    return path.with_name(f"{_UNFINISHED}{token or secrets.token_hex(4)}-{path.name}")


def is_unfinished(path: Path) -> bool:
    """Return whether a path is named as unfinished work."""
    return _NAME.fullmatch(path.name) is not None


# ---------------------------------------------------------------- cleaning


def clean(path: str | Path) -> list[Path]:
    """Remove what killed processes left of a target, and give a replaced folder its name back where it has none.

    What a living process writes stays.

    Returns:
        What was removed or renamed.
    """
    path = Path(path)
    return _clean(path.parent, path.name) if path.parent.is_dir() else []


def clean_folder(folder: str | Path) -> list[Path]:
    """Do what [`clean`] does for every target in a folder."""
    return _clean(Path(folder))


def _clean(folder: Path, target: str | None = None) -> list[Path]:
    cleaned = []
    for found in sorted(folder.glob(".*")):
        match = _NAME.fullmatch(found.name)
        if match is None or target not in (None, match[3]) or _is_in_use(found):
            continue
        original = found.with_name(match[3])
        if match[1] == _REPLACED and not os.path.lexists(original):
            found.rename(original)
        else:
            _remove(found)
        cleaned.append(found)
    return cleaned


@contextlib.contextmanager
def _in_use(path: Path, make: Callable[[], Any]) -> Iterator[None]:
    """Make a file or folder and hold a lock on it, so that no other process takes it for left behind."""
    make()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _without_locks():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # another process was faster
        return True
    try:
        with _without_locks():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _without_locks() -> Iterator[None]:
    """Go on where a file system has no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _remove(path: Path) -> None:
    """Remove a file or folder; what cannot be removed now is left for the next cleaning."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- flushing


def flush_tree(folder: str | Path) -> None:
    """Flush every file and folder below a folder, and the folder itself, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent) / name)
        flush_folder(parent)


def flush_folder(folder: str | Path) -> None:
    """Flush the names in a folder to the disk, where the file system can."""
    try:
        _flush(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems flush files alone
            raise


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
