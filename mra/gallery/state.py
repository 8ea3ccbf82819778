"""What an open gallery consists of: its place, files, tokens and model, and what it remembers of itself."""

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch

from mra.common.command_line import FullDiskError, find_full_disk
from mra.gallery.parts import FileStore, GalleryParts
from mra.gallery.place import FORMAT, Place, read_info
from mra.gallery.sources import Source
from mra.gallery.store import Record, Store
from mra.gallery.token_cache import TOKEN_DTYPES, TokenCache
from mra.gallery.types import DEFAULT_COLLECTION, Calibration
from mra.gallery.where import RECORD_FIELDS, Where, parse_where
from mra.retrieval.encoders import Encoder, TorchEncoder


logger = logging.getLogger(__name__)


class GalleryState:
    """Parts of an open gallery, and what it remembers of itself.

    An earlier removal that was interrupted is finished first. Where the disk is full, a warning says so and the gallery
    opens all the same.

    Attributes:
        place: where the gallery lies, with the store of its records.
        files: copies of images.
        info: what the gallery remembers of itself, as `Store.read_info` gives it; empty before the first build.
        lock: held while records, copies or tokens are read and written by several threads.

    Args:
        place: of the gallery; closed with the state.
        model: folder or Hub id of the model; `None` for the one the gallery was built with.
        encoder: what encodes and matches instead of `model` in PyTorch.
        device: to run the model on; `None` for the GPU if there is one.
        dtype: dtype of the forward passes; `None` for that of the weights.
        token_cache: most bytes of the token cache on disk; 0 for none.
        token_dtype: of a new gallery's token cache; `None` for the default.

    Raises:
        ValueError: if another version of this project wrote the gallery, or it has lost a part of itself.
        FullDiskError: if the disk is too full to open the gallery.
    """

    def __init__(
        self,
        place: Place,
        *,
        model: str | None,
        encoder: Encoder | None,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
        token_cache: int,
        token_dtype: str | None,
    ) -> None:
        self.place = place
        self.files = FileStore(place.files)
        self.info: dict = {}
        self.lock = threading.RLock()
        self._model, self._encoder, self._device, self._dtype = model, encoder, device, dtype
        self._token_cache, self._token_dtype = token_cache, token_dtype
        self._tokens: TokenCache | None = None
        if place.store is None:
            return
        try:
            self.info = read_info(place.store, place.uri)
            self._refuse_loss(place.store)
            if self.info.get("is_removing"):
                self._resume_removal()
        except BaseException:
            self.close()
            raise

    def _refuse_loss(self, store: Store) -> None:
        """Refuse a gallery that has lost one half: it cannot be searched, and a build could mix images of two models."""
        lost = None
        if not self.info and store.exists() and store.count():
            lost = f"what it remembers of its {store.count():,} images, the model included"
        elif self.info.get("images") and not store.exists():
            lost = f"the index of its {self.info['images']:,} images"
        if lost:
            raise ValueError(
                f"gallery {self.place.uri} has lost {lost}: a file of it is damaged; restore a backup, or delete the "
                "folder and build the gallery again"
            )

    def close(self) -> None:
        """Release the gallery, so that another process can open it."""
        self._tokens = None
        self.place.close()
        self.info = {}

    # ---------------------------------------------------------------- reading

    @property
    def store(self) -> Store:
        """The store of a gallery that exists."""
        assert self.place.store is not None, "`require` or `remember` comes first"
        return self.place.store

    @property
    def exists(self) -> bool:
        """Return whether the gallery has been built."""
        return bool(self.info) and self.store.exists()

    @property
    def encoder(self) -> Encoder:
        """Load the model on first use and check it against the gallery's.

        Raises:
            ValueError: if no model is known, it cannot be loaded, or it is not the one the gallery was built with.
        """
        with self.lock:
            if self._encoder is None:
                name = self._model or self.info.get("model")
                if name is None:
                    raise ValueError(f"gallery {self.place.uri} is new: give the model to build it with")
                self._encoder = cast(Encoder, TorchEncoder(name, self._device, self._dtype))
            known = self.info.get("fingerprint", self._encoder.fingerprint)
            if known != self._encoder.fingerprint:
                raise ValueError(
                    f"gallery {self.place.uri} was built with {self.info['model']} (fingerprint {known[:12]}), not with "
                    f"{self._encoder.name} (fingerprint {self._encoder.fingerprint[:12]}): their embeddings cannot be "
                    "compared; use that model, or build another gallery"
                )
            return self._encoder

    @property
    def roots(self) -> list[Path]:
        """Return the folders that images may lie in: those they were indexed from, and that of the copies."""
        return [*map(Path, self.info.get("roots", [])), self.files.root]

    @property
    def fields(self) -> dict[str, str]:
        """Return name and kind of what `where` can ask for."""
        return RECORD_FIELDS | self.info.get("fields", {})

    @property
    def calibration(self) -> Calibration | None:
        """Return the calibration that the gallery remembers."""
        saved = self.info.get("calibration")
        return None if saved is None else Calibration(**saved | {"curve": [tuple(point) for point in saved["curve"]]})

    def require(self) -> None:
        """Refuse a gallery that has not been built.

        Raises:
            ValueError: with the command that builds it.
        """
        if not self.exists:
            place, name = self.place, self.place.collection
            called, option = ("", "") if name == DEFAULT_COLLECTION else (f" {name}", f" --collection {name}")
            raise ValueError(
                f"there is no gallery{called} at {place.uri}: make one with `mra index build --gallery "
                f"{place.uri}{option} --images FOLDER --model MODEL`"
            )

    def parse(self, where: str | None) -> Where | None:
        """Parse a condition on the fields of the gallery; nothing for an empty one.

        Raises:
            ValueError: if it is not as `Gallery.search` describes it.
        """
        return None if where is None or not where.strip() else parse_where(where, self.fields)

    def find(self, keys: Iterable[str]) -> list[Record]:
        """Return records in the order of the keys, each once.

        Raises:
            ValueError: if there is no gallery or a key is unknown.
        """
        self.require()
        keys = list(dict.fromkeys(keys))
        found = {record.key: record for record in self.store.records(keys=keys)}
        unknown = [key for key in keys if key not in found]
        if unknown:
            raise ValueError(
                f"no image of the gallery has the key {unknown[0]!r} ({len(unknown)} of {len(keys)} unknown)"
            )
        return [found[key] for key in keys]

    @property
    def tokens(self) -> TokenCache:
        """Open the token cache on first use."""
        with self.lock:
            if self._tokens is None:
                path = self.place.files / "tokens"
                shape, dtype = self.info["token_shape"], self.info["token_dtype"]
                self._tokens = TokenCache(path, self.info["fingerprint"], shape, self._token_cache, dtype)
            return self._tokens

    def parts(self) -> GalleryParts:
        """Return what indexing and searching work with.

        Raises:
            ValueError: as `require` and `encoder`.
        """
        with self.lock:
            self.require()
            return GalleryParts(self.store, self.files, self.tokens, self.encoder, self.roots, self.lock)

    # ---------------------------------------------------------------- writing

    def remember(self, encoder: Encoder, source: Source, fields: dict[str, str]) -> None:
        """Make the index if there is none, and write what the next process must know before anything is indexed."""
        with self.lock:
            store = self.place.make()
            name = str(Path(encoder.name).resolve()) if Path(encoder.name).exists() else encoder.name
            info = self.info or {
                "format": FORMAT,
                "fingerprint": encoder.fingerprint,
                "embedding_dim": encoder.embedding_dim,
                "token_shape": list(encoder.token_shape),
                "token_dtype": self._token_dtype or TOKEN_DTYPES[0],
                "roots": [],
            }
            roots = [*info["roots"], *([str(source.root)] if source.root else [])]
            info = info | {"model": name, "fields": fields, "roots": sorted(set(roots))}
            if info != self.info:
                store.write_info(info)
                self.info = info
            if not store.exists():
                store.create(encoder.embedding_dim)

    def write_info(self, **changes: object) -> None:
        """Change what the gallery remembers of itself."""
        self.store.write_info(self.info | changes)
        self.info = self.info | changes

    def sweep(self) -> None:
        """Delete tokens and copies that belong to no record, those of interrupted builds included."""
        contents, paths = set(), set()
        for record in self.store.records():
            contents.add(record.content)
            if self.files.is_copy(record.path):
                paths.add(record.path)
        self.tokens.keep_only(contents)
        self.files.keep_only(paths)

    def finish_removal(self) -> None:
        """Take what was removed off the disk.

        Raises:
            FullDiskError: if there is no room to rewrite the index; whoever opens the gallery next tries again.
        """
        try:
            self.sweep()
            self.store.purge()
            self.write_info(is_removing=False)
        except Exception as error:
            words = find_full_disk(error)
            if words is None:
                raise
            raise FullDiskError(
                f"gallery {self.place.uri} cannot be rewritten without the images that were removed from it: the disk is "
                f"full ({words}): no search finds them, but what is left of them stays on the disk; free some space and "
                "open the gallery again, such as with `mra index stats`"
            ) from error

    def _resume_removal(self) -> None:
        try:
            with self.lock:
                self.finish_removal()
        except FullDiskError as error:  # what is left can be searched
            logger.warning("%s", error)
