"""Filters of a search, in a small language with the same meaning for a record in memory and for Milvus.

The text is parsed by Python's `ast` and never evaluated. `not` is moved into the comparisons while parsing, so that a
comparison with a missing value is false, and so is its negation, as in SQL.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime


MAX_LENGTH = 4000
MAX_DEPTH = 50

# Fields of every record; the metadata has further ones.
RECORD_FIELDS = {"key": "text", "camera": "text", "time": "time"}

# Names with a meaning of their own, which no metadata column can have.
RESERVED = {"path", "image", "captions", "embedding", "content", "source", "metadata", *RECORD_FIELDS}

EXAMPLE = 'camera == "c3" and time > "2026-01-31T08:00"'

_OPERATORS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_OPPOSITES = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_SWAPPED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_TESTS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

Value = str | int | float

# Characters with a meaning in literals of Milvus and milvus-lite; both read all others unchanged.
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"})


def quote(text: str) -> str:
    """Return a text as a literal of Milvus; control characters are kept because milvus-lite cannot read JSON escapes."""
    return f'"{text.translate(_ESCAPES)}"'


def is_field_name(name: object) -> bool:
    """Return whether a filter can use a metadata column of that name."""
    taken = RESERVED | {"and", "or", "not", "in", "is"}
    return isinstance(name, str) and name.isidentifier() and name.isascii() and name not in taken


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, by which Python represents names that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True)
class Comparison:
    """Comparison of a field with a constant."""

    field: str
    operator: str
    value: Value

    def matches(self, values: Callable[[str], Value | None]) -> bool:
        """Return whether the record matches; `values` returns its fields, None for a missing value."""
        value = values(self.field)
        return value is not None and _TESTS[self.operator](value, self.value)

    def to_milvus(self) -> str:
        """Return the filter for Milvus, where an unknown camera or time is ""."""
        constant = quote(self.value) if isinstance(self.value, str) else repr(self.value)
        if self.field in RECORD_FIELDS:
            return f'({self.field} != "" and {self.field} {self.operator} {constant})'
        path = f"metadata[{quote(self.field)}]"
        # A server reads `exists a and b` as `exists (a and b)`; milvus-lite does not.
        return f"((exists {path}) and {path} {self.operator} {constant})"


@dataclass(frozen=True)
class Combination:
    """Conditions joined by `and` or `or`."""

    word: str  # "and" or "or"
    parts: tuple["Comparison | Combination", ...]

    def matches(self, values: Callable[[str], Value | None]) -> bool:
        """Return whether the record matches."""
        combine = all if self.word == "and" else any
        return combine(part.matches(values) for part in self.parts)

    def to_milvus(self) -> str:
        """Return the filter for Milvus."""
        return "(" + f" {self.word} ".join(part.to_milvus() for part in self.parts) + ")"


Where = Comparison | Combination


def parse_where(text: str, fields: Mapping[str, str]) -> Where:
    """Parse a filter.

    Args:
        text: comparisons of fields with constants, joined by `and`, `or`, `not` and parentheses.
        fields: name and kind of each field, "text", "number" or "time".

    Raises:
        ValueError: if it cannot be parsed, a field is unknown, or a constant is not of the field's kind.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"where is {len(text)} characters long: expected at most {MAX_LENGTH}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = f"{error.msg} at character {error.offset}" if isinstance(error, SyntaxError) else str(error)
        reason = reason or "it is nested too deeply"  # the parser's MemoryError has no text
        raise ValueError(f"where {text!r} cannot be parsed ({reason}): write a condition such as {EXAMPLE}") from None
    return _ConditionReader(text, fields).read(tree, negated=False)


