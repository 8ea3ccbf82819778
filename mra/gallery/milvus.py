"""Records of a gallery in Milvus: embedded in this process (milvus-lite) or on a server, through one client."""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mra.common.private_interfaces import release_milvus_lite
from mra.gallery.connection import connect, readable, readable_errors, refuse_locked
from mra.gallery.store import Record
from mra.gallery.where import Where, is_unicode, quote


logger = logging.getLogger(__name__)

# Records per request: 500 of 2048 floats are 4 MB, far below the limit of any server.
RECORDS_PER_REQUEST = 500

# Records per request without embeddings.
RECORDS_PER_PAGE = 10_000

# Maximum lengths of texts in bytes, and maximum hits of a search: limits of Milvus.
MAX_TEXT_BYTES = {"key": 1024, "content": 64, "path": 4096, "source": 4096, "camera": 256, "time": 32, "checksum": 8}
MAX_INFO_BYTES = 65535
MAX_HITS = 16384

INDEXES = {
    "flat": {"index_type": "FLAT", "params": {}},
    "hnsw": {"index_type": "HNSW", "params": {"M": 16, "efConstruction": 200}},
    "ivf": {"index_type": "IVF_FLAT", "params": {"nlist": 256}},
}
SEARCH_PARAMETERS = {"flat": {}, "hnsw": {"ef": 512}, "ivf": {"nprobe": 32}}


