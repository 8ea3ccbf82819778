"""Tables of a data set on disk or on the Hub, never an outdated copy."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, overload

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

from mra.common.command_line import FullDiskError, writing_to
from mra.common.streaming import StreamedTable, Streaming


Table = datasets.Dataset | StreamedTable

_NOT_FOUND = (DatasetNotFoundError, DataFilesNotFoundError, EmptyDatasetError)
# What the Hub calls a data set: a name, after that of its owner or not.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@overload
def load_split(
    name: str,
    split: str | None = None,
    streaming: None = None,
    *,
    argument: str = "dataset",
    expected: str = "",
    optional: Literal[False] = False,
) -> datasets.Dataset: ...


@overload
def load_split(
    name: str,
    split: str | None = None,
    streaming: None = None,
    *,
    argument: str = "dataset",
    expected: str = "",
    optional: bool,
) -> datasets.Dataset | None: ...


@overload
def load_split(
    name: str,
    split: str | None = None,
    streaming: Streaming | None = None,
    *,
    argument: str = "dataset",
    expected: str = "",
    optional: Literal[False] = False,
) -> Table: ...


def load_split(
    name: str,
    split: str | None = None,
    streaming: Streaming | None = None,
    *,
    argument: str = "dataset",
    expected: str = "a prepared set as `mra prepare` writes it",
    optional: bool = False,
) -> Table | None:
    """Load one split of a data set, never an outdated copy of a folder.

    Args:
        name: folder or Hub id.
        split: its name, or a slice such as `validation[:200]`; None for the only one.
        streaming: how to read it piece by piece; None copies it into a table on disk first.
        argument: what errors call the data set.
        expected: what errors ask for.
        optional: return None if there is no such split.

    Raises:
        ValueError: if there is no such data set or split, or a file of it cannot be read, which is then named.
        FullDiskError: if there is no room for the table.
    """
    if not os.path.exists(name) and not _HUB_ID.fullmatch(name):  # the Hub would be asked several times
        raise ValueError(f"{argument} {name}: there is no such folder; expected {expected}")
    with _readable(name, argument, expected):
        builder = open_builder(name)
    splits = [str(known) for known in builder.config.data_files or builder.info.splits or ()]
    if split is None:
        if len(splits) != 1:
            raise ValueError(f"{argument} {name} has the splits {', '.join(splits) or 'none'}: choose one with split")
        (split,) = splits
    elif not {*split_names(split)} <= {*splits, "all"}:
        if optional:
            return None
        raise ValueError(f"{argument} {name} has no split {split}: expected one of {', '.join(splits)}")
    if streaming is not None:
        return _open_streamed(builder, split, streaming)
    with _readable(name, argument, expected), writing_to(datasets.config.HF_DATASETS_CACHE):
        return datasets.load_dataset(name, split=split, cache_dir=cache_folder(name))


def split_names(split: str) -> list[str]:
    """Return the names of the splits that a slice takes from: `train[:10]+test` gives `train` and `test`."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def open_builder(name: str) -> datasets.DatasetBuilder:
    """Find files, features and splits of a data set without reading its rows.

    Args:
        name: folder or Hub id.

    Returns:
        The builder whose tables `load_split` gives.

    Raises:
        Exception: what `load_dataset_builder` raises, of many kinds.
    """
    return datasets.load_dataset_builder(name, cache_dir=cache_folder(name))


def cache_folder(name: str) -> str | None:
    """Choose where `datasets` keeps its copy of a data set.

    `datasets` knows its copy of a folder by the folder's name, the card and the patterns in it: files that changed under
    the same names, and another folder of that name, would get the copy that is there. Copies of a folder therefore lie in
    a place of their own, which follows from path, size and times of each file. The times include that of the last change
    of the file's entry (`ctime`), which tools that keep the modification time (`rsync -t`, `cp -p`) cannot set. The Hub
    needs none of this: there the copy is known by the commit.

    Args:
        name: folder or Hub id.

    Returns:
        A folder below the usual cache; None, which means the usual one, for anything but a folder.

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
    """Name the content of a folder by names and sizes of its files: the same wherever the folder lies.

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
    except _NOT_FOUND:
        return None  # the caller reports it
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


@contextlib.contextmanager
def _readable(name: str, argument: str, expected: str) -> Iterator[None]:
    """Turn what `datasets` raises, which is of many kinds, into a `ValueError` that names the data set and the file."""
    try:
        yield
    except FullDiskError:
        raise
    except _NOT_FOUND as error:
        known = "a folder without data" if os.path.isdir(name) else "neither a folder nor a data set on the Hub"
        raise ValueError(f"{argument} {name} is {known}; expected {expected} ({error})") from error
    except ConnectionError as error:
        raise ValueError(
            f"{argument} {name} is not a folder, and the Hub cannot be reached; check the path or the connection ({error})"
        ) from error
    except Exception as error:
        damage = _find_damaged_file(name) or f"{type(error).__name__}: {error.__cause__ or error}"
        raise ValueError(f"{argument} {name} cannot be read: {damage}; expected {expected}") from error


def _find_damaged_file(name: str) -> str | None:
    """Return the first Parquet file of a folder that cannot be read whole, and why."""
    for file in sorted(Path(name).rglob("*.parquet")) if os.path.isdir(name) else ():
        try:
            with pq.ParquetFile(file) as opened:
                for _ in opened.iter_batches():
                    pass
        except (pa.ArrowException, OSError, ValueError) as error:
            return f"{file}: {error}"
    return None


def _open_streamed(builder: datasets.DatasetBuilder, split: str, streaming: Streaming) -> StreamedTable:
    """Open a split, or a slice of one, for streaming."""
    names = split_names(split)
    if len(names) > 1:
        raise ValueError(f"`streaming` reads one split, got {split}")
    table = StreamedTable((builder.config.data_files or {}).get(names[0], []), streaming, builder.info.features)
    if names == [split]:
        return table
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({names[0]: len(table)})
    return table.select(np.arange(len(table))[part.from_ : part.to])
