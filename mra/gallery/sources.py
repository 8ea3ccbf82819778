"""Images to index: folders, lists of files and data sets."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from PIL import Image

from mra.gallery.where import RECORD_FIELDS


if TYPE_CHECKING:
    import datasets


# What `Gallery.build` indexes: a folder or data set by name, files, or a data set. A text, so that datasets is not imported.
ImageSource: TypeAlias = "str | Path | Sequence[str | Path] | datasets.Dataset"


# Formats that Pillow opens but nobody means by "an image in a folder".
NOT_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".fits", ".fit"}

MAX_KEY_BYTES = 1024

# Names that mean something else in a record or a `where`.
RESERVED = {"path", "image", "captions", "embedding", "content", "source", "metadata", *RECORD_FIELDS}

Value = str | int | float


@dataclass(frozen=True)
class Item:
    """One image to index.

    Attributes:
        key: its name in the gallery.
        path: absolute path of its file, or None where it has none.
        read: gives the bytes of the image file.
        columns: what its data set says of it.
    """

    key: str
    path: Path | None
    read: Callable[[], bytes]
    columns: dict[str, Value] = field(default_factory=dict)


@dataclass
class Source:
    """Images to index.

    Attributes:
        name: the folder, or what a data set is called; a key of the gallery belongs to one source.
        root: the folder that holds the files, or None.
        items: sorted by key, or in the order of the data set.
        refused: key and reason of what cannot be indexed whatever its content.
    """

    name: str
    root: Path | None
    items: list[Item]
    refused: list[tuple[str, str]] = field(default_factory=list)


def open_source(
    images: ImageSource, prefix: str = "", split: str | None = None, gallery_folder: Path | None = None
) -> Source:
    """Find the images of a folder, a list of files, or a data set.

    Args:
        images: as `Gallery.build` takes it.
        prefix: put before each key.
        split: of a data set that `load_dataset` is to read; None where it has one only.
        gallery_folder: left out where it lies in the folder of images.

    Raises:
        ValueError: if there are none, or this is not a folder, a list of files or a data set.
    """
    if isinstance(images, str | Path):
        folder = Path(images)
        if folder.is_file():
            raise ValueError(f"images {images} is a file: expected a folder, a list of files or a data set")
        source = _folder(folder, prefix, gallery_folder) if folder.is_dir() else None
        if source is None or not (source.items or source.refused):
            from mra.common.tables import load_split

            dataset = load_split(str(images), split, argument="images", expected="images or a data set of them")
            source = _dataset(dataset, str(images), prefix or f"{split}/" if split else prefix)
    elif hasattr(images, "features") and hasattr(images, "select_columns"):
        dataset = cast("datasets.Dataset", images)
        source = _dataset(dataset, f"data set {dataset.info.dataset_name or ''} {dataset.split or ''}".strip(), prefix)
    elif isinstance(images, Sequence):
        source = _files(images, prefix)
    else:
        raise ValueError(
            f"images must be a folder, a list of files or a datasets.Dataset, got {type(images).__name__}"
        )
    if not source.items and not source.refused:
        raise ValueError(f"images {source.name} has no images: expected at least one")
    return source


def content_hash(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of an image file, which decides whether an image is new, changed or as it was."""
    return hashlib.sha256(data).hexdigest()


def _folder(folder: Path, prefix: str, gallery_folder: Path | None) -> Source:
    root = folder.resolve()
    excluded = gallery_folder.resolve() if gallery_folder else None
    known = set(Image.registered_extensions()) - NOT_PICTURES
    items, refused = [], []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != excluded]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or path.suffix.lower() not in known:
                continue
            key = prefix + path.relative_to(root).as_posix()
            problem = _key_problem(key)
            if problem is None and not path.resolve().is_relative_to(root):
                problem = "it is a link to a place outside the folder"
            if problem:
                refused.append((_printable(key), problem))
            else:
                items.append(Item(key, path, path.read_bytes))
    return Source(
        f"{root} as {prefix}" if prefix else str(root), root, sorted(items, key=lambda item: item.key), sorted(refused)
    )


def _files(paths: Sequence, prefix: str) -> Source:
    if not all(isinstance(path, str | Path) for path in paths):
        raise ValueError("images as a list must be paths; put PIL images into a datasets.Dataset with a column image")
    if not paths:
        raise ValueError("images is an empty list: expected at least one path")
    items, refused = {}, []
    for given in paths:
        path = Path(os.path.abspath(given))
        key = prefix + Path(given).as_posix()
        if problem := _key_problem(key):
            refused.append((_printable(key), problem))
        else:
            items[key] = Item(key, path, path.read_bytes)
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths]))
    return Source(f"files under {root}", root, sorted(items.values(), key=lambda item: item.key), refused)


def _dataset(dataset: "datasets.Dataset", name: str, prefix: str) -> Source:
    from datasets import Image as ImageFeature
    from datasets import Value as ValueFeature

    columns = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    if not columns:
        raise ValueError(f"images {name} has no image column: it has {', '.join(dataset.column_names)}")
    column = "image" if "image" in columns else columns[0]
    scalars = [
        scalar
        for scalar, feature in dataset.features.items()
        if isinstance(feature, ValueFeature) and (scalar in ("camera", "time") or is_field_name(scalar))
    ]
    rows = dataset.with_format(None).cast_column(column, ImageFeature(decode=False))
    labels = rows.select_columns(scalars)[:] if scalars else {}

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            image = rows[row][column]
            if image is None:
                raise ValueError("the row has no image")
            return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

        return read

    digits = max(6, len(str(len(dataset))))
    items = [
        Item(
            f"{prefix}{row:0{digits}d}",
            None,
            reader(row),
            {name: values[row] for name, values in labels.items() if values[row] is not None},
        )
        for row in range(len(dataset))
    ]
    return Source(name, None, items)


def _key_problem(key: str) -> str | None:
    try:
        return None if len(key.encode()) <= MAX_KEY_BYTES else f"its path is longer than {MAX_KEY_BYTES} bytes"
    except UnicodeEncodeError:
        return "its name is not valid UTF-8"


def _printable(key: str) -> str:
    return key.encode(errors="backslashreplace").decode()


def is_field_name(name: object) -> bool:
    """Return whether a metadata column of that name can be used in a `where`."""
    taken = RESERVED | {"and", "or", "not", "in", "is"}
    return isinstance(name, str) and name.isidentifier() and name.isascii() and name not in taken
