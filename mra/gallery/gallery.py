"""Gallery of your own images on disk or on a Milvus server, searched by text or by an image."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from mra.common.command_line import writing_to
from mra.gallery.indexing import Indexer
from mra.gallery.inspection import describe, examine
from mra.gallery.metadata import MetadataSource, read_metadata
from mra.gallery.parts import read_image
from mra.gallery.place import Place
from mra.gallery.searching import Question, answer, open_query_image
from mra.gallery.sources import ImageSource, open_source
from mra.gallery.state import BACKENDS, GalleryState
from mra.gallery.types import (
    DEFAULT_COLLECTION,
    DEFAULT_MATCHED_VIEWS,
    DEFAULT_RERANK,
    DEFAULT_TOKEN_DTYPE,
    DEFAULT_TOP,
    MATCHED_VIEWS,
    TOKEN_DTYPES,
    BuildReport,
    Calibration,
    GalleryStats,
    Hit,
    SearchResult,
    Skipped,
    Verification,
)
from mra.retrieval.score_fusion import require_finite, sigmoid


if TYPE_CHECKING:
    import torch

    from mra.common.tables import Table
    from mra.retrieval.encoders import Encoder


__all__ = ["BuildReport", "Calibration", "Gallery", "GalleryStats", "Hit", "SearchResult", "Skipped", "Verification"]


DEFAULT_TOKEN_CACHE = 4 * 2**30
DEFAULT_THRESHOLD = 0.5
DEFAULT_MATCH_WEIGHT = 1.0


class Gallery:
    """Images that can be searched by text, by an image or by both.

    Args:
        uri: a path ending in `.db` (embedded Milvus, a folder), `http://host:19530` (a Milvus server) or ":memory:" (exact
            search in memory, not saved).
        model: folder or Hub id of an MRA model; None for the one that built the gallery. It is loaded on first use.
        collection: name of the gallery at that location, which can hold several.
        token: token of a Milvus server, "user:password" or an API key.
        device: to run the model on; None for the GPU if there is one.
        dtype: dtype of the forward passes, or its name, or "auto" for the faster one on this device; None for that of the
            weights.
        backend: "torch"; "onnx" for the model's ONNX export, `model` itself or its folder `onnx`; or "auto" for an export of
            the gallery's fingerprint if there is one and neither a GPU nor a dtype is asked for, which starts without
            PyTorch.
        encoder: used instead of `model`; see `mra.retrieval.encoders.Encoder`.
        files: folder of copied images and cached tokens. None: inside the embedded gallery; for a server
            `~/.cache/mra_retrieval/<name>`; for ":memory:" a temporary one.
        token_cache: maximum size of the token cache in bytes; 0 for none.
        token_dtype: dtype of the token cache of a new gallery: "float16" (the default) holds twice as many images as
            "float32".
        matched_views: views of an image that a new gallery caches and matches: 1 (the default) for the upright one, 2 for
            its mirror image too, as in evaluation. Embeddings are the mean of both views in either case.
        index: index of a new gallery: "flat" (exact; the default when embedded), "hnsw" (the default on a server) or "ivf".

    Raises:
        ValueError: if the gallery cannot be opened, a different process has it open, or an argument is not as described.
        FullDiskError: if the disk is too full to open it; methods that write raise it too.
    """

    def __init__(
        self,
        uri: str | Path,
        model: str | None = None,
        *,
        collection: str = DEFAULT_COLLECTION,
        token: str | None = None,
        device: "str | torch.device | None" = None,
        dtype: "str | torch.dtype | None" = None,
        backend: str = "torch",
        encoder: "Encoder | None" = None,
        files: str | Path | None = None,
        token_cache: int = DEFAULT_TOKEN_CACHE,
        token_dtype: str | None = None,
        matched_views: int = DEFAULT_MATCHED_VIEWS,
        index: str | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        for name, value, choices in (
            ("token_dtype", token_dtype or DEFAULT_TOKEN_DTYPE, TOKEN_DTYPES),
            ("matched_views", matched_views, MATCHED_VIEWS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        with writing_to(uri):
            self._state = GalleryState(
                Place(uri, collection, token, files, index),
                model=model,
                encoder=encoder,
                backend=backend,
                device=device,
                dtype=dtype,
                token_cache=token_cache,
                token_dtype=token_dtype,
                matched_views=matched_views,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of images in the gallery."""
        return self._state.store.count() if self._state.exists else 0

    def close(self) -> None:
        """Release the gallery, so that a different process can open it."""
        self._state.close()

    @property
    def encoder(self) -> "Encoder":
        """Return the model, loaded on first use; a `TorchEncoder` has `model` and `processor`.

        Raises:
            ValueError: if no model is known, it cannot be loaded, or it is not the one that built the gallery.
        """
        return self._state.encoder

    @property
    def roots(self) -> list[Path]:
        """Return the folders that images may be in: those they were indexed from, and the folder of copies."""
        return self._state.roots

    @property
    def fields(self) -> dict[str, str]:
        """Return name and kind ("text", "time" or "number") of each field for `where`, key, camera and time included."""
        return self._state.fields

    @property
    def calibration(self) -> Calibration | None:
        """Return what `calibrate` saved, or None."""
        return self._state.calibration

    @property
    def threshold(self) -> float:
        """Return the calibrated threshold, 0.5 without calibration."""
        return DEFAULT_THRESHOLD if self.calibration is None else self.calibration.threshold

    @property
    def match_weight(self) -> float:
        """Return the weight of the matching log-odds in the ranking: the calibrated one, else the model's, else 1."""
        if self.calibration is not None:
            return self.calibration.match_weight
        chosen = getattr(self.encoder, "match_weight", None)  # users' encoders may lack it
        return DEFAULT_MATCH_WEIGHT if chosen is None else chosen

    @property
    def largest_log_odds(self) -> float | None:
        """Return the largest log-odds of a match seen in calibration or on the model's validation data; None if unknown."""
        self._state.require()
        views = self._state.info["token_shape"][0]
        seen = [getattr(self.encoder, "largest_log_odds", {}).get(views)]  # users' encoders may lack it
        seen += [self.calibration.largest_log_odds] if self.calibration else []
        return max((value for value in seen if value is not None), default=None)

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
        """Index images: encode those that are new or changed. Create the gallery if there is none.

        After an interruption, call it again: it resumes, and the resulting gallery is that of an uninterrupted call.

        Args:
            images: a folder (searched at any depth), a list of paths, a `datasets.Dataset` with an image column, or a
                folder or Hub id that `load_dataset` reads.
            metadata: a CSV file, or rows as dicts: `path` (of the image, relative to the folder, or its key), `camera`,
                `time` (ISO 8601) and any further column. The text and number columns of a dataset are used automatically.
            split: split for `load_dataset`.
            prefix: prefix of the keys, so that two folders with equal file names can share a gallery.
            prune: remove images of this source that are no longer in it.
            copy_images: copy each image into the gallery; None copies only images without a file.
            batch_size: images per forward pass.
            num_workers: threads that read and decode images.
            progress: called with the number of images done and the total.

        Raises:
            ValueError: if there are no images, the metadata cannot be read, a key belongs to a different source, or the
                gallery was built with a different model.
            FullDiskError: if the disk is full; the next call resumes.
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
        """Index more images into an existing gallery; the arguments are those of `build`.

        Raises:
            ValueError: as for `build`, or if there is no gallery yet.
        """
        self._state.require()
        return self.build(images, metadata, **options)

    def remove(
        self, *, where: str | None = None, keys: Iterable[str] | None = None, delete_files: bool = False
    ) -> int:
        """Remove images permanently: delete vectors, tokens and copies, and rewrite an embedded index without them.

        The user's own files stay unless `delete_files`; the next `build` of their folder would index them again. Identical
        images under different keys stay too, with a warning. After an interruption, call it again with the same arguments.

        Args:
            where: condition on the images, as in `search`.
            keys: keys of the images.
            delete_files: also delete the user's own files of these images.

        Returns:
            The number of images removed.

        Raises:
            ValueError: if neither or both are given, a key is unknown, or `where` is not as described.
            FullDiskError: if the disk is full; the message says whether searches still find the images.
        """
        state = self._state
        state.require()
        if (where is None) == (keys is None):
            raise ValueError("exactly one of where and keys must be given, to choose the images")
        with state.lock, writing_to(state.place.uri):
            if keys is None:
                records = list(state.store.records(state.parse(where)))
                keys = [record.key for record in records]
            else:
                keys = list(dict.fromkeys(keys))
                records = state.find(keys, may_be_removed=True)
            if records or state.info.get("is_removing"):
                state.remove(records, delete_files, keys)
        return len(records)

    def stats(self) -> GalleryStats:
        """Count images, cameras, times, cached tokens and bytes."""
        self._state.require()
        return describe(self._state)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Read every image again and compare it with the index; no model is needed."""
        self._state.require()
        return examine(self._state, progress)

    def search(
        self,
        text: str | None = None,
        *,
        image: Image.Image | str | Path | None = None,
        top: int = DEFAULT_TOP,
        rerank: int = DEFAULT_RERANK,
        early_stop: bool = True,
        where: str | None = None,
        threshold: float | None = None,
    ) -> SearchResult:
        """Rank images by a text, by an image of the person, or by both.

        The nearest embeddings are found first; with a text, the fusion layers then re-rank the best of them. An image alone
        is not re-ranked. With both, the query embedding is the mean of both embeddings.

        Args:
            text: description of the person.
            image: PIL image or its path; it need not be in the gallery.
            top: number of hits.
            rerank: number of nearest images to re-rank, 0 for none.
            early_stop: match them in rounds, and stop as soon as the first `top` hits are settled: they and their order are
                those of matching all, unless a log-odds exceeds `largest_log_odds`. If that is unknown, all are matched.
            where: filter: comparisons (== != < <= > >=, `in`) of fields with texts or numbers, joined by `and`, `or`, `not`
                and parentheses, such as `camera == "c3" and time > "2026-01-31T08:00"`. If an image lacks a value, a
                comparison with it is false, and so is its negation.
            threshold: matching probability from which a hit counts as likely; None for the calibrated one.

        Raises:
            ValueError: if neither text nor image is given, the gallery is empty or was built with a different model, or an
                argument is not as described.
        """
        self._state.require()
        if text is None and image is None:
            raise ValueError("text or image must be given, or both")
        question = Question(
            text=text,
            image=None if image is None else open_query_image(image),
            top=top,
            rerank=rerank,
            where=self._state.parse(where),
            threshold=self.threshold if threshold is None else threshold,
            match_weight=self.match_weight,
            largest_log_odds=self.largest_log_odds if early_stop else None,
        )
        return answer(self._state.parts(), question)

    def match(self, texts: Sequence[str], keys: Sequence[str]) -> np.ndarray:
        """Return matching probabilities `(texts, keys)` of texts or phrases with images of the gallery.

        Raises:
            ValueError: if a key is unknown, a text has no words, or a matching score is not finite.
        """
        parts = self._state.parts()
        records = self._state.find(keys)
        log_odds = np.asarray(parts.encoder.match(parts.encoder.encode_texts(texts), parts.require_tokens(records)))
        require_finite(log_odds, lambda text, image: f"the text {texts[text]!r} and image {keys[image]}")
        return sigmoid(log_odds).mean(axis=0)

    def image(self, key: str) -> Image.Image:
        """Read an image as it was encoded: upright and RGB.

        Raises:
            ValueError: if the key is unknown, or its file is missing, unreadable or outside `roots`.
        """
        (record,) = self._state.find([key])
        return read_image(record, self._state.files, self.roots)

    def image_tokens(self, key: str) -> np.ndarray:
        """Load tokens `(matched views, 1 + patches, hidden)` float32 of an image; the second view is its mirror image.

        Raises:
            ValueError: as for `image`.
        """
        return self._state.parts().require_tokens(self._state.find([key]))[0]

    def calibrate(
        self, dataset: "Table", *, rerank: int = DEFAULT_RERANK, max_false_alarms: float | None = None, name: str = ""
    ) -> Calibration:
        """Choose the threshold and the weight of the matching score on a labelled split, and save both in the gallery.

        The largest log-odds of a match is saved too, for early stopping. All are measured in the gallery's matched views and
        its precision of tokens.

        Args:
            dataset: `datasets.Dataset` with columns image, captions and image_id, as for `evaluate_retrieval`.
            rerank: images to re-rank per query.
            max_false_alarms: maximum share of queries with a false alarm; None minimises the sum of false alarms and
                misses.
            name: name of the split, saved with the calibration.

        Raises:
            ValueError: if the dataset is not as described.
        """
        from mra.gallery import calibration as gallery_calibration  # imports PyTorch, as evaluation does

        self._state.require()
        tokens = self._state.tokens
        result = gallery_calibration.calibrate(
            self.encoder, dataset, rerank, max_false_alarms, name, tokens.shape[0], tokens.dtype.name
        )
        with self._state.lock, writing_to(self._state.place.uri):
            self._state.write_info(calibration=asdict(result))
        return result
