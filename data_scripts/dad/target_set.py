"""Loading of the target dataset, with clear errors if it is not a prepared dataset of images with captions."""

from typing import Any, Literal, overload

from datasets import Dataset

from images_mra import read_picture
from mra.common.tables import load_split
from mra.retrieval.encode import undecoded


_COLUMNS = ("image", "captions", "image_id")


@overload
def load_target(name: str, split: Literal["train"] = "train") -> Dataset: ...


@overload
def load_target(name: str, split: str) -> Dataset | None: ...


def load_target(name: str, split: str = "train") -> Dataset | None:
    """Load a split of the target dataset.

    Args:
        name: folder or Hub id (`common.dataset`).
        split: `train` or `validation`.

    Returns:
        Rows with `image` (as stored), `captions` and `image_id`, or None if there is no validation split.

    Raises:
        ValueError: if there is no such dataset, it cannot be read, or it is of another kind.
    """
    rows = load_split(name, split, argument="common.dataset", optional=split != "train")
    if rows is None:
        return None
    missing = [column for column in _COLUMNS if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"common.dataset {name} has no column {', '.join(map(repr, missing))}, only {', '.join(rows.column_names)}: "
            "name a dataset of images with captions, as written by `mra prepare pedes`"
        )
    return undecoded(rows)


def read_target(rows: Dataset, row: int) -> dict[str, Any]:
    """Read one row, its image decoded to RGB.

    Raises:
        ValueError: if the image cannot be decoded; the message names the row.
    """
    try:
        item = rows[row]
        return item | {"image": read_picture(item["image"])}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"common.dataset: the image of row {row} (counting from 0) of the split cannot be read: {error}; prepare the "
            "dataset again without it"
        ) from None
