"""Rows of a CSV file with a header, as text."""

import csv
from collections.abc import Iterator
from pathlib import Path

from data_scripts.text_files import SAVE_AS_UTF8, UnreadableFile, name_bad_byte, name_other_kind, open_text


def read_csv_rows(path: str | Path, required: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the rows of a comma-separated file without empty lines and empty cells.

    Args:
        path: the file, in UTF-8.
        required: columns that the header must have; others are allowed.

    Raises:
        ValueError: if the header lacks a column or names one twice.
        UnreadableFile: at the first row that is not CSV in UTF-8.
    """
    row = 0

    def unreadable(problem: str, advice: str = "correct the row") -> UnreadableFile:
        return UnreadableFile(path, row, problem, "CSV", advice, "counting from 0, without the header")

    try:
        if other := name_other_kind(path):
            problem, advice = other
            if problem != "the file is empty":  # the check of the header reports what is missing
                raise unreadable(problem, advice)
        with open_text(path, newline="") as file:
            reader = csv.DictReader(file, restkey="", strict=True)
            reader.fieldnames = names = _check_header(path, list(reader.fieldnames or []), required)
            for values in reader:
                if "" in values:
                    count = len(names) + len(values[""])
                    raise unreadable(f"{count} cells, expected {len(names)}", "quote texts with commas")
                if problem := name_bad_byte("".join(value or "" for value in values.values())):
                    raise unreadable(problem, SAVE_AS_UTF8)
                yield {name: value.strip() for name, value in values.items() if value and value.strip()}
                row += 1
    except csv.Error as error:
        raise unreadable(str(error)) from None
    except OSError as error:
        raise unreadable(error.strerror or str(error), "check the file and its permissions") from None


def _check_header(path: str | Path, header: list[str], required: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in header]
    if problem := name_bad_byte("".join(names)):
        raise ValueError(f"{path}: the first line cannot be read: {problem}; {SAVE_AS_UTF8}")
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(
            f"{path}: the first line must name the columns {', '.join(required)}, separated by commas; "
            f"{', '.join(missing)} is missing, got {', '.join(names) or 'an empty file'}"
        )
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the first line names {', '.join(twice)} twice; expected each column once")
    return names
