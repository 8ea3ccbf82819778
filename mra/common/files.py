"""Files and folders that survive a crash: written under another name, flushed to the disk, then renamed."""

import errno
import os
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file under another name, flush it and rename it, so that after a crash it is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    flush_folder(path.parent)


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
    if os.name == "nt":  # opens no folder, and flushes nothing that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
