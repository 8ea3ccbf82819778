"""Image files below a root: where the paths of an annotation file lead, and whether what lies there is an image."""

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
from images_mra import storable_picture


def path_readings(path: Any, field: str) -> list[tuple[str, ...]]:
    """Split the path of an image; it may not lead out of the image root.

    Args:
        path: as the annotations give it, its folders separated by `/`, or by the backslashes of Windows.
        field: that holds it.

    Returns:
        Its parts as it stands, and, where it has backslashes, its parts with those as separators.

    Raises:
        RowError: if it is absolute, contains `..`, or is not a path.
    """
    if not isinstance(path, str):
        raise RowError(field, "wrong type", f"expected a path, got {shorten(path)}")
    if not path.strip() or "\0" in path:
        raise RowError(field, "missing image", f"expected a path, got {shorten(path)}")
    check_unicode(path, field)
    windows = PureWindowsPath(path)
    if path.startswith("/") or windows.drive or windows.root or ".." in windows.parts:
        raise RowError(
            field,
            "path leaves the image root",
            f"expected a path below --images, got {shorten(path)}",
            "Give paths relative to --images, without '..'",
        )
    return list(dict.fromkeys((PurePosixPath(path).parts, windows.parts)))


def with_slashes(path: str) -> str:
    """Write a path in one way: `/` between folders, nothing that can be left out."""
    return PurePosixPath(path.replace("\\", "/")).as_posix()


@dataclass(frozen=True)
class PathRule:
    """How the paths of the annotations lie to `--images`.

    Args:
        subfolder: of `--images`, in which the paths start.
        stripped: folders at the front of each path that are left out, since `--images` ends with them.
    """

    subfolder: str = ""
    stripped: tuple[str, ...] = ()

    def apply(self, parts: tuple[str, ...]) -> str | None:
        """Return the path below `--images`, None where the rule does not fit."""
        count = len(self.stripped)
        if len(parts) <= count or parts[:count] != self.stripped:
            return None
        return os.path.join(self.subfolder, *parts[count:])

    def __str__(self) -> str:
        start = f"read below {self.subfolder}/" if self.subfolder else "read from --images on"
        return f"{start}, its first {'/'.join(self.stripped)}/ left out" if self.stripped else start


