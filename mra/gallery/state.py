"""Parts and settings of an open gallery: its place, files, tokens and model."""

import hashlib
import json
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mra.common.command_line import FullDiskError, find_full_disk
from mra.gallery.parts import FileStore, GalleryParts
from mra.gallery.place import Place
from mra.gallery.sources import Source, content_hash
from mra.gallery.store import Record, Store
from mra.gallery.token_cache import TokenCache
from mra.gallery.types import DEFAULT_COLLECTION, DEFAULT_TOKEN_DTYPE, Calibration
from mra.gallery.where import RECORD_FIELDS, Where, parse_where


if TYPE_CHECKING:
    from mra.retrieval.encoders import Encoder


logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "onnx")

# Devices of the drivers of NVIDIA and AMD: looked up without PyTorch.
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))

# Saved in each gallery; a gallery of a different format is refused.
FORMAT = 2


class GalleryState:
    """Parts and settings of an open gallery.

    Opening first finishes an interrupted removal; if the disk is too full for that, it logs a warning.

    Attributes:
        place: location of the gallery, with the store of its records.
        files: copies of images.
        info: settings of the gallery, as from `Store.read_info`; empty before the first build.
        lock: protects records, copies and tokens that several threads read and write.

    Args:
        place: location of the gallery; closed with the state.
        model: folder or Hub id of the model; None for the one that built the gallery.
        encoder: used instead of `model`.
        backend: one of `BACKENDS`; see `Gallery`.
        device: to run the model on; None for the GPU if there is one.
        dtype: dtype of the forward passes, "auto" for the faster one on this device; None for that of the weights.
        token_cache: maximum size of the token cache in bytes; 0 for none.
        token_dtype: dtype of the token cache of a new gallery; None for the default.
        matched_views: views that a new gallery caches and matches.

    Raises:
        ValueError: if the gallery has a different format or has lost its index or its settings.
        FullDiskError: if the disk is too full to open the gallery.
    """

    def __init__(
        self,
        place: Place,
        *,
        model: str | None,
        encoder: "Encoder | None",
        backend: str,
        device: Any,
        dtype: Any,
        token_cache: int,
        token_dtype: str | None,
        matched_views: int,
    ) -> None:
        self.place = place
        self.files = FileStore(place.files)
        self.info: dict = {}
        self.lock = threading.RLock()
        self._model, self._encoder = model, encoder
        self._backend, self._device, self._dtype = backend, device, dtype
        self._token_cache, self._token_dtype, self._matched_views = token_cache, token_dtype, matched_views
        self._tokens: TokenCache | None = None
        if place.store is None:
            return
        try:
            self.info = place.store.read_info()
            self._refuse_format()
            self._refuse_loss(place.store)
            self._warn_of_loss(place.store)
            if self.info.get("is_removing"):
                self._resume_removal()
        except BaseException:
            self.close()
            raise

    def _refuse_format(self) -> None:
        found = self.info.get("format")
        if self.info and found != FORMAT:
            raise ValueError(
                f"gallery {self.place.uri} has format {found!r}, expected {FORMAT}: build it again with this version"
            )

    def _refuse_loss(self, store: Store) -> None:
        """Raise an error if the index or the settings are lost: a build could then mix embeddings of two models."""
        lost = None
        if not self.info and store.exists() and store.count():
            lost = f"the settings of its {store.count():,} images, the model included"
        elif self.info.get("images") and not store.exists():
            lost = f"the index of its {self.info['images']:,} images"
        if lost:
            raise ValueError(
                f"gallery {self.place.uri} has lost {lost}: a file of it is damaged: restore a backup, or delete the "
                "folder and build the gallery again"
            )

    def _warn_of_loss(self, store: Store) -> None:
        """Warn if the index has fewer images than were written: the engine goes back to an earlier state by itself."""
        written = self.info.get("images", 0)
        if written and (held := store.count()) < written:
            logger.warning(
                "gallery %s has lost %d of its %d images: a file of its index is damaged; restore a backup, or build the "
                "gallery again from their folders", self.place.uri, written - held, written,
            )  # fmt: skip

    def close(self) -> None:
        """Release the gallery, so that a different process can open it."""
        self._tokens = None
        self.place.close()
        self.info = {}

    # ---------------------------------------------------------------- reading

    @property
    def store(self) -> Store:
        """Return the store; the gallery must exist."""
        assert self.place.store is not None, "call `require` or `remember` first"
        return self.place.store

    @property
    def exists(self) -> bool:
        """Return whether the gallery has been built."""
        return bool(self.info) and self.store.exists()

    @property
    def encoder(self) -> "Encoder":
        """Load the model on first use and check it against the gallery's.

        Raises:
            ValueError: if no model is known, it cannot be loaded, or it is not the one that built the gallery.
        """
        with self.lock:
            if self._encoder is None:
                name = self._model or self.info.get("model")
                if name is None:
                    raise ValueError(f"gallery {self.place.uri} is new: pass the model to build it with")
                try:
                    self._encoder = self._load_encoder(name)
                except ValueError as error:
                    if self._model:
                        raise
                    raise ValueError(f"gallery {self.place.uri}: its model cannot be loaded: {error}") from error
            known = self.info.get("fingerprint", self._encoder.fingerprint)
            if known != self._encoder.fingerprint:
                raise ValueError(
                    f"gallery {self.place.uri} was built with {self.info['model']} (fingerprint {known[:12]}), not with "
                    f"{self._encoder.name} (fingerprint {self._encoder.fingerprint[:12]}): their embeddings cannot be "
                    "compared; use that model, or build a new gallery"
                )
            return self._encoder

    def _load_encoder(self, model: str) -> "Encoder":
        if self._backend != "torch" and (export := self._find_export(model)) is not None:
            from mra.retrieval.onnx_encoder import OnnxEncoder

            return cast("Encoder", OnnxEncoder(export, self._device))
        from mra.retrieval.encoders import TorchEncoder

        return cast("Encoder", TorchEncoder(model, self._device, self._dtype))

    def _find_export(self, model: str) -> Path | None:
        """Return the folder of the export to run; None for PyTorch, if `auto` has none that does the same."""
        from mra.retrieval.onnx_encoder import DESCRIPTION, EXPORT, find_export, read_description

        export = find_export(model)
        if self._backend == "onnx":
            if export is None:
                raise ValueError(
                    f"model {model} has no ONNX export ({DESCRIPTION} is neither in it nor in its folder {EXPORT}): make one "
                    f"with `mra export --model {model}`"
                )
            return export
        is_on_cpu = str(self._device or "cpu") == "cpu" and (self._device or not any(map(Path.exists, _GPU_DRIVERS)))
        if export is None or not is_on_cpu or self._dtype is not None:
            return None
        return export if read_description(export)["fingerprint"] == self.info.get("fingerprint") else None

    @property
    def roots(self) -> list[Path]:
        """Return the folders that images may be in: those they were indexed from, and the folder of copies."""
        return [*map(Path, self.info.get("roots", [])), self.files.root]

    @property
    def fields(self) -> dict[str, str]:
        """Return name and kind of each field for `where`."""
        return RECORD_FIELDS | self.info.get("fields", {})

    @property
    def calibration(self) -> Calibration | None:
        """Return the saved calibration, or None."""
        saved = self.info.get("calibration")
        return None if saved is None else Calibration(**saved | {"curve": [tuple(point) for point in saved["curve"]]})

    def require(self) -> None:
        """Check that the gallery has been built.

        Raises:
            ValueError: if it has not; the message gives the command that builds it.
        """
        if not self.exists:
            place, name = self.place, self.place.collection
            called, option = ("", "") if name == DEFAULT_COLLECTION else (f" {name}", f" --collection {name}")
            raise ValueError(
                f"there is no gallery{called} at {place.uri}: build one with `mra index build --gallery "
                f"{place.uri}{option} --images FOLDER --model MODEL`"
            )

    def parse(self, where: str | None) -> Where | None:
        """Parse a condition on the fields of the gallery; return None for an empty one.

        Raises:
            ValueError: if it is not as described in `Gallery.search`.
        """
        return None if where is None or not where.strip() else parse_where(where, self.fields)

    def find(self, keys: Iterable[str], may_be_removed: bool = False) -> list[Record]:
        """Return the records of keys in their order, without duplicates.

        Args:
            keys: keys of the images.
            may_be_removed: leave out, with a warning, those that the latest removal of exactly these keys has removed: the
                same command finishes a removal that was interrupted.

        Raises:
            ValueError: if there is no gallery or a key is unknown.
        """
        self.require()
        keys = list(dict.fromkeys(keys))
        found = {record.key: record for record in self.store.records(keys=keys)}
        unknown = [key for key in keys if key not in found]
        if unknown and may_be_removed and self.info.get("removed") == _digest(keys):
            logger.warning("already removed: %d of %d images", len(unknown), len(keys))
        elif unknown:
            raise ValueError(
                f"no image of the gallery has the key {unknown[0]!r} ({len(unknown)} of {len(keys)} keys are unknown)"
            )
        return [found[key] for key in keys if key in found]

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
        """Return the parts that indexing and searching use.

        Raises:
            ValueError: as for `require` and `encoder`.
        """
        with self.lock:
            self.require()
            return GalleryParts(self.store, self.files, self.tokens, self.encoder, self.roots, self.lock)

    # ---------------------------------------------------------------- writing

    def remember(self, encoder: "Encoder", source: Source, fields: dict[str, str]) -> None:
        """Save the settings, which must precede the first record, and create the index if there is none.

        Raises:
            ValueError: if a new gallery is to match more views than the encoder gives.
        """
        views, *of_view = encoder.token_shape
        if not self.info and views < self._matched_views:
            raise ValueError(f"matched_views must be {views} with model {encoder.name}, got {self._matched_views}")
        with self.lock:
            store = self.place.make()
            name = str(Path(encoder.name).resolve()) if Path(encoder.name).exists() else encoder.name
            info = self.info or {
                "format": FORMAT,
                "fingerprint": encoder.fingerprint,
                "embedding_dim": encoder.embedding_dim,
                "token_shape": [self._matched_views, *of_view],
                "token_dtype": self._token_dtype or DEFAULT_TOKEN_DTYPE,
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
        """Change settings of the gallery."""
        self.store.write_info(self.info | changes)
        self.info = self.info | changes

    def sweep(self) -> None:
        """Delete tokens and copies without a record, those of interrupted builds included."""
        contents, paths = set(), set()
        for record in self.store.records():
            contents.add(record.content)
            if self.files.is_copy(record.path):
                paths.add(record.path)
        self.tokens.keep_only(contents)
        self.files.keep_only(paths)

    def remove(self, records: Sequence[Record], delete_files: bool, keys: Sequence[str]) -> None:
        """Remove images permanently and warn about identical images that stay; see `Gallery.remove`.

        Args:
            records: records of the images; the caller holds the lock.
            delete_files: delete the user's own files too, unless a different image has taken the name.
            keys: keys that the removal was asked for. A digest of them is saved, by which its repetition is recognised.

        Raises:
            FullDiskError: if the index cannot be rewritten.
        """
        # On a full disk this fails before any file is deleted.
        self.write_info(is_removing=True, images=self.store.count() - len(records), removed=_digest(keys))
        if delete_files:
            for record in records:
                path = Path(record.path)
                is_theirs = not self.files.is_copy(record.path) and path.exists()
                if is_theirs and content_hash(path.read_bytes()) == record.content:
                    path.unlink()
        self.store.delete([record.key for record in records])
        self._finish_removal()
        contents = {record.content for record in records}
        twins = sorted(record.key for record in self.store.records() if record.content in contents)
        if twins:
            logger.warning(
                "identical images stay under %d other keys, such as %s: remove them too to delete the person permanently",
                len(twins), twins[0],
            )  # fmt: skip

    def _finish_removal(self) -> None:
        """Erase removed images from the disk.

        Raises:
            FullDiskError: if there is no space to rewrite the index; the next opening of the gallery retries it.
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
                f"full ({words}): no search finds them, but their data stays on the disk; free some space and open the "
                "gallery again, such as with `mra index stats`"
            ) from error

    def _resume_removal(self) -> None:
        try:
            with self.lock:
                self._finish_removal()
        except FullDiskError as error:  # the remaining images can be searched
            logger.warning("%s", error)


def _digest(keys: Iterable[str]) -> str:
    """Return a digest of a set of keys: the settings have no room for the keys, and removed names are not to stay."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()
