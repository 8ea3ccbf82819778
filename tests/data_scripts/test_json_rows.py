import json

import pytest

from data_scripts import json_rows
from data_scripts.json_rows import UnreadableJson, json_files, read_rows


ROWS = [{"a": 1, "text": 'with ] and , and "{" and 人'}, {"b": [1, 2, {"c": None}]}, 7, "word", {}]


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


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(UnreadableJson, match="not UTF-8"):
        list(read_rows(path))


def test_the_row_of_a_bad_byte_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "b"}, {"a": "caf\xe9"}, {}]')
    with pytest.raises(UnreadableJson, match=r"row 1 .*byte 0xe9.*save the file as UTF-8"):
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


def test_only_a_window_of_a_large_file_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_BLOCK", 1000)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"row": row, "text": "x" * 50} for row in range(2000)]))
    windows = []
    more = json_rows._Text.more
    monkeypatch.setattr(json_rows._Text, "more", lambda self: (more(self), windows.append(len(self.window)))[0])
    assert [row["row"] for row in read_rows(path)] == list(range(2000))
    assert max(windows) < 3000


def test_files_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("sda_10000_15000.json", "sda_0_5000.json", "sda_5000_10000.json", "notes.txt"):
        (tmp_path / name).write_text("[]")
    names = [path.name for path in json_files(tmp_path)]
    assert names == ["sda_0_5000.json", "sda_5000_10000.json", "sda_10000_15000.json"]


def test_a_path_without_files_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--annotations .*nowhere does not exist"):
        json_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.json file"):
        json_files(tmp_path)
