"""Builders that turn annotation rows and image files into `datasets` tables with the image bytes inside."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data_scripts.annotation_builder import AnnotationBuilder, Chunk, RejectedRows
from data_scripts.image_files import ImageRoot, RootSearch, with_slashes
from data_scripts.json_rows import json_files, read_rows
from data_scripts.pedes_layouts import CSV, DATASETS, AnnotatedImage, camera_of, find_sources, read_images
from data_scripts.row_checks import RowError, check_identity, check_object, check_regions, check_text, list_names
from data_scripts.text_files import UnreadableFile


SDA_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "image_id": datasets.Value("int64"),
        "boxes": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "logits": datasets.List(datasets.Value("float32")),
        "phrases": datasets.List(datasets.Value("string")),
    }
)
PEDES_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("int64"),
        "camera": datasets.Value("string"),
    }
)

_CHUNK = 500  # rows per process at a time
_EXAMPLES = 40  # first rows of SDA, and later ones, used to find the root; every row is checked against it afterwards


class SdaBuilder(AnnotationBuilder):
    """Builder of SDA, from JSON files of any size with one row per image.

    Args:
        annotations: a JSON file or a folder of them.
        images: folder of the images.
        rejected, scratch: see [`AnnotationBuilder`].
        follow_symlinks: allows links that lead out of `images`.

    Raises:
        ValueError: if paths or files are wrong.
    """

    FEATURES = SDA_FEATURES

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        rejected: RejectedRows,
        scratch: str | Path,
        follow_symlinks: bool = False,
    ) -> None:
        super().__init__(rejected, scratch)
        self._num_chunks = 0
        self._open_rows: tuple[str, int, Iterator] | None = None
        search = RootSearch(images, ("SDA",), follow_symlinks=follow_symlinks)
        self._hashes = array("q")  # of the image paths
        chunks = [chunk for file in json_files(annotations) for chunk in self._scan(file, search)]
        self.chunks = {"train": chunks} if chunks else {}
        self.root = search.choose()
        repeated = len(self._hashes) - len(np.unique(np.asarray(self._hashes)))
        if repeated:
            self.notes.append(f"{repeated:,} rows name an image that another row also names")
        del self._hashes

    def _scan(self, file: Path, search: RootSearch) -> Iterator[Chunk]:
        """Read a whole file once, to find truncated files before hours of work."""
        rows, unreadable, first = 0, None, []
        try:
            for row in read_rows(file):
                path = row.get("image") if isinstance(row, dict) else None
                is_first = rows < _EXAMPLES
                if is_first:
                    first.append(row)
                if is_first or not search.has_found or (rows % 100 == 0 and rows < 100 * _EXAMPLES):
                    search.look(str(file), rows, path)
                if isinstance(path, str):
                    self._hashes.append(hash(path))
                rows += 1
        except UnreadableFile as error:
            unreadable = error
            if self.rejected.on_error == "raise":
                raise
        _check_is_sda(file, first)
        if not rows and not unreadable:
            self.notes.append(f"{file} holds no rows")
        name = "00000000"
        for start in range(0, rows, _CHUNK):
            self._num_chunks += 1
            name = f"{self._num_chunks:08d}"
            yield Chunk(name, min(_CHUNK, rows - start), (str(file), start))
        if unreadable:
            self.leave_out_rest(name, unreadable)

    def examples_of(self, chunk: Chunk) -> Iterator[dict]:
        """Yield the examples of a chunk."""
        file, start = chunk.content
        for row, value in enumerate(self._rows_from(file, start, chunk.size), start):
            try:
                yield self._example(value)
            except RowError as error:
                image = value.get("image") if isinstance(value, dict) else None
                self.rejected.add(chunk.name, file, row, image, error)

    def _example(self, row: Any) -> dict:
        check_object(row, ("image", "caption", "image_id"))
        caption = check_text(row["caption"], "caption")
        boxes, logits, phrases = check_regions(row)
        image_id = check_identity(row["image_id"], "image_id")
        image = {"bytes": self.root.read(row["image"]), "path": with_slashes(row["image"])}
        return {
            "image": image,
            "caption": caption,
            "image_id": image_id,
            "boxes": boxes,
            "logits": logits,
            "phrases": phrases,
        }

    def _rows_from(self, file: str, start: int, size: int) -> Iterator[Any]:
        """Yield rows of a file, continuing from the last chunk if this one follows it."""
        if self._open_rows is None or self._open_rows[:2] != (file, start):
            rows = read_rows(file)
            for _ in range(start):
                next(rows)
        else:
            rows = self._open_rows[2]
        for _ in range(size):
            yield next(rows)
        self._open_rows = (file, start + size, rows)


def _check_is_sda(file: Path, rows: list[Any]) -> None:
    """Refuse a file most of whose first rows are of PEDES; a few odd ones are rows to reject."""
    rows = [row for row in rows if isinstance(row, dict)]
    other_names = [row for row in rows if "image" not in row and row.keys() & {"file_path", "img_path", "captions"}]
    lists = [row for row in rows if isinstance(row.get("caption"), list)]
    if 2 * len(other_names) > len(rows):
        raise ValueError(f"{file} holds PEDES annotations ({list_names(other_names[0])}): use `mra prepare pedes`")
    if 2 * len(lists) > len(rows):
        raise ValueError(f"{file} holds PEDES annotations (a list of captions a row): use `mra prepare pedes`")


class PedesBuilder(AnnotationBuilder):
    """Builder of CUHK-PEDES, ICFG-PEDES and RSTPReid, from official or processed files.

    Args:
        dataset: `cuhk`, `icfg` or `rstp`.
        annotations: an annotation file, or a folder with the files of one or several datasets.
        images: folder with the images of this dataset, or of all datasets.
        rejected, scratch: see [`AnnotationBuilder`].
        follow_symlinks: allows links that lead out of `images`.

    Raises:
        ValueError: if paths or files are wrong.
    """

    FEATURES = PEDES_FEATURES

    def __init__(
        self,
        dataset: str,
        annotations: str | Path,
        images: str | Path,
        rejected: RejectedRows,
        scratch: str | Path,
        follow_symlinks: bool = False,
    ) -> None:
        super().__init__(rejected, scratch)
        self.sources = find_sources(annotations, dataset)
        for error in self.sources.unreadable:
            self.leave_out_rest("00000000", error)
        splits: dict[str, list[AnnotatedImage]] = {"train": [], "validation": [], "test": []}
        for source in self.sources.files:
            try:
                for split, image in read_images(source, self._reject_early):
                    splits[split].append(image)
            except UnreadableFile as error:
                self.leave_out_rest("00000000", error)
        splits = {split: images for split, images in splits.items() if images}
        self.root = self._find_root(images, splits, dataset, follow_symlinks)
        self._note_repeated(splits)
        if self.sources.ignored:
            names = ", ".join(f"{name} ({reason})" for name, reason in self.sources.ignored.items())
            self.notes.append(f"ignored in {annotations}: {names}")
        names = iter(range(1, 10**8))
        for split, rows in splits.items():
            parts = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
            self.chunks[split] = [Chunk(f"{next(names):08d}", len(part), part) for part in parts]

    def examples_of(self, chunk: Chunk) -> Iterator[dict]:
        """Yield the examples of a chunk."""
        for image in chunk.content:
            captions, rows = [], []
            for row, texts in image.texts:
                if isinstance(texts, RowError):
                    self.rejected.add(chunk.name, image.file, row, image.path, texts)
                else:
                    captions += texts
                    rows.append(row)
            try:
                if captions:
                    yield self._example(image, captions)
            except RowError as error:
                for row in rows:
                    self.rejected.add(chunk.name, image.file, row, image.path, error)

    def _example(self, image: AnnotatedImage, captions: list[str]) -> dict:
        field = image.layout.image
        content = self.root.read(image.path, field)
        spellings = image.spellings if len(image.spellings) > 1 else ()  # a single one was located while reading
        if len({self.root.locate(spelling, field) for spelling in spellings}) > 1:
            problem = (
                f"{' and '.join(sorted(image.spellings))} are two files, and differ only in how the path is written"
            )
            raise RowError(field, "conflicting path", problem)
        return {
            "image": {"bytes": content, "path": with_slashes(image.path)},
            "captions": captions,
            "image_id": image.identity,
            "camera": image.camera or camera_of(image.path),
        }

    def _reject_early(self, file: str, row: int, value: Any, error: RowError) -> None:
        image = None
        if isinstance(value, dict):
            image = next((value[name] for name in ("image", "file_path", "img_path", "path") if name in value), None)
        self.rejected.add("00000000", file, row, image, error)

    def _find_root(
        self, folder: str | Path, splits: Mapping[str, Sequence[AnnotatedImage]], dataset: str, follow_symlinks: bool
    ) -> ImageRoot:
        names = ("images",) if dataset == CSV else ("imgs", DATASETS[dataset], f"{DATASETS[dataset]}/imgs")
        search = RootSearch(folder, names, self.sources.files[0].layout.image, follow_symlinks)
        for rows in splits.values():
            for image in rows:
                search.look(image.file, image.texts[0][0], image.path)
        return search.choose()

    def _note_repeated(self, splits: Mapping[str, Sequence[AnnotatedImage]]) -> None:
        owners: dict[str, str] = {}
        repeated = across = 0
        for split, images in splits.items():
            for image in images:
                owner = owners.setdefault(with_slashes(image.path), split)
                across += owner != split
                repeated += 1
        repeated -= len(owners) + across
        if repeated:
            self.notes.append(f"{repeated:,} rows name an image that another row of the split also names")
        if across:
            self.notes.append(f"{across:,} images are in two splits, so test images may be in the training set")
