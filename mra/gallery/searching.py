"""Search: encode the query, find the nearest embeddings, match the best of them and rank them."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from images_mra import read_picture
from mra.gallery.parts import GalleryParts
from mra.gallery.store import Record, find_damage
from mra.gallery.types import Hit, SearchResult
from mra.gallery.where import Where
from mra.retrieval.early_stopping import match_in_rounds
from mra.retrieval.score_fusion import posterior_scores, require_finite, sigmoid


if TYPE_CHECKING:
    from mra.retrieval.encoders import Encoder


logger = logging.getLogger(__name__)

# Images matched at a time: few on a CPU, where each costs time; enough to keep an accelerator busy.
ROUND_SIZES = {"cpu": 8}
DEFAULT_ROUND_SIZE = 64


@dataclass
class Question:
    """Query of a search.

    Attributes:
        text: description of the person, or None.
        image: image of the person, or None.
        top: number of hits.
        rerank: number of nearest images to re-rank.
        where: filter, or None.
        threshold: matching probability of a likely hit.
        match_weight: weight of the matching log-odds in the ranking.
        largest_log_odds: bound by which re-ranking stops early; None to match all images to re-rank.
        timings: seconds of each stage, filled by `answer`.

    Raises:
        ValueError: if a value is not as described.
    """

    text: str | None
    image: Image.Image | None
    top: int
    rerank: int
    where: Where | None
    threshold: float
    match_weight: float
    largest_log_odds: float | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text is not None and not self.text.strip():
            raise ValueError(f"text must have at least one word, got {self.text!r}")
        for name, value, least in (("top", self.top, 1), ("rerank", self.rerank, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a probability from 0 to 1, got {self.threshold}")

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to the timings."""
        start = time.perf_counter()
        yield
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start


class _PairMatching:
    """Matches found images with the text of a question, and counts what it did.

    Attributes:
        encoded: images encoded again because their tokens were not cached.
        failed: images that cannot be read.
    """

    def __init__(self, parts: GalleryParts, question: Question, texts: Any, records: list[Record]) -> None:
        self._parts, self._question, self._texts, self._records = parts, question, texts, records
        self.encoded = self.failed = 0

    def match(self, places: range) -> tuple[list[int], np.ndarray]:
        """Match some of the images: the positions of those that can be read, and their log-odds `(views, images)`.

        Raises:
            ValueError: if a log-odds is not finite.
        """
        records = self._records[places.start : places.stop]
        with self._question.timed("tokens"):
            tokens, failed, encoded = self._parts.load_tokens(records)
        for reason in failed.values():
            logger.warning("not re-ranked: %s", reason)
        self.encoded += encoded
        self.failed += len(failed)
        kept = [place for place in range(len(records)) if place not in failed]
        if not kept:
            return [], np.empty((tokens.shape[1], 0), np.float32)
        with self._question.timed("rerank"):
            log_odds = np.asarray(self._parts.encoder.match(self._texts, tokens[kept]))
            require_finite(log_odds, lambda _, place: f"the text and image {records[kept[place]].key}")
        return [places[place] for place in kept], log_odds[:, 0]


def answer(parts: GalleryParts, question: Question) -> SearchResult:
    """Rank the images of a gallery; see `Gallery.search`.

    Raises:
        ValueError: if the embedding of a found image is damaged, or a matching score is not finite.
    """
    with question.timed("encode"):
        texts, embedding = _encode(parts, question)
    rerank = question.rerank if texts is not None else 0
    with question.timed("search"), parts.lock:
        found = parts.store.search(embedding, max(question.top, rerank), question.where, embeddings=True)
    for record, product in found:
        if (reason := find_damage(record, embedding, product)) is not None:
            raise ValueError(
                f"image {record.key}: {reason}: a file of the index is damaged: find all such images with `mra index verify`; "
                "restore a backup, or delete the gallery and build it again"
            )
    records = [record for record, _ in found]
    similarity = np.array([value for _, value in found], np.float32)
    scores: list[float | None] = [None] * len(found)
    order, encoded, reranked, matched = list(range(len(found))), 0, 0, []
    if rerank and found and texts is not None:
        require_finite(
            similarity[None, None], lambda _, place: f"the text and image {records[place].key}", "similarity"
        )
        pairs = _PairMatching(parts, question, texts, records)
        matched, log_odds = match_in_rounds(
            similarity,
            pairs.match,
            top=question.top,
            rerank=rerank,
            temperature=parts.encoder.temperature,
            match_weight=question.match_weight,
            largest_log_odds=question.largest_log_odds,
            round_size=round_size(parts.encoder),
        )
        encoded, reranked = pairs.encoded, min(rerank, len(found)) - pairs.failed
    if matched:
        order = _fused_order(parts, question, similarity, np.array(matched), log_odds[:, None])
        for place, score in zip(matched, sigmoid(log_odds).mean(axis=0).tolist(), strict=True):
            scores[place] = score
    hits = [
        _hit(parts, rank, records[place], scores[place], float(similarity[place]), question.threshold)
        for rank, place in enumerate(order[: question.top], start=1)
    ]
    weight = question.match_weight if matched else None
    backend = getattr(parts.encoder, "backend", None)  # users' encoders may lack it
    return SearchResult(hits, question.threshold, question.timings, reranked, encoded, weight, len(matched), backend)


def round_size(encoder: "Encoder") -> int:
    """Return how many images to match at a time before looking whether the first hits are settled."""
    device = str(getattr(encoder, "device", "cpu")).partition(":")[0]  # users' encoders may lack it
    return ROUND_SIZES.get(device, DEFAULT_ROUND_SIZE)


def open_query_image(image: Image.Image | str | Path) -> Image.Image:
    """Read the query image, upright and RGB.

    Raises:
        ValueError: if the file cannot be read or is not an image.
    """
    try:
        return read_picture(image)
    except OSError as error:
        raise ValueError(f"image {image} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"image {image}: {error}") from None


def _encode(parts: GalleryParts, question: Question) -> tuple[Any, np.ndarray]:
    """Return the encoded text and the query embedding `(dim,)`, the mean of those of text and image if both are given."""
    embeddings, texts = [], None
    if question.text is not None:
        texts = parts.encoder.encode_texts([question.text])
        embeddings.append(np.asarray(texts.embeds)[0])
    if question.image is not None:
        embeddings.append(np.asarray(parts.encoder.encode_images([question.image]).embeds)[0])
    return texts, np.mean(embeddings, axis=0)


def _fused_order(
    parts: GalleryParts, question: Question, similarity: np.ndarray, matched: np.ndarray, log_odds: np.ndarray
) -> list[int]:
    """Return the positions of the found images, best first, by `posterior_scores`."""
    fused = posterior_scores(
        similarity[None], matched[None], log_odds, parts.encoder.temperature, question.match_weight
    )
    return np.argsort(-fused[0], kind="stable").tolist()


def _hit(
    parts: GalleryParts, rank: int, record: Record, score: float | None, similarity: float, threshold: float
) -> Hit:
    return Hit(
        rank=rank,
        key=record.key,
        path=parts.files.resolve(record.path),
        score=score,
        similarity=similarity,
        likely=None if score is None else score >= threshold,
        camera=record.camera or None,
        time=record.time or None,
        metadata=record.metadata,
    )
