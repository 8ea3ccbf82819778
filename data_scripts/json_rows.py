"""Rows of an annotation file, read one by one so that memory does not grow with the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


_BLOCK = 1 << 20  # characters
_LARGEST_ROW = 1 << 26
_SPACE = re.compile(r"[ \t\r\n]*")


class UnreadableJson(ValueError):
    """
    A file that stops being JSON at some row.

    Args:
        path: of the file.
        row: number of the first row that cannot be read, from 0.
        problem: what is wrong there.
    """

    def __init__(self, path: str | Path, row: int, problem: str):
        super().__init__(
            f"{path}: row {row} (counting from 0) cannot be read: {problem}; expected a JSON list of objects. "
            "Download or unpack the file again."
        )
        self.row = row


class _Text:
    """A file's text, of which only a window is in memory."""

    def __init__(self, file):
        self.file = file
        self.window = ""
        self.start = 0
        self.ended = False

    def more(self) -> bool:
        block = self.file.read(_BLOCK)
        self.ended = not block
        self.window = self.window[self.start :] + block
        self.start = 0
        return not self.ended

    def next_character(self) -> str:
        while True:
            self.start = _SPACE.match(self.window, self.start).end()
            if self.start < len(self.window):
                return self.window[self.start]
            if not self.more():
                return ""


def read_rows(path: str | Path) -> Iterator[Any]:
    """
    Yields the elements of a JSON list, or of a file with one JSON object a line.

    Raises:
        UnreadableJson: where the file stops being JSON.
    """
    row = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = _Text(file)
            in_list = text.next_character() == "["
            text.start += in_list
            while _row_follows(text, in_list, row):
                yield _decode(text)
                row += 1
    except json.JSONDecodeError as error:
        raise UnreadableJson(path, row, error.msg) from None
    except UnicodeDecodeError as error:
        raise UnreadableJson(path, row, f"it is not UTF-8 ({error.reason})") from None


def _row_follows(text: _Text, in_list: bool, row: int) -> bool:
    character = text.next_character()
    if not in_list:
        return bool(character)
    if character == "]":
        text.start += 1
        if text.next_character():
            raise json.JSONDecodeError("something follows the end of the list", text.window, text.start)
        return False
    if row:
        if character != ",":
            raise json.JSONDecodeError("',' or ']' is missing, the file may be cut off", text.window, text.start)
        text.start += 1
        character = text.next_character()
    if not character:
        raise json.JSONDecodeError("the list has no end, the file may be cut off", text.window, text.start)
    return True


def _decode(text: _Text) -> Any:
    decoder = json.JSONDecoder()
    while True:
        try:
            value, text.start = decoder.raw_decode(text.window, text.start)
            return value
        except json.JSONDecodeError:  # perhaps it goes on behind the window
            if len(text.window) - text.start > _LARGEST_ROW or not text.more():
                raise


def json_files(path: str | Path, argument: str = "--annotations") -> list[Path]:
    """
    Lists the JSON files that a path names, numbers in their names in order of value.

    Args:
        path: a file, or a folder with `*.json` or `*.jsonl` files right in it.
        argument: what the error message calls the path.

    Raises:
        ValueError: if there is no such file, or no JSON file in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{argument} {path} does not exist; expected a JSON file, or a folder that holds them.")
    files = [file for file in path.iterdir() if file.suffix.lower() in (".json", ".jsonl") and file.is_file()]
    if not files:
        raise ValueError(f"{argument} {path} holds no .json file; expected a JSON file, or a folder that holds them.")
    return sorted(files, key=_numbers_by_value)


def _numbers_by_value(path: Path) -> list:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]
