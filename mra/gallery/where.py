"""The `where` of a search: one small language with one meaning, as a test of a record and as a filter of Milvus.

The text is read by Python's `ast` and never evaluated. `not` is pushed down to the comparisons while reading, so that a
comparison with a value that a record does not have is false whichever way it is put, as in SQL.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime


MAX_LENGTH = 4000
MAX_DEPTH = 50

# Fields of every record; further ones come with its metadata.
RECORD_FIELDS = {"key": "text", "camera": "text", "time": "time"}

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

# What ends or continues a literal in the grammars of Milvus and milvus-lite; both take every other character as it is.
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"})


def quote(text: str) -> str:
    """Return a text as a literal of Milvus, with its control characters as they are: milvus-lite cannot read those of JSON."""
    return f'"{text.translate(_ESCAPES)}"'


@dataclass(frozen=True)
class Comparison:
    """A field against a constant."""

    field: str
    operator: str
    value: Value

    def matches(self, values: Callable[[str], Value | None]) -> bool:
        """Return whether the record matches; `values` reads its fields and gives None for a value it does not have."""
        value = values(self.field)
        return value is not None and _TESTS[self.operator](value, self.value)

    def to_milvus(self) -> str:
        """Return the same as a filter of Milvus, where the record's own fields hold "" for what is unknown."""
        constant = quote(self.value) if isinstance(self.value, str) else repr(self.value)
        if self.field in RECORD_FIELDS:
            return f'({self.field} != "" and {self.field} {self.operator} {constant})'
        path = f"metadata[{quote(self.field)}]"
        # A server reads `exists a and b` as `exists (a and b)`; milvus-lite does not.
        return f"((exists {path}) and {path} {self.operator} {constant})"


@dataclass(frozen=True)
class Combination:
    """Parts of which all must hold, or any."""

    word: str  # "and" or "or"
    parts: tuple["Comparison | Combination", ...]

    def matches(self, values: Callable[[str], Value | None]) -> bool:
        """Return whether the record matches."""
        combine = all if self.word == "and" else any
        return combine(part.matches(values) for part in self.parts)

    def to_milvus(self) -> str:
        """Return the same as a filter of Milvus."""
        return "(" + f" {self.word} ".join(part.to_milvus() for part in self.parts) + ")"


Where = Comparison | Combination


def parse_where(text: str, fields: Mapping[str, str]) -> Where:
    """Read a `where`.

    Args:
        text: comparisons of fields with constants, joined by `and`, `or`, `not` and parentheses.
        fields: name and kind of every field that may be asked for: "text", "number" or "time".

    Raises:
        ValueError: if it cannot be read, a field is unknown, or a constant is not of the field's kind.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"where is {len(text)} characters long: expected at most {MAX_LENGTH}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = f"{error.msg} at character {error.offset}" if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"where {text!r} cannot be read ({reason}): expected something like {EXAMPLE}") from None
    return _ConditionReader(text, fields).read(tree, negated=False)


class _ConditionReader:
    def __init__(self, text: str, fields: Mapping[str, str]) -> None:
        self.text, self.fields = text, fields

    def read(self, node: ast.expr, negated: bool, depth: int = 0) -> Where:
        if depth > MAX_DEPTH:
            raise self.error(node, f"is nested deeper than {MAX_DEPTH} levels", "write it with fewer parentheses")
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
                raise self.error(right, "cannot be searched", 'write camera in ["c1", "c2"]')
            inside = isinstance(link, ast.In) != negated
            symbol, word = ("==", "or") if inside else ("!=", "and")
            return Combination(word, tuple(self.comparison(left, symbol, item) for item in right.elts))
        if type(link) not in _OPERATORS:
            raise self.error(left, "is compared by something unknown", f"expected {' '.join(_OPPOSITES)} or in")
        symbol = _OPERATORS[type(link)]
        if not isinstance(left, ast.Name):
            left, right, symbol = right, left, _SWAPPED[symbol]
        return self.comparison(left, _OPPOSITES[symbol] if negated else symbol, right)

    def comparison(self, field: ast.expr, symbol: str, constant: ast.expr) -> Comparison:
        if not isinstance(field, ast.Name):
            raise self.error(field, "is not a field", f"one side of a comparison must be one of {self.known()}")
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
            if not value.isprintable() and any(0xD800 <= ord(character) < 0xE000 for character in value):
                raise self.error(node, "is not valid Unicode", "remove the lone surrogates")
            return value
        if isinstance(value, float) and math.isfinite(value):
            return sign * value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return sign * value
        raise self.error(node, "is neither a text nor a number", f"expected a constant, as in {EXAMPLE}")

    def known(self) -> str:
        return ", ".join(self.fields)

    def error(self, node: ast.expr, problem: str, mend: str) -> ValueError:
        part = ast.get_source_segment(self.text.strip(), node) or ast.unparse(node)
        return ValueError(f"where: {part!r} {problem}: {mend}")


def read_time(text: str) -> str:
    """Bring an ISO 8601 time into the one form in which times are kept and compared, "2026-01-31T08:15:00".

    A time with a zone is turned to UTC, one without is taken as it is.

    Raises:
        ValueError: if it is not an ISO 8601 date or time, or leaves the years 1 to 9999 in UTC.
    """
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"expected a time like 2026-01-31 or 2026-01-31T08:15:00, got {text!r}") from None
    if time.tzinfo is not None:
        try:
            time = time.astimezone(UTC).replace(tzinfo=None)
        except OverflowError:
            raise ValueError(f"expected a time that lies in the years 1 to 9999 in UTC, got {text!r}") from None
    return time.isoformat()
