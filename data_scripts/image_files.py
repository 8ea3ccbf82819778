"""Image files below a root: where the paths of an annotation file lead, and whether what lies there is an image."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import UnidentifiedImageError

from data_scripts.validation import RowError, shorten
from images_mra import storable_picture


_MOST_STRIPPED = 2  # folders in front of a path that the root may already contain


def relative_parts(path: Any, field: str) -> tuple[str, ...]:
    """
    Splits the path of an image; it may not lead out of the image root.

    Raises:
        RowError: if it is absolute, contains `..`, or is no path.
    """
    if not isinstance(path, str):
        raise RowError(field, "wrong type", f"expected a path, got {shorten(path)}")
    if not path.strip() or "\0" in path:
        raise RowError(field, "missing image", f"expected a path, got {shorten(path)}")
    windows = PureWindowsPath(path)
    if path.startswith("/") or windows.drive or windows.root or ".." in windows.parts:
        raise RowError(
            field,
            "path leaves the image root",
            f"expected a path below --images, got {shorten(path)}",
            "Give paths relative to --images, without '..'",
        )
    return PurePosixPath(path).parts


@dataclass(frozen=True)
class ImageRoot:
    """
    The folder below which images are looked for.

    Args:
        folder: as the user named it; nothing outside it is read.
        subfolder: of it, in which the paths start.
        stripped: folders in front of each path that are left out, since `folder` ends with them.
        follow_symlinks: allows links that lead out of the folder.
    """

    folder: str
    subfolder: str = ""
    stripped: int = 0
    follow_symlinks: bool = False

    def locate(self, path: Any, field: str = "image") -> str:
        """
        Gives the file that a path names.

        Raises:
            RowError: if the path leads out of the root.
        """
        parts = relative_parts(path, field)
        located = os.path.join(self.folder, self.subfolder, *parts[min(self.stripped, len(parts) - 1) :])
        if not self.follow_symlinks:
            root = os.path.realpath(self.folder)
            target = os.path.realpath(located)
            if os.path.commonpath([root, target]) != root:
                raise RowError(
                    field,
                    "path leaves the image root",
                    f"expected a file below {self.folder}, got {shorten(path)}, a link to {target}",
                    "Move the files there, pass --follow_symlinks if you made the link",
                )
        return located

    def read(self, path: Any, field: str = "image") -> bytes:
        """
        Read an image file and decode it once; returns the bytes to store, as `decode` gives them.

        Raises:
            RowError: if it is missing, unreadable or corrupt, or the path leads out of the root.
        """
        located = self.locate(path, field)
        try:
            with open(located, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            mend = "Unpack the image archives again, correct --images"
            raise RowError(
                field, "missing image", f"expected the file {located}, which does not exist", mend
            ) from None
        except OSError as error:
            raise RowError(field, "unreadable image", f"{located}: {error.strerror or error}") from None
        try:
            return decode(content)
        except OSError as error:
            cause = "it is no image" if isinstance(error, UnidentifiedImageError) else error
            mend = "Unpack the image archive again"
            raise RowError(field, "corrupt image", f"{located} cannot be decoded: {cause}", mend) from None


def decode(content: bytes) -> bytes:
    """
    Decode all of an image, and return the bytes to store: as they are, or [`storable_picture`]'s.

    Raises:
        OSError: if it is not an image, or a broken one.
    """
    with warnings.catch_warnings():
        # Of metadata that are cut or strange, once a file: what would stop a reader is removed here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return storable_picture(content)


def find_image_root(
    folder: str | Path,
    examples: Iterable[tuple[str, int, Any]],
    names: tuple[str, ...],
    field: str = "image",
    follow_symlinks: bool = False,
) -> ImageRoot:
    """
    Finds out how the paths of an annotation file lie to `--images`.

    The user may name the folder of all sets (`images`), of one set (`images/CUHK-PEDES`) or of its images
    (`images/CUHK-PEDES/imgs`), and the paths may start at any of these. What finds most of the given files is taken
    for all rows.

    Args:
        folder: as the user named it.
        examples: annotation file, row and path of some rows.
        names: folders that may lie between, such as `CUHK-PEDES`, `imgs` and `CUHK-PEDES/imgs`.
        field: that holds the paths.
        follow_symlinks: allows links that lead out of the folder.

    Raises:
        ValueError: if the folder does not exist, or none of the files is found.
    """
    folder = str(folder)
    if not os.path.isdir(folder):
        found = "is a file" if os.path.exists(folder) else "does not exist"
        raise ValueError(f"--images {folder} {found}; expected the folder that holds the images.")
    usable = []
    for file, row, path in examples:
        try:
            relative_parts(path, field)
        except RowError:
            continue
        usable.append((file, row, path))
    best, most = ImageRoot(folder, follow_symlinks=follow_symlinks), 0
    for stripped in range(_MOST_STRIPPED + 1):
        for subfolder in ("", *names):
            root = ImageRoot(folder, subfolder, stripped, follow_symlinks=True)
            hits = sum(os.path.isfile(root.locate(path, field)) for _, _, path in usable)
            if hits > most:
                best, most = ImageRoot(folder, subfolder, stripped, follow_symlinks), hits
    if usable and not most:
        file, row, path = usable[0]
        raise ValueError(
            f"--images {folder}: missing image: none of {len(usable)} images looked for is there; {file}, row {row} "
            f"(counting from 0), field {field} names {os.path.join(folder, path)}, which was also looked for below "
            f"{', '.join(names)}. Correct --images, or unpack the image archives."
        )
    return best
