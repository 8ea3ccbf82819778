"""Digests of the files of a model or set, by which damage is noticed when they are read.

Safetensors, ONNX, JSON and Parquet keep no checksum of their values, so that a changed byte would give other results silently.
"""

import json
from pathlib import Path

from mra.common.files import write_whole
from mra.common.weight_files import file_digest


DIGESTS_FILE = "digests.json"
_UNCHECKED = ("README.md", "retrieval.json", "*.py")  # not read with the model, or replaced later


def write_digests(folder: str | Path, pattern: str = "*") -> None:
    """Save the SHA-256 of the files of a finished folder in its `digests.json`.

    Args:
        folder: the folder.
        pattern: files to include; `README.md`, `retrieval.json` and code are always left out.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    digests = {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in files
        if not any(path.match(name) for name in (DIGESTS_FILE, *_UNCHECKED))
    }
    write_whole(folder / DIGESTS_FILE, json.dumps(digests, indent=2) + "\n")


def check_digests(folder: str | Path, argument: str = "model") -> None:
    """Compare the files of a folder with its `digests.json`; a folder without one, such as of the Hub, is accepted.

    Files are hashed once per process.

    Args:
        folder: folder or Hub id.
        argument: what it was given as, for messages.

    Raises:
        ValueError: if a file is missing or was changed; the message names it.
    """
    folder = Path(folder)
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return
    fix = f"copy or save it again, or remove {path} if you changed it on purpose"
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
        files = [(folder / name, str(digest)) for name, digest in digests.items()]
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{argument} {folder}: {path} is damaged ({error}): remove it to read the folder unchecked"
        ) from error
    for file, digest in files:
        if not file.is_file():
            raise ValueError(f"{argument} {folder}: {file} is missing: {fix}")
        if file_digest(file) != digest:
            raise ValueError(f"{argument} {folder}: {file} was changed after it was written: {fix}")
