"""Result types of a gallery, and its default settings."""

from dataclasses import dataclass, field
from pathlib import Path


DEFAULT_COLLECTION = "people"
DEFAULT_TOP = 20
DEFAULT_RERANK = 128

# Characters of a query over HTTP, of which the model reads about fifty words.
MAX_TEXT = 1_000
# Views of an image that a gallery can match: the upright one, or its mirror image too.
MATCHED_VIEWS = (1, 2)
DEFAULT_MATCHED_VIEWS = 1

# Precision of the token cache of a new gallery.
TOKEN_DTYPES = ("float32", "float16")
DEFAULT_TOKEN_DTYPE = "float16"


@dataclass(frozen=True)
class Hit:
    """One image of a search result.

    Attributes:
        rank: 1 = best.
        key: unique name of the image in the gallery.
        path: image file, the user's own or the gallery's copy.
        score: matching probability, 0 to 1, averaged over the gallery's matched views; None if the image was not matched.
        similarity: dot product of query and image embeddings.
        likely: whether the score reaches the threshold; False means "probably not in the gallery", None means no score.
        camera: camera, or None if unknown.
        time: ISO 8601 time, or None if unknown.
        metadata: all further non-empty columns of the image.
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
    """Result of a search.

    Attributes:
        hits: images, best first.
        threshold: matching probability from which a hit counts as likely.
        timings: seconds of each stage: encode, search, tokens, rerank.
        reranked: how many images were re-ranked.
        tokens_encoded: how many images were encoded again because their tokens were not cached.
        match_weight: weight of the matching log-odds in their order; None if nothing was re-ranked.
        matched: how many of the re-ranked images were matched with the text; the first hits were settled by then.
        backend: "torch" or "onnx", which ran the model; None if the encoder does not say.
    """

    hits: list[Hit]
    threshold: float
    timings: dict[str, float]
    reranked: int = 0
    tokens_encoded: int = 0
    match_weight: float | None = None
    matched: int = 0
    backend: str | None = None

    @property
    def likely_in_gallery(self) -> bool | None:
        """Return whether the first hit reaches the threshold; None if nothing was re-ranked."""
        return self.hits[0].likely if self.hits else None


@dataclass(frozen=True)
class Skipped:
    """An image that could not be indexed, and why."""

    key: str
    reason: str


@dataclass
class BuildReport:
    """What `Gallery.build` or `Gallery.add` did.

    Attributes:
        added: images that are new to the gallery.
        changed: images whose content changed and was encoded again.
        unchanged: images whose content is the same.
        relabelled: unchanged images whose path, camera, time or further metadata changed.
        removed: images that are no longer in the source (with `prune`).
        missing: keys of images that are no longer in the source but were kept (without `prune`).
        skipped: images that could not be read.
        unmatched: paths of the metadata that match no image.
        encoded: images that went through the model; identical images are encoded once.
        seconds: duration of the call.
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
        false_alarms: share of queries whose first hit reaches the threshold although the person is not in the gallery.
        misses: share of queries whose person is in the gallery but whose best own image does not reach the threshold.
        match_weight: weight of the matching log-odds in the ranking, chosen by the mean of R@1 and mAP on the same split.
        rerank: images re-ranked for each query.
        queries: number of captions.
        split: name of the split.
        curve: (threshold, false_alarms, misses) for thresholds from 0 to 1.
        largest_log_odds: largest log-odds of a match, the bound of early stopping; None if saved by a version without it.
    """

    threshold: float
    false_alarms: float
    misses: float
    match_weight: float
    rerank: int
    queries: int
    split: str
    curve: list[tuple[float, float, float]] = field(repr=False)
    largest_log_odds: float | None = None


@dataclass(frozen=True)
class GalleryStats:
    """Contents and sizes of a gallery.

    Attributes:
        uri: location.
        collection: name at that location.
        images: number of images.
        cameras: number of images of each camera; "" for unknown.
        first_time: earliest time, or None.
        last_time: latest time, or None.
        fields: name and kind ("text" or "number") of each metadata column; filters can use all of them.
        roots: folders that the images come from.
        copies: number of images copied into the gallery.
        model: folder or Hub id of the model that built it.
        fingerprint: fingerprint of that model.
        embedding_dim: width of the embeddings.
        tokens: number of images with cached tokens.
        disk_bytes: bytes of the index (None if a server keeps it), the tokens and the images.
        calibration: saved calibration, or None.
        matched_views: views of an image that a search matches: 1, or 2 with the mirror image.
        token_dtype: dtype of cached tokens.
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
    disk_bytes: dict[str, int | None]
    calibration: Calibration | None
    matched_views: int = DEFAULT_MATCHED_VIEWS
    token_dtype: str = DEFAULT_TOKEN_DTYPE


@dataclass
class Verification:
    """Result of `Gallery.verify`; an intact gallery has no problems.

    Attributes:
        images: number of images checked.
        problems: key and reason of each: a file that is missing, changed or unreadable, or a damaged embedding.
        tokens_missing: number of images without cached tokens; a search encodes them on demand.
    """

    images: int = 0
    problems: list[Skipped] = field(default_factory=list)
    tokens_missing: int = 0
