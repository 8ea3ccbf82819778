"""What the verbs of a gallery return, and what they do where nothing else is asked for."""

from dataclasses import dataclass, field
from pathlib import Path


DEFAULT_COLLECTION = "people"
DEFAULT_TOP = 20
DEFAULT_RERANK = 128


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
        match_weight: weight of the matching log-odds in their order; None where nothing was re-ranked.
    """

    hits: list[Hit]
    threshold: float
    timings: dict[str, float]
    reranked: int = 0
    tokens_encoded: int = 0
    match_weight: float | None = None

    @property
    def likely_in_gallery(self) -> bool | None:
        """Whether the first hit reaches the threshold; None where nothing was re-ranked."""
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
        false_alarms: share of queries whose person was taken out of the gallery, yet the first hit reached the threshold.
        misses: share of queries whose person was in the gallery, yet the first of their images did not reach it.
        match_weight: weight of the matching log-odds in the ranking, chosen by the mean of R@1 and mAP on the same split.
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
        disk_bytes: of each part: index (None where a server keeps it), tokens, images.
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
    disk_bytes: dict[str, int | None]
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
