"""Search your own people: a gallery of images on disk or on a Milvus server, asked in words or by an image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from .encoders import Encoder


DEFAULT_TOP = 20
DEFAULT_RERANK = 128
DEFAULT_TOKEN_CACHE = 4 * 2**30


@dataclass(frozen=True)
class Hit:
    """One image of a search result.

    Attributes:
        rank: 1 = best.
        key: name of the image in the gallery, unique.
        path: the file that holds the image: the user's own, or the gallery's copy.
        score: matching probability, 0 to 1, the mean of both views; None where the image was not re-ranked.
        similarity: dot product of query and image embeddings.
        likely: whether the score reaches the threshold; False says "probably not in the gallery". None without a score.
        camera: camera, or None where unknown.
        time: ISO 8601, or None where unknown.
        metadata: every other column that came with the image, without empty ones.
    """

    rank: int
    key: str
    path: Path
    score: float | None
    similarity: float
    likely: bool | None
    camera: str | None
    time: str | None
    metadata: dict[str, str | float]


@dataclass(frozen=True)
class SearchResult:
    """What a search gave.

    Attributes:
        hits: best first.
        threshold: matching probability from which a hit counts as likely.
        timings: seconds of each stage: encode, search, tokens, rerank.
        reranked: how many images were re-ranked.
        tokens_encoded: how many of them had to be encoded again, since their tokens were not in the cache.
    """

    hits: list[Hit]
    threshold: float
    timings: dict[str, float]
    reranked: int = 0
    tokens_encoded: int = 0

    @property
    def likely_in_gallery(self) -> bool | None:
        """Whether any hit reaches the threshold; None where nothing was re-ranked."""
        judged = [hit.likely for hit in self.hits if hit.likely is not None]
        return any(judged) if judged else None


@dataclass(frozen=True)
class Skipped:
    """An image that could not be indexed, and why."""

    key: str
    reason: str


@dataclass
class BuildReport:
    """What `Gallery.build` or `Gallery.add` did.

    Attributes:
        added: images that were not in the gallery.
        changed: images whose content had changed and was encoded anew.
        unchanged: images whose content is as it was.
        relabelled: of the unchanged ones, those whose path, camera, time or other metadata changed.
        removed: images that were in the gallery but no longer in the source (with `prune`).
        missing: keys of those, where they were kept (without `prune`).
        skipped: images that could not be read.
        unmatched: metadata rows whose path names no image.
        encoded: images that went through the model; equal contents go once.
        seconds: the whole call.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    relabelled: int = 0
    removed: int = 0
    missing: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    encoded: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """A threshold chosen on a labelled split, saved with the gallery.

    Attributes:
        threshold: matching probability from which a hit counts as likely.
        false_alarms: share of queries whose person was taken out of the gallery, yet a hit reached the threshold.
        misses: share of queries whose person was in the gallery, yet none of their images among the hits reached it.
        match_weight: weight of the matching log-odds in the ranking, chosen by mAP on the same split.
        rerank: images re-ranked for each query.
        queries: captions of the split.
        split: what it was calibrated on.
        curve: (threshold, false_alarms, misses) from 0 to 1.
    """

    threshold: float
    false_alarms: float
    misses: float
    match_weight: float
    rerank: int
    queries: int
    split: str
    curve: list[tuple[float, float, float]] = field(repr=False)


@dataclass(frozen=True)
class GalleryStats:
    """Contents and sizes of a gallery.

    Attributes:
        uri: where it lies.
        collection: its name there.
        images: how many.
        cameras: images of each camera; "" for unknown.
        first_time: earliest time, or None.
        last_time: latest time, or None.
        fields: name and kind ("text" or "number") of every metadata column; all can be filtered on.
        roots: folders that the images come from.
        copies: images of which the gallery holds a copy.
        model: folder or Hub id it was built with.
        fingerprint: of that model.
        embedding_dim: width of the embeddings.
        tokens: images whose tokens are in the cache.
        disk_bytes: of each part: index, tokens, images.
        calibration: or None.
    """

    uri: str
    collection: str
    images: int
    cameras: dict[str, int]
    first_time: str | None
    last_time: str | None
    fields: dict[str, str]
    roots: list[str]
    copies: int
    model: str | None
    fingerprint: str | None
    embedding_dim: int | None
    tokens: int
    disk_bytes: dict[str, int]
    calibration: Calibration | None


