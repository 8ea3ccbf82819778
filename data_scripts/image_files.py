"""Image files below a root: resolution of the paths in an annotation file, and decoding checks."""

import filecmp
import functools
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import UnidentifiedImageError

from data_scripts.row_checks import RowError, check_unicode, shorten
from images_mra import TooManyPixels, storable_picture


def path_readings(path: Any, field: str) -> list[tuple[str, ...]]:
    """Split the path of an image, which may not lead out of the image root.

    Args:
        path: path in the annotations, its folders separated by `/` or by the backslashes of Windows.
        field: name of the field that holds it.

    Returns:
        The parts of the path, and if it has backslashes, also its parts with those as separators.

    Raises:
        RowError: if it is absolute, contains `..`, or is not a path.
    """
    if not isinstance(path, str):
        raise RowError(field, "wrong type", f"expected a path, got {shorten(path)}")
    windows = PureWindowsPath(path)
    if not path.strip() or "\0" in path or not windows.parts:  # "." has no parts
        raise RowError(field, "missing image", f"expected a path, got {shorten(path)}")
    check_unicode(path, field)
    if path.startswith("/") or windows.drive or windows.root or ".." in windows.parts:
        raise RowError(
            field,
            "path leaves the image root",
            f"expected a path below --images, got {shorten(path)}",
            "Give paths relative to --images, without '..'",
        )
    return list(dict.fromkeys((PurePosixPath(path).parts, windows.parts)))


def with_slashes(path: str) -> str:
    """Normalise a path: `/` as separator, no redundant parts."""
    return PurePosixPath(path.replace("\\", "/")).as_posix()


@dataclass(frozen=True)
class PathRule:
    """Relation between the paths in the annotations and `--images`.

    Args:
        subfolder: subfolder of `--images` in which the paths start.
        stripped: leading folders of each path to drop because `--images` ends with them.
    """

    subfolder: str = ""
    stripped: tuple[str, ...] = ()

    def apply(self, parts: tuple[str, ...]) -> str | None:
        """Return the path below `--images`, or None if the rule does not apply."""
        count = len(self.stripped)
        if len(parts) <= count or parts[:count] != self.stripped:
            return None
        return os.path.join(self.subfolder, *parts[count:])

    def __str__(self) -> str:
        start = f"read below {self.subfolder}/" if self.subfolder else "read from --images"
        return f"{start}, its first {'/'.join(self.stripped)}/ left out" if self.stripped else start


