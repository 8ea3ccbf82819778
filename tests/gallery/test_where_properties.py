"""Any `where`: memory, milvus-lite and ten lines of Python choose the same records; any text is an answer or one line."""

import operator
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mra.gallery.milvus import EmbeddedStore
from mra.gallery.store import MemoryStore, Record
from mra.gallery.where import parse_where, read_time
from tests.helpers.properties import examples


FIELDS = {"key": "text", "camera": "text", "time": "time", "speed": "number", "place": "text"}
TESTS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TEXTS = [
    "a",
    "ab",
    "B",
    "é",
    "人",
    "😀",
    'the "gate"',
    "it's",
    "back\\slash",
    "a\nb",
    "tab\t",
    "\x01",
    "\x7f",
    "%",
    "a_b",
    "{x}",
]
NUMBERS = [
    -2,
    0,
    1,
    7,
    2**53 - 1,
    -0.5,
    2.5,
    1e-300,
    5e-324,
    1e16,
    2.0**53,
    2.0**62,
    2.0**63,
    -(2.0**63),
    1.7e308,
    0.1,
]
TIMES = ["0001-01-01T00:00:00", "2026-01-01T00:00:00", "2026-02-03T04:05:06.500000", "9999-12-31T23:59:59.999999"]


def make_records() -> list[Record]:
    """Records that lack some fields, with texts and numbers that are hard to write."""
    records = []
    for row in range(48):
        metadata = {}
        if row % 3:
            metadata["speed"] = NUMBERS[row % len(NUMBERS)]
        if row % 4:
            metadata["place"] = TEXTS[row * 5 % len(TEXTS)]
        camera, time = ["", *TEXTS][row % (1 + len(TEXTS))], ["", *TIMES][row % (1 + len(TIMES))]
        key = f"{TEXTS[row % len(TEXTS)]}{row}"
        embedding = np.eye(4, dtype=np.float32)[row % 4]
        records.append(Record(key, f"{row:064x}", "/x", "/", camera, time, metadata, embedding))
    return records


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    stores = MemoryStore(), EmbeddedStore(tmp_path_factory.mktemp("store") / "g.db", "people")
    for store in stores:
        store.create(4)
        store.upsert(make_records())
    yield stores
    stores[1].close()


texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
integers = st.integers(-(2**63) + 1, 2**63 - 1) | st.sampled_from([2**53, 2**53 + 1, 2**62 + 1, 2**63 - 1])
numbers = st.sampled_from(NUMBERS) | integers | st.floats(allow_nan=False, allow_infinity=False)
zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.none() | zones).map(datetime.isoformat)
times = st.sampled_from(TIMES) | moments
CONSTANTS = {"text": texts, "number": numbers, "time": times}


@st.composite
def comparisons(draw):
    """(text, test of a record) of a comparison in any of the ways to write one."""
    field = draw(st.sampled_from(list(FIELDS)))
    kind = FIELDS[field]

    def constant():
        value = draw(CONSTANTS[kind])
        return repr(value), read_time(value) if kind == "time" else value

    def test(symbol, value):
        return lambda record: None if (known := record.value(field)) is None else TESTS[symbol](known, value)

    (text, value), symbol = constant(), draw(st.sampled_from(list(TESTS)))
    way = draw(st.integers(0, 4))
    if way == 0:
        swapped = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(symbol, symbol)
        return f"{text} {symbol} {field}", test(swapped, value)
    if way == 1:
        (other, low) = constant()
        above, below = test("<=", value), test(">", low)
        return f"{other} < {field} <= {text}", lambda record: both(above(record), below(record))
    if way == 2:
        pairs = [(text, value), *(constant() for _ in range(draw(st.integers(0, 2))))]
        listed, values = ", ".join(text for text, _ in pairs), [value for _, value in pairs]
        word = draw(st.sampled_from(["in", "not in"]))
        equal = [test("==", value) for value in values]

        def among(record):
            answers = [one(record) for one in equal]
            return None if None in answers else any(answers) == (word == "in")

        return f"{field} {word} [{listed}]", among
    return f"{field} {symbol} {text}", test(symbol, value)


def both(left, right):
    """`and` of SQL."""
    return False if left is False or right is False else None if left is None or right is None else True


def negated(answer):
    """`not` of SQL."""
    return None if answer is None else not answer


def joined(parts):
    (left, first), word, (right, second) = parts
    if word == "and":
        return f"({left} and {right})", lambda record: both(first(record), second(record))
    return f"({left} or {right})", lambda record: negated(both(negated(first(record)), negated(second(record))))


conditions = st.recursive(
    comparisons(),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(joined)
        | inner.map(lambda part: (f"not ({part[0]})", lambda record: negated(part[1](record))))
    ),
    max_leaves=6,
)


@examples(150)
@given(condition=conditions)
def test_memory_and_milvus_choose_what_sql_means(stores, condition):
    text, matches = condition
    expected = sorted(record.key for record in make_records() if matches(record))
    try:
        where = parse_where(text, FIELDS)
    except ValueError as error:
        assert "characters long" in str(error) or "nested deeper" in str(error)
        return
    in_memory, in_milvus = (sorted(record.key for record in store.records(where)) for store in stores)
    assert in_memory == expected, text
    assert in_milvus == expected, (text, where.to_milvus())


words = st.sampled_from(
    [
        *FIELDS,
        "and",
        "or",
        "not",
        "in",
        "is",
        "==",
        "!=",
        "<",
        ">=",
        "=",
        "(",
        ")",
        "[",
        "]",
        ",",
        "-",
        "+",
        "~",
        ".",
        ":=",
        "lambda",
        ":",
        "*",
        "if",
        "else",
        "True",
        "None",
        "...",
        "1j",
        "b''",
        "f'{x}'",
        "0x" + "f" * 3900,
        "1e999",
        "5" * 500,
        '"c1"',
        "'a'",
        '"0001-01-01T00:00:00+14:00"',
        '"9999-12-31T23:59:59-12:00"',
        '"2026-13-01"',
        '"24:00"',
        "speed > 1",
        str(2**62),
        str(2**63),
        str(-(2**63)),
        "1_0",
        "#",
        "\\",
        "\n",
        "\r",
        "\t",
        "\x0c",
        "\x0b",
        "\0",
        "\ufeff",
        "\ud800",
        "'",
        "(" * 150,
        ")" * 150,
        "not " * 900,
        "-" * 900,
        "[" * 150,
        "key." * 700,
        "é",
        "ﬁeld",
        "\u2028",
        "\x1c",
        "\x85",
    ]
)
sentences = st.lists(words, max_size=12).flatmap(
    lambda parts: st.sampled_from([" ", ""]).map(lambda gap: gap.join(parts))
)


@examples(1500)
@given(text=sentences | st.text(max_size=40))
@example(text='time < "0001-01-01T00:00:00+14:00"')
@example(text='time < "9999-12-31T23:59:59-12:00"')
@example(text="key == " + "-" * 900 + "1")
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        where = parse_where(text, FIELDS)
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith("where") and len(str(error).splitlines()) == 1
        assert "cannot be read ()" not in str(error)
        return
    where.to_milvus()
    for record in make_records():
        assert where.matches(record.value) in (True, False)


@examples(300)
@given(text=st.datetimes(timezones=st.none() | zones).map(datetime.isoformat) | st.text(max_size=30))
def test_any_time_is_read_or_refused(text):
    try:
        time = read_time(text)
    except ValueError as error:
        assert "expected a time" in str(error)
        return
    assert read_time(time) == time and len(time) in (19, 26)
