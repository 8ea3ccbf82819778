"""Annotation files of CUHK-PEDES, ICFG-PEDES and RSTPReid, told apart by their content, and CSV files of one's own."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_scripts.csv_rows import read_csv_rows
from data_scripts.json_rows import json_files, read_rows
from data_scripts.validation import RowError, check_captions, check_object, check_text, shorten


DATASETS = {"cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
CSV = "csv"  # captions of one's own, in place of a set
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}

_LOOKED_AT = 20  # rows from which a file's layout is told
_MSMT17_NAME = re.compile(r"\d+_\d+_(\d+)_\d{4}(?:morning|noon|afternoon)_")  # person_number_camera_time, ICFG-PEDES
_RSTP_NAME = re.compile(r"\d{4}_(c\d+)_\d+\.\w+$")
_CUHK_FOLDERS = {"cam_a", "cam_b", "cuhk01", "cuhk03", "market", "test_query", "train_query"}
_FILE_NAMES = {
    "cuhk": re.compile(r"cuhk|reid_raw", re.IGNORECASE),
    "icfg": re.compile(r"icfg", re.IGNORECASE),
    "rstp": re.compile(r"rstp|data_captions", re.IGNORECASE),
}


@dataclass(frozen=True)
class Layout:
    """
    Names of the fields of one kind of annotation file.

    Args:
        name: `official`, `processed` or `csv`.
        image: field with the image's path.
        captions: field with a caption or a list of them.
        identity: field with the person's number.
        split: field with the split, None where each split has its own file.
        camera: field with the camera, None where the path tells it.
    """

    name: str
    image: str
    captions: str
    identity: str
    split: str | None = None
    camera: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that every row must have."""
        return tuple(name for name in (self.image, self.captions, self.identity, self.split) if name)


LAYOUTS = (
    Layout("official", "file_path", "captions", "id", "split"),
    Layout("official", "img_path", "captions", "id", "split"),
    Layout("processed", "image", "caption", "image_id"),
)
CSV_LAYOUT = Layout("csv", "path", "caption", "identity", "split", "camera")
CSV_REQUIRED = ("path", "caption", "identity")


@dataclass
class AnnotatedImage:
    """One image with all that is said of it; `texts` holds (row of the file, value of its caption field)."""

    file: str
    layout: Layout
    path: Any
    identity: Any
    texts: list[tuple[int, Any]] = field(default_factory=list)
    camera: str | None = None


@dataclass(frozen=True)
class Source:
    """An annotation file and what its first rows tell: layout, set (None if it could be any), kind of captions."""

    file: Path
    layout: Layout
    dataset: str | None
    one_caption_a_row: bool


def camera_of(path: str) -> str | None:
    """
    Reads the camera off an image's path, where the set's naming has it.

    CUHK-PEDES: folder `cam_a`, ...; RSTPReid: `0000_c5_0022.jpg`; ICFG-PEDES: named as in MSMT17.
    """
    *folders, name = path.split("/")
    if folders and re.fullmatch(r"cam_\w+", folders[-1]):
        return folders[-1]
    match = _RSTP_NAME.match(name)
    if match:
        return match.group(1)
    match = _MSMT17_NAME.match(name)
    return f"c{int(match.group(1))}" if match else None


def find_sources(annotations: str | Path, dataset: str) -> list[Source]:
    """
    Finds the files of one set: the official one, or the processed ones.

    Args:
        annotations: a file, or a folder that may hold files of other sets and other files too.
        dataset: `cuhk`, `icfg`, `rstp`, or `csv` for a CSV file.

    Raises:
        ValueError: if there is none, they belong to another set, or there are several official ones.
        UnreadableJson: if the only file is no JSON.
    """
    if dataset == CSV:
        if not Path(annotations).is_file():
            raise ValueError(f"--annotations {annotations} is no file; expected a CSV file with --dataset csv.")
        return [Source(Path(annotations), CSV_LAYOUT, CSV, one_caption_a_row=True)]
    files = json_files(annotations)
    sources = []
    for file in files:
        try:
            source = _examine(file)
        except ValueError:
            if len(files) == 1:
                raise
            continue
        if source:
            sources.append(source)
    if not sources:
        raise ValueError(
            f"--annotations {annotations}: no PEDES annotations in {', '.join(file.name for file in files[:5])}; expected "
            "the official file (split, captions, file_path or img_path, id) or processed ones (image, caption, image_id)."
        )
    fitting = [source for source in sources if source.dataset in (dataset, None)]
    if not fitting:
        others = sorted({source.dataset for source in sources})
        raise ValueError(
            f"--annotations {annotations} holds {', '.join(DATASETS[name] for name in others)}, not {DATASETS[dataset]}. "
            f"Pass --dataset {others[0]}, or the annotations of {DATASETS[dataset]}."
        )
    certain = [source for source in fitting if source.dataset]
    official = [source for source in certain or fitting if source.layout.name == "official"]
    if len(official) > 1:
        names = ", ".join(source.file.name for source in official)
        raise ValueError(f"--annotations {annotations} holds several official files: {names}. Pass one of them.")
    return official or certain or fitting


