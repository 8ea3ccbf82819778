"""data_scripts/json_rows.py: the rows that `json` reads, whatever the blocks, and errors that name the row."""

import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scripts import json_rows
from data_scripts.json_rows import UnreadableJson, json_files, read_rows
from data_scripts.row_checks import RowError
from tests.helpers.properties import examples


ROWS = [
    {"a": 1, "text": 'with ] and , and "{" and 人'},
    {"b": [1, 2, {"c": None}]},
    71,
    "word",
    {},
    -1.5e300,
    1e-07,
    3,
]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=2, ensure_ascii=False), "[]", " [ ] "])
def test_lists_are_read_whatever_the_block(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(json_rows, "_BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert list(read_rows(path)) == json.loads(text)


def test_lines_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps({"row": row}) for row in range(3)) + "\n", encoding="utf-8")
    assert list(read_rows(path)) == [{"row": row} for row in range(3)]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('[{"a": 1}, {"b": ', 1),
        ('[{"a": 1}', 1),
        ('[{"a": 1}, ', 1),
        ("[{}] {}", 1),
        ("[{}]}", 1),
        ("[]x", 0),
        ("[", 0),
        ("[,{}]", 0),
        ("[{},]", 1),
        ('{"a": 1}\n{"b": }', 1),
        ("{}\n]", 1),
        ('[{"a": 1} {"b": 2}]', 1),
        ("[{a}]", 0),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, text, row):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UnreadableJson, match=rf"a\.json: row {row} \(counting from 0\) cannot be read") as caught:
        list(read_rows(path))
    assert caught.value.row == row


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("content", "row"), [(b'{"a": "caf\xe9"}, {}]', 1), (b'{"a": caf\xe9}, {}]', 1), (b'{}, {"a": "caf\xe9', 2)]
)
def test_the_row_of_a_bad_byte_is_named(tmp_path, monkeypatch, content, row, block):
    monkeypatch.setattr(json_rows, "_BLOCK", block)
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "b"}, ' + content)
    with pytest.raises(UnreadableJson, match=rf"row {row} .*byte 0xe9.*save the file as UTF-8"):
        list(read_rows(path))


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path, problem in ((tmp_path / "none.json", os.strerror(2)), (tmp_path, os.strerror(21))):
        with pytest.raises(UnreadableJson, match=f"row 0 .*{problem}.*check the file and its permissions"):
            list(read_rows(path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        ("[]".encode("utf-16"), "UTF-16"),
        ("[{}]".encode("utf-16-le"), "UTF-16"),
        (b"<html></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'[{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, content, problem):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UnreadableJson, match=f"row 0 .*{problem}"):
        list(read_rows(path))


def test_numbers_that_python_refuses_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"a": {"9" * 5000}, "b": 1e400, "c": NaN, "d": {"9" * 30}}}]')
    (row,) = read_rows(path)
    assert (row["a"], row["b"], row["d"]) == (float("inf"), float("inf"), int("9" * 30)) and row["c"] != row["c"]


def test_integers_of_a_thousand_digits_or_more_are_floats(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f"[{'1' * 999}, -{'1' * 998}, {'1' * 1000}]")
    assert list(read_rows(path)) == [int("1" * 999), -int("1" * 998), float("inf")]


@pytest.fixture
def windows(monkeypatch):
    """The length of the window after each block that is read."""
    lengths = []
    more = json_rows._Text.more
    monkeypatch.setattr(json_rows._Text, "more", lambda self: (more(self), lengths.append(len(self.window)))[0])
    return lengths


