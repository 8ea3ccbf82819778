"""Annotation files of CUHK-PEDES, ICFG-PEDES and RSTPReid, recognised by content, and CSV files of your own captions."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_scripts.csv_rows import read_csv_rows
from data_scripts.image_files import path_readings, with_slashes
from data_scripts.json_rows import UnreadableJson, json_files, read_rows
from data_scripts.row_checks import RowError, check_captions, check_identity, check_object, check_text, shorten
from data_scripts.text_files import UnreadableFile


DATASETS = {"cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
CSV = "csv"  # your own captions instead of a published dataset
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}

_PACKED_NAME = re.compile(r"\.jsonl?\.|\bjson\w*\.(gz|zip|bz2|xz|zst|7z)$", re.IGNORECASE)
_LOOKED_AT = 20  # rows examined to recognise a file's layout
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
    """Field names of one kind of annotation file.

    Args:
        name: `official`, `processed` or `csv`.
        image: field with the image's path.
        captions: field with a caption or a list of them.
        identity: field with the person's number.
        split: field with the split, None if each split has its own file.
        camera: field with the camera, None if the path shows it.
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
    """An image with all its annotations; `texts` holds (row of the file, its captions or their error)."""

    file: str
    layout: Layout
    path: str
    identity: int
    texts: list[tuple[int, list[str] | RowError]] = field(default_factory=list)
    camera: str | None = None
    spellings: set[str] = field(default_factory=set)  # spellings of the path


@dataclass(frozen=True)
class AnnotationFile:
    """An annotation file with layout, dataset (None if ambiguous) and kind of captions, from its first rows."""

    file: Path
    layout: Layout
    dataset: str | None
    one_caption_a_row: bool


@dataclass(frozen=True)
class Sources:
    """Files in `--annotations` for one dataset.

    Args:
        files: files to read.
        unreadable: files that could not be recognised because their first rows are unreadable.
        ignored: other files of the folder, each with the reason.
    """

    files: list[AnnotationFile]
    unreadable: list[UnreadableFile] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)


def camera_of(path: str) -> str | None:
    """Read the camera from an image's path, if the dataset's names include it.

    CUHK-PEDES: folder `cam_a`, ...; RSTPReid: `0000_c5_0022.jpg`; ICFG-PEDES: named as in MSMT17.
    """
    *folders, name = with_slashes(path).split("/")
    if folders and re.fullmatch(r"cam_\w+", folders[-1]):
        return folders[-1]
    match = _RSTP_NAME.match(name)
    if match:
        return match.group(1)
    match = _MSMT17_NAME.match(name)
    return f"c{int(match.group(1))}" if match else None


def find_sources(annotations: str | Path, dataset: str) -> Sources:
    """Find the files of one dataset: the official one, or the processed ones.

    Args:
        annotations: a file, or a folder that may also hold files of other datasets and other files.
        dataset: `cuhk`, `icfg`, `rstp`, or `csv` for a CSV file.

    Raises:
        ValueError: if there are none, they belong to another dataset, there are several official ones, or one is
            ambiguous.
        UnreadableFile: if the only file cannot be read.
    """
    if dataset == CSV:
        if not Path(annotations).is_file():
            raise ValueError(f"--annotations {annotations} is not a file; expected a CSV file with --dataset csv")
        return Sources([AnnotationFile(Path(annotations), CSV_LAYOUT, CSV, one_caption_a_row=True)])
    files = json_files(annotations)
    found, unreadable, ignored = [], [], _other_files(Path(annotations), dataset, files)
    unreadable += [error for error in ignored.values() if isinstance(error, UnreadableFile)]
    ignored = {name: reason for name, reason in ignored.items() if isinstance(reason, str)}
    for file in files:
        try:
            source = _examine(file, dataset)
        except UnreadableFile as error:
            if len(files) == 1:
                raise
            owner = _named_dataset(file)
            if owner in (None, dataset):
                unreadable.append(error)
            else:
                ignored[file.name] = f"{DATASETS[owner]} by its name, but cannot be read"
            continue
        if source is None:
            ignored[file.name] = "no PEDES annotations"
        else:
            found.append(source)
    if not found:
        problems = "".join(f" {error}." for error in unreadable)
        raise ValueError(
            f"--annotations {annotations}: no PEDES annotations in {', '.join(file.name for file in files[:5])}; expected "
            "the official file (split, captions, file_path or img_path, id) or processed ones (image, caption, image_id)."
            f"{problems}"
        )
    chosen = _choose(found, annotations, dataset)
    for source in found:
        if source not in chosen:
            other = source.dataset not in (dataset, None)
            ignored[source.file.name] = DATASETS[source.dataset] if other else f"{chosen[0].file.name} is read instead"
    return Sources(chosen, unreadable, ignored)


