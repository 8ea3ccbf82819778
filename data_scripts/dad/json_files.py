"""JSON files, written atomically."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mra.common.files import write_whole


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON value atomically."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON value.

    Raises:
        ValueError: if the file is damaged; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected JSON in UTF-8; remove {Path(path).parent} and run its stage again"
        ) from None


def to_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Return the rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