def test_only_a_window_of_a_large_file_is_held(tmp_path, windows):
    rows = [{"row": row, "text": "x" * 50_000} for row in range(100)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    assert list(read_rows(path)) == rows
    assert max(windows) < path.stat().st_size / 2


@pytest.mark.parametrize("cut", ['"', '"x', "[" * 100_000], ids=["text", "cut text", "nested"])
def test_the_search_for_the_end_of_a_row_is_limited(tmp_path, monkeypatch, windows, cut):
    monkeypatch.setattr(json_rows, "_BLOCK", 10_000)
    monkeypatch.setattr(json_rows, "_LARGEST_ROW", 120_000)
    rows = [{"row": row, "text": "x" * 7000} for row in range(40)]
    path = tmp_path / "a.json"
    text = json.dumps(rows)
    path.write_text(text)
    assert list(read_rows(path)) == rows  # the limit is that of a row, not of the file
    path.write_text(f"{text[:-1]}, [{cut}" + "y" * 400_000)
    with pytest.raises(UnreadableJson, match=r"row 40 "):
        list(read_rows(path))
    assert max(windows) < 120_000 + 2 * 10_000


class ReadOn(Exception):
    """The file was asked for more."""


class Unread(io.StringIO):
    """A file that must not be read any further."""

    def read(self, size: int | None = -1) -> str:
        raise ReadOn


@pytest.mark.parametrize(
    ("read", "first", "limit", "start"),
    [
        (json_rows._decode, '"', 1 << 26, 0),
        (json_rows._decode, '"', 100, 70),
        (json_rows._skip_nested, "[", 100, 70),
    ],
)
def test_the_end_of_a_row_is_looked_for_up_to_the_limit(monkeypatch, read, first, limit, start):
    if limit == 100:
        monkeypatch.setattr(json_rows, "_LARGEST_ROW", limit)
    text = json_rows._Text(Unread())
    for length, error in ((limit, ReadOn), (limit + 1, json.JSONDecodeError)):
        text.window, text.start = ", " * (start // 2) + first.ljust(length, "x"), start
        with pytest.raises(error):
            read(text)


DEEP = 100_000
NESTED = [
    "[" * DEEP + "]" * DEEP,
    '{"a": ' * DEEP + "1" + "}" * DEEP,
    '[{"a[": ' * DEEP + '"}]' + r"\"]" + '"' + "}]" * DEEP,
    "[" * DEEP + '"' + "]" * (3 * DEEP) + '"' + "]" * DEEP,
]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("nested", NESTED, ids=["lists", "objects", "both", "long text"])
def test_a_row_that_is_nested_too_deeply_stands_alone(tmp_path, monkeypatch, nested, blocks):
    monkeypatch.setattr(json_rows, "_BLOCK", 1 + len(nested) // blocks)
    path = tmp_path / "a.json"
    path.write_text(f'[{{"a": 1}}, {nested}, {{"a": "]"}}]')
    first, error, last = read_rows(path)
    assert (first, last) == ({"a": 1}, {"a": "]"})
    assert isinstance(error, RowError) and "nested too deeply" in error.problem


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab]}"\\', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@examples(50)
@given(
    rows=st.lists(json_values, max_size=5),
    block=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
    is_ascii=st.booleans(),
)
def test_any_rows_are_read_as_python_reads_them(tmp_path_factory, rows, block, indent, is_ascii):
    path = tmp_path_factory.getbasetemp() / "any.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_BLOCK", block)
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
        assert list(read_rows(path)) == rows
        objects = [{"row": row} for row in rows]
        if objects:
            path.write_text("\n".join(json.dumps(row, ensure_ascii=is_ascii) for row in objects), encoding="utf-8")
            assert list(read_rows(path)) == objects


def test_files_come_in_the_order_of_their_numbers(tmp_path):
    names = ["sda_0_5000.json", "sda_5000_9000.JSON", "sda_5000_10000.jsonl", "sda_10000_15000.json"]
    for name in (*reversed(names), "notes.txt", ".hidden.json", "jsonl"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "folder.json").mkdir()
    assert [path.name for path in json_files(tmp_path)] == names
    assert json_files(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_a_broken_link_is_not_left_out_silently(tmp_path):
    (tmp_path / "a.json").symlink_to(tmp_path / "gone.json")
    assert json_files(tmp_path) == [tmp_path / "a.json"]


def test_a_path_without_files_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--annotations .*nowhere does not exist"):
        json_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.json file"):
        json_files(tmp_path)
