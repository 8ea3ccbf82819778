"""Records of a gallery: the protocol of stores, and an exact store in memory."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from mra.gallery.where import Where


# Tolerance of a float32 dot product of unit vectors, whose terms a store may add in any order.
PRODUCT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Record:
    """One image of a gallery.

    Attributes:
        key: unique name.
        content: SHA-256 of the image file, hexadecimal.
        path: absolute path of the user's file, or path of the gallery's copy relative to its folder of files.
        source: name of the folder or dataset it was indexed from.
        camera: camera, "" if unknown.
        time: as from `read_time`, "" if unknown.
        metadata: further non-empty columns.
        embedding: `(dim,)` float32, or None if not requested.
        checksum: `embedding_checksum` of content and embedding, computed when the image was encoded.
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
        """Return the value of a field for filters, or None if it is unknown."""
        if name in ("key", "camera", "time"):
            return getattr(self, name) or None
        return self.metadata.get(name)


def embedding_checksum(content: str, embedding: np.ndarray) -> str:
    """Return the CRC-32 of a content and its embedding, by which `verify` detects damaged vectors."""
    return f"{zlib.crc32(np.asarray(embedding, np.float32).tobytes(), zlib.crc32(content.encode())):08x}"


def find_damage(record: Record, query: np.ndarray, product: float | None) -> str | None:
    """Compare a record with its checksum and with the index.

    Args:
        record: a record with its embedding `(dim,)`.
        query: another embedding.
        product: their dot product, as a search of the index gives it; None if it is not known.

    Returns:
        What is wrong with the embedding, or None.
    """
    embedding = record.embedding
    assert embedding is not None, "read with its embedding"
    if embedding.shape != query.shape or not np.isfinite(embedding).all():
        return "the embedding is not a finite vector of the right width"
    if record.checksum != embedding_checksum(record.content, embedding):
        return "the embedding differs from the one that was written"
    if product is not None and not abs(product - embedding @ query) <= PRODUCT_TOLERANCE:
        return "the index has a different embedding than the record"
    return None


class Store(Protocol):
    """Storage of the records of a gallery. Call `create` before writing records."""

    @property
    def is_exact(self) -> bool:
        """Return whether a search compares the query with every record."""
        ...

    def exists(self) -> bool:
        """Return whether the index exists."""
        ...

    def create(self, dim: int) -> None:
        """Create an empty index for embeddings of that width."""
        ...

    def read_info(self) -> dict[str, Any]:
        """Return what `write_info` saved, {} if nothing."""
        ...

    def write_info(self, info: dict[str, Any]) -> None:
        """Save a mapping of JSON values about the gallery as a whole."""
        ...

    def upsert(self, records: list[Record]) -> None:
        """Write records, replacing those with the same keys."""
        ...

    def delete(self, keys: list[str]) -> None:
        """Delete records by key; `purge` erases them from the disk."""
        ...

    def purge(self) -> None:
        """Erase deleted and replaced records from the disk."""
        ...

    def flush(self) -> None:
        """Flush written records to their final form."""
        ...

    def count(self) -> int:
        """Return the number of records."""
        ...

    def records(
        self, where: Where | None = None, keys: Iterable[str] | None = None, embeddings: bool = False
    ) -> Iterator[Record]:
        """Yield records in any order: all, those that match, or those with some keys."""
        ...

    def search(
        self, embedding: np.ndarray, limit: int, where: Where | None = None, embeddings: bool = False
    ) -> list[tuple[Record, float]]:
        """Return the records with the largest dot products with an embedding `(dim,)`, best first, and the products."""
        ...

    def close(self) -> None:
        """Release the store."""
        ...


class MemoryStore:
    """Exact search in memory: the reference for tests and recall figures."""

    is_exact = True

    def __init__(self) -> None:
        self._info: dict[str, Any] = {}
        self._rows: dict[str, int] = {}
        self._records: list[Record] = []
        self._exists = False
        self._embeddings = np.empty((0, 0), np.float32)

    def exists(self) -> bool:
        """Return whether the index exists."""
        return self._exists

    def create(self, dim: int) -> None:
        """Create an empty index for embeddings of that width."""
        self._embeddings = np.empty((0, dim), np.float32)
        self._exists = True

    def read_info(self) -> dict[str, Any]:
        """Return what `write_info` saved, {} if nothing."""
        return dict(self._info)

    def write_info(self, info: dict[str, Any]) -> None:
        """Save a mapping of JSON values about the gallery as a whole."""
        self._info = dict(info)

    def upsert(self, records: list[Record]) -> None:
        """Write records, replacing those with the same keys."""
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
        """Delete records by key; `purge` erases them from the disk."""
        gone = {self._rows[key] for key in keys if key in self._rows}
        kept = [row for row in range(len(self._records)) if row not in gone]
        self._embeddings = self._embeddings[kept]
        self._records = [self._records[row] for row in kept]
        self._rows = {record.key: row for row, record in enumerate(self._records)}

    def purge(self) -> None:
        """Do nothing: nothing is on a disk."""

    def flush(self) -> None:
        """Do nothing: nothing is on a disk."""

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

    def search(
        self, embedding: np.ndarray, limit: int, where: Where | None = None, embeddings: bool = False
    ) -> list[tuple[Record, float]]:
        """Return the nearest records, best first, with their dot products."""
        rows = np.array(
            [row for row, record in enumerate(self._records) if where is None or where.matches(record.value)],
            dtype=int,
        )
        similarity = (self._embeddings if where is None else self._embeddings[rows]) @ embedding
        order = np.argsort(-similarity, kind="stable")[:limit]
        found = [(rows[place], float(similarity[place])) for place in order]
        if not embeddings:
            return [(self._records[row], value) for row, value in found]
        return [(replace(self._records[row], embedding=self._embeddings[row]), value) for row, value in found]

    def close(self) -> None:
        """Do nothing: the memory is freed with the object."""
