"""An open gallery beneath its verbs: its place, its model, its cache, and what it remembers of itself."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch

from mra.gallery import maintenance as gallery_maintenance
from mra.gallery.parts import GalleryParts
from mra.gallery.picture_files import FileStore
from mra.gallery.place import FORMAT, Place, read_info
from mra.gallery.sources import Source
from mra.gallery.store import Record
from mra.gallery.token_cache import TOKEN_DTYPES, TokenCache
from mra.gallery.types import DEFAULT_COLLECTION, Calibration
from mra.gallery.where import RECORD_FIELDS, Where, parse_where
from mra.retrieval.encoders import Encoder, TorchEncoder


DEFAULT_TOKEN_CACHE = 4 * 2**30
DEFAULT_THRESHOLD = 0.5
DEFAULT_MATCH_WEIGHT = 1.0


class OpenGallery:
    """What `Gallery` stands on; its arguments and errors are described there."""

    def __init__(
        self,
        uri: str | Path,
        model: str | None = None,
        *,
        collection: str = DEFAULT_COLLECTION,
        token: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        encoder: Encoder | None = None,
        files: str | Path | None = None,
        token_cache: int = DEFAULT_TOKEN_CACHE,
        token_dtype: str | None = None,
        index: str | None = None,
    ):
        self._lock = threading.RLock()
        self._model, self._encoder, self._device, self._dtype = model, encoder, device, dtype
        self._token_cache, self._token_dtype = token_cache, token_dtype
        self._place = Place(uri, collection, token, files, index)
        self._files = FileStore(self._place.files)
        self._tokens: TokenCache | None = None
        self._info: dict = {}
        if self._place.store is not None:
            try:
                self._info = read_info(self._place.store, self._place.uri)
                if self._info.get("is_removing"):
                    self._finish_removal()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __len__(self) -> int:
        """Images in the gallery."""
        return self._place.store.count() if self._info and self._place.store.exists() else 0

    def close(self) -> None:
        """Let go of the gallery, so that another process can open it."""
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None
        self._place.close()
        self._info = {}

    @property
    def encoder(self) -> Encoder:
        """The model, loaded on first use and checked against the gallery's; a `TorchEncoder` has `model` and `processor`.

        Raises:
            ValueError: if no model is known, it cannot be loaded, or it is not the one the gallery was built with.
        """
        with self._lock:
            if self._encoder is None:
                name = self._model or self._info.get("model")
                if name is None:
                    raise ValueError(f"gallery {self._place.uri} is new: give the model to build it with")
                self._encoder = TorchEncoder(name, self._device, self._dtype)
            known = self._info.get("fingerprint", self._encoder.fingerprint)
            if known != self._encoder.fingerprint:
                raise ValueError(
                    f"gallery {self._place.uri} was built with {self._info['model']} (fingerprint {known[:12]}), not with "
                    f"{self._encoder.name} (fingerprint {self._encoder.fingerprint[:12]}): their embeddings cannot be "
                    "compared; use that model, or build another gallery"
                )
            return self._encoder

    @property
    def roots(self) -> list[Path]:
        """Folders that images of this gallery may lie in: those they were indexed from, and that of the copies."""
        return [*map(Path, self._info.get("roots", [])), self._files.root]

    @property
    def fields(self) -> dict[str, str]:
        """What `where` can ask for: name and kind ("text", "time" or "number"), `key`, `camera` and `time` included."""
        return RECORD_FIELDS | self._info.get("fields", {})

    @property
    def threshold(self) -> float:
        """The calibrated threshold, 0.5 before any calibration."""
        return DEFAULT_THRESHOLD if self.calibration is None else self.calibration.threshold

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` saved, or None."""
        return gallery_maintenance.read_calibration(self._info)

    @property
    def match_weight(self) -> float:
        """Weight of the matching log-odds in the ranking: the calibrated one, else the model's own, else 1."""
        if self.calibration is not None:
            return self.calibration.match_weight
        chosen = getattr(self.encoder, "match_weight", None)  # encoders of others may lack it
        return DEFAULT_MATCH_WEIGHT if chosen is None else chosen

    def _require(self) -> None:
        if not self._info or not self._place.store.exists():
            place, name = self._place, self._place.collection
            called, option = ("", "") if name == DEFAULT_COLLECTION else (f" {name}", f" --collection {name}")
            raise ValueError(
                f"there is no gallery{called} at {place.uri}: make one with `mra index build --gallery "
                f"{place.uri}{option} --images FOLDER --model MODEL`"
            )

    def _where(self, text: str | None) -> Where | None:
        return None if text is None or not text.strip() else parse_where(text, self.fields)

    def _find(self, keys: Iterable[str]) -> list[Record]:
        """Records in the order of the keys, each once."""
        self._require()
        keys = list(dict.fromkeys(keys))
        found = {record.key: record for record in self._place.store.records(keys=keys)}
        unknown = [key for key in keys if key not in found]
        if unknown:
            raise ValueError(
                f"no image of the gallery has the key {unknown[0]!r} ({len(unknown)} of {len(keys)} unknown)"
            )
        return [found[key] for key in keys]

    def _cache(self) -> TokenCache:
        if self._tokens is None:
            shape, dtype = self._info["token_shape"], self._info["token_dtype"]
            path = self._place.files / "tokens.bin"
            self._tokens = TokenCache(path, self._info["fingerprint"], shape, self._token_cache, dtype)
        return self._tokens

    def _parts(self) -> GalleryParts:
        with self._lock:
            self._require()
            return GalleryParts(self._place.store, self._files, self._cache(), self.encoder, self.roots, self._lock)

    def _remember(self, encoder: Encoder, source: Source, fields: dict[str, str]) -> None:
        """Make the index if there is none, and keep what the next process must know before anything is indexed."""
        with self._lock:
            store = self._place.make()
            name = str(Path(encoder.name).resolve()) if Path(encoder.name).exists() else encoder.name
            info = self._info or {
                "format": FORMAT,
                "fingerprint": encoder.fingerprint,
                "embedding_dim": encoder.embedding_dim,
                "token_shape": list(encoder.token_shape),
                "token_dtype": self._token_dtype or TOKEN_DTYPES[0],
                "roots": [],
            }
            roots = [*info["roots"], *([str(source.root)] if source.root else [])]
            info = info | {"model": name, "fields": fields, "roots": sorted(set(roots))}
            if info != self._info:
                store.write_info(info)
                self._info = info
            if not store.exists():
                store.create(encoder.embedding_dim)

    def _write_info(self, **changes) -> None:
        self._place.store.write_info(self._info | changes)
        self._info = self._info | changes

    def _finish_removal(self) -> None:
        gallery_maintenance.sweep(self._place.store, self._files, self._cache())
        self._place.store.purge()
        self._write_info(is_removing=False)