@dataclass(frozen=True)
class ImageRoot:
    """Root folder of the images.

    Args:
        folder: folder given by the user; nothing outside it is read.
        subfolders: subfolders in which paths could start.
        rule: the rule for all paths.
        example: annotation file and row that the rule was inferred from.
        follow_symlinks: whether symbolic links may lead out of the folder.
    """

    folder: str
    subfolders: tuple[str, ...] = ()
    rule: PathRule = PathRule()
    example: str = ""
    follow_symlinks: bool = False

    @functools.cached_property
    def _resolved(self) -> str:
        """Folder with links resolved; cached, because resolving costs as much as decoding a small image."""
        return os.path.realpath(self.folder)

    @functools.cached_property
    def _endings(self) -> set[tuple[str, ...]]:
        """Trailing folders of the root's path, as given and with links resolved."""
        return {Path(place).parts[1:] for place in (os.path.abspath(self.folder), self._resolved)}

    def rules_for(self, readings: list[tuple[str, ...]]) -> Iterator[PathRule]:
        """Yield the rules that could apply to a path, simplest first; folders are stripped only if `--images` ends so."""
        stripped = {
            parts[:count]: None
            for parts in readings
            for count in range(1, len(parts))
            if any(parts[:count] == end[-count:] for end in self._endings)
        }
        for front in ((), *stripped):
            for subfolder in ("", *self.subfolders):
                yield PathRule(subfolder, front)

    def find(self, rule: PathRule, readings: list[tuple[str, ...]]) -> str | None:
        """Return the file that a rule leads to, or None."""
        for parts in readings:
            below = rule.apply(parts)
            if below is not None and os.path.isfile(located := os.path.join(self.folder, below)):
                return located
        return None

    def locate(self, path: Any, field: str = "image") -> str:
        """Return the file that a path refers to, whether or not it exists.

        Raises:
            RowError: if the path leads out of the root, or is found by another rule than other rows.
        """
        readings = path_readings(path, field)
        located = self.find(self.rule, readings)
        if located is None or self.rule != PathRule():  # a direct hit needs no further check
            self._refuse_other_rules(path, readings, located, field)
        if located is None:
            parts = readings[-1]
            located = os.path.join(self.folder, self.rule.apply(parts) or os.path.join(*parts))
        if not self.follow_symlinks:
            target = os.path.realpath(located)
            if os.path.commonpath([self._resolved, target]) != self._resolved:
                raise RowError(
                    field,
                    "path leaves the image root",
                    f"expected a file below {self.folder}, got {shorten(path)}, a link to {target}",
                    "Move the files there, pass --follow_symlinks if you made the link",
                )
        return located

    def _refuse_other_rules(self, path: str, readings: Any, located: str | None, field: str) -> None:
        """Refuse a path for which another rule finds a different file."""
        for rule in self.rules_for(readings):
            other = self.find(rule, readings) if rule != self.rule else None
            if other is None or (located and filecmp.cmp(located, other, shallow=False)):
                continue
            here = f"{shorten(path)} is the file {other} when {rule}"
            there = f"{self.example} was found when {self.rule}, by which this is {located or 'missing'}"
            advice = "Start all paths at the same folder and pass that folder as --images"
            raise RowError(field, "another path rule", f"{here}; {there}", advice)

    def read(self, path: Any, field: str = "image") -> bytes:
        """Read an image file, check that it decodes and return the bytes to store, as [`decode`].

        Raises:
            RowError: if it is missing, unreadable or corrupt, or the path leads out of the root.
        """
        located = self.locate(path, field)
        try:
            with open(located, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            advice = "Unpack the image archives again, correct --images"
            problem = (
                f"expected the file {repr(located)[1:-1]}, which does not exist"  # on one line, whatever the name
            )
            if self.rule != PathRule():
                problem += f" ({self.example} was found when {self.rule})"
            raise RowError(field, "missing image", problem, advice) from None
        except OSError as error:
            raise RowError(field, "unreadable image", f"{located}: {error.strerror or error}") from None
        try:
            return decode(content)
        except TooManyPixels as error:
            raise RowError(
                field, "image too large", f"{located}: {str(error).partition(':')[0]}", "Make the image smaller"
            ) from None
        except OSError as error:
            cause = "it is not an image" if isinstance(error, UnidentifiedImageError) else error
            advice = "Unpack the image archive again"
            raise RowError(field, "corrupt image", f"{located} cannot be decoded: {cause}", advice) from None


def decode(content: bytes) -> bytes:
    """Check that an image decodes completely; return the bytes to store, unchanged or from [`storable_picture`].

    Raises:
        OSError: if it is not an image or is damaged.
    """
    with warnings.catch_warnings():
        # Warnings about damaged metadata, which is removed here if it would break readers.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return storable_picture(content)


class RootSearch:
    """Search for the relation between the paths in an annotation file and `--images`.

    The user may pass the folder of all datasets (`images`), of one dataset (`images/CUHK-PEDES`) or of its images
    (`images/CUHK-PEDES/imgs`), and paths may start at any of these. The rule that finds most of the sampled paths is chosen;
    [`ImageRoot.locate`] then checks every path against it.

    Args:
        folder: folder given by the user.
        names: possible folders in between, for example `CUHK-PEDES`, `imgs` and `CUHK-PEDES/imgs`.
        field: name of the field that holds the paths.
        follow_symlinks: whether symbolic links may lead out of the folder.

    Raises:
        ValueError: if the folder does not exist.
    """

    def __init__(
        self, folder: str | Path, names: tuple[str, ...], field: str = "image", follow_symlinks: bool = False
    ) -> None:
        folder = str(folder)
        if not os.path.isdir(folder):
            found = "is a file" if os.path.exists(folder) else "does not exist"
            raise ValueError(f"--images {folder} {found}; expected the folder that holds the images")
        subfolders = tuple(name for name in names if os.path.isdir(os.path.join(folder, name)))
        self._root = ImageRoot(folder, subfolders, follow_symlinks=follow_symlinks)
        self._names, self._field = names, field
        self._hits: Counter[PathRule] = Counter()
        self._examples: dict[PathRule, str] = {}
        self._first: tuple[str, int, str] | None = None
        self.looked_at = 0

    @property
    def has_found(self) -> bool:
        """Whether a file was found for any path."""
        return bool(self._hits)

    def look(self, file: str, row: int, path: Any) -> None:
        """Look for the image of a row; invalid paths are ignored, as the row check reports them."""
        try:
            readings = path_readings(path, self._field)
        except RowError:
            return
        self.looked_at += 1
        self._first = self._first or (file, row, path)
        for rule in self._root.rules_for(readings):
            if self._root.find(rule, readings):
                self._hits[rule] += 1
                self._examples.setdefault(rule, f"{file}, row {row}")

    def choose(self) -> ImageRoot:
        """Return the root with the rule that found most images, the simplest among equals.

        Raises:
            ValueError: if none of the files was found.
        """
        if self._first and not self._hits:
            file, row, path = self._first
            raise ValueError(
                f"--images {self._root.folder}: missing image: none of {self.looked_at} images looked for is there; {file}, "
                f"row {row} (counting from 0), field {self._field} names {os.path.join(self._root.folder, path)}, which was "
                f"also looked for below {', '.join(self._names)}; correct --images, or unpack the image archives"
            )
        if not self._hits:
            return self._root
        rule = min(self._hits, key=lambda rule: (-self._hits[rule], len(rule.stripped), len(rule.subfolder)))
        return replace(self._root, rule=rule, example=self._examples[rule])
