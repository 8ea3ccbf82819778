"""Indexing: find new and changed images of a source and encode them in batches."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from images_mra import read_picture
from mra.gallery.metadata import Labels
from mra.gallery.parts import GalleryParts
from mra.gallery.sources import Item, Source, content_hash
from mra.gallery.store import Record, embedding_checksum
from mra.gallery.types import BuildReport, Skipped


# Records per step that copies or relabels records with their embeddings.
RECORDS_PER_STEP = 256

# Pixels of decoded images in a batch, and of those that wait for it: half a GB each.
MAX_PIXELS_HELD = 2**27

# Conflicting keys named in an error.
KEYS_IN_MESSAGE = 3


class Indexer:
    """One run of `Gallery.build`.

    Batches are cut from the images that still need encoding, in the order of the source, and each is written in one step.
    A run that resumes after an interruption therefore cuts the same batches and gets the same embeddings.

    Args:
        parts: parts of the gallery, whose store has been created.
        source: images to index.
        labels: metadata of the images.
        copy_images: copy all images; None copies only images without a file.
        batch_size: images per forward pass.
        num_workers: threads that read and decode images.
        progress: called with the number of images done and the total.
    """

    def __init__(
        self,
        parts: GalleryParts,
        source: Source,
        labels: Labels,
        *,
        copy_images: bool | None = None,
        batch_size: int = 32,
        num_workers: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_workers", num_workers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.parts, self.source, self.labels = parts, source, labels
        self.copy_images, self.batch_size, self.num_workers = copy_images, batch_size, num_workers
        self.report = BuildReport(skipped=[Skipped(key, reason) for key, reason in source.refused])
        self.report.unmatched = labels.unmatched
        self._progress, self._done = progress, 0
        self.existing = {record.key: record for record in parts.store.records()}
        self.known = {record.content: key for key, record in self.existing.items()}

    def run(self) -> BuildReport:
        """Update the gallery from the source.

        Raises:
            ValueError: if a key belongs to an image of a different source.
        """
        start = time.perf_counter()
        with ThreadPoolExecutor(self.num_workers) as pool:
            contents = dict(self._contents(pool))
            self._refuse_conflicts(contents)
            new = [item for item in self.source.items if self._is_new(item, contents)]
            kept = [item for item in self.source.items if item.key in contents and not self._is_new(item, contents)]
            self._advance(len(self.source.items) - len(new))
            self.report.unchanged = len(kept)
            first_of_content = {}
            for item in new:
                if contents[item.key] not in self.known:
                    first_of_content.setdefault(contents[item.key], item)
            self._encode(pool, list(first_of_content.values()))
            encoded = {item.key for item in first_of_content.values()}
            left = self._copy([item for item in new if item.key not in encoded], contents)
            self._encode(pool, left)
        self._relabel(kept)
        self._find_missing()
        self.parts.store.flush()
        self.report.seconds = time.perf_counter() - start
        return self.report

    def _contents(self, pool: ThreadPoolExecutor) -> Iterator[tuple[str, str]]:
        def read(item: Item) -> str | Exception:
            try:
                return content_hash(item.read())
            except (OSError, ValueError) as error:
                return error

        for item, content in zip(self.source.items, pool.map(read, self.source.items), strict=True):
            if isinstance(content, Exception):
                self._skip(item, f"the file cannot be read ({getattr(content, 'strerror', None) or content})")
            else:
                yield item.key, content

    def _is_new(self, item: Item, contents: dict[str, str]) -> bool:
        record = self.existing.get(item.key)
        return item.key in contents and (record is None or record.content != contents[item.key])

    def _refuse_conflicts(self, contents: dict[str, str]) -> None:
        """Raise an error for keys of a different source whose image still exists; a moved folder is not a conflict."""
        conflicts = []
        for key, content in contents.items():
            record = self.existing.get(key)
            if record is not None and record.source != self.source.name and record.content != content:
                file = self.parts.files.resolve(record.path)
                if self.parts.files.is_copy(record.path) or file.exists():
                    conflicts.append(key)
        if conflicts:
            raise ValueError(
                f"{len(conflicts)} keys, such as {', '.join(conflicts[:KEYS_IN_MESSAGE])}, belong to different images of "
                f"{self.existing[conflicts[0]].source} in this gallery: pass a prefix to keep both"
            )

    def _encode(self, pool: ThreadPoolExecutor, items: list[Item]) -> None:
        batch, pixels = [], 0
        for item, data, image in self._loaded(pool, items):
            batch.append((item, data, image))
            pixels += image.width * image.height
            if len(batch) == self.batch_size or pixels >= MAX_PIXELS_HELD:
                self._write(batch)
                batch, pixels = [], 0
        if batch:
            self._write(batch)

    def _loaded(self, pool: ThreadPoolExecutor, items: list[Item]) -> Iterator[tuple[Item, bytes, Image.Image]]:
        """Yield the images that can be decoded, while threads decode the next batch, or less of large images."""

        def load(item: Item) -> tuple[bytes, Image.Image] | tuple[None, Exception]:
            try:
                data = item.read()
                return data, read_picture(data)
            except (OSError, ValueError) as error:
                return None, error

        left, waiting, largest = iter(items), deque(), MAX_PIXELS_HELD
        while True:
            ahead = min(self.batch_size, max(self.num_workers, MAX_PIXELS_HELD // largest))
            for item in itertools.islice(left, max(0, ahead - len(waiting))):
                waiting.append((item, pool.submit(load, item)))
            if not waiting:
                return
            item, loading = waiting.popleft()
            data, image = loading.result()
            if data is None or isinstance(image, Exception):
                self._skip(item, str(image))
                self._advance(1)
                continue
            pixels = image.width * image.height
            largest = pixels if largest == MAX_PIXELS_HELD else max(largest, pixels)
            yield item, data, image

    def _write(self, batch: list[tuple[Item, bytes, Image.Image]]) -> None:
        encodings = self.parts.encoder.encode_images([image for _, _, image in batch])
        records = []
        with self.parts.lock:
            for (item, data, _), embedding, tokens in zip(
                batch,
                np.asarray(encodings.embeds),
                np.asarray(encodings.hidden_states)[:, : self.parts.matched_views],
                strict=True,
            ):
                content = content_hash(data)
                self.parts.tokens.write(content, tokens, replace=False)
                record = self._record(item, content, data, embedding)
                records.append(replace(record, checksum=embedding_checksum(content, embedding)))
            self.parts.store.upsert(records)
        self.report.encoded += len(records)
        self._count(records)

    def _record(self, item: Item, content: str, data: bytes | None, embedding: Any) -> Record:
        before = self.existing.get(item.key)
        label = self.labels.of_key.get(item.key)
        if label is None:
            label = {"camera": before.camera, "time": before.time, "metadata": before.metadata} if before else {}
        if item.path is not None and not self.copy_images:
            path = str(item.path)
        elif (
            before is not None
            and before.content == content
            and self.parts.files.is_copy(before.path)
            and self.parts.files.holds(before.path, content)
        ):
            path = before.path
        else:
            path = self.parts.files.write(content, data if data is not None else item.read())
        return Record(item.key, content, path, self.source.name, **label, embedding=embedding)

    def _copy(self, items: list[Item], contents: dict[str, str]) -> list[Item]:
        """Index images whose content is in the gallery under a different key with the embedding of that key.

        Returns:
            The images without such an embedding: the other key got a new image, or its image could not be decoded.
        """
        left = []
        for start in range(0, len(items), RECORDS_PER_STEP):
            some = items[start : start + RECORDS_PER_STEP]
            owners = {self.known[contents[item.key]] for item in some if contents[item.key] in self.known}
            records = []
            with self.parts.lock:
                twins = {record.content: record for record in self.parts.store.records(keys=owners, embeddings=True)}
                for item in some:
                    twin = twins.get(contents[item.key])
                    if twin is None:
                        left.append(item)
                    else:
                        record = self._record(item, twin.content, None, twin.embedding)
                        records.append(replace(record, checksum=twin.checksum))
                self.parts.store.upsert(records)
            self._count(records)
        return left

    def _relabel(self, items: list[Item]) -> None:
        for start in range(0, len(items), RECORDS_PER_STEP):
            with self.parts.lock:  # until the upsert, a new copy has no record
                changed = {}
                for item in items[start : start + RECORDS_PER_STEP]:
                    before = self.existing[item.key]
                    after = self._record(item, before.content, None, None)
                    if after != before:
                        changed[item.key] = after
                found = list(self.parts.store.records(keys=changed, embeddings=True)) if changed else []
                self.parts.store.upsert(
                    [replace(changed[old.key], embedding=old.embedding, checksum=old.checksum) for old in found]
                )
            self.report.relabelled += len(changed)

    def _find_missing(self) -> None:
        present = {item.key for item in self.source.items} | {skipped.key for skipped in self.report.skipped}
        self.report.missing = sorted(
            key for key, record in self.existing.items() if record.source == self.source.name and key not in present
        )

    def _count(self, records: list[Record]) -> None:
        changed = sum(record.key in self.existing for record in records)
        self.report.changed += changed
        self.report.added += len(records) - changed
        for record in records:
            self.known[record.content] = record.key
        self._advance(len(records))

    def _skip(self, item: Item, reason: str) -> None:
        self.report.skipped.append(Skipped(item.key, reason))

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None and count:
            self._progress(self._done, len(self.source.items))
