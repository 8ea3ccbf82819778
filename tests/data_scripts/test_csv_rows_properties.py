"""Any CSV file of captions: read as `csv.writer` wrote it, or a ValueError that names file and row."""

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_scripts.csv_rows import read_csv_rows
from tests.helpers.properties import examples


REQUIRED = ("path", "caption")
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
cells = texts | st.sampled_from(["x" * 140_000, "\0", '"', "\r", "\n", ",", "\ufeff", "\x1a", "é" * 100, ""])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "m.csv"


def read(path, content: bytes) -> list[dict[str, str]] | None:
    """Rows, or None where the file is refused with one sentence that names it."""
    path.write_bytes(content)
    try:
        return list(read_csv_rows(path, REQUIRED))
    except ValueError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1, str(error)
        assert any(word in str(error) for word in ("row ", "first line")), str(error)
        return None


def written(rows) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


@examples(200)
@given(
    columns=st.permutations(["path", "caption", "note", ""]),
    rows=st.lists(st.lists(texts, min_size=4, max_size=4), max_size=6),
    bom=st.booleans(),
)
@example(
    columns=["path", "caption", "note", ""], rows=[["a.jpg", "a man", "x", ""], ["b.jpg", "a man", "", "y"]], bom=False
)
def test_tables_are_read_as_they_were_written(place, columns, rows, bom):
    expected = [
        {name: cell.strip() for name, cell in zip(columns, row, strict=True) if name and cell.strip()} for row in rows
    ]
    assert read(place, b"\xef\xbb\xbf" * bom + written([columns, *rows])) == expected


@examples(300)
@given(table=st.lists(st.lists(cells | st.sampled_from(REQUIRED), max_size=4), max_size=4))
@example(table=[["path", "caption", ""], ["a", "b", "", ""]])
@example(table=[["path", "caption", "caption"], ["a", "b", "c"]])
def test_any_table_is_read_or_refused(place, table):
    read(place, written(table))


@examples(300)
@given(content=st.binary(max_size=60) | st.binary(max_size=40).map(lambda rest: b"path,caption\na.jpg," + rest))
@example(content=b"path,caption\na.jpg," + b'"' + b"x" * 200_000 + b'"\n')
@example(content=b"path,caption\na.jpg,\xff\n")
def test_any_bytes_are_read_or_refused(place, content):
    read(place, content)
