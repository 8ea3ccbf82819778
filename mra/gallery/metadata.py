"""What is known of the images of a gallery: CSV files, rows, and the columns of data sets."""

import csv
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mra.gallery.sources import RESERVED, Source, is_field_name
from mra.gallery.where import read_time


# What `Gallery.build` takes as metadata: a CSV file, rows, or nothing.
MetadataSource: TypeAlias = str | Path | Iterable[Mapping[str, Any]] | None


MAX_CAMERA_BYTES = 256
MAX_VALUE_BYTES = 4096

_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")

Value = str | int | float


@dataclass
class Labels:
    """What is known of images.

    Attributes:
        of_key: camera, time and metadata of each image that has any, as a record keeps them.
        kinds: "text" or "number" of every column, those included that the gallery knew.
        unmatched: paths that name no image.
    """

    of_key: dict[str, dict]
    kinds: dict[str, str]
    unmatched: list[str]


def read_metadata(metadata: MetadataSource, source: Source, kinds: Mapping[str, str], prefix: str = "") -> Labels:
    """Read what is known of the images, and the kinds of its columns.

    Args:
        metadata: a CSV file, rows as mappings, or None for what the data set itself says.
        source: the images.
        kinds: "text" or "number" of each column that the gallery knows already.
        prefix: of the keys.

    Raises:
        ValueError: naming file and row, if a row or column is not as `Gallery.build` describes.
    """
    if metadata is None:
        rows = [(item.key, item.key, item.columns) for item in source.items if item.columns]
        return _label(rows, dict(kinds), "data set", [])
    place, base = (
        ("metadata", None) if not isinstance(metadata, str | Path) else (str(metadata), Path(metadata).parent)
    )
    found = {item.key: item.key for item in source.items} | {key: None for key, _ in source.refused}
    found |= {str(item.path): item.key for item in source.items if item.path is not None}
    rows, unmatched, seen = [], [], {}
    for number, row in _metadata_rows(metadata, place):
        path = row.pop("path", None)
        if not isinstance(path, str) or not path.strip():
            raise ValueError(f"{place}, row {number}: path must name an image, got {path!r}")
        path = path.strip()
        matches = _find_images(path, found, prefix, base)
        if not matches and "\\" in path:  # written on Windows
            matches = _find_images(path.replace("\\", "/"), found, prefix, base)
        if len(matches) > 1:
            raise ValueError(
                f"{place}, row {number}: path {path!r} names the images {' and '.join(map(repr, matches))}: expected one, "
                "write the whole path of its file"
            )
        if not matches:
            unmatched.append(Path(path).as_posix())
            continue
        (key,) = matches
        before, known = seen.setdefault(key, (number, row))
        if known != row:
            raise ValueError(
                f"{place}, row {number}: row {before} says something else of the same image {path!r}: expected one row for "
                "each image"
            )
        if found[key] is not None:
            rows.append((key, number, row))
    if unmatched and not rows:
        raise ValueError(
            f"{place}: no path names an image of {source.name} (the first is {unmatched[0]!r}); write them relative to "
            f"the folder of images, such as {source.items[0].key!r}"
        )
    return _label(rows, dict(kinds), place, unmatched)


def _find_images(path: str, found: Mapping[str, str | None], prefix: str, base: Path | None) -> list[str]:
    """Keys that a path of the metadata may mean: relative to the images, to the working folder or to the CSV file."""
    path = Path(path).as_posix()
    candidates = [prefix + path, path, os.path.abspath(path)] + ([os.path.abspath(base / path)] if base else [])
    return list(dict.fromkeys(found[name] or name for name in candidates if name in found))


def _metadata_rows(metadata: str | Path | Iterable[Mapping[str, Any]], place: str) -> Iterator[tuple[int, dict]]:
    if not isinstance(metadata, str | Path):
        yield from ((number, dict(row)) for number, row in enumerate(metadata, start=1))
        return
    line = 1
    try:
        # Decoded with the bad bytes kept, so that the line of the first one is known.
        with open(metadata, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            "".join(reader.fieldnames or []).encode()
            twice = [name for name in reader.fieldnames or [] if list(reader.fieldnames or []).count(name) > 1]
            if twice:
                raise ValueError(f"{place} has two columns {twice[0]!r}: rename or delete one")
            if "path" not in (reader.fieldnames or []):
                raise ValueError(f"{place} must have a column path, got {', '.join(reader.fieldnames or ['nothing'])}")
            for row in reader:
                line = reader.line_num
                "".join(value for value in row.values() if isinstance(value, str)).encode()
                if None in row or None in row.values():
                    raise ValueError(
                        f"{place}, line {reader.line_num}: expected {len(reader.fieldnames or [])} values, as the header has"
                    )
                yield reader.line_num, row
    except OSError as error:
        raise ValueError(f"{place} cannot be read ({error.strerror}): expected a CSV file") from None
    except csv.Error as error:
        raise ValueError(f"{place}, after line {line}: not CSV in UTF-8 ({error}): save the file as UTF-8") from None
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
        raise ValueError(f"{place}, line {line}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8") from None


def _label(
    rows: Sequence[tuple[str, object, Mapping[str, Any]]], kinds: dict[str, str], place: str, unmatched: list[str]
) -> Labels:
    columns = dict.fromkeys(column for _, _, row in rows for column in row)
    for column in columns:
        if column in ("camera", "time"):
            continue
        if not is_field_name(column):
            raise ValueError(
                f"{place}: a column cannot be called {column!r}: use letters, digits and _, and none of "
                f"{', '.join(sorted(RESERVED - {'camera', 'time'}))}"
            )
        if column not in kinds:
            values = [row[column] for _, _, row in rows if not _is_empty(row.get(column))]
            kinds[column] = "number" if values and all(_is_number(value) for value in values) else "text"
    of_key = {}
    for key, number, row in rows:
        label = {"camera": "", "time": "", "metadata": {}}
        for column, value in row.items():
            if _is_empty(value):
                continue
            try:
                if column in ("camera", "time"):
                    label[column] = _camera(value) if column == "camera" else _time(value)
                else:
                    label["metadata"][column] = _value(value, kinds[column])
            except ValueError as error:
                raise ValueError(f"{place}, row {number}: {column} {error}") from None
        of_key[key] = label
    return Labels(of_key, kinds, unmatched)


def _camera(value: Any) -> str:
    text = str(value).strip()
    if len(text.encode()) > MAX_CAMERA_BYTES:
        raise ValueError(f"is longer than {MAX_CAMERA_BYTES} bytes")
    return text


def _time(value: Any) -> str:
    return read_time(value.isoformat() if hasattr(value, "isoformat") else str(value))


def _value(value: Any, kind: str) -> Value:
    if kind == "number":
        if not _is_number(value):
            raise ValueError(f"must be a number, as it is for the other images, got {value!r}")
        number = math.inf if isinstance(value, int) and abs(value) > sys.float_info.max else float(value)
        if not math.isfinite(number):
            raise ValueError(f"must be a finite number, got {value!r}")
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    text = str(value).strip()
    if len(text.encode()) > MAX_VALUE_BYTES:
        raise ValueError(f"is longer than {MAX_VALUE_BYTES} bytes")
    return text


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_NUMBER.fullmatch(value.strip()))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_empty(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):  # what pandas makes of an empty cell
        return True
    return value is None or (isinstance(value, str) and not value.strip())