@dataclass
class Verification:
    """What `Gallery.verify` found; a sound gallery has no problems.

    Attributes:
        images: how many were looked at.
        problems: key and reason: the file is gone, changed or unreadable, or the embedding is no finite vector.
        tokens_missing: images without tokens in the cache; a search encodes them when it needs them.
    """

    images: int = 0
    problems: list[Skipped] = field(default_factory=list)
    tokens_missing: int = 0


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
        encoder: what encodes and matches instead of `model` in PyTorch, see `mra_retrieval.encoders.Encoder`.
        files: folder of copied images and cached tokens. None: inside the embedded gallery; for a server
            `~/.cache/mra_retrieval/<name>`; for ":memory:" a temporary one.
        token_cache: most bytes of the token cache on disk; 0 for none.
        token_dtype: "float32" ranks exactly as evaluation does, "float16" holds twice as many images.

    Raises:
        ValueError: if the place cannot be opened, another process has it open, or an argument is not as described.
    """

    def __init__(
        self,
        uri: str | Path,
        model: str | None = None,
        *,
        collection: str = "people",
        token: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        encoder: Encoder | None = None,
        files: str | Path | None = None,
        token_cache: int = DEFAULT_TOKEN_CACHE,
        token_dtype: str = "float32",
    ):
        raise NotImplementedError

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __len__(self) -> int:
        """Images in the gallery."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the gallery, so that another process can open it."""
        raise NotImplementedError

    @property
    def encoder(self) -> Encoder:
        """The model, loaded on first use and checked against the gallery's; a `TorchEncoder` has `model` and `processor`.

        Raises:
            ValueError: if no model is known, it cannot be loaded, or it is not the one the gallery was built with.
        """
        raise NotImplementedError

    @property
    def roots(self) -> list[Path]:
        """Folders that images of this gallery may lie in: those they were indexed from, and that of the copies."""
        raise NotImplementedError

    @property
    def fields(self) -> dict[str, str]:
        """What `where` can ask for: name and kind ("text", "time" or "number"), `key`, `camera` and `time` included."""
        raise NotImplementedError

    @property
    def threshold(self) -> float:
        """The calibrated threshold, 0.5 before any calibration."""
        raise NotImplementedError

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` saved, or None."""
        raise NotImplementedError

    def build(
        self,
        images,
        metadata=None,
        *,
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
            images: a folder (searched at any depth), a list of paths, or a `datasets.Dataset` with an image column
                (`load_dataset` reads a folder or Hub id).
            metadata: a CSV file, or rows as dicts: `path` (of the image, relative to the folder, or its key), `camera`,
                `time` (ISO 8601) and any other column. Of a dataset, its text and number columns are taken without asking.
            prefix: put before the keys, so that two folders with equal file names can share a gallery.
            prune: remove images of this source that are no longer in it.
            copy_images: keep a copy of each image in the gallery; None does so only for images that have no file.
            batch_size: images in a forward pass.
            num_workers: threads that read and decode images.
            progress: called with images done and images in all.

        Raises:
            ValueError: if there are no images, the metadata cannot be read, a key belongs to another source already, or
                the gallery was built with another model.
        """
        raise NotImplementedError

    def add(self, images, metadata=None, **options) -> BuildReport:
        """Index more images into a gallery that exists; arguments are those of `build`.

        Raises:
            ValueError: as `build`, and if there is no gallery yet.
        """
        raise NotImplementedError

    def remove(
        self, *, where: str | None = None, keys: Iterable[str] | None = None, delete_files: bool = False
    ) -> int:
        """Remove images for good: no vector, token or copy stays on disk, and an embedded index is rewritten without them.

        The user's own files stay, and the next `build` of their folder would index them again, unless `delete_files`.

        Args:
            where: which ones, as in `search`.
            keys: which ones, by key.
            delete_files: delete the user's own files of these images too.

        Returns:
            How many images were removed.

        Raises:
            ValueError: if neither or both are given, a key is unknown, or `where` is not as described.
        """
        raise NotImplementedError

    def stats(self) -> GalleryStats:
        """Count images, cameras, times, cached tokens and bytes."""
        raise NotImplementedError

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Read every image again and compare its content with what was indexed; needs no model."""
        raise NotImplementedError

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
        raise NotImplementedError

    def match(self, texts: Sequence[str], keys: Sequence[str]) -> torch.Tensor:
        """Matching probabilities (texts, keys) of sentences or phrases with images of the gallery.

        Raises:
            ValueError: if a key is unknown or a text has no word in it.
        """
        raise NotImplementedError

    def image(self, key: str) -> Image.Image:
        """The image as it was encoded: upright and RGB.

        Raises:
            ValueError: if the key is unknown, its file is gone or unreadable, or it lies outside `roots`.
        """
        raise NotImplementedError

    def image_tokens(self, key: str) -> torch.Tensor:
        """Tokens (views, 1 + patches, hidden) of an image, from the cache or encoded anew; the second view is its mirror.

        Raises:
            ValueError: as `image`.
        """
        raise NotImplementedError

    def calibrate(
        self, dataset, *, rerank: int = DEFAULT_RERANK, max_false_alarms: float | None = None, name: str = ""
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
        raise NotImplementedError


Metadata = str | Path | Sequence[Mapping[str, object]]
