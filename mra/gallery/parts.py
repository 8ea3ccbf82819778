"""What indexing and searching work with: copies of images, and how the parts give images and their tokens."""

import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from images_mra import open_picture, read_picture
from mra.common.files import whole_file
from mra.gallery.sources import content_hash
from mra.gallery.store import Record, Store
from mra.gallery.token_cache import TokenCache
from mra.retrieval.encoders import Encoder


# Name of the folder of copied images.
COPIES = "images"

# Images encoded at a time on a cache miss.
IMAGES_PER_STEP = 32


class FileStore:
    """Copies of images under `<folder>/images`, named by their content, so that equal images share one.

    Args:
        folder: of the gallery's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / COPIES

    def write(self, content: str, data: bytes) -> str:
        """Keep the bytes of an image file and return their path relative to the folder."""
        path = self.root / content[:2] / (content + _suffix(data))
        name = path.relative_to(self.folder).as_posix()
        if not self.holds(name, content):
            if path.is_dir():
                shutil.rmtree(path)
            # Its name is the hash of its content, which every reader checks.
            with whole_file(path, flush=False) as unfinished:
                unfinished.write_bytes(data)
        return name

    def holds(self, path: str, content: str) -> bool:
        """Return whether the file that the path of a record names is there with that content."""
        try:
            return content_hash(self.resolve(path).read_bytes()) == content
        except OSError:
            return False

    def is_copy(self, path: str) -> bool:
        """Return whether the path of a record names a copy."""
        return not os.path.isabs(path)

    def resolve(self, path: str) -> Path:
        """Return the file that the path of a record names."""
        return self.folder / path if self.is_copy(path) else Path(path)

    def keep_only(self, paths: set[str]) -> None:
        """Delete every copy, finished or not, that is not among these paths."""
        for file in list(self.root.rglob("*")):
            if file.is_file() and file.relative_to(self.folder).as_posix() not in paths:
                file.unlink()

    def size(self) -> int:
        """Return the bytes of all copies."""
        return sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())


def _suffix(data: bytes) -> str:
    return f".{open_picture(data).format or 'image'}".lower()


@dataclass(frozen=True)
class GalleryParts:
    """Parts that indexing and searching work with.

    Attributes:
        store: the records.
        files: the copies of images.
        tokens: the token cache.
        encoder: the model.
        roots: folders that images may lie in.
        lock: held while records, copies or tokens are read and written by several threads.
    """

    store: Store
    files: FileStore
    tokens: TokenCache
    encoder: Encoder
    roots: Sequence[Path]
    lock: threading.RLock = field(default_factory=threading.RLock)

    def load_tokens(self, records: Sequence[Record]) -> tuple[torch.Tensor, dict[int, str], int]:
        """Load tokens of images from the cache, or encode the images again.

        Returns:
            Tokens `(images, views, 1 + patches, hidden)`; the places whose image cannot be read, with the reason, whose
            tokens are 0; how many were encoded.
        """
        tokens = torch.zeros(len(records), *self.tokens.shape)
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
            encoded = self.encoder.encode_images(list(images.values())).hidden_states
            assert encoded is not None, "an encoder keeps hidden states"
            with self.lock:
                # A removal may have ended meanwhile: what it deleted is not written back.
                keys = [records[place].key for place in images]
                present = {record.content for record in self.store.records(keys=keys)}
                for place, of_image in zip(images, encoded, strict=True):
                    tokens[place] = self.tokens.rounded(of_image)
                    if records[place].content in present:
                        self.tokens.write(records[place].content, of_image)
        return tokens, failed, len(absent) - len(failed)

    def require_tokens(self, records: Sequence[Record]) -> torch.Tensor:
        """Load tokens `(images, views, 1 + patches, hidden)` of images that must all be readable.

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
        ValueError: if its file lies outside the roots, is gone, was changed since it was indexed or cannot be decoded.
    """
    path = files.resolve(record.path)
    if not any(path.resolve().is_relative_to(root.resolve()) for root in roots):
        raise ValueError(f"image {record.key}: {path} lies outside the folders of this gallery")
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
