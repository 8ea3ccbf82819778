"""What a gallery holds, whether it is sound, and taking out of its files what its records no longer name."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from mra.gallery.parts import read_image
from mra.gallery.picture_files import FileStore
from mra.gallery.place import Place
from mra.gallery.store import Store
from mra.gallery.token_cache import TokenCache
from mra.gallery.types import Calibration, GalleryStats, Skipped, Verification


# Embeddings are means of two unit vectors: no longer than 1, up to rounding.
LONGEST_EMBEDDING = 1.001


def describe(place: Place, info: dict, files: FileStore, tokens: TokenCache | None) -> GalleryStats:
    """Count what an open gallery holds; see `Gallery.stats`."""
    cameras, times, images, copies = Counter(), [], 0, 0
    for record in place.store.records():
        images += 1
        cameras[record.camera] += 1
        copies += files.is_copy(record.path)
        if record.time:
            times.append(record.time)
    sizes = {"index": place.index_bytes(), "tokens": tokens.size() if tokens else 0, "images": files.size()}
    return GalleryStats(
        uri=place.uri,
        collection=place.collection,
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
        tokens=len(tokens) if tokens else 0,
        disk_bytes=sizes,
        calibration=read_calibration(info),
    )


def read_calibration(info: dict) -> Calibration | None:
    """The calibration that a gallery remembers."""
    saved = info.get("calibration")
    return None if saved is None else Calibration(**saved | {"curve": [tuple(point) for point in saved["curve"]]})


def examine(
    store: Store,
    info: dict,
    files: FileStore,
    tokens: TokenCache,
    roots: list,
    progress: Callable[[int, int], None] | None,
) -> Verification:
    """Read every image and embedding again; see `Gallery.verify`."""
    result, total = Verification(), store.count()
    for record in store.records(embeddings=True):
        result.images += 1
        embedding = record.embedding
        if embedding.shape != (info["embedding_dim"],) or not np.isfinite(embedding).all():
            result.problems.append(Skipped(record.key, "the embedding is no finite vector of the right width"))
        elif not 0 < np.linalg.norm(embedding) <= LONGEST_EMBEDDING:
            result.problems.append(Skipped(record.key, "the embedding is longer than 1 or zero"))
        try:
            read_image(record, files, roots)
        except ValueError as error:
            result.problems.append(Skipped(record.key, str(error).partition(": ")[2]))
        result.tokens_missing += record.content not in tokens
        if progress is not None:
            progress(result.images, total)
    result.problems.sort(key=lambda problem: problem.key)
    return result


def sweep(store: Store, files: FileStore, tokens: TokenCache) -> None:
    """Delete tokens and copies that belong to no record, those of interrupted builds included."""
    contents, paths = set(), set()
    for record in store.records():
        contents.add(record.content)
        if files.is_copy(record.path):
            paths.add(record.path)
    for content in tokens.contents():
        if content not in contents:
            tokens.remove(content)
    tokens.flush()
    files.keep_only(paths)