class _ConditionReader:
    def __init__(self, text: str, fields: Mapping[str, str]) -> None:
        self.text, self.fields = text, fields

    def read(self, node: ast.expr, negated: bool, depth: int = 0) -> Where:
        if depth > MAX_DEPTH:
            raise self.error(node, f"is nested deeper than {MAX_DEPTH} levels", "use fewer parentheses")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self.read(node.operand, not negated, depth + 1)
        if isinstance(node, ast.BoolOp):
            word = "and" if isinstance(node.op, ast.And) != negated else "or"
            return Combination(word, tuple(self.read(value, negated, depth + 1) for value in node.values))
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            links = zip(operands, node.ops, operands[1:], strict=False)
            parts = tuple(self.compare(left, link, right, negated) for left, link, right in links)
            return parts[0] if len(parts) == 1 else Combination("or" if negated else "and", parts)
        raise self.error(node, "is not a comparison", f"compare a field with a value, as in {EXAMPLE}")

    def compare(self, left: ast.expr, link: ast.cmpop, right: ast.expr, negated: bool) -> Where:
        if isinstance(link, ast.In | ast.NotIn):
            if not isinstance(left, ast.Name) or not isinstance(right, ast.List | ast.Tuple) or not right.elts:
                raise self.error(
                    right, "is not a list of constants", 'write a condition such as camera in ["c1", "c2"]'
                )
            inside = isinstance(link, ast.In) != negated
            symbol, word = ("==", "or") if inside else ("!=", "and")
            return Combination(word, tuple(self.comparison(left, symbol, item) for item in right.elts))
        if type(link) not in _OPERATORS:
            raise self.error(left, "has an unknown comparison", f"use {' '.join(_OPPOSITES)} or in")
        symbol = _OPERATORS[type(link)]
        if not isinstance(left, ast.Name):
            left, right, symbol = right, left, _SWAPPED[symbol]
        return self.comparison(left, _OPPOSITES[symbol] if negated else symbol, right)

    def comparison(self, field: ast.expr, symbol: str, constant: ast.expr) -> Comparison:
        if not isinstance(field, ast.Name):
            raise self.error(field, "is not a field", f"compare one of {self.known()} with a constant")
        if field.id not in self.fields:
            raise self.error(field, "is not a field of this gallery", f"it has {self.known()}")
        kind = self.fields[field.id]
        value = self.constant(constant)
        if (kind == "number") != (not isinstance(value, str)):
            expected = "a number, as in 12 or 0.5" if kind == "number" else 'a text in quotes, as in "c3"'
            raise self.error(constant, f"does not fit the field {field.id}", f"expected {expected}")
        if kind == "time":
            try:
                value = read_time(str(value))
            except ValueError as error:
                raise self.error(constant, "is not a time", str(error)) from None
        return Comparison(field.id, symbol, value)

    def constant(self, node: ast.expr) -> Value:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            sign, node = -1, node.operand
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and sign == 1:
            if not is_unicode(value):
                raise self.error(node, "is not valid Unicode", "remove the lone surrogates")
            return value
        if isinstance(value, float) and math.isfinite(value):
            return sign * value
        if isinstance(value, int) and not isinstance(value, bool) and value < 2**63:
            return sign * value
        raise self.error(node, "is neither a text nor a number", f"write a constant, as in {EXAMPLE}")

    def known(self) -> str:
        return ", ".join(self.fields)

    def error(self, node: ast.expr, problem: str, fix: str) -> ValueError:
        part = ast.get_source_segment(self.text.strip(), node) or ast.unparse(node)
        return ValueError(f"where: {part!r} {problem}: {fix}")


def read_time(text: str) -> str:
    """Normalise an ISO 8601 time to the form in which times are saved and compared, "2026-01-31T08:15:00".

    A time with a zone is converted to UTC; one without a zone is kept.

    Raises:
        ValueError: if it is not an ISO 8601 date or time, or is outside the years 1 to 9999 in UTC.
    """
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"expected a time like 2026-01-31 or 2026-01-31T08:15:00, got {text!r}") from None
    if time.tzinfo is not None:
        try:
            time = time.astimezone(UTC).replace(tzinfo=None)
        except OverflowError:
            raise ValueError(f"expected a time in the years 1 to 9999 in UTC, got {text!r}") from None
    return time.isoformat()
