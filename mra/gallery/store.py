"""Where a gallery's records lie: what every store can do, and the exact one in memory."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from mra.gallery.where import Where


@dataclass(frozen=True)
class Record:
    """One image of a gallery.

    Attributes:
        key: unique name.
        content: SHA-256 of the image file, hexadecimal.
        path: absolute path of the user's file, or path of the gallery's copy relative to its folder of files.
        source: what it was indexed from, a folder or the name of a dataset.
        camera: "" for unknown.
        time: as `read_time` gives it, "" for unknown.
        metadata: further columns, without empty ones.
        embedding: `(dim,)` float32, or None if it was not asked for.
        checksum: of content and embedding, as `embedding_checksum` gave it when the image was encoded.
    """

    key: str
    content: str
    path: str
    source: str
    camera: str = ""
    time: str = ""
    metadata: dict[str, str | int | float] = field(default_factory=dict)
    embedding: np.ndarray | None = field(default=None, compare=False, repr=False)
    checksum: str = field(default="", compare=False, repr=False)

    def value(self, name: str) -> str | int | float | None:
        """Value of a field that can be filtered on, None where it is unknown."""
        if name in ("key", "camera", "time"):
            return getattr(self, name) or None
        return self.metadata.get(name)


def embedding_checksum(content: str, embedding: np.ndarray) -> str:
    """Return the CRC-32 of a content and its embedding, by which `verify` finds a vector that is not what was written."""
    return f"{zlib.crc32(np.asarray(embedding, np.float32).tobytes(), zlib.crc32(content.encode())):08x}"


class Store(Protocol):
    """What a gallery asks of the place of its records. Writing needs `create` first."""

    @property
    def is_exact(self) -> bool:
        """Return whether a search compares every record."""
        ...

    def exists(self) -> bool:
        """Return whether there is an index already."""
        ...

    def create(self, dim: int) -> None:
        """Make an empty index of embeddings of that width."""
        ...

    def read_info(self) -> dict[str, Any]:
        """Return what `write_info` kept, {} where there is nothing."""
        ...

    def write_info(self, info: dict[str, Any]) -> None:
        """Keep a mapping of JSON values about the gallery as a whole."""
        ...

    def upsert(self, records: list[Record]) -> None:
        """Write records, all of them or none, in place of those with their keys."""
        ...

    def delete(self, keys: list[str]) -> None:
        """Delete records by key; `purge` takes them off the disk."""
        ...

    def purge(self) -> None:
        """Make sure that nothing of deleted or replaced records stays on the disk."""
        ...

    def flush(self) -> None:
        """Bring what was written into its final form."""
        ...

    def count(self) -> int:
        """Return the number of records."""
        ...

    def records(
        self, where: Where | None = None, keys: Iterable[str] | None = None, embeddings: bool = False
    ) -> Iterator[Record]:
        """Yield records in no particular order: all, those that match, or those with some keys."""
        ...

    def search(self, embedding: np.ndarray, limit: int, where: Where | None = None) -> list[tuple[Record, float]]:
        """Return the records of the largest dot products with `(dim,)` embedding, best first, and these products."""
        ...

    def close(self) -> None:
        """Release the place."""
        ...


class MemoryStore:
    """Exact search over everything, in memory: the truth that tests and recall figures compare with."""

    is_exact = True

    def __init__(self) -> None:
        self._info: dict[str, Any] = {}
        self._rows: dict[str, int] = {}
        self._records: list[Record] = []
        self._exists = False
        self._embeddings = np.empty((0, 0), np.float32)

    def exists(self) -> bool:
        """Return whether there is an index already."""
        return self._exists

    def create(self, dim: int) -> None:
        """Make an empty index of embeddings of that width."""
        self._embeddings = np.empty((0, dim), np.float32)
        self._exists = True

    def read_info(self) -> dict[str, Any]:
        """Return what `write_info` kept, {} where there is nothing."""
        return dict(self._info)

    def write_info(self, info: dict[str, Any]) -> None:
        """Keep a mapping of JSON values about the gallery as a whole."""
        self._info = dict(info)

    def upsert(self, records: list[Record]) -> None:
        """Write records in place of those with their keys."""
        new = [record for record in records if record.key not in self._rows]
        start = len(self._records)
        self._rows |= {record.key: start + number for number, record in enumerate(new)}
        self._records += new
        if new:
            self._embeddings = np.concatenate(
                [self._embeddings, np.empty((len(new), self._embeddings.shape[1]), np.float32)]
            )
        for record in records:
            row = self._rows[record.key]
            self._embeddings[row] = record.embedding
            self._records[row] = replace(record, embedding=None)

    def delete(self, keys: list[str]) -> None:
        """Delete records by key; `purge` takes them off the disk."""
        gone = {self._rows[key] for key in keys if key in self._rows}
        kept = [row for row in range(len(self._records)) if row not in gone]
        self._embeddings = self._embeddings[kept]
        self._records = [self._records[row] for row in kept]
        self._rows = {record.key: row for row, record in enumerate(self._records)}

    def purge(self) -> None:
        """Nothing to do: nothing lies on a disk."""

    def flush(self) -> None:
        """Nothing to do: nothing lies on a disk."""

    def count(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def records(
        self, where: Where | None = None, keys: Iterable[str] | None = None, embeddings: bool = False
    ) -> Iterator[Record]:
        """Yield all records, those that match, or those with some keys."""
        rows = range(len(self._records)) if keys is None else [self._rows[key] for key in keys if key in self._rows]
        for row in rows:
            record = self._records[row]
            if where is None or where.matches(record.value):
                yield replace(record, embedding=self._embeddings[row].copy()) if embeddings else record

    def search(self, embedding: np.ndarray, limit: int, where: Where | None = None) -> list[tuple[Record, float]]:
        """Return the nearest records, best first, with their dot products."""
        rows = np.array(
            [row for row, record in enumerate(self._records) if where is None or where.matches(record.value)],
            dtype=int,
        )
        similarity = (self._embeddings if where is None else self._embeddings[rows]) @ embedding
        order = np.argsort(-similarity, kind="stable")[:limit]
        return [(self._records[rows[place]], float(similarity[place])) for place in order]

    def close(self) -> None:
        """Nothing to do: the memory goes with the object."""
