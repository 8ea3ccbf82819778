"""Rows of an annotation file, read one by one with constant memory.

ijson 3.6 is not used because it refuses NaN, 1e400, long integers, a byte order mark and JSON lines, and silently replaces a
lone surrogate by a question mark.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from data_scripts.row_checks import RowError
from data_scripts.text_files import SAVE_AS_UTF8, UnreadableFile, name_bad_byte, name_other_kind, open_text


_BLOCK = 1 << 20  # characters
_LARGEST_ROW = 1 << 26
_MOST_DIGITS = 1000  # Python refuses to parse integers of several thousand digits
_SHORTEST_EXPONENT = len("e+1")  # a number is read without the beginning of one
_SPACE = re.compile(r"[ \t\r\n]*")
_TEXT_OR_BRACKET = re.compile(
    r'"(?:[^"\\]|\\.)*"|["[\]{}]', re.DOTALL
)  # a lone quotation mark is of a text that was cut


class UnreadableJson(UnreadableFile):
    """File that is not valid JSON from some row.

    Args:
        path: the file.
        row: number of the first row that cannot be read, from 0.
        problem: what is wrong there.
        advice: what to do about it.
    """

    reason = "unreadable JSON"

    def __init__(
        self, path: str | Path, row: int, problem: str, advice: str = "download or unpack the file again"
    ) -> None:
        super().__init__(path, row, problem, "a JSON list of objects", advice)


class _Text:
    """Text of a file, with only a window in memory."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.window = ""
        self.start = 0
        self.is_utf8 = True

    def more(self) -> bool:
        block = self.file.read(_BLOCK)
        self.is_utf8 = self.is_utf8 and name_bad_byte(block) is None
        self.window = self.window[self.start :] + block
        self.start = 0
        return bool(block)

    def next_character(self) -> str:
        while True:
            self.start = cast(re.Match, _SPACE.match(self.window, self.start)).end()  # it also matches the empty text
            if self.start < len(self.window):
                return self.window[self.start]
            if not self.more():
                return ""


def read_rows(path: str | Path) -> Iterator[Any]:
    """Yield the elements of a JSON list, or of a file with one JSON object a line.

    Integers of a thousand digits or more are returned as floats, which may be infinite. A [`RowError`] stands for an element
    that is nested too deeply.

    Raises:
        UnreadableJson: at the first row that is not JSON in UTF-8.
    """
    row = 0
    try:
        if other := name_other_kind(path):
            raise UnreadableJson(path, row, *other)
        with open_text(path) as file:
            text = _Text(file)
            in_list = text.next_character() == "["
            text.start += in_list
            while _row_follows(text, in_list, row):
                value, source = _decode(text)
                if not text.is_utf8 and (problem := name_bad_byte(source)):
                    raise UnreadableJson(path, row, problem, SAVE_AS_UTF8)
                yield value
                row += 1
    except json.JSONDecodeError as error:
        if problem := name_bad_byte(error.doc[error.pos :]):
            raise UnreadableJson(path, row, problem, SAVE_AS_UTF8) from None
        raise UnreadableJson(path, row, error.msg) from None
    except OSError as error:
        raise UnreadableJson(path, row, error.strerror or str(error), "check the file and its permissions") from None


def _row_follows(text: _Text, in_list: bool, row: int) -> bool:
    character = text.next_character()
    if not in_list:
        return bool(character)
    if character == "]":
        text.start += 1
        if text.next_character():
            raise json.JSONDecodeError("there is text after the end of the list", text.window, text.start)
        return False
    if row:
        if character != ",":
            raise json.JSONDecodeError("',' or ']' is missing, the file may be cut off", text.window, text.start)
        text.start += 1
        character = text.next_character()
    if not character:
        raise json.JSONDecodeError("the list has no end, the file may be cut off", text.window, text.start)
    return True


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def _decode(text: _Text) -> tuple[Any, str]:
    """Return the next value and its source text."""
    while True:
        try:
            value, end = _DECODER.raw_decode(text.window, text.start)
            source = text.window[text.start : end]
            if len(text.window) - end < _SHORTEST_EXPONENT and text.more():
                continue  # a number may continue after the window
            text.start += len(source)
            return value, source
        except json.JSONDecodeError:  # it may continue after the window
            if len(text.window) - text.start > _LARGEST_ROW or not text.more():
                raise
        except RecursionError:
            source = _skip_nested(text)
            problem = "expected an object, got one that is nested too deeply to be read"
            return RowError("(all)", "wrong type", problem), source


def _skip_nested(text: _Text) -> str:
    """Go to the end of a list or object by its brackets alone; return its source text."""
    while True:
        depth = 0
        for match in _TEXT_OR_BRACKET.finditer(text.window, text.start):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if match[0] == '"':
                break
            if depth == 0:
                source, text.start = text.window[text.start : match.end()], match.end()
                return source
        if len(text.window) - text.start > _LARGEST_ROW or not text.more():
            raise json.JSONDecodeError("it is nested too deeply, and has no end", text.window, text.start)


def is_json_name(path: Path) -> bool:
    """Return whether a file name is that of a JSON file; hidden files are not."""
    return path.suffix.lower() in (".json", ".jsonl") and not path.name.startswith(".")


def json_files(path: str | Path, argument: str = "--annotations") -> list[Path]:
    """List the JSON files of a path, sorted by name with numbers in numeric order.

    Args:
        path: a file, or a folder that directly contains `*.json` or `*.jsonl` files.
        argument: name of the path's argument, for messages.

    Raises:
        ValueError: if there is no such file, or no JSON file in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{argument} {path} does not exist; expected a JSON file, or a folder that holds them")
    files = [file for file in path.iterdir() if is_json_name(file) and not file.is_dir()]  # includes broken links
    if not files:
        raise ValueError(f"{argument} {path} holds no .json file; expected a JSON file, or a folder that holds them")
    return sorted(files, key=_numbers_by_value)


def _numbers_by_value(path: Path) -> list:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]