def _choose(found: list[AnnotationFile], annotations: str | Path, dataset: str) -> list[AnnotationFile]:
    fitting = [source for source in found if source.dataset in (dataset, None)]
    if not fitting:
        others = sorted({source.dataset for source in found if source.dataset})
        raise ValueError(
            f"--annotations {annotations} holds {', '.join(DATASETS[name] for name in others)}, not {DATASETS[dataset]}; "
            f"pass --dataset {others[0]}, or the annotations of {DATASETS[dataset]}"
        )
    certain = [source for source in fitting if source.dataset]
    official = [source for source in certain or fitting if source.layout.name == "official"]
    if len(official) > 1:
        names = ", ".join(source.file.name for source in official)
        raise ValueError(f"--annotations {annotations} holds several official files: {names}; pass one of them")
    doubtful = [source.file.name for source in fitting if certain and not source.dataset]
    if doubtful and not official:
        raise ValueError(
            f"--annotations {annotations}: neither name nor paths show whether {', '.join(doubtful)} belongs to "
            f"{DATASETS[dataset]} like {certain[0].file.name}; start its name with {dataset}_, or move it away"
        )
    return official or fitting


def _other_files(folder: Path, dataset: str, files: list[Path]) -> dict[str, str | UnreadableFile]:
    """Return the files of the folder without JSON names, with the reason to ignore them or an error."""
    if not folder.is_dir():
        return {}
    others: dict[str, str | UnreadableFile] = {}
    for file in sorted(folder.iterdir()):
        if file in files or file.is_dir() or file.name.startswith("."):
            continue
        others[file.name] = "neither .json nor .jsonl"
        if _PACKED_NAME.search(file.name) and _named_dataset(file) in (None, dataset):
            others[file.name] = UnreadableJson(file, 0, "the file is packed", "unpack it, or move it away")
    return others


def _named_dataset(file: Path) -> str | None:
    return next((dataset for dataset, pattern in _FILE_NAMES.items() if pattern.search(file.name)), None)


def _examine(file: Path, dataset: str) -> AnnotationFile | None:
    """Recognise a file by its first rows; return None if it holds no annotations of people.

    Raises:
        UnreadableFile: if it is damaged in its first rows, has no rows, or has other fields.
    """
    read, broken = [], None
    try:
        read.extend(islice(read_rows(file), _LOOKED_AT))
    except UnreadableFile as error:
        read, broken = list(islice(read_rows(file), error.row)), error
    rows = [row for row in read if isinstance(row, dict)]
    is_sda = any("boxes" in row for row in rows)
    fitting = {layout: [row for row in rows if set(layout.fields) <= set(row)] for layout in LAYOUTS}
    layout = max(LAYOUTS, key=lambda layout: len(fitting[layout]))
    known = fitting[layout]
    if known and not is_sda:
        paths = [row[layout.image] for row in known if isinstance(row[layout.image], str)]
        texts = [row[layout.captions] for row in known]
        singles = sum(isinstance(text, str) for text in texts)
        return AnnotationFile(file, layout, _guess_dataset(file, paths), 2 * singles > len(texts))
    if broken:
        raise broken
    if not read:
        raise UnreadableJson(file, 0, "the list has no rows", "complete the file, or move it away")
    like = next((layout for layout in LAYOUTS for row in rows if len(set(layout.fields) & set(row)) > 1), None)
    has_split_name = _named_dataset(file) == dataset and SPLITS.keys() & set(_words(file))
    if not is_sda and (like or has_split_name):
        fields = ", ".join(map(str, rows[0])) if rows else "no object"
        problem = f"expected the fields {', '.join((like or LAYOUTS[-1]).fields)}, got {fields}"
        raise UnreadableJson(file, 0, problem, "correct the file, or move it away")
    return None


