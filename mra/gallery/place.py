"""Where a gallery lies: a folder of this machine, a Milvus server, or memory; and what it remembers of itself."""

import os
import re
import tempfile
from pathlib import Path

from mra.gallery.connection import is_server
from mra.gallery.milvus import EmbeddedStore, MilvusStore
from mra.gallery.store import MemoryStore, Store
from mra.gallery.types import DEFAULT_COLLECTION


MEMORY = ":memory:"

# Written into every gallery; one of another number is refused.
FORMAT = 2

# Kinds of index where none is asked for. An embedded gallery is searched exactly; see docs/search.md for the figures.
DEFAULT_INDEXES = {"embedded": "flat", "server": "hnsw"}


class Place:
    """The store of a gallery and the folder of its files, neither of which is made before `make`.

    Args:
        uri: as `Gallery` takes it.
        collection: name of the gallery there.
        token: of a server.
        files: folder of copies and tokens, or None.
        index: kind of a new index, or None.

    Raises:
        ValueError: if there is a gallery that cannot be opened.
    """

    def __init__(
        self,
        uri: str | Path,
        collection: str = DEFAULT_COLLECTION,
        token: str | None = None,
        files: str | Path | None = None,
        index: str | None = None,
    ) -> None:
        self.uri, self.collection, self._token = str(uri), collection, token
        self.is_server = is_server(self.uri)
        self.is_embedded = not self.is_server and self.uri != MEMORY
        self._index = index or DEFAULT_INDEXES["server" if self.is_server else "embedded"]
        self._temporary = None
        if files is not None:
            self.files = Path(files)
        elif self.is_server:
            name = re.sub(r"\W+", "_", self.uri.rpartition("@")[2].partition("://")[2] or self.uri)
            self.files = Path.home() / ".cache" / "mra_retrieval" / f"{name}_{collection}"
        elif self.is_embedded:
            self.files = Path(self.uri) / "files" / collection
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="gallery-")
            self.files = Path(self._temporary.name)
        self.store: Store | None = None
        if not self.is_embedded or Path(self.uri).exists():
            self.make()

    @property
    def folder(self) -> Path | None:
        """The folder of an embedded gallery."""
        return Path(self.uri) if self.is_embedded else None

    def make(self) -> Store:
        """Open the store, making the folder of an embedded one."""
        if self.store is None:
            if self.is_embedded:
                self.store = EmbeddedStore(Path(self.uri), self.collection, self._index)
            elif self.is_server:
                self.store = MilvusStore(self.uri, self.collection, self._token, self._index)
            else:
                self.store = MemoryStore()
        return self.store

    def index_bytes(self) -> int | None:
        """Bytes of an embedded index on disk; None elsewhere."""
        if not self.is_embedded or not Path(self.uri).exists():
            return None
        files = self.files.resolve()
        return sum(
            os.path.getsize(os.path.join(parent, name))
            for parent, folders, names in os.walk(self.uri)
            if not Path(parent).resolve().is_relative_to(files)
            for name in names
        )

    def close(self) -> None:
        """Let go of the store and delete what was temporary."""
        if self.store is not None:
            self.store.close()
            self.store = None
        if self._temporary is not None:
            self._temporary.cleanup()


def read_info(store: Store, uri: str) -> dict:
    """Read what a gallery remembers of itself: model, fields, roots, calibration; {} for a new one.

    Raises:
        ValueError: if another version of this project wrote it.
    """
    info = store.read_info()
    if info and info.get("format") != FORMAT:
        raise ValueError(
            f"gallery {uri} is of format {info.get('format')!r}, expected {FORMAT}: build it again with this version"
        )
    return info
