"""Parts shared by indexing and searching: copies of images, and loading of images and tokens."""

import inspect
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from images_mra import open_picture, read_picture
from mra.common.files import whole_file
from mra.gallery.sources import content_hash
from mra.gallery.store import Record, Store
from mra.gallery.token_cache import TokenCache


if TYPE_CHECKING:
    from mra.retrieval.encoders import Encoder


# Folder of copied images.
COPIES = "images"

# Images per step that encodes cache misses.
IMAGES_PER_STEP = 32


class FileStore:
    """Copies of images under `<folder>/images`, named by their content, so that identical images share one.

    Args:
        folder: folder of the gallery's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / COPIES

    def write(self, content: str, data: bytes) -> str:
        """Save the bytes of an image file and return its path relative to the folder."""
        path = self.root / content[:2] / (content + _suffix(data))
        name = path.relative_to(self.folder).as_posix()
        if not self.holds(name, content):
            if path.is_dir():
                shutil.rmtree(path)
            # Unflushed: every reader compares the content with the hash in the name.
            with whole_file(path, flush=False) as unfinished:
                unfinished.write_bytes(data)
        return name

    def holds(self, path: str, content: str) -> bool:
        """Return whether the file at a record's path exists and has that content."""
        try:
            return content_hash(self.resolve(path).read_bytes()) == content
        except OSError:
            return False

    def is_copy(self, path: str) -> bool:
        """Return whether a record's path is that of a copy."""
        return not os.path.isabs(path)

    def resolve(self, path: str) -> Path:
        """Return the file at a record's path."""
        return self.folder / path if self.is_copy(path) else Path(path)

    def keep_only(self, paths: set[str]) -> None:
        """Delete all copies except these, unfinished ones included."""
        for file in list(self.root.rglob("*")):
            if file.is_file() and file.relative_to(self.folder).as_posix() not in paths:
                file.unlink()

    def size(self) -> int:
        """Return the size of all copies in bytes."""
        return sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())


def _suffix(data: bytes) -> str:
    return f".{open_picture(data).format or 'image'}".lower()


@dataclass(frozen=True)
class GalleryParts:
    """Parts that indexing and searching use.

    Attributes:
        store: the records.
        files: the copies of images.
        tokens: the token cache.
        encoder: the model.
        roots: folders that images may lie in.
        lock: protects records, copies and tokens that several threads read and write.
    """

    store: Store
    files: FileStore
    tokens: TokenCache
    encoder: "Encoder"
    roots: Sequence[Path]
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def matched_views(self) -> int:
        """Return how many views of an image are cached and matched, the upright one first."""
        return self.tokens.shape[0]

    def load_tokens(self, records: Sequence[Record]) -> tuple[np.ndarray, dict[int, str], int]:
        """Load tokens of images from the cache, or encode the images again.

        Returns:
            Tokens `(images, views, 1 + patches, hidden)`; the reason for each image that cannot be read, by position (its
            tokens are 0); the number of images encoded.
        """
        tokens = np.zeros((len(records), *self.tokens.shape), np.float32)
        absent, failed = [], {}
        with self.lock:
            for place, record in enumerate(records):
                cached = self.tokens.read(record.content)
                if cached is None:
                    absent.append(place)
                else:
                    tokens[place] = cached
        for start in range(0, len(absent), IMAGES_PER_STEP):
            images = {}
            for place in absent[start : start + IMAGES_PER_STEP]:
                try:
                    images[place] = read_image(records[place], self.files, self.roots)
                except ValueError as error:
                    failed[place] = str(error)
            if not images:
                continue
            encoded = self._encode_tokens(list(images.values()))
            with self.lock:
                # Do not write back what a concurrent removal deleted.
                keys = [records[place].key for place in images]
                present = {record.content for record in self.store.records(keys=keys)}
                for place, of_image in zip(images, encoded, strict=True):
                    tokens[place] = self.tokens.rounded(of_image)
                    if records[place].content in present:
                        self.tokens.write(records[place].content, of_image)
        return tokens, failed, len(absent) - len(failed)

    def _encode_tokens(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Encode images to the tokens of the matched views; an encoder whose `encode_images` has no `flip` encodes both."""
        encode = self.encoder.encode_images
        is_upright = self.matched_views == 1 and "flip" in inspect.signature(encode).parameters
        encoded = encode(images, flip=False) if is_upright else encode(images)
        return np.asarray(encoded.hidden_states)[:, : self.matched_views]

    def require_tokens(self, records: Sequence[Record]) -> np.ndarray:
        """Load tokens `(images, views, 1 + patches, hidden)` of images, all of which must be readable.

        Raises:
            ValueError: if one cannot be read.
        """
        tokens, failed, _ = self.load_tokens(records)
        for reason in failed.values():
            raise ValueError(reason)
        return tokens


def read_image(record: Record, files: FileStore, roots: Sequence[Path]) -> Image.Image:
    """Read the image of a record, upright and RGB.

    Raises:
        ValueError: if its file is outside the roots, missing, changed since it was indexed, or cannot be decoded.
    """
    path = files.resolve(record.path)
    if not any(path.resolve().is_relative_to(root.resolve()) for root in roots):
        raise ValueError(f"image {record.key}: {path} is outside the folders of this gallery")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image {record.key}: {path} cannot be read ({error.strerror})") from None
    if content_hash(data) != record.content:
        raise ValueError(f"image {record.key}: {path} has changed since it was indexed: run build again")
    try:
        return read_picture(data)
    except ValueError as error:
        raise ValueError(f"image {record.key}: {error}") from None
