"""Tables of a data set on disk or on the Hub, never an outdated copy."""

import hashlib
import os
from pathlib import Path

import datasets


def load_table(name: str, split: str | None = None) -> datasets.Dataset | datasets.DatasetDict:
    """
    Load a data set as `datasets.load_dataset` does, but never an outdated copy of a folder.

    Args:
        name: folder or Hub id.
        split: the one to load; None for all.

    Returns:
        The split, or all by name.

    Raises:
        Exception: what `load_dataset` raises, of many kinds.
    """
    return datasets.load_dataset(name, split=split, cache_dir=cache_folder(name))


def open_builder(name: str) -> datasets.DatasetBuilder:
    """
    Find files, features and splits of a data set without reading its rows.

    Args:
        name: folder or Hub id.

    Returns:
        The builder whose tables `load_table` gives.

    Raises:
        Exception: what `load_dataset_builder` raises, of many kinds.
    """
    return datasets.load_dataset_builder(name, cache_dir=cache_folder(name))


def cache_folder(name: str) -> str | None:
    """
    Choose where `datasets` keeps its copy of a data set.

    `datasets` knows its copy of a folder by the folder's name, the card and the patterns in it: files that changed under
    the same names, and another folder of that name, would get the copy that is there. Copies of a folder therefore lie in
    a place of their own, which follows from path, size and times of each file. The times include that of the last change
    of the file's entry (`ctime`), which tools that keep the modification time (`rsync -t`, `cp -p`) cannot set. The Hub
    needs none of this: there the copy is known by the commit.

    Args:
        name: folder or Hub id.

    Returns:
        A folder below the usual cache; None, which means the usual one, for what is no folder.

    Raises:
        Exception: what `load_dataset_builder` raises, of many kinds.
    """
    if not os.path.isdir(name):
        return None
    digest = hashlib.blake2b(os.path.realpath(name).encode(errors="surrogateescape"), digest_size=8)
    for split, file in _list_files(name):
        state = None
        if os.path.exists(file):
            status = os.stat(file)
            state = (os.path.realpath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(f"{split}:{file}:{state}\n".encode(errors="surrogateescape"))
    return str(Path(datasets.config.HF_DATASETS_CACHE, "folders", digest.hexdigest()))


def files_digest(name: str) -> str | None:
    """
    Name the content of a folder by names and sizes of its files: the same wherever the folder lies.

    The shards of a prepared set have the digest of their rows in their names, so that other rows give another digest.

    Args:
        name: folder or Hub id.

    Returns:
        16 hexadecimal digits; None for what is not a folder of data.
    """
    if not os.path.isdir(name):
        return None
    try:
        files = _list_files(name)
    except (FileNotFoundError, datasets.exceptions.DataFilesNotFoundError, datasets.exceptions.DatasetNotFoundError):
        return None  # whoever loads it says so
    digest = hashlib.blake2b(digest_size=8)
    for split, file in files:
        size = os.path.getsize(file) if os.path.exists(file) else None
        digest.update(
            f"{split}:{os.path.relpath(file, os.path.realpath(name))}:{size}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _list_files(name: str) -> list[tuple[str, str]]:
    data_files = datasets.load_dataset_builder(name).config.data_files or {}
    return [(str(split), str(file)) for split, files in data_files.items() for file in files]