def _words(file: Path) -> list[str]:
    return re.split(r"[^a-z]+", file.stem.lower())


def _guess_dataset(file: Path, paths: list[str]) -> str | None:
    for path in map(with_slashes, paths):
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
    return _named_dataset(file)


def split_of(source: AnnotationFile) -> str:
    """Return the split of a processed file; the name must distinguish validation from test.

    Raises:
        ValueError: if neither name nor content shows the split.
    """
    named = {SPLITS[word] for word in _words(source.file) if word in SPLITS}
    if len(named) == 1:
        return named.pop()
    if source.one_caption_a_row and not named:
        return "train"
    raise ValueError(
        f"{source.file}: cannot distinguish the validation from the test split; "
        "end its name with _train, _val or _test"
    )


def read_images(
    source: AnnotationFile, rejected: Callable[[str, int, Any, RowError], None]
) -> Iterator[tuple[str, AnnotatedImage]]:
    """Read a file and merge rows of the same image; images are located later.

    Args:
        source: a file from [`find_sources`].
        rejected: called for each row that cannot be used, with file, row, the row's value and the [`RowError`].

    Yields:
        Split (`train`, `validation`, `test`) and image, in the order in which images first appear.

    Raises:
        UnreadableFile: at the first row that is not JSON or CSV, after the rows before it.
    """
    layout, file = source.layout, str(source.file)
    split = None if layout.split else split_of(source)
    images: dict[tuple[str, str], AnnotatedImage] = {}
    is_csv = layout.name == CSV
    broken: list[UnreadableFile] = []
    rows = read_csv_rows(file, CSV_REQUIRED) if is_csv else read_rows(file)
    for row, value in enumerate(_until_broken(rows, broken)):
        try:
            check_object(value, CSV_REQUIRED if is_csv else layout.fields)
            row_split = split or _check_split(value, layout)
            path, identity = value[layout.image], value[layout.identity]
            identity = _read_number(identity, layout.identity) if is_csv else identity
            identity = check_identity(identity, layout.identity)
            path_readings(path, layout.image)
            camera = value.get(layout.camera)
            # An official row is one image; a processed training row is one caption of an image.
            key = (row_split, f"{path}\n{row}" if layout.name == "official" else with_slashes(path))
            image = images.setdefault(key, AnnotatedImage(file, layout, path, identity, camera=camera))
            _check_same(layout.identity, "person", identity, image.identity, image)
            if camera is not None and image.camera is not None:
                _check_same(layout.camera or "camera", "camera", camera, image.camera, image)
            image.camera = image.camera or camera
        except RowError as error:
            rejected(file, row, value, error)
            continue
        image.texts.append((row, _read_texts(value[layout.captions], layout.captions)))
        image.spellings.add(path)
    for (row_split, _), image in images.items():
        yield row_split, image
    if broken:
        raise broken[0]


def _until_broken(rows: Iterator[Any], broken: list[UnreadableFile]) -> Iterator[Any]:
    """Yield the rows before the first unreadable one; append its error to `broken`."""
    try:
        yield from rows
    except UnreadableFile as error:
        broken.append(error)


def _check_split(row: dict, layout: Layout) -> str:
    split = row.get(layout.split, "train")  # a CSV file may leave it out
    if not isinstance(split, str) or split not in SPLITS:
        raise RowError(layout.split or "split", "unknown split", f"expected train, val or test, got {shorten(split)}")
    return SPLITS[split]


def _check_same(name: str, kind: str, said: Any, before: Any, image: AnnotatedImage) -> None:
    if said != before:
        problem = f"row {image.texts[0][0]} gives {image.path} to {kind} {before}, this one to {said}"
        raise RowError(name, f"conflicting {kind}", problem)


def _read_number(text: str, name: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):  # int() would read 1_0 as 10
        problem = f"expected a whole number of 64 bits, the same for all images of a person, got {shorten(text)}"
        raise RowError(name, "wrong type", problem)
    return int(text)


def _read_texts(value: Any, name: str) -> list[str] | RowError:
    """Return the captions of a row, or the error: the image may have other rows."""
    try:
        return [check_text(value, name)] if isinstance(value, str) else check_captions(value, name)
    except RowError as error:
        return error
