"""The files of a gallery beside its index: copies of images, found by their content."""

import os
from pathlib import Path

from images_mra import open_picture
from mra.common.files import whole_file


COPIES = "images"


class FileStore:
    """Copies of images under `<folder>/images`, named by their content, so that equal images share one.

    Args:
        folder: of the gallery's files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder / COPIES

    def write(self, content: str, data: bytes) -> str:
        """Keep the bytes of an image file; returns their path relative to the folder."""
        path = self.root / content[:2] / (content + _suffix(data))
        if not path.exists():
            with whole_file(
                path, flush=False
            ) as unfinished:  # its name is the hash of its content, which every reader checks
                unfinished.write_bytes(data)
        return path.relative_to(self.folder).as_posix()

    def is_copy(self, path: str) -> bool:
        """Whether the path of a record names a copy."""
        return not os.path.isabs(path)

    def resolve(self, path: str) -> Path:
        """The file that the path of a record names."""
        return self.folder / path if self.is_copy(path) else Path(path)

    def keep_only(self, paths: set[str]) -> None:
        """Delete every copy, finished or not, that is not among these paths."""
        for file in list(self.root.rglob("*")):
            if file.is_file() and file.relative_to(self.folder).as_posix() not in paths:
                file.unlink()

    def size(self) -> int:
        """Bytes of all copies."""
        return sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())


def _suffix(data: bytes) -> str:
    return f".{open_picture(data).format.lower()}"
