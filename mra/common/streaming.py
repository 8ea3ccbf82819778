"""Streaming of prepared datasets, row group by row group, from a folder or the Hub, without a copy on disk."""

import math
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, cast

import datasets
import fsspec
import fsspec.core
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.logging import get_logger


logger = get_logger(__name__)

_OPENING_THREADS = 16


@dataclass(frozen=True)
class Streaming:
    """Settings of streaming; see [`~mra.training.order.LaneSampler`].

    Attributes:
        lanes: parts of an epoch that are read side by side.
        buffer: size of the shuffle window in rows, over all lanes.
        num_readers: number of processes x workers per process.
    """

    lanes: int
    buffer: int
    num_readers: int

    @property
    def lanes_of_a_reader(self) -> int:
        """Number of lanes that one reader reads from; lanes are shared if they are not a multiple of the readers."""
        return self.lanes // math.gcd(self.lanes, self.num_readers)


class StreamingOptions(Protocol):
    """Options of streaming, as in `DataArguments` of [`mra.training.arguments`]."""

    streaming: bool
    streaming_lanes: int
    streaming_buffer: int
    num_workers: int


def make_streaming(args: StreamingOptions) -> Streaming | None:
    """Return the streaming settings for the processes that `accelerate` started, or None if streaming is off.

    Args:
        args: a `DataArguments`.
    """
    if not args.streaming:
        return None
    streaming = Streaming(
        args.streaming_lanes, args.streaming_buffer, PartialState().num_processes * max(args.num_workers, 1)
    )
    if streaming.lanes % streaming.num_readers:
        logger.warning(
            f"`streaming_lanes` {streaming.lanes} is not a multiple of processes x workers ({streaming.num_readers}), so "
            f"several of them read each row group: set {streaming.num_readers * math.ceil(16 / streaming.num_readers)} "
            "instead"
        )
    return streaming


class StreamedTable:
    """Table of Parquet files with rows read on demand; replaces `datasets.Dataset` in training.

    Opening reads only the files' footers. Every process that reads rows opens the files itself and keeps the row groups used
    last: about `buffer` rows over all readers, and one or two row groups per lane.

    Args:
        files: paths or URLs (`hf://datasets/...`) of the Parquet files, in order.
        streaming: how many rows to keep.
        features: features of the columns; None for those of the files.

    Raises:
        ValueError: if there is no file, one is not a Parquet file, or the files differ in columns.
    """

    def __init__(self, files: list[str], streaming: Streaming, features: datasets.Features | None = None) -> None:
        if not files or not all(str(file).endswith(".parquet") for file in files):
            raise ValueError(
                f"`streaming` reads Parquet files, got {', '.join(map(str, files[:3])) or 'none'}: prepare the dataset with "
                "`mra prepare`, or leave `streaming` out"
            )
        self.files = [str(file) for file in files]
        self.streaming = streaming
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            self._metadata = list(threads.map(_read_footer, self.files))
        schema = self._metadata[0].schema.to_arrow_schema()
        for file, metadata in zip(self.files, self._metadata, strict=True):
            if metadata.schema.to_arrow_schema().names != schema.names:
                raise ValueError(f"{file}: its columns are not those of {self.files[0]}; prepare the dataset again")
        self.features = features or datasets.Features.from_arrow_schema(schema)
        self._groups = [
            (file, group) for file, metadata in enumerate(self._metadata) for group in range(metadata.num_row_groups)
        ]
        lengths = [self._metadata[file].row_group(group).num_rows for file, group in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._longest = max(lengths, default=0)
        self._rows = np.arange(self._starts[-1])
        self._forget()

    def _forget(self) -> None:
        self._process, self._open_files, self._cache, self._cached_rows = None, {}, OrderedDict(), 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_process": None, "_open_files": {}, "_cache": OrderedDict(), "_cached_rows": 0}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def column_names(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.features)

    @property
    def row_groups(self) -> np.ndarray:
        """Return the row group of each row, counted over all files, `(rows,)`."""
        return np.searchsorted(self._starts, self._rows, side="right") - 1

    def select(self, rows: np.ndarray) -> "StreamedTable":
        """Return a table of some rows of this one."""
        selected = object.__new__(StreamedTable)
        selected.__dict__.update(self.__getstate__())
        selected._rows = self._rows[rows]
        return selected

    def select_columns(self, names: list[str]) -> "StreamedTable":
        """Return a table of some columns of this one."""
        selected = self.select(np.arange(len(self)))
        selected.features = datasets.Features({name: self.features[name] for name in names})
        return selected

    def to_dataset(self) -> datasets.Dataset:
        """Return all rows in memory."""
        return datasets.Dataset.from_dict(self[list(range(len(self)))], features=self.features)

    def column(self, name: str) -> pa.Array:
        """Return one whole column without reading the others."""
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            parts = threads.map(lambda file: _read_column(file, name), self.files)
            values = pa.concat_arrays([chunk for part in parts for chunk in part.chunks])
        return values if len(self) == len(values) and (np.diff(self._rows) == 1).all() else values.take(self._rows)

    def __getitem__(self, rows: list[int]) -> dict[str, list]:
        """Return the values of some rows by column, images as `bytes` and `path`."""
        if self._process != os.getpid():  # a forked worker must not share the position in the parent's open files
            self._forget()
            self._process = os.getpid()
        wanted = self._rows[np.asarray(rows)]
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        taken = {
            group: self._read_group(group).take(wanted[groups == group] - self._starts[group])
            for group in np.unique(groups)
        }
        order = np.argsort(groups, kind="stable").argsort()
        return pa.concat_tables(taken.values()).take(order).to_pydict()

    def _read_group(self, group: int) -> pa.Table:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, number = self._groups[group]
        if file not in self._open_files:
            self._open_files[file] = _open_parquet(self.files[file], self._metadata[file])
        table = self._open_files[file].read_row_group(number, columns=self.column_names, use_threads=False)
        self._cache[group] = table
        self._cached_rows += len(table)
        while self._cached_rows > self._capacity and len(self._cache) > 1:
            self._cached_rows -= len(self._cache.popitem(last=False)[1])
        return table

    @property
    def _capacity(self) -> int:
        """Number of rows that this reader holds: a shuffle window per lane, and the row groups that it cuts."""
        lane = self.streaming.buffer // self.streaming.lanes + 2 * self._longest
        return self.streaming.lanes_of_a_reader * lane


def arrow_column(table: datasets.Dataset | StreamedTable, name: str) -> pa.Array | pa.ChunkedArray:
    """Return a column of either kind of table as one Arrow array without reading the other columns (images)."""
    if isinstance(table, StreamedTable):
        return table.column(name)
    columns = cast(pa.Table, table.select_columns([name]).with_format("arrow")[:])
    return columns.column(name).combine_chunks()


def list_lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the length of each list of a column, 0 for missing lists."""
    lengths = pc.list_value_length(column)  # pyright: ignore[reportAttributeAccessIssue]  # pyarrow makes it at import
    return pc.fill_null(lengths, 0).to_numpy()


def _open_parquet(file: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    remote = "://" in file
    return pq.ParquetFile(
        cast(fsspec.core.OpenFile, fsspec.open(file)).open() if remote else file, metadata=metadata, pre_buffer=remote
    )


def _read_footer(file: str) -> pq.FileMetaData:
    try:
        with _open_parquet(file) as opened:
            return opened.metadata
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{file}: not a complete Parquet file ({error}); prepare or download the dataset again"
        ) from error


def _read_column(file: str, name: str) -> pa.ChunkedArray:
    with _open_parquet(file) as opened:
        return opened.read([name], use_threads=False).column(name)
