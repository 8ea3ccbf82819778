"""Text files of users, opened as UTF-8, with clear errors for other files."""

import os
import re
from pathlib import Path
from typing import IO


NOT_UTF8 = re.compile("[\udc80-\udcff]")  # characters that stand for invalid UTF-8 bytes in a file from `open_text`
SAVE_AS_UTF8 = "save the file as UTF-8"

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
_LOOKED_AT = 1024


class UnreadableFile(ValueError):
    """File that cannot be read from some row.

    Args:
        path: the file.
        row: number of the first row that cannot be read, from 0.
        problem: what is wrong there.
        expected: kind of file.
        advice: what to do about it.
        counting: how rows are counted.
    """

    reason = "unreadable file"

    def __init__(
        self, path: str | Path, row: int, problem: str, expected: str, advice: str, counting: str = "counting from 0"
    ) -> None:
        super().__init__(
            f"{path}: row {row} ({counting}) cannot be read: {problem}; expected {expected}; {advice}, or pass --on_error "
            "skip to leave out unreadable rows"
        )
        self.path = str(path)
        self.row = row
        self.problem = problem


def open_text(path: str | Path, newline: str | None = None) -> IO[str]:
    """Open a text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        newline: line-break handling, as in `open`.

    Returns:
        A file in which invalid UTF-8 bytes are read as characters of [`NOT_UTF8`].
    """
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def name_bad_byte(text: str) -> str | None:
    """Describe the first invalid byte in text from `open_text`; None if all of it is UTF-8."""
    match = NOT_UTF8.search(text)
    return f"it is not UTF-8 (byte 0x{ord(match.group()) - 0xDC00:02x})" if match else None


def name_other_kind(path: str | Path) -> tuple[str, str] | None:
    """Recognise a file that is not UTF-8 text by its first bytes.

    Returns:
        What it is and what to do; None if it may be text.
    """
    with open(path, "rb") as file:
        start = file.read(_LOOKED_AT)
    again = "download or unpack the file again"
    if not start.strip(b"\xef\xbb\xbf \t\r\n") and os.path.getsize(path) <= _LOOKED_AT:
        return "the file is empty", again
    packed = next((name for signature, name in _PACKED.items() if start.startswith(signature)), None)
    if packed:
        return f"the file is packed with {packed}", "unpack it"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        return "it is not UTF-8 but UTF-16 or no text at all", SAVE_AS_UTF8
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "the file is an HTML or XML page", again
    if start.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer", "fetch the file itself with `git lfs pull`"
    return None
