"""Checks of annotation rows, with errors that name file, row, field and remedy."""

from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast


ROUNDING = 1e-3  # a coordinate at most this far outside 0..1 is treated as rounded and clipped
LARGEST = 3.4028234663852886e38  # of float32
OVERHANG = (
    0.02  # detectors place edges a few pixels outside the image; further out, the box must belong to another image
)


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        field: name of the field.
        reason: short name of the kind of error, by which errors are counted.
        problem: what was expected and what came.
        advice: how to fix it.
    """

    def __init__(self, field: str, reason: str, problem: str, advice: str = "Correct the row") -> None:
        super().__init__(problem)
        self.field = field
        self.reason = reason
        self.problem = problem
        self.advice = advice

    def __reduce__(self) -> tuple:
        return type(self), (self.field, self.reason, self.problem, self.advice)  # for another process

    def describe(self, file: str | Path, row: int) -> str:
        """Return the message for the user."""
        return (
            f"{file}, row {row} (counting from 0), field {self.field}: {self.reason}: {self.problem}. "
            f"{self.advice}, or pass --on_error skip to leave such rows out."
        )


def shorten(value: Any, length: int = 120) -> str:
    """Shorten a value for an error message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def list_names(names: Iterable[str]) -> str:
    """Return names of fields for an error message, on one line."""
    text = ", ".join(repr(name)[1:-1] for name in names)
    return text if len(text) <= 1000 else f"{text[:997]}..."


def check_object(row: Any, required: tuple[str, ...]) -> None:
    """Refuse a value that is not an object or lacks a field.

    Raises:
        RowError: if the check fails; the message names the field.
    """
    if isinstance(row, RowError):  # a reader could not give more of it
        raise row
    if not isinstance(row, dict):
        raise RowError("(all)", "wrong type", f"expected an object, got {shorten(row)}")
    for field in required:
        if field not in row:
            problem = f"expected {', '.join(required)}, got {list_names(row) or 'nothing'}"
            raise RowError(field, "missing field", problem)


def check_unicode(text: str, field: str) -> None:
    """Refuse lone surrogates, which JSON can escape but no file can hold.

    Raises:
        RowError: if the check fails; the message names the field.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"expected Unicode text, got the half character {text[error.start]!a} in {shorten(text)}"
        raise RowError(field, "invalid text", problem) from None


def check_text(text: Any, field: str) -> str:
    """Check that a caption or phrase has a letter or digit, and return it unchanged.

    Raises:
        RowError: if the check fails; the message names the field.
    """
    kind = field.split("[")[0].rstrip("s")
    if not isinstance(text, str):
        raise RowError(field, "wrong type", f"expected a string, got {shorten(text)}")
    if not any(character.isalnum() for character in text):
        raise RowError(field, f"empty {kind}", f"expected at least one word, got {shorten(text)}")
    check_unicode(text, field)
    return text


def check_captions(captions: Any, field: str) -> list[str]:
    """Check a list of captions, which must not be empty or contain empty ones.

    Raises:
        RowError: if the check fails; the message names the field.
    """
    if not isinstance(captions, list):
        raise RowError(field, "wrong type", f"expected a list of strings, got {shorten(captions)}")
    if not captions:
        raise RowError(field, "empty caption", "expected at least one caption, got an empty list")
    return [check_text(text, f"{field}[{index}]") for index, text in enumerate(captions)]


def check_identity(value: Any, field: str) -> int:
    """Check that a value is a 64-bit integer.

    Raises:
        RowError: if the check fails; the message names the field.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not -(2**63) <= cast(int, value) < 2**63:
        raise RowError(field, "wrong type", f"expected an integer, got {shorten(value)}")
    return int(value)


def check_regions(row: dict) -> tuple[list[list[float]], list[float], list[str]]:
    """Check `boxes`, `logits` and `phrases` of an SDA row; without all three the row has no regions.

    Coordinates outside 0..1 by at most [`ROUNDING`] are clipped. Edges may extend beyond the image by at most [`OVERHANG`] of
    its side; training clips them.

    Returns:
        Boxes (cx, cy, w, h in 0..1), detector scores and phrases, as many of each.

    Raises:
        RowError: if the check fails; the message names field and box.
    """
    regions = {}
    for field in ("boxes", "logits", "phrases"):
        regions[field] = [] if row.get(field) is None else row[field]
        if not isinstance(regions[field], list):
            raise RowError(field, "wrong type", f"expected a list, got {shorten(regions[field])}")
    counts = {field: len(values) for field, values in regions.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {field}" for field, count in counts.items())
        raise RowError("boxes", "different lengths", f"expected as many boxes as logits and phrases, got {found}")
    boxes = [check_box(box, f"boxes[{index}]") for index, box in enumerate(regions["boxes"])]
    logits = [check_number(score, f"logits[{index}]") for index, score in enumerate(regions["logits"])]
    phrases = [check_text(phrase, f"phrases[{index}]") for index, phrase in enumerate(regions["phrases"])]
    return boxes, logits, phrases


def check_number(value: Any, field: str) -> float:
    """Check that a value is a finite 32-bit number.

    Raises:
        RowError: if the check fails; the message names the field.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(cast(float, value)) <= LARGEST:
        raise RowError(field, "wrong type", f"expected a finite number, got {shorten(value)}")
    return float(value)


def check_box(box: Any, field: str) -> list[float]:
    """Check one box; see [`check_regions`].

    Raises:
        RowError: if the check fails; the message names the field.
    """
    if not isinstance(box, list) or len(box) != 4:
        raise RowError(field, "wrong type", f"expected [cx, cy, w, h], got {shorten(box)}")
    values = [check_number(value, field) for value in box]
    advice = "Divide pixel coordinates by the image's width and height, or correct the row"
    if min(values) < -ROUNDING or max(values) > 1 + ROUNDING:
        raise RowError(field, "box outside 0..1", f"expected cx, cy, w and h in 0..1, got {shorten(box)}", advice)
    cx, cy, width, height = (min(max(value, 0.0), 1.0) for value in values)
    if not (width > 0 and height > 0):
        raise RowError(field, "box without area", f"expected w and h above 0, got {shorten(box)}")
    edges = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    if min(edges) < -OVERHANG or max(edges) > 1 + OVERHANG:
        raise RowError(
            field,
            "box outside 0..1",
            f"expected edges inside the image, got {shorten(box)}, which reaches from "
            f"({edges[0]:.3f}, {edges[1]:.3f}) to ({edges[2]:.3f}, {edges[3]:.3f})",
            "Give boxes as centre, width and height (not corners)",
        )
    return [cx, cy, width, height]
