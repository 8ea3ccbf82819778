"""Uploaded images and archives: unpacked within limits, and never outside their folder."""

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
    """Unpacked files of an upload.

    Attributes:
        images: image files.
        metadata: CSV file, or None.
        ignored: names of all further files.
    """

    images: list[Path] = field(default_factory=list)
    metadata: Path | None = None
    ignored: list[str] = field(default_factory=list)


class Unpacker:
    """Copies the images of uploaded files to a folder.

    Args:
        folder: existing folder to write to.
        limits: limits for all files together.
    """

    def __init__(self, folder: Path, limits: UploadLimits) -> None:
        self.folder, self.limits = folder, limits
        self.result = Unpacked()
        self._bytes = 0
        self._suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}

    def unpack(self, files: Iterable[str | Path]) -> Unpacked:
        """Copy images, a CSV file and the contents of ZIP archives.

        Raises:
            ValueError: if a limit is exceeded, a name leads out of the folder, an archive is damaged or encrypted, or there
                are two CSV files or no images.
        """
        for file in map(Path, files):
            if file.suffix.lower() == ".zip":
                self._unpack_zip(file)
            else:
                with open(file, "rb") as source:
                    self._take(file.name, source)
        if not self.result.images:
            raise ValueError("upload has no images: expected image files, or a ZIP archive of them")
        return self.result

    def _unpack_zip(self, file: Path) -> None:
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if member.is_dir():
                        continue
                    if stat.S_ISLNK(member.external_attr >> 16):
                        raise ValueError(f"{file.name} contains the link {member.filename!r}: add the image itself")
                    if member.flag_bits & 1:
                        raise ValueError(f"{file.name} is encrypted: create it without a password")
                    with archive.open(member) as source:
                        self._take(member.filename, source)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, UnicodeError, zlib.error) as error:
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
            raise ValueError(f"upload contains {name!r} twice: rename one of them")
        if suffix == METADATA_SUFFIX:
            if self.result.metadata is not None:
                raise ValueError(f"upload contains two CSV files, {self.result.metadata.name} and {name}: keep one")
            self.result.metadata = path
        else:
            self.result.images.append(path)
            if len(self.result.images) > self.limits.images:
                raise ValueError(f"upload has more than {self.limits.images:,} images: split it")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._copy(name, source, path)

    def _copy(self, name: str, source: IO[bytes], path: Path) -> None:
        """Copy a file and count its unpacked bytes, because the sizes in an archive can be forged."""
        size = 0
        with open(path, "xb") as target:
            while block := source.read(BLOCK):
                size += len(block)
                self._bytes += len(block)
                if size > self.limits.image_bytes:
                    raise ValueError(f"{name!r} is larger than {self.limits.image_bytes >> 20} MiB: reduce it")
                if self._bytes > self.limits.bytes:
                    raise ValueError(f"upload is larger than {self.limits.bytes >> 20} MiB unpacked: split it")
                target.write(block)


def safe_parts(name: str) -> tuple[str, ...]:
    """Split the name of a file in an archive into the parts of a relative path.

    Raises:
        ValueError: if it leads out of the folder that it is unpacked into.
    """
    windows = PureWindowsPath(name)
    if not name.strip("/. ") or "\0" in name or name.startswith("/") or windows.drive or ".." in windows.parts:
        raise ValueError(
            f"upload contains the name {name!r}, which leads out of its folder: rename it; nothing was indexed"
        )
    return windows.parts


def inside_any(path: str | Path, roots: Iterable[Path]) -> Path:
    """Resolve the path of a folder, links included, that must be in one of the roots.

    Raises:
        ValueError: if it is not in a root or is not a folder, with the same message.
    """
    roots = [root.resolve() for root in roots]
    resolved = Path(path).expanduser().resolve()
    if not any(resolved.is_relative_to(root) for root in roots) or not resolved.is_dir():
        allowed = ", ".join(map(str, roots)) or "none; start the page with --images FOLDER"
        raise ValueError(f"folder {path} is not in an allowed folder: expected one in {allowed}")
    return resolved
