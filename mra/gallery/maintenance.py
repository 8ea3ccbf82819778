"""Count what a gallery holds, check whether it is sound, and remove images for good."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mra.gallery.parts import read_image
from mra.gallery.sources import content_hash
from mra.gallery.state import GalleryState
from mra.gallery.store import Record, embedding_checksum
from mra.gallery.types import GalleryStats, Skipped, Verification


logger = logging.getLogger(__name__)

# Of a dot product of unit vectors in float32, whose terms a store may add in another order.
PRODUCT_TOLERANCE = 1e-4


def describe(state: GalleryState) -> GalleryStats:
    """Count what an open gallery holds; see `Gallery.stats`."""
    cameras: Counter[str] = Counter()
    times: list[str] = []
    images = copies = 0
    for record in state.store.records():
        images += 1
        cameras[record.camera] += 1
        copies += state.files.is_copy(record.path)
        if record.time:
            times.append(record.time)
    info = state.info
    return GalleryStats(
        uri=state.place.uri,
        collection=state.place.collection,
        images=images,
        cameras=dict(sorted(cameras.items())),
        first_time=min(times, default=None),
        last_time=max(times, default=None),
        fields=dict(info["fields"]),
        roots=list(info["roots"]),
        copies=copies,
        model=info["model"],
        fingerprint=info["fingerprint"],
        embedding_dim=info["embedding_dim"],
        tokens=len(state.tokens),
        disk_bytes={
            "index": state.place.index_bytes(),
            "tokens": state.tokens.size(),
            "images": state.files.size(),
        },
        calibration=state.calibration,
    )


def examine(state: GalleryState, progress: Callable[[int, int], None] | None) -> Verification:
    """Read every image and embedding again; see `Gallery.verify`."""
    result, total = Verification(), state.store.count()
    probe = np.random.default_rng(0).standard_normal(state.info["embedding_dim"]).astype(np.float32)
    probe /= np.linalg.norm(probe)
    indexed = {record.key: value for record, value in state.store.search(probe, max(total, 1))}
    for record in state.store.records(embeddings=True):
        result.images += 1
        embedding = record.embedding
        assert embedding is not None, "asked for"
        if embedding.shape != (state.info["embedding_dim"],) or not np.isfinite(embedding).all():
            reason = "the embedding is not a finite vector of the right width"
            result.problems.append(Skipped(record.key, reason))
        elif record.checksum != embedding_checksum(record.content, embedding):
            result.problems.append(Skipped(record.key, "the embedding is not the one that was written"))
        elif not abs(indexed.get(record.key, float(embedding @ probe)) - embedding @ probe) <= PRODUCT_TOLERANCE:
            result.problems.append(
                Skipped(record.key, "a search compares with another embedding than the one written")
            )
        try:
            read_image(record, state.files, state.roots)
        except ValueError as error:
            result.problems.append(Skipped(record.key, str(error).partition(": ")[2]))
        result.tokens_missing += record.content not in state.tokens
        if progress is not None:
            progress(result.images, total)
    result.problems.sort(key=lambda problem: problem.key)
    written = state.info.get("images", 0)
    if result.images < written:
        reason = (
            f"{written - result.images:,} of {written:,} images are missing from the index, which has lost what was written "
            "last: build it again from their folders"
        )
        result.problems.insert(0, Skipped("index", reason))
    return result


def remove_records(state: GalleryState, records: Sequence[Record], delete_files: bool) -> None:
    """Remove images for good and warn of equal pictures that stay; see `Gallery.remove`.

    Args:
        state: of the gallery; the caller holds its lock.
        records: of the images.
        delete_files: delete the user's own files too, unless another picture has taken the name.

    Raises:
        FullDiskError: as `GalleryState.finish_removal`.
    """
    # A full disk refuses this, before any file is deleted.
    state.write_info(is_removing=True, images=state.store.count() - len(records))
    if delete_files:
        for record in records:
            path = Path(record.path)
            is_theirs = not state.files.is_copy(record.path) and path.exists()
            if is_theirs and content_hash(path.read_bytes()) == record.content:
                path.unlink()
    state.store.delete([record.key for record in records])
    state.finish_removal()
    contents = {record.content for record in records}
    twins = sorted(record.key for record in state.store.records() if record.content in contents)
    if twins:
        logger.warning(
            "equal pictures stay under %d other keys, such as %s: remove them too to delete the person for good",
            len(twins),
            twins[0],
        )
