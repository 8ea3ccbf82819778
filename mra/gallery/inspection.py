"""Counts of the contents of a gallery, and checks for damage."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from mra.gallery.parts import read_image
from mra.gallery.state import GalleryState
from mra.gallery.store import find_damage
from mra.gallery.types import GalleryStats, Skipped, Verification


def describe(state: GalleryState) -> GalleryStats:
    """Count the contents of an open gallery; see `Gallery.stats`."""
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
        matched_views=state.tokens.shape[0],
        token_dtype=info["token_dtype"],
    )


def examine(state: GalleryState, progress: Callable[[int, int], None] | None) -> Verification:
    """Check every image and embedding; see `Gallery.verify`."""
    result, total = Verification(), state.store.count()
    probe = np.random.default_rng(0).standard_normal(state.info["embedding_dim"]).astype(np.float32)
    probe /= np.linalg.norm(probe)
    indexed = {record.key: value for record, value in state.store.search(probe, max(total, 1))}
    for record in state.store.records(embeddings=True):
        result.images += 1
        if (reason := find_damage(record, probe, indexed.get(record.key))) is not None:
            result.problems.append(Skipped(record.key, reason))
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
            f"{written - result.images:,} of {written:,} images are missing from the index, which has lost its latest "
            "records: build the gallery again from their folders"
        )
        result.problems.insert(0, Skipped("index", reason))
    return result