@dataclass(frozen=True)
class ImageRoot:
    """The folder below which images are looked for.

    Args:
        folder: as the user named it; nothing outside it is read.
        subfolders: of it, in which paths could start.
        rule: the one that holds for all paths.
        example: annotation file and row that the rule was taken from.
        follow_symlinks: allows links that lead out of the folder.
    """

    folder: str
    subfolders: tuple[str, ...] = ()
    rule: PathRule = PathRule()
    example: str = ""
    follow_symlinks: bool = False

    @functools.cached_property
    def _resolved(self) -> str:
        """Resolve the folder's links, which costs as much as decoding a small image."""
        return os.path.realpath(self.folder)

    @functools.cached_property
    def _endings(self) -> set[tuple[str, ...]]:
        """Return the folders that lead to this one, by its name and without links."""
        return {Path(place).parts[1:] for place in (os.path.abspath(self.folder), self._resolved)}

    def rules_for(self, readings: list[tuple[str, ...]]) -> Iterator[PathRule]:
        """Yield the rules that a path could be read by, the plainest first: leading folders only where `--images` ends so."""
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
        """Return the file that a rule leads to, None where there is none."""
        for parts in readings:
            below = rule.apply(parts)
            if below is not None and os.path.isfile(located := os.path.join(self.folder, below)):
                return located
        return None

    def locate(self, path: Any, field: str = "image") -> str:
        """Return the file that a path names, whether it exists or not.

        Raises:
            RowError: if the path leads out of the root, or is found by another rule than the paths of other rows.
        """
        readings = path_readings(path, field)
        located = self.find(self.rule, readings)
        if located is None or self.rule != PathRule():  # what is found as it stands needs no second look
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
        """Refuse a path that another rule leads to another file than the rule of all paths."""
        for rule in self.rules_for(readings):
            other = self.find(rule, readings) if rule != self.rule else None
            if other is None or (located and filecmp.cmp(located, other, shallow=False)):
                continue
            here = f"{shorten(path)} is the file {other} when {rule}"
            there = f"{self.example} was found when {self.rule}, by which this is {located or 'missing'}"
            advice = "Let all paths start at the same folder, name that folder as --images"
            raise RowError(field, "another path rule", f"{here}; {there}", advice)

    def read(self, path: Any, field: str = "image") -> bytes:
        """Read an image file and decode it once; returns the bytes to store, as `decode` gives them.

        Raises:
            RowError: if it is missing, unreadable or corrupt, or the path leads out of the root.
        """
        located = self.locate(path, field)
        try:
            with open(located, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            advice = "Unpack the image archives again, correct --images"
            problem = f"expected the file {located}, which does not exist"
            if self.rule != PathRule():
                problem += f" ({self.example} was found when {self.rule})"
            raise RowError(field, "missing image", problem, advice) from None
        except OSError as error:
            raise RowError(field, "unreadable image", f"{located}: {error.strerror or error}") from None
        try:
            return decode(content)
        except OSError as error:
            cause = "it is not an image" if isinstance(error, UnidentifiedImageError) else error
            advice = "Unpack the image archive again"
            raise RowError(field, "corrupt image", f"{located} cannot be decoded: {cause}", advice) from None


def decode(content: bytes) -> bytes:
    """Decode all of an image, and return the bytes to store: as they are, or [`storable_picture`]'s.

    Raises:
        OSError: if it is not an image, or a broken one.
    """
    with warnings.catch_warnings():
        # Of metadata that are cut or strange, once a file: what would stop a reader is removed here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return storable_picture(content)


class RootSearch:
    """Finds out how the paths of an annotation file lie to `--images`.

    The user may name the folder of all sets (`images`), of one set (`images/CUHK-PEDES`) or of its images
    (`images/CUHK-PEDES/imgs`), and the paths may start at any of these. The rule that finds most of the paths looked at is
    proposed; [`ImageRoot.locate`] then holds every path to it.

    Args:
        folder: as the user named it.
        names: folders that may lie between, such as `CUHK-PEDES`, `imgs` and `CUHK-PEDES/imgs`.
        field: that holds the paths.
        follow_symlinks: allows links that lead out of the folder.

    Raises:
        ValueError: if the folder does not exist.
    """

    def __init__(
        self, folder: str | Path, names: tuple[str, ...], field: str = "image", follow_symlinks: bool = False
    ) -> None:
        folder = str(folder)
        if not os.path.isdir(folder):
            found = "is a file" if os.path.exists(folder) else "does not exist"
            raise ValueError(f"--images {folder} {found}; expected the folder that holds the images.")
        subfolders = tuple(name for name in names if os.path.isdir(os.path.join(folder, name)))
        self._root = ImageRoot(folder, subfolders, follow_symlinks=follow_symlinks)
        self._names, self._field = names, field
        self._hits: Counter[PathRule] = Counter()
        self._examples: dict[PathRule, str] = {}
        self._first: tuple[str, int, str] | None = None
        self.looked_at = 0

    @property
    def has_found(self) -> bool:
        """Return whether a file was found for any path."""
        return bool(self._hits)

    def look(self, file: str, row: int, path: Any) -> None:
        """Look for the image of a row; what is not a path is left to the check of the row."""
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
        """Return the root with the rule that found most, of equals the plainest.

        Raises:
            ValueError: if none of the files was found.
        """
        if self._first and not self._hits:
            file, row, path = self._first
            raise ValueError(
                f"--images {self._root.folder}: missing image: none of {self.looked_at} images looked for is there; {file}, "
                f"row {row} (counting from 0), field {self._field} names {os.path.join(self._root.folder, path)}, which was "
                f"also looked for below {', '.join(self._names)}. Correct --images, or unpack the image archives."
            )
        if not self._hits:
            return self._root
        rule = min(self._hits, key=lambda rule: (-self._hits[rule], len(rule.stripped), len(rule.subfolder)))
        return replace(self._root, rule=rule, example=self._examples[rule])
