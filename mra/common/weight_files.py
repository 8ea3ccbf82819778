"""Reading of downloaded weight files without running code from them, with clear errors for damaged ones."""

import functools
import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


# In the search order of `from_pretrained`; literal, because transformers takes seconds to import.
WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What else `from_pretrained` reads of a model, its tokenizer and its image processor; a model has some of them.
_SETTINGS_NAMES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)

# Globals in pickled NumPy numbers and arrays, under the names of NumPy 1 and 2; none of them runs code.
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
    """Read a `.pth` or `.bin` file of tensors and plain values; tensors of a zip archive are mapped from disk.

    Args:
        path: the file.
        argument: name of the argument that gave the path, for messages.

    Raises:
        ValueError: if it is missing, truncated, damaged, not a weight file, or holds objects that could run code.
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
            f"{path} cannot be read: its {path.stat().st_size} bytes are truncated, the end of the archive is missing; {again}"
        )
    import torch  # only here: `weights_digest` is used without

    try:
        with torch.serialization.safe_globals(NUMPY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            reason = f"it holds {foreign[1]}, which could run code: save only its tensors and a plain `config`"
        else:
            reason = f"it is damaged, truncated or of another format ({first_line(error)}): {again}"
        raise ValueError(f"{path} cannot be read as tensors and plain values: {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weights_digest(model: str | Path) -> str | None:
    """Hash the weight files of a model.

    Files of one architecture have the same size and header, so all bytes are hashed, once per process: a second or two
    per gigabyte.

    Args:
        model: folder or Hub id; may be a folder of ONNX graphs, which hold their weights.

    Returns:
        64 hexadecimal digits, or None if there are no weights.
    """
    files: list[str] = []
    for name in WEIGHTS_NAMES:
        path = find_model_file(model, name)
        if path is not None:
            files = [path]
            if name.endswith(".index.json"):
                shards = sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
                files = [found for shard in shards if (found := find_model_file(model, shard)) is not None]
            break
    else:
        files = sorted(map(str, Path(model).glob("*.onnx")))
    if not files:
        return None
    digests = [file_digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def model_digest(model: str | Path) -> str:
    """Hash all that determines what a model computes: weights, configuration, tokenizer and image processor.

    Args:
        model: folder or Hub id.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{weights_digest(model)}\n".encode())
    for name in _SETTINGS_NAMES:
        path = find_model_file(model, name)
        digest.update(f"{name}:{path and file_digest(path)}\n".encode())
    return digest.hexdigest()


def find_model_file(model: str | Path, name: str) -> str | None:
    """Return the path of a file in a model's folder or Hub repository, or None if it is not there."""
    if Path(model).is_dir():
        path = Path(model) / name
        return str(path) if path.is_file() else None
    from transformers.utils.hub import cached_file

    return cached_file(
        str(model),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; a file is hashed once per process unless it changes."""
    state = Path(path).stat()
    return _hash_file(str(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hash_file(path: str, size: int, modified: int) -> str:
    """Hash a file; the cache is keyed by its size and modification time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
