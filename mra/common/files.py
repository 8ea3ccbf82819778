"""Files and folders that survive a crash: written under a temporary name, flushed to disk, then renamed.

An unfinished file or folder is stored next to its target as `.unfinished-TOKEN-NAME`; a folder that is being replaced is
called `.replaced-TOKEN-NAME` between two renames. The next write of the same target, or [`clean_folder`], removes what a
killed process left, and restores a replaced folder if the new one never took its place.
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
    """Yield a temporary path with the target's suffix; on success, rename it to the target.

    Args:
        path: the file; its folder is created, an older file is replaced.
        flush: flush to disk before renaming. False is for formats in which damage can be detected.

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
                mode = unfinished.stat().st_mode & 0o666
                yield unfinished
                _allow(unfinished, mode)
                if flush:
                    _flush(unfinished)
                os.replace(unfinished, path)
                if flush:
                    flush_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path, replaces: str | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder; on success, rename it to the target, replacing an older folder or file.

    Args:
        path: the folder; its parent is created.
        replaces: name of a file that a non-empty older folder must hold to be replaced; None replaces any folder.

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
    """Write a file atomically: after a crash it holds either the old or the new content."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_folder(source: str | Path, target: str | Path) -> None:
    """Flush a finished folder to disk and rename it to its target, replacing an older folder or file."""
    source, target = Path(source), Path(target)
    for path in source.rglob("*"):
        if path.is_file():
            _allow(path, source.stat().st_mode & 0o666)
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
    """Return the temporary path next to a target.

    Args:
        path: the target.
        token: lower-case token by which several processes get the same path; None for a unique one.
    """
    path = Path(path)
    return path.with_name(f"{_UNFINISHED}{token or secrets.token_hex(4)}-{path.name}")


def is_unfinished(path: Path) -> bool:
    """Return whether a path is named as unfinished work."""
    return _NAME.fullmatch(path.name) is not None


# ---------------------------------------------------------------- cleaning


def clean(path: str | Path) -> list[Path]:
    """Remove what killed processes left of a target, and restore a replaced folder without a successor.

    Work of running processes is kept.

    Returns:
        Paths that were removed or renamed.
    """
    path = Path(path)
    return _clean(path.parent, path.name) if path.parent.is_dir() else []


def clean_folder(folder: str | Path) -> list[Path]:
    """Apply [`clean`] to every target in a folder."""
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
    """Create a file or folder and hold a lock on it, so that no other process treats it as abandoned."""
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
    """Ignore the errors of file systems without locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _remove(path: Path) -> None:
    """Remove a file or folder; anything that cannot be removed is left for the next cleanup."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _allow(path: Path, mode: int) -> None:
    """Add the permissions that the umask allows: safetensors writes files that only their owner can read."""
    now = path.stat().st_mode
    if now | mode != now:
        path.chmod(now | mode)


# ---------------------------------------------------------------- flushing


def flush_tree(folder: str | Path) -> None:
    """Flush a folder and everything below it to disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent) / name)
        flush_folder(parent)


def flush_folder(folder: str | Path) -> None:
    """Flush the entries of a folder to disk, if the file system supports it."""
    try:
        _flush(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems can only flush files
            raise


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
