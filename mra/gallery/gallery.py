"""Search your own people: a gallery of images on disk or on a Milvus server, asked in words or by an image."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image

from mra.common.command_line import writing_to
from mra.gallery import calibration as gallery_calibration
from mra.gallery.indexing import Indexer
from mra.gallery.maintenance import describe, examine, remove_records
from mra.gallery.metadata import MetadataSource, read_metadata
from mra.gallery.parts import read_image
from mra.gallery.place import Place
from mra.gallery.searching import Question, answer, open_query_image
from mra.gallery.sources import ImageSource, open_source
from mra.gallery.state import GalleryState
from mra.gallery.types import (
    DEFAULT_COLLECTION,
    DEFAULT_RERANK,
    DEFAULT_TOP,
    BuildReport,
    Calibration,
    GalleryStats,
    Hit,
    SearchResult,
    Skipped,
    Verification,
)
from mra.retrieval.encoders import Encoder
from mra.retrieval.score_fusion import require_finite


if TYPE_CHECKING:
    from mra.common.tables import Table


__all__ = ["BuildReport", "Calibration", "Gallery", "GalleryStats", "Hit", "SearchResult", "Skipped", "Verification"]


DEFAULT_TOKEN_CACHE = 4 * 2**30
DEFAULT_THRESHOLD = 0.5
DEFAULT_MATCH_WEIGHT = 1.0


class Gallery:
    """Images that can be searched by words, by an image or by both.

    Args:
        uri: a path that ends in `.db` (embedded Milvus, a folder), `http://host:19530` (a Milvus server) or ":memory:"
            (exact search in memory, gone at the end).
        model: folder or Hub id of an MRA model; None for the one the gallery was built with. It is loaded when needed.
        collection: name of the gallery at that place; one place can hold several.
        token: of a Milvus server, "user:password" or an API key.
        device: to run the model on; None for the GPU if there is one.
        dtype: dtype of the forward passes; None for that of the weights.
        encoder: what encodes and matches instead of `model` in PyTorch, see `mra.retrieval.encoders.Encoder`.
        files: folder of copied images and cached tokens. None: inside the embedded gallery; for a server
            `~/.cache/mra_retrieval/<name>`; for ":memory:" a temporary one.
        token_cache: most bytes of the token cache on disk; 0 for none.
        token_dtype: of a new gallery's token cache: "float32" (the default) ranks exactly as evaluation does, "float16"
            holds twice as many images.
        index: of a new gallery: "flat" (exact; the default when embedded), "hnsw" (the default on a server) or "ivf".

    Raises:
        ValueError: if the place cannot be opened, another process has it open, or an argument is not as described.
        FullDiskError: if the disk is too full to open it; the verbs that write raise it too.
    """

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
    ) -> None:
        with writing_to(uri):
            self._state = GalleryState(
                Place(uri, collection, token, files, index),
                model=model,
                encoder=encoder,
                device=device,
                dtype=dtype,
                token_cache=token_cache,
                token_dtype=token_dtype,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of images in the gallery."""
        return self._state.store.count() if self._state.exists else 0

    def close(self) -> None:
        """Release the gallery, so that another process can open it."""
        self._state.close()

    @property
    def encoder(self) -> Encoder:
        """The model, loaded on first use and checked against the gallery's; a `TorchEncoder` has `model` and `processor`.

        Raises:
            ValueError: if no model is known, it cannot be loaded, or it is not the one the gallery was built with.
        """
        return self._state.encoder

    @property
    def roots(self) -> list[Path]:
        """Folders that images of this gallery may lie in: those they were indexed from, and that of the copies."""
        return self._state.roots

    @property
    def fields(self) -> dict[str, str]:
        """What `where` can ask for: name and kind ("text", "time" or "number"), `key`, `camera` and `time` included."""
        return self._state.fields

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` saved, or None."""
        return self._state.calibration

    @property
    def threshold(self) -> float:
        """The calibrated threshold, 0.5 before any calibration."""
        return DEFAULT_THRESHOLD if self.calibration is None else self.calibration.threshold

    @property
    def match_weight(self) -> float:
        """Weight of the matching log-odds in the ranking: the calibrated one, else the model's own, else 1."""
        if self.calibration is not None:
            return self.calibration.match_weight
        chosen = getattr(self.encoder, "match_weight", None)  # encoders of others may lack it
        return DEFAULT_MATCH_WEIGHT if chosen is None else chosen

    def build(
        self,
        images: ImageSource,
        metadata: MetadataSource = None,
        *,
        split: str | None = None,
        prefix: str = "",
        prune: bool = False,
        copy_images: bool | None = None,
        batch_size: int = 32,
        num_workers: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> BuildReport:
        """Index images: encode what is new or changed, leave alone what is not. Makes the gallery if there is none.

        It may be interrupted at any time and called again: what was indexed is not encoded again, and the gallery becomes
        the one that an uninterrupted call gives.

        Args:
            images: a folder (searched at any depth), a list of paths, a `datasets.Dataset` with an image column, or a
                folder or Hub id that `load_dataset` reads.
            metadata: a CSV file, or rows as dicts: `path` (of the image, relative to the folder, or its key), `camera`,
                `time` (ISO 8601) and any other column. Of a dataset, its text and number columns are taken without asking.
            split: of what `load_dataset` is to read.
            prefix: put before the keys, so that two folders with equal file names can share a gallery.
            prune: remove images of this source that are no longer in it.
            copy_images: keep a copy of each image in the gallery; None does so only for images that have no file.
            batch_size: images in a forward pass.
            num_workers: threads that read and decode images.
            progress: called with images done and images in all.

        Raises:
            ValueError: if there are no images, the metadata cannot be read, a key belongs to another source already, or
                the gallery was built with another model.
            FullDiskError: if the disk is full; the next call goes on where this one stopped.
        """
        state = self._state
        source = open_source(images, prefix, split, state.place.folder)
        labels = read_metadata(metadata, source, state.info.get("fields", {}), prefix)
        encoder = self.encoder
        with writing_to(state.place.uri):
            state.remember(encoder, source, labels.kinds)
            report = Indexer(
                state.parts(),
                source,
                labels,
                copy_images=copy_images,
                batch_size=batch_size,
                num_workers=num_workers,
                progress=progress,
            ).run()
            with state.lock:
                state.write_info(images=state.store.count())
            if prune and report.missing:
                report.removed = self.remove(keys=report.missing)
                report.missing = []
            elif report.changed:
                with state.lock:
                    state.sweep()
        return report

    def add(self, images: ImageSource, metadata: MetadataSource = None, **options: Any) -> BuildReport:
        """Index more images into a gallery that exists; arguments are those of `build`.

        Raises:
            ValueError: as `build`, and if there is no gallery yet.
        """
        self._state.require()
        return self.build(images, metadata, **options)

    def remove(
        self, *, where: str | None = None, keys: Iterable[str] | None = None, delete_files: bool = False
    ) -> int:
        """Remove images for good: no vector, token or copy stays on disk, and an embedded index is rewritten without them.

        The user's own files stay, and the next `build` of their folder would index them again, unless `delete_files`. An equal
        picture under another key is an image of its own and stays, with a warning.

        Args:
            where: which ones, as in `search`.
            keys: which ones, by key.
            delete_files: delete the user's own files of these images too.

        Returns:
            How many images were removed.

        Raises:
            ValueError: if neither or both are given, a key is unknown, or `where` is not as described.
            FullDiskError: if the disk is full; the message says whether the images are still found.
        """
        state = self._state
        state.require()
        if (where is None) == (keys is None):
            raise ValueError("remove needs either where or keys, to say which images")
        with state.lock, writing_to(state.place.uri):
            records = list(state.store.records(state.parse(where))) if keys is None else state.find(keys)
            if records:
                remove_records(state, records, delete_files)
        return len(records)

    def stats(self) -> GalleryStats:
        """Count images, cameras, times, cached tokens and bytes."""
        self._state.require()
        return describe(self._state)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Read every image again and compare its content with what was indexed; needs no model."""
        self._state.require()
        return examine(self._state, progress)

    def search(
        self,
        text: str | None = None,
        *,
        image: Image.Image | str | Path | None = None,
        top: int = DEFAULT_TOP,
        rerank: int = DEFAULT_RERANK,
        where: str | None = None,
        threshold: float | None = None,
    ) -> SearchResult:
        """Rank images by a sentence, by an image of the person, or by both.

        The nearest embeddings are found first; with a sentence, the best of them are then re-ranked by the fusion layers.
        By an image alone there is nothing to re-rank. With both, the query embedding is the mean of both embeddings.

        Args:
            text: a sentence.
            image: a PIL image, or the path of one; it need not be in the gallery.
            top: hits to return.
            rerank: nearest images to re-rank, 0 for none.
            where: restricts the search: comparisons (== != < <= > >=, `in`) of fields with texts or numbers, joined by
                `and`, `or`, `not` and parentheses, such as `camera == "c3" and time > "2026-01-31T08:00"`. A comparison
                with a value that an image does not have is false, and so is its opposite.
            threshold: matching probability from which a hit counts as likely; None for the calibrated one.

        Raises:
            ValueError: if neither text nor image is given, the gallery is empty or was built with another model, or an
                argument is not as described.
        """
        self._state.require()
        if text is None and image is None:
            raise ValueError("search needs a text, an image or both")
        question = Question(
            text=text,
            image=None if image is None else open_query_image(image),
            top=top,
            rerank=rerank,
            where=self._state.parse(where),
            threshold=self.threshold if threshold is None else threshold,
            match_weight=self.match_weight,
        )
        return answer(self._state.parts(), question)

    def match(self, texts: Sequence[str], keys: Sequence[str]) -> torch.Tensor:
        """Return matching probabilities `(texts, keys)` of sentences or phrases with images of the gallery.

        Raises:
            ValueError: if a key is unknown, a text has no word in it, or a matching score is not finite.
        """
        parts = self._state.parts()
        records = self._state.find(keys)
        log_odds = parts.encoder.match(parts.encoder.encode_texts(texts), parts.require_tokens(records))
        require_finite(log_odds, lambda text, image: f"the text {texts[text]!r} and image {keys[image]}")
        return log_odds.sigmoid().mean(dim=0)

    def image(self, key: str) -> Image.Image:
        """Read an image as it was encoded: upright and RGB.

        Raises:
            ValueError: if the key is unknown, its file is gone or unreadable, or it lies outside `roots`.
        """
        (record,) = self._state.find([key])
        return read_image(record, self._state.files, self.roots)

    def image_tokens(self, key: str) -> torch.Tensor:
        """Load tokens `(views, 1 + patches, hidden)` of an image; the second view is its mirror image.

        Raises:
            ValueError: as `image`.
        """
        return self._state.parts().require_tokens(self._state.find([key]))[0]

    def calibrate(
        self, dataset: "Table", *, rerank: int = DEFAULT_RERANK, max_false_alarms: float | None = None, name: str = ""
    ) -> Calibration:
        """Choose the threshold and the weight of the matching score on a labelled split, and save both with the gallery.

        Args:
            dataset: `datasets.Dataset` with columns image, captions and image_id, as for `evaluate_retrieval`.
            rerank: images re-ranked for each query.
            max_false_alarms: most false alarms to accept, a share of the queries; None makes the sum of false alarms and
                misses as small as possible.
            name: what the split is called in messages.

        Raises:
            ValueError: if the dataset is not as described.
        """
        self._state.require()
        result = gallery_calibration.calibrate(self.encoder, dataset, rerank, max_false_alarms, name)
        with self._state.lock, writing_to(self._state.place.uri):
            self._state.write_info(calibration=asdict(result))
        return result