class MilvusStore:
    """Records on a Milvus server.

    A second, small collection named `<collection>_info` holds what `write_info` saves.

    Args:
        uri: `http://host:19530` or `https://...`.
        collection: name of the collection of records.
        token: "user:password" or an API key.
        index: "flat" (exact), "hnsw" or "ivf", for `create`.

    Raises:
        ValueError: if pymilvus is missing, the server cannot be reached or rejects the token, or an argument is wrong.
    """

    def __init__(self, uri: str, collection: str, token: str | None = None, index: str = "hnsw") -> None:
        if index not in INDEXES:
            raise ValueError(f"index must be one of {', '.join(INDEXES)}, got {index!r}")
        if not collection.isidentifier() or not collection.isascii() or len(collection) > 200:
            raise ValueError(f"collection must be a name of letters, digits and underscores, got {collection!r}")
        self.collection, self.info_collection = collection, f"{collection}_info"
        self._new_index = index
        self._uri = uri
        self._client = connect(uri, token)
        try:
            self._exists = self._client.has_collection(self.collection)
            self._index = self._read_index() if self._exists else index
            for name in (self.collection, self.info_collection):
                if self._client.has_collection(name):
                    self.load_collection(name)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            raise readable(error, uri) from error

    @property
    def is_exact(self) -> bool:
        """Return whether a search compares the query with every record."""
        return self._index == "flat"

    def exists(self) -> bool:
        """Return whether the index exists."""
        return self._exists

    def create(self, dim: int) -> None:
        """Create an empty index for embeddings of that width."""
        self._index = self._new_index
        self._create_records(self.collection, dim)
        self._exists = True

    def read_info(self) -> dict[str, Any]:
        """Return what `write_info` saved, {} if nothing."""
        if not self._client.has_collection(self.info_collection):
            return {}
        rows = self._client.query(self.info_collection, filter='name == "info"', output_fields=["value"])
        return json.loads(rows[0]["value"]) if rows else {}

    def write_info(self, info: dict[str, Any]) -> None:
        """Save a mapping of JSON values about the gallery as a whole."""
        from pymilvus import DataType

        value = json.dumps(info)
        if len(value) > MAX_INFO_BYTES:
            raise ValueError(
                f"gallery {self._uri} has {len(value)} bytes of settings, expected at most {MAX_INFO_BYTES}: "
                "index fewer folders and metadata columns"
            )
        if not self._client.has_collection(self.info_collection):
            schema = self._client.create_schema(auto_id=False)
            schema.add_field("name", DataType.VARCHAR, is_primary=True, max_length=16)
            schema.add_field("value", DataType.VARCHAR, max_length=MAX_INFO_BYTES)
            schema.add_field("unused", DataType.FLOAT_VECTOR, dim=2)  # Milvus requires a vector in every collection
            self._create(self.info_collection, schema, "unused", INDEXES["flat"])
        self._client.upsert(self.info_collection, [{"name": "info", "value": value, "unused": [0.0, 0.0]}])

    def upsert(self, records: list[Record]) -> None:
        """Write records, replacing those with the same keys."""
        for start in range(0, len(records), RECORDS_PER_REQUEST):
            rows = [_to_row(record) for record in records[start : start + RECORDS_PER_REQUEST]]
            self._client.upsert(self.collection, rows)

    def delete(self, keys: list[str]) -> None:
        """Delete records by key; `purge` erases them from the disk."""
        for start in range(0, len(keys), RECORDS_PER_REQUEST):
            # As a condition, because pymilvus does not escape the ids it is given.
            self._client.delete(self.collection, filter=_among(keys[start : start + RECORDS_PER_REQUEST]))

    def purge(self) -> None:
        """Ask the server to compact; it deletes the old files after its own retention period."""
        self._client.flush(self.collection)
        self._client.compact(self.collection)

    def flush(self) -> None:
        """Flush written records to their final form."""
        self._client.flush(self.collection)

    def count(self) -> int:
        """Return the number of records."""
        return int(self._client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def records(
        self, where: Where | None = None, keys: Iterable[str] | None = None, embeddings: bool = False
    ) -> Iterator[Record]:
        """Yield all records, those that match, or those with some keys."""
        fields = [*MAX_TEXT_BYTES, "metadata"] + (["embedding"] if embeddings else [])
        condition = "" if where is None else where.to_milvus()
        if keys is None:
            yield from self._iterate(self.collection, condition, fields)
            return
        keys = list(keys)
        for start in range(0, len(keys), RECORDS_PER_REQUEST):
            some = keys[start : start + RECORDS_PER_REQUEST]
            wanted = " and ".join(filter(None, [_among(some), condition]))
            rows = self._client.query(self.collection, filter=wanted, output_fields=fields, limit=len(some))
            yield from map(_to_record, rows)

    def search(
        self, embedding: np.ndarray, limit: int, where: Where | None = None, embeddings: bool = False
    ) -> list[tuple[Record, float]]:
        """Return the nearest records, best first, with their dot products."""
        limit = min(limit, MAX_HITS)
        parameters = dict(SEARCH_PARAMETERS[self._index])
        if "ef" in parameters:
            parameters["ef"] = max(parameters["ef"], limit)
        (hits,) = self._client.search(
            self.collection,
            data=[np.asarray(embedding, np.float32)],
            anns_field="embedding",
            filter="" if where is None else where.to_milvus(),
            limit=limit,
            output_fields=[*MAX_TEXT_BYTES, "metadata", *(["embedding"] if embeddings else [])],
            search_params={"metric_type": "IP", "params": parameters},
        )
        return [(_to_record(hit["entity"]), float(hit["distance"])) for hit in hits]

    def close(self) -> None:
        """Release the store."""
        self._client.close()

    def load_collection(self, name: str) -> None:
        """Load a collection, so that it can be read."""
        self._client.load_collection(name)

    def _create_records(self, name: str, dim: int) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        for field, longest in MAX_TEXT_BYTES.items():
            schema.add_field(field, DataType.VARCHAR, is_primary=field == "key", max_length=longest)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
        self._create(name, schema, "embedding", INDEXES[self._index])

    def _create(self, name: str, schema: Any, vector: str, index: dict) -> None:
        indexes = self._client.prepare_index_params()
        indexes.add_index(vector, metric_type="IP", **index)
        self._client.create_collection(name, schema=schema, index_params=indexes, consistency_level="Strong")

    def _read_index(self) -> str:
        kind = self._client.describe_index(self.collection, "embedding")["index_type"]
        return next((name for name, index in INDEXES.items() if index["index_type"] == kind), "flat")

    def _iterate(self, collection: str, condition: str, fields: list[str]) -> Iterator[Record]:
        size = RECORDS_PER_REQUEST if "embedding" in fields else RECORDS_PER_PAGE
        last = None
        while True:
            # A new iterator for each page: a continued one does not escape the last key in its condition.
            wanted = " and ".join(filter(None, [condition, "" if last is None else f"key > {quote(last)}"]))
            iterator = self._client.query_iterator(collection, batch_size=size, filter=wanted, output_fields=fields)
            try:
                with readable_errors(self._uri):
                    rows = iterator.next()
            finally:
                iterator.close()
            if not rows:  # a server may return fewer than a page before the end
                return
            yield from map(_to_record, rows)
            last = rows[-1]["key"]


class EmbeddedStore(MilvusStore):
    """Records in a local folder, stored by milvus-lite in this process.

    The collection is reached by an alias: milvus-lite has no compaction, so `purge` copies the remaining records into a new
    collection, points the alias to it and drops the old one. One process at a time can open the folder.

    Args:
        path: the folder, which must end in `.db`.
        collection: name of the collection of records.
        index: "flat" (exact), "hnsw" or "ivf", for `create`.

    Raises:
        ValueError: if a different process has the folder open, its parent folder is missing, or pymilvus or milvus-lite is.
    """

    _open_folders: dict[str, int] = {}  # noqa: RUF012 (stores of this process on one folder share its server)

    def __init__(self, path: Path, collection: str, index: str = "flat") -> None:
        if path.suffix != ".db":
            raise ValueError(
                f"gallery {path} must be a path ending in .db, the http:// address of a server, or :memory:"
            )
        if not is_unicode(str(path.resolve())):
            raise ValueError(f"gallery {path} has a path that is not valid UTF-8: choose a different name")
        if not path.parent.is_dir():
            raise ValueError(f"gallery {path} cannot be created: the folder {path.parent} does not exist")
        if path.is_file():
            raise ValueError(
                f"gallery {path} is a file: expected a folder created by `mra index build`, or a new name"
            )
        self._path = str(path.resolve())
        if not self._open_folders.get(self._path):
            refuse_locked(path)
        self._is_counted = False
        super().__init__(self._path, collection, index=index)
        self._open_folders[self._path] = self._open_folders.get(self._path, 0) + 1
        self._is_counted = True
        try:
            if not self._exists:
                self._restore_alias()
            self._drop_leftovers()
        except BaseException:
            self.close()
            raise

    def create(self, dim: int) -> None:
        """Create an empty index for embeddings of that width."""
        name = self._generation(1)
        self._index = self._new_index
        self._create_records(name, dim)
        self._client.create_alias(name, self.collection)
        self._exists = True

    def write_info(self, info: dict[str, Any]) -> None:
        """Save a mapping of JSON values about the gallery as a whole."""
        super().write_info(info)
        self._client.flush(self.info_collection)  # a server has it in its log

    def purge(self) -> None:
        """Rewrite the collection without what was deleted."""
        self._drop_leftovers()  # of a purge that failed on a full disk
        old = self._client.describe_alias(self.collection)["collection_name"]
        new = self._generation(1 + int(old.rpartition("_")[2]))
        description = self._client.describe_collection(old)
        (dim,) = (int(field["params"]["dim"]) for field in description["fields"] if field["name"] == "embedding")
        self._create_records(new, dim)
        fields = [*MAX_TEXT_BYTES, "metadata", "embedding"]
        rows = []
        for record in self._iterate(old, "", fields):
            rows.append(_to_row(record))
            if len(rows) == RECORDS_PER_REQUEST:
                self._client.upsert(new, rows)
                rows = []
        if rows:
            self._client.upsert(new, rows)
        self._client.flush(new)
        self._client.alter_alias(new, self.collection)
        self._client.drop_collection(old)

    def close(self) -> None:
        """Release the store."""
        super().close()
        if self._is_counted:  # not if opening failed
            self._open_folders[self._path] -= 1
        if not self._open_folders.get(self._path):
            self._remove_temporary_files()  # while no other process may write
            release_milvus_lite(self._path)

    def load_collection(self, name: str) -> None:
        """Load a collection; index files that were not written to their end are derived from the records again.

        milvus-lite writes them last and in place, and reports no full disk.
        """
        try:
            super().load_collection(name)
        except ValueError:
            if name == self.collection:
                name = self._client.describe_alias(name)["collection_name"]
            files = list(Path(self._path, "collections", name).glob("partitions/*/indexes/*.idx"))
            if not files:
                raise
            for file in files:
                file.unlink()
            super().load_collection(name)
            logger.warning("gallery %s had an index file that was not complete: all are written again", self._path)

    def _remove_temporary_files(self) -> None:
        """Remove what milvus-lite could not rename, such as on a full disk; it removes manifests itself."""
        for pattern in ("aliases.json.tmp", "collections/*/schema.json.tmp"):
            for path in Path(self._path).glob(pattern):
                path.unlink()

    def _generation(self, number: int) -> str:
        return f"{self.collection}_{number:06d}"

    def _restore_alias(self) -> None:
        """Restore the alias of a collection of records that has lost it, such as with a damaged `aliases.json`.

        An empty collection is from an interrupted `create`, which creates it again; of two, the older one is complete.
        """
        for name in self._generations():
            self.load_collection(name)
            if self._client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"]:
                self._client.create_alias(name, self.collection)
                self._exists, self._index = True, self._read_index()
                logger.warning("gallery %s had lost the alias of its index: restored", self._path)
                return

    def _drop_leftovers(self) -> None:
        """Drop what an interrupted `create` or `purge` left: our collections without the alias.

        milvus-lite neither lists nor overwrites the folder of a collection without its schema, which a kill leaves while it
        creates or drops the collection. Such a folder is deleted if it is empty or another collection has taken its place.
        """
        named = self._client.describe_alias(self.collection)["collection_name"] if self._exists else None
        for name in self._generations():
            if name != named:
                self._client.drop_collection(name)
        for folder in Path(self._path, "collections").glob(f"{self.collection}_*"):
            if folder.name == named or (folder / "schema.json").exists():
                continue
            is_replaced = named is not None and folder.name != self.info_collection
            holds_data = any(path.is_file() and path.name != "schema.json.tmp" for path in folder.rglob("*"))
            if self._is_ours(folder.name) and (is_replaced or not holds_data):
                shutil.rmtree(folder)

    def _is_ours(self, name: str) -> bool:
        return re.fullmatch(rf"{self.collection}_(\d+|info)", name) is not None

    def _generations(self) -> list[str]:
        """Return the names of all collections of records, oldest first."""
        found = [name.rpartition("_") for name in self._client.list_collections()]
        return sorted("".join(parts) for parts in found if parts[0] == self.collection and parts[2].isdigit())


def _among(keys: list[str]) -> str:
    """Return the condition that a record has one of these keys."""
    return f"key in [{', '.join(map(quote, keys))}]"


def _to_row(record: Record) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in MAX_TEXT_BYTES}
    return row | {"metadata": record.metadata, "embedding": np.asarray(record.embedding, np.float32)}


def _to_record(row: dict[str, Any]) -> Record:
    embedding = row.get("embedding")
    metadata = row["metadata"]
    return Record(
        **{name: row[name] for name in MAX_TEXT_BYTES},
        metadata=dict(json.loads(metadata) if isinstance(metadata, str | bytes) else metadata),
        embedding=None if embedding is None else np.asarray(embedding, np.float32),
    )
