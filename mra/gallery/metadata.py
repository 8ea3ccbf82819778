"""Metadata of images: CSV files, rows, and the columns of datasets."""

import csv
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mra.gallery.sources import Source
from mra.gallery.where import RESERVED, Value, is_field_name, is_unicode, read_time


# Metadata for `Gallery.build`: a CSV file, rows, or nothing.
MetadataSource: TypeAlias = str | Path | Iterable[Mapping[str, Any]] | None


MAX_CAMERA_BYTES = 256
MAX_VALUE_BYTES = 4096

_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


@dataclass
class Labels:
    """Metadata of images.

    Attributes:
        of_key: camera, time and metadata of each image that has any, as in a `Record`.
        kinds: kind of each column, "text" or "number", those already in the gallery included.
        unmatched: paths that match no image.
    """

    of_key: dict[str, dict]
    kinds: dict[str, str]
    unmatched: list[str]


def read_metadata(metadata: MetadataSource, source: Source, kinds: Mapping[str, str], prefix: str = "") -> Labels:
    """Read the metadata of images and determine the kinds of its columns.

    Args:
        metadata: a CSV file, rows as mappings, or None for the columns of the dataset.
        source: the images.
        kinds: kind of each column already in the gallery, "text" or "number".
        prefix: prefix of the keys.

    Raises:
        ValueError: if a row or column is not as described in `Gallery.build`; the message names file and row.
    """
    if metadata is None:
        rows = [(item.key, item.key, item.columns) for item in source.items if item.columns]
        return _label(rows, dict(kinds), "dataset", [])
    place, base = (
        ("metadata", None) if not isinstance(metadata, str | Path) else (str(metadata), Path(metadata).parent)
    )
    found = {item.key: item.key for item in source.items} | {key: None for key, _ in source.refused}
    found |= {str(item.path): item.key for item in source.items if item.path is not None}
    rows, unmatched, seen = [], [], {}
    for number, row in _metadata_rows(metadata, place):
        path = row.pop("path", None)
        if not isinstance(path, str) or not path.strip():
            shown = repr(path) if isinstance(path, str | None) else f"a value of type {type(path).__name__}"
            raise ValueError(f"{place}, row {number}: path must name an image, got {shown}")
        path = path.strip()
        matches = _find_images(path, found, prefix, base)
        if not matches and "\\" in path:  # written on Windows
            matches = _find_images(path.replace("\\", "/"), found, prefix, base)
        if len(matches) > 1:
            raise ValueError(
                f"{place}, row {number}: path {path!r} matches the images {' and '.join(map(repr, matches))}, expected "
                "one: write the full path of its file"
            )
        if not matches:
            unmatched.append(Path(path).as_posix())
            continue
        (key,) = matches
        before, known = seen.setdefault(key, (number, row))
        if known != row:
            raise ValueError(
                f"{place}, row {number}: differs from row {before} of the same image {path!r}: keep one row for each image"
            )
        if found[key] is not None:
            rows.append((key, number, row))
    if unmatched and not rows:
        raise ValueError(
            f"{place}: no path matches an image of {source.name}; the first is {unmatched[0]!r}: write paths relative to "
            f"the folder of images, such as {source.items[0].key!r}"
        )
    return _label(rows, dict(kinds), place, unmatched)


def _find_images(path: str, found: Mapping[str, str | None], prefix: str, base: Path | None) -> list[str]:
    """Return the keys that a path matches, relative to the images, the working folder or the CSV file."""
    path = Path(path).as_posix()
    candidates = [prefix + path, path, os.path.abspath(path)] + ([os.path.abspath(base / path)] if base else [])
    return list(dict.fromkeys(found[name] or name for name in candidates if name in found))


def _metadata_rows(metadata: str | Path | Iterable[Mapping[str, Any]], place: str) -> Iterator[tuple[int, dict]]:
    if not isinstance(metadata, str | Path):
        yield from ((number, dict(row)) for number, row in enumerate(metadata, start=1))
        return
    line = 1
    try:
        # Decode with surrogates, to report the line of the first byte that is not UTF-8.
        with open(metadata, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            "".join(reader.fieldnames or []).encode()
            twice = [name for name in reader.fieldnames or [] if list(reader.fieldnames or []).count(name) > 1]
            if twice:
                raise ValueError(f"{place} has two columns {twice[0]!r}, expected unique names: rename or delete one")
            if "path" not in (reader.fieldnames or []):
                raise ValueError(f"{place} must have a column path, got {reader.fieldnames or 'nothing'}")
            for row in reader:
                line = reader.line_num
                "".join(value for value in row.values() if isinstance(value, str)).encode()
                if None in row or None in row.values():
                    raise ValueError(
                        f"{place}, line {reader.line_num}: expected {len(reader.fieldnames or [])} values, as in the header"
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
                f"{place}: column {column!r} must be a name of letters, digits and underscores, and none of "
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
                if isinstance(value, int) and abs(value) > sys.float_info.max:  # Python may refuse to print it
                    raise ValueError("must be a number of at most 308 digits")
                if column in ("camera", "time"):
                    label[column] = _text(value, MAX_CAMERA_BYTES) if column == "camera" else _time(value)
                else:
                    label["metadata"][column] = _value(value, kinds[column])
            except ValueError as error:
                raise ValueError(f"{place}, row {number}: {column} {error}") from None
        of_key[key] = label
    return Labels(of_key, kinds, unmatched)


def _camera(value: Any) -> str:
    return _text(value, MAX_CAMERA_BYTES)


def _time(value: Any) -> str:
    return read_time(value.isoformat() if hasattr(value, "isoformat") else str(value))


def _value(value: Any, kind: str) -> Value:
    if kind == "number":
        if not _is_number(value):
            raise ValueError(f"must be a number, as for the other images, got {value!r}")
        number = math.inf if isinstance(value, int) and abs(value) > sys.float_info.max else float(value)
        if not math.isfinite(number):
            raise ValueError(f"must be a finite number, got {value!r}")
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return _text(value, MAX_VALUE_BYTES)


def _text(value: Any, most_bytes: int) -> str:
    text = str(value).strip()
    if not is_unicode(text):
        raise ValueError(f"must be valid Unicode, got {text!r}")
    if len(text.encode()) > most_bytes:
        raise ValueError(f"is longer than {most_bytes} bytes")
    return text


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_NUMBER.fullmatch(value.strip()))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_empty(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):  # an empty cell in pandas
        return True
    return value is None or (isinstance(value, str) and not value.strip())