def _examine(file: Path) -> Source | None:
    rows = [row for row in islice(read_rows(file), _LOOKED_AT) if isinstance(row, dict)]
    for layout in LAYOUTS:
        known = [row for row in rows if set(layout.fields) <= set(row)]
        if known and 2 * len(known) >= len(rows) and "boxes" not in known[0]:
            break
    else:
        return None
    paths = [row[layout.image] for row in known if isinstance(row[layout.image], str)]
    texts = [row[layout.captions] for row in known]
    return Source(file, layout, _guess_dataset(file, paths), 2 * sum(isinstance(t, str) for t in texts) > len(texts))


def _guess_dataset(file: Path, paths: list[str]) -> str | None:
    for path in paths:
        for dataset, name in DATASETS.items():
            if any(re.sub(r"[-_]", "", part) == name.lower().replace("-", "") for part in path.lower().split("/")):
                return dataset
        *folders, name = path.split("/")
        if not folders and _RSTP_NAME.match(name):
            return "rstp"
        if _MSMT17_NAME.match(name) or folders[:1] in (["train"], ["test"]):
            return "icfg"
        if _CUHK_FOLDERS & {folder.lower() for folder in folders}:
            return "cuhk"
    for dataset, pattern in _FILE_NAMES.items():
        if pattern.search(file.name):
            return dataset
    return None


def split_of(source: Source) -> str:
    """
    Gives the split of a processed file: validation and test look alike, so the name must say which it is.

    Raises:
        ValueError: if neither name nor content tells.
    """
    words = re.split(r"[^a-z]+", source.file.stem.lower())
    named = {SPLITS[word] for word in words if word in SPLITS}
    if len(named) == 1:
        return named.pop()
    if source.one_caption_a_row and not named:
        return "train"
    raise ValueError(
        f"{source.file}: cannot tell whether it is the validation or the test split, which look alike. "
        "Let its name end in _train, _val or _test."
    )


def read_images(source: Source, rejected) -> Iterator[tuple[str, AnnotatedImage]]:
    """
    Reads a file, rows of the same image joined; see [`check_texts`] for what is checked later.

    Args:
        source: of [`find_sources`].
        rejected: called with file, row, value of the row and [`RowError`] for each row that cannot be used.

    Yields:
        Split (`train`, `validation`, `test`) and image, in the order in which images first appear.

    Raises:
        UnreadableJson: where the file stops being JSON.
    """
    layout, file = source.layout, str(source.file)
    split = None if layout.split else split_of(source)
    images: dict[tuple[str, str], AnnotatedImage] = {}
    is_csv = layout.name == CSV
    for row, value in enumerate(read_csv_rows(file, CSV_REQUIRED) if is_csv else read_rows(file)):
        try:
            check_object(value, CSV_REQUIRED if is_csv else layout.fields)
            row_split = split or _check_split(value, layout)
            path, identity = value[layout.image], value[layout.identity]
            identity = _read_number(identity, layout.identity) if is_csv else identity
            if not isinstance(path, str):
                raise RowError(layout.image, "wrong type", f"expected a path, got {shorten(path)}")
            camera = value.get(layout.camera)
            # An official row is an image of its own; processed rows of training are captions of an image.
            key = (row_split, f"{path}\n{row}" if layout.name == "official" else path)
            image = images.setdefault(key, AnnotatedImage(file, layout, path, identity, camera=camera))
            _check_same(layout.identity, "person", identity, image.identity, image)
            if camera is not None and image.camera is not None:
                _check_same(layout.camera, "camera", camera, image.camera, image)
            image.camera = image.camera or camera
        except RowError as error:
            rejected(file, row, value, error)
            continue
        image.texts.append((row, value[layout.captions]))
    for (row_split, _), image in images.items():
        yield row_split, image


def _check_split(row: dict, layout: Layout) -> str:
    split = row.get(layout.split, "train")  # a CSV file may leave it out
    if not isinstance(split, str) or split not in SPLITS:
        raise RowError(layout.split, "unknown split", f"expected train, val or test, got {shorten(split)}")
    return SPLITS[split]


def _check_same(name: str, kind: str, said: Any, before: Any, image: AnnotatedImage) -> None:
    if said != before:
        problem = f"row {image.texts[0][0]} gives {image.path} to {kind} {before}, this one to {said}"
        raise RowError(name, f"conflicting {kind}", problem)


def _read_number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        problem = f"expected a whole number, the same for all images of a person, got {shorten(text)}"
        raise RowError(name, "wrong type", problem) from None


def check_texts(value: Any, name: str) -> list[str]:
    """
    Checks the caption field of one row, which holds a caption or a list of them.

    Raises:
        RowError: if there is no caption, or an empty one.
    """
    return [check_text(value, name)] if isinstance(value, str) else check_captions(value, name)
