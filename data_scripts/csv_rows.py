"""Rows of a CSV file with a header, as texts."""

import csv
from collections.abc import Iterator
from pathlib import Path


def read_csv_rows(path: str | Path, required: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """
    Yields the rows of a comma-separated file, empty lines left out, each without its empty cells.

    Args:
        path: of the file, in UTF-8.
        required: columns that the header must name; it may name others.

    Raises:
        ValueError: if the header lacks a column, or the file stops being CSV in UTF-8.
    """
    row = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", strict=True)
            names = [name.strip() for name in reader.fieldnames or []]
            missing = [name for name in required if name not in names]
            if missing:
                raise ValueError(
                    f"{path}: the first line must name the columns {', '.join(required)}, separated by commas; "
                    f"{', '.join(missing)} is missing, got {', '.join(names) or 'an empty file'}."
                )
            reader.fieldnames = names
            for values in reader:
                if "" in values:
                    raise csv.Error(
                        f"{len(names) + len(values[''])} cells, expected {len(names)}: quote texts with commas"
                    )
                yield {name: value.strip() for name, value in values.items() if value and value.strip()}
                row += 1
    except csv.Error as error:
        raise ValueError(f"{path}: row {row} (counting from 0, without the header) cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: after row {row} (counting from 0) it is not UTF-8 ({error.reason}): save it as UTF-8"
        ) from None
