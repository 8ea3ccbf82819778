"""Files of weights as they were downloaded: read without running their code, refused in a sentence when they are damaged."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


# What pickled numbers and arrays of NumPy are made of, under the names of NumPy 1 and 2; none of them runs code.
NUMPY_GLOBALS = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["All"]},
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in (
            ("scalar", np.float64().__reduce__()[0]),
            ("_reconstruct", np.empty(0).__reduce__()[0]),
        )
        for core in ("core", "_core")
    ),
]


def load_tensors(path: Path, argument: str) -> Any:
    """Read a `.pth` or `.bin` file of tensors and plain values; tensors of a zip archive stay on disk until they are used.

    Args:
        path: the file.
        argument: that named it, for the messages.

    Raises:
        ValueError: if it is missing, cut off, damaged, not what was meant to be downloaded, or holds what could run code.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"`{argument}`: {what} at {str(path)!r}; expected a .pth file")
    try:
        with path.open("rb") as file:
            head = file.read(512).lstrip()
        is_archive = zipfile.is_zipfile(path)
    except OSError as error:
        raise ValueError(f"`{argument}`: {str(path)!r} cannot be read ({error.strerror or error})") from error
    again = "download it again"
    if not head:
        raise ValueError(f"{path} is empty: {again}")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file it stands for: run `git lfs pull`, or {again}")
    if head[:1] == b"<":
        raise ValueError(
            f"{path} is a web page (HTML), not a checkpoint: {again}, in a browser if the site asks to confirm"
        )
    if head.startswith(b"PK") and not is_archive:
        raise ValueError(
            f"{path} cannot be read: it is cut off, its {path.stat().st_size} bytes lack the end of the archive; {again}"
        )
    try:
        with torch.serialization.safe_globals(NUMPY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle fails in more ways than can be listed
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            reason = f"it holds {foreign[1]}, which could run code: save its tensors and a plain `config` alone"
        else:
            reason = f"it is damaged, cut off or of another format ({first_line(error)}): {again}"
        raise ValueError(f"{path} cannot be read as tensors and plain values: {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
