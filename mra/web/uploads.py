"""Uploaded archives and pictures: unpacked within limits, and never outside the folder they are meant for."""

import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from PIL import Image

from mra.web.arguments import UploadLimits


BLOCK = 1 << 20  # bytes copied at a time
METADATA_SUFFIX = ".csv"
IGNORED_FOLDERS = {"__MACOSX"}


@dataclass
class Unpacked:
    """Pictures of an upload.

    Attributes:
        images: their files.
        metadata: a CSV file that came with them, or None.
        ignored: names of files other than pictures.
    """

    images: list[Path] = field(default_factory=list)
    metadata: Path | None = None
    ignored: list[str] = field(default_factory=list)


class Unpacker:
    """Collects the pictures of uploaded files in a folder.

    Args:
        folder: to write into; it exists.
        limits: for all files together.
    """

    def __init__(self, folder: Path, limits: UploadLimits) -> None:
        self.folder, self.limits = folder, limits
        self.result = Unpacked()
        self._bytes = 0
        self._suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}

    def unpack(self, files: Iterable[str | Path]) -> Unpacked:
        """Copy pictures, CSV files and the contents of ZIP archives.

        Raises:
            ValueError: if a limit is passed, a name leads out of the folder, an archive is damaged or locked, there are two
                CSV files, or no picture.
        """
        for file in map(Path, files):
            if file.suffix.lower() == ".zip":
                self._unpack_zip(file)
            else:
                with open(file, "rb") as source:
                    self._take(file.name, source)
        if not self.result.images:
            raise ValueError("the upload holds no picture: expected image files, or a ZIP archive of them")
        return self.result

    def _unpack_zip(self, file: Path) -> None:
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if member.is_dir():
                        continue
                    if stat.S_ISLNK(member.external_attr >> 16):
                        raise ValueError(f"{file.name} holds the link {member.filename!r}: pack the picture itself")
                    if member.flag_bits & 1:
                        raise ValueError(f"{file.name} is locked with a password: pack it without one")
                    with archive.open(member) as source:
                        self._take(member.filename, source)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, zlib.error) as error:
            raise ValueError(f"{file.name} cannot be unpacked ({error}): expected a ZIP archive") from None

    def _take(self, name: str, source: IO[bytes]) -> None:
        parts = safe_parts(name)
        hidden = any(part.startswith(".") or part in IGNORED_FOLDERS for part in parts)
        suffix = PurePosixPath(name).suffix.lower()
        if hidden or suffix not in self._suffixes | {METADATA_SUFFIX}:
            self.result.ignored.append(name)
            return
        path = self.folder.joinpath(*parts)
        if path.exists():
            raise ValueError(f"the upload holds {name!r} twice: rename one of them")
        if suffix == METADATA_SUFFIX:
            if self.result.metadata is not None:
                raise ValueError(f"the upload holds two CSV files, {self.result.metadata.name} and {name}: keep one")
            self.result.metadata = path
        else:
            self.result.images.append(path)
            if len(self.result.images) > self.limits.images:
                raise ValueError(f"the upload holds more than {self.limits.images:,} pictures: split it")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._copy(name, source, path)

    def _copy(self, name: str, source: IO[bytes], path: Path) -> None:
        """Count the bytes that are unpacked, because the sizes in an archive can be forged."""
        size = 0
        with open(path, "xb") as target:
            while block := source.read(BLOCK):
                size += len(block)
                self._bytes += len(block)
                if size > self.limits.image_bytes:
                    raise ValueError(f"{name!r} is larger than {self.limits.image_bytes >> 20} MiB: shrink it")
                if self._bytes > self.limits.bytes:
                    raise ValueError(f"the upload is larger than {self.limits.bytes >> 20} MiB unpacked: split it")
                target.write(block)


def safe_parts(name: str) -> tuple[str, ...]:
    """Split the name of an archive's member, which must stay inside the folder that it is unpacked into.

    Raises:
        ValueError: if it does.
    """
    windows = PureWindowsPath(name)
    if not name.strip("/. ") or "\0" in name or name.startswith("/") or windows.drive or ".." in windows.parts:
        raise ValueError(f"the upload holds the name {name!r}, which leads out of its folder: nothing was taken over")
    return windows.parts


def inside_any(path: str | Path, roots: Iterable[Path]) -> Path:
    """Resolve a folder that someone typed, links included, if it lies in one of the roots.

    Raises:
        ValueError: if it does not, whether it exists or not.
    """
    roots = [root.resolve() for root in roots]
    resolved = Path(path).expanduser().resolve()
    if not any(resolved.is_relative_to(root) for root in roots) or not resolved.is_dir():
        allowed = ", ".join(map(str, roots)) or "none; start the page with --images FOLDER"
        raise ValueError(f"folder {path} is not in an allowed folder: expected one in {allowed}")
    return resolved
