"""Loading of datasets from disk or the Hub, never from an outdated cache."""

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
import yaml
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

from mra.common.command_line import FullDiskError, writing_to
from mra.common.digests import check_digests
from mra.common.streaming import StreamedTable, Streaming


Table = datasets.Dataset | StreamedTable

_NOT_FOUND = (DatasetNotFoundError, DataFilesNotFoundError, EmptyDatasetError)
# A dataset id on the Hub: NAME or OWNER/NAME.
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
    expected: str = "a dataset written by `mra prepare`",
    optional: bool = False,
) -> Table | None:
    """Load one split of a dataset, never an outdated cached copy of a folder.

    Args:
        name: folder or Hub id.
        split: name of the split, or a slice like `validation[:200]`; None for the only split.
        streaming: settings to read it piece by piece; None copies it into a table on disk first.
        argument: name of the dataset's argument in errors.
        expected: what the argument should be, for errors.
        optional: return None if there is no such split.

    Raises:
        ValueError: if there is no such dataset or split, or one of its files cannot be read; the message names the file.
        FullDiskError: if the disk has no room for the table.
    """
    if not os.path.exists(name) and not _HUB_ID.fullmatch(name):  # spare several requests to the Hub
        raise ValueError(f"{argument} {name} does not exist; expected {expected}")
    with _readable(name, argument, expected):
        builder = open_builder(name)
    splits = [str(known) for known in builder.config.data_files or builder.info.splits or ()]
    if split is None:
        if len(splits) != 1:
            raise ValueError(
                f"{argument} {name} has the splits {', '.join(splits) or 'none'}: choose one with `split`"
            )
        (split,) = splits
    elif {*split_names(split)} - {*splits, "all"}:
        if optional:
            return None
        raise ValueError(f"{argument} {name} has no split {split}: expected one of {', '.join(splits)}")
    if streaming is not None:
        return _open_streamed(builder, split, streaming)
    if not os.path.isdir(builder.cache_dir):  # else its table was made from these very files
        check_digests(name, argument)
    with _readable(name, argument, expected), writing_to(datasets.config.HF_DATASETS_CACHE):
        return datasets.load_dataset(name, split=split, cache_dir=cache_folder(name))


def split_names(split: str) -> list[str]:
    """Return the names of the splits in a slice: `train[:10]+test` gives `train` and `test`."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def open_builder(name: str) -> datasets.DatasetBuilder:
    """Find files, features and splits of a dataset without reading its rows.

    Args:
        name: folder or Hub id.

    Returns:
        The dataset's builder.

    Raises:
        Exception: any error of `load_dataset_builder`.
    """
    return datasets.load_dataset_builder(name, cache_dir=cache_folder(name))


def cache_folder(name: str) -> str | None:
    """Choose the cache folder of a dataset.

    `datasets` identifies its cached copy of a folder by the folder's name, its card and the patterns in it, so changed files
    under the same names, or another folder of that name, would load the old copy. Folders therefore get their own cache,
    identified by the path, size and times of each file. The times include `ctime`, which tools that preserve the modification
    time (`rsync -t`, `cp -p`) cannot set. Hub datasets need none of this: their copies are identified by the commit.

    Args:
        name: folder or Hub id.

    Returns:
        A folder below the usual cache; None (the usual cache) if `name` is not a folder.

    Raises:
        Exception: any error of `load_dataset_builder`.
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
    """Hash the names and sizes of the files of a folder, regardless of the folder's location.

    The names of a prepared dataset's shards contain the digest of their rows, so other rows give another digest.

    Args:
        name: folder or Hub id.

    Returns:
        16 hexadecimal digits; None if `name` is not a folder with data.
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
    """Turn any error of `datasets` into a `ValueError` that names the dataset and the file."""
    try:
        yield
    except FullDiskError:
        raise
    except _NOT_FOUND as error:
        known = "a folder without data" if os.path.isdir(name) else "neither a folder nor a dataset on the Hub"
        raise ValueError(f"{argument} {name} is {known}; expected {expected} ({error})") from error
    except ConnectionError as error:
        raise ValueError(
            f"{argument} {name} is not a folder, and the Hub cannot be reached; check the path or the connection ({error})"
        ) from error
    except Exception as error:
        check_digests(name, argument)
        damage = _find_damaged_file(name) or f"{type(error).__name__}: {error.__cause__ or error}"
        if isinstance(error, yaml.YAMLError):
            damage = f"{Path(name, 'README.md')} has settings that are not YAML: {' '.join(str(error).split())}"
        raise ValueError(f"{argument} {name} cannot be read: {damage}; expected {expected}") from error


def _find_damaged_file(name: str) -> str | None:
    """Return the first damaged Parquet file of a folder and the error, or None."""
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
