"""Any CSV file of metadata: read as `csv.writer` wrote it, or a ValueError that names file and line."""

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mra.gallery.metadata import read_metadata
from mra.gallery.sources import Item, Source
from tests.helpers.properties import examples


KEYS = ["a.jpg", "b/c.jpg", 'quote".jpg', "comma,.jpg", "line\nend.jpg", "人.jpg"]
HEADERS = ["path", "camera", "time", "place", "speed", "", "a b", "path ", "place", "é", "None", "metadata"]
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
cells = (
    st.sampled_from(
        ["", " ", *KEYS, "c1", "2026-01-31", "7", "-2.50", "1e999", "9" * 400, "9" * 5000, "0001-01-01T00:00+14:00"]
    )
    | st.sampled_from(["x" * 140_000, "\0", "a\0b", '"', "'", "\r", "\n", ",", "nan", "inf", "\ufeff", "\u2028"])
    | text
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("metadata") / "m.csv"


def source() -> Source:
    return Source("images", None, [Item(key, None, bytes) for key in KEYS])


def read(path, content: bytes):
    """Labels, or None where the file is refused with a sentence that names it."""
    path.write_bytes(content)
    try:
        return read_metadata(path, source(), {})
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error) and len(str(error).splitlines()) == 1, str(error)
        return None


def written(rows) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


good_columns = st.lists(st.sampled_from(["camera", "place", "floor"]), unique=True)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(str.strip)


@examples(150)
@given(
    columns=good_columns,
    values=st.lists(st.lists(words, min_size=3, max_size=3), min_size=1, max_size=6),
    bom=st.booleans(),
)
def test_good_tables_are_read_as_they_were_written(place, columns, values, bom):
    rows = [[key, *row[: len(columns)]] for key, row in zip(KEYS, values, strict=False)]
    labels = read(place, b"\xef\xbb\xbf" * bom + written([["path", *columns], *rows]))
    assert labels is not None and labels.unmatched == []
    for key, *row in rows:
        label = {name: value for name, value in zip(columns, row, strict=True) if value}
        assert labels.of_key[key]["camera"] == label.pop("camera", "")
        got = labels.of_key[key]["metadata"]
        assert got.keys() == label.keys()
        assert all(
            float(label[name]) == got[name] if labels.kinds[name] == "number" else label[name] == got[name]
            for name in got
        )


@examples(300)
@given(
    table=st.lists(st.sampled_from(HEADERS), max_size=5).flatmap(
        lambda header: st.lists(st.lists(cells, min_size=len(header), max_size=len(header) + 1), max_size=4).map(
            lambda rows: [header, *rows]
        )
    )
)
@example(table=[["path", ""], ["a.jpg", ""]])
@example(table=[["path", "place", "place"], ["a.jpg", "x", "y"]])
@example(table=[["path", "speed"], ["a.jpg", "9" * 5000]])
def test_any_table_is_read_or_refused(place, table):
    labels = read(place, written(table))
    if labels is not None:
        named = [name for name in table[0] if name]
        assert len(named) == len(set(named))


@examples(400)
@given(
    content=st.binary(max_size=60)
    | st.binary(max_size=40).map(lambda rest: b"path,place\na.jpg," + rest)
    | st.tuples(st.sampled_from(["utf-16", "latin-1", "cp1252"]), st.just("path,place\na.jpg,é\n")).map(
        lambda c: c[1].encode(c[0])
    )
)
@example(content=b"path,place\na.jpg," + b'"' + b"x" * 200_000 + b'"\n')
@example(content=b"path,place\na.jpg,\xff\n")
def test_any_bytes_are_read_or_refused(place, content):
    read(place, content)


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, 10**5000, b"", [], {}])
)


@examples(300)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["path", "camera", "time", "speed", "place", ""]), values, max_size=4).map(
            lambda row: {"path": "a.jpg", **row}
        ),
        max_size=3,
    )
)
@example(rows=[{"path": "a.jpg", "speed": 10**5000}])
@example(rows=[{"path": "a.jpg", "speed": "x"}, {"path": "b/c.jpg", "speed": 10**5000}])
@example(rows=[{"path": "a.jpg", "place": "\ud800"}])
def test_any_rows_are_read_or_refused(rows):
    try:
        read_metadata(rows, source(), {})
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith("metadata"), str(error)
        assert "integer string conversion" not in str(error) and "codec" not in str(error)
