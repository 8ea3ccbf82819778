"""Any rows among good ones: kept + rejected = rows, good rows come out as they went in, and errors are one sentence.

The builders are called without their Parquet files; what they yield is encoded as those would hold it.
"""

import csv
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from data_scripts.annotation_builder import Chunk, RejectedRows, _add_to_digest
from data_scripts.builders import PedesBuilder, SdaBuilder
from data_scripts.row_checks import RowError
from tests.helpers.properties import examples


class Raw(str):
    """A piece of JSON that is written as it is."""


DEEP = Raw('{"a": ' + "[" * 100_000 + "]" * 100_000 + ', "]\\"": "}"}')
ODD_TEXTS = ["", " ", "\0", "\ud800", "a\udfff", "...", "\u2028", "\n", "word", "x" * 5000, "人", "\u200b"]
ODD_PATHS = [
    "",
    ".",
    "./.",
    ".\\.",
    "/",
    "\\",
    "..",
    "../a.png",
    "a/../b.png",
    "/a.png",
    "C:a.png",
    "a.png/",
    "a.png/b",
    "~",
]
ODD_PATHS += [
    "\0",
    "a\0.png",
    "x" * 300,
    "/".join(["d"] * 3000),
    "\ud800.png",
    "broken.png",
    "none.png",
    "folder",
    "a.png ",
    "A.PNG",
]
ODD_PATHS += [
    "images/a.png",
    "./a.png",
    ".\\b.png",
    "con",
    "file:a.png",
    "a.png\n",
]
NUMBERS = [
    float("nan"),
    float("inf"),
    1e400,
    -1,
    2**63,
    -(2**63),
    10**400,
    Raw("9" * 5000),
    Raw("1e5000"),
    0.5,
    True,
    1.0,
]
scalars = (
    st.none()
    | st.sampled_from([*ODD_TEXTS, *ODD_PATHS, *NUMBERS, DEEP])
    | st.text(max_size=4)
    | st.integers()
    | st.floats()
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
boxes = st.lists(
    st.lists(st.sampled_from([0, 0.5, 1, 1.0005, 2, -0.0001, *NUMBERS]), min_size=3, max_size=5), max_size=2
)


def to_json(value) -> str:
    """JSON as Python writes it, with NaN; [`Raw`] pieces as they are, and pairs in place of a dict for a doubled key."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_json, value)) + "]"
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(item)}" for key, item in value) + "}"
    return json.dumps(value)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "images"
    (folder / "folder").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 3), "red" if name == "a.png" else "blue").save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


GOOD = {
    "sda": lambda row: {
        "image": "ab"[row % 2] + ".png",
        "caption": f"good {row}",
        "image_id": row,
        "boxes": [[0.5, 0.5, 0.5, 1]],
        "logits": [0.5],
        "phrases": [f"part {row}"],
    },
    "official": lambda row: {
        "split": ["train", "val", "test"][row % 3],
        "captions": [f"good {row}"],
        "file_path": "ab"[row % 2] + ".png",
        "id": row,
    },
    "img_path": lambda row: {
        "split": "train",
        "captions": [f"good {row}"],
        "img_path": "ab"[row % 2] + ".png",
        "id": row,
    },
    "processed": lambda row: {"image": "ab"[row % 2] + ".png", "caption": f"good {row}", "image_id": row % 2},
    "csv": lambda row: {
        "path": "ab"[row % 2] + ".png",
        "caption": f"good {row}",
        "identity": row % 2,
        "split": "train",
    },
}
DATASET = {"official": "cuhk", "img_path": "rstp", "processed": "icfg", "csv": "csv"}


@st.composite
def tables(draw, layout):
    """A list of (is it good, row): fewer odd rows than good ones, anywhere."""
    count = draw(st.integers(0, 5))
    kinds = draw(st.permutations([True] * (count + 2) + [False] * count))
    names = [*GOOD[layout](0), "boxes", "image", "captions", "extra", "\ud800", "a\nb"]
    rows = []
    for number, is_good in enumerate(kinds):
        row = GOOD[layout](number)
        if not is_good:
            way = draw(st.integers(0, 5))
            name = draw(st.sampled_from(names))
            if way == 0:
                row = draw(anything)
            elif way == 1:
                row.pop(name, None)
            elif way == 2:
                row = (*row.items(), (name, draw(anything)))
            else:
                value = draw(
                    st.sampled_from(ODD_PATHS)
                    if name in ("image", "path", "file_path", "img_path")
                    else boxes
                    if name == "boxes"
                    else anything
                )
                row[name] = value
        rows.append((is_good, row))
    return rows


def build(layout: str, text: str, images: Path, work: Path, on_error: str):
    """(row numbers of each example, examples, records of rejected rows) of an annotation file."""
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        (folder / "rejected").mkdir()
        file = folder / (
            "train.csv" if layout == "csv" else "icfg_train.json" if layout == "processed" else "sda.json"
        )
        file.write_text(text, encoding="utf-8", newline="")
        rejected = RejectedRows(folder / "rejected", on_error)
        if layout == "sda":
            builder = SdaBuilder(file, images, rejected, folder)
        else:
            builder = PedesBuilder(DATASET[layout], file, images, rejected, folder)
        kept, rows_of = [], []
        for chunk in (chunk for chunks in builder.chunks.values() for chunk in chunks):
            if layout == "sda":
                got = list(builder.examples_of(chunk))
                before = {record["row"] for record in rejected.read()}
                rows_of += [[row] for row in range(chunk.size) if row not in before]
                kept += got
                continue
            for image in chunk.content:
                got = list(builder.examples_of(Chunk(chunk.name, 1, [image])))
                rows_of += [[row for row, texts in image.texts if not isinstance(texts, RowError)] for _ in got]
                kept += got
        encoded = [builder.FEATURES.encode_example(row) for row in kept]
        pa.Table.from_pylist(encoded, schema=builder.FEATURES.arrow_schema)
        for row in kept:
            _add_to_digest(hashlib.blake2b(), row)
        records = list(rejected.read())
        assert all(Path(record["file"]) == file and record["reason"] and record["problem"] for record in records)
        return rows_of, kept, records
    finally:
        shutil.rmtree(folder)


def check(layout: str, rows, images: Path, work: Path) -> None:
    if layout == "csv":
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(GOOD["csv"](0))
        writer.writerows(row for _, row in rows)
        text = file.getvalue()
    else:
        text = "[" + ",\n".join(to_json(row) for _, row in rows) + "]"
    rows_of, kept, records = build(layout, text, images, work, "skip")
    listed = [record["row"] for record in records]
    assert sorted([*listed, *(row for group in rows_of for row in group)]) == list(range(len(rows)))
    good = {number: GOOD[layout](number) for number, (is_good, _) in enumerate(rows) if is_good}
    assert not good.keys() & set(listed), [record for record in records if record["row"] in good]
    assert len(rows_of) == len(kept)
    order = []
    for group, row in zip(rows_of, kept, strict=True):
        for number in (row for row in group if row in good):
            order.append(number)
            texts = [row["caption"]] if layout == "sda" else row["captions"]
            assert f"good {number}" in texts
            expected = good[number]
            if layout == "sda":
                assert {**expected, "image": None} == {**row, "image": None}
            names = ("image", "path", "file_path", "img_path")
            path = next(expected[name] for name in names if name in expected)
            assert row["image"] == {"bytes": (images / path).read_bytes(), "path": path}
            assert row["image_id"] == next(
                expected[name] for name in ("image_id", "id", "identity") if name in expected
            )
    if layout in ("sda", "img_path"):
        assert order == sorted(order)
    try:
        build(layout, text, images, work, "raise")
    except ValueError as error:
        assert listed and len(str(error).splitlines()) == 1 and "--on_error skip" in str(error), str(error)
        assert "row " in str(error) and "Exceeds" not in str(error)
    else:
        assert not listed


@examples(60)
@given(rows=tables("sda"))
@example(
    rows=[
        (False, {"image": "a.png", "caption": ["a", "b"], "image_id": 1}),
        (True, GOOD["sda"](1)),
        (True, GOOD["sda"](2)),
    ]
)
@example(rows=[(True, GOOD["sda"](0)), (False, DEEP), (True, GOOD["sda"](2))])
@example(rows=[(True, GOOD["sda"](0)), (False, {**GOOD["sda"](1), "image": "."}), (True, GOOD["sda"](2))])
def test_sda(images, work, rows):
    check("sda", rows, images, work)


@pytest.mark.parametrize("layout", ["official", "img_path", "processed"])
def test_pedes(images, work, layout):
    @examples(40)
    @given(rows=tables(layout))
    @example(
        rows=[(True, GOOD[layout](0) | {"boxes": []}), (True, GOOD[layout](1)), (False, DEEP), (True, GOOD[layout](3))]
    )
    def run(rows):
        check(layout, rows, images, work)

    run()


cells = st.sampled_from(
    [text for text in [*ODD_TEXTS, *ODD_PATHS] if text.isprintable() or text < "\ud800"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@st.composite
def csv_tables(draw):
    count = draw(st.integers(0, 5))
    rows = []
    for number, is_good in enumerate(draw(st.permutations([True] * (count + 2) + [False] * count))):
        row = list(map(str, GOOD["csv"](number).values()))
        if not is_good:
            # Not the identity: a valid one that contradicts a good row makes that row the one that is rejected.
            row[draw(st.sampled_from([0, 1, 3]))] = draw(cells)
            row += draw(st.lists(cells, max_size=2))
        rows.append((is_good, row))
    return rows


@examples(60)
@given(rows=csv_tables())
@example(
    rows=[
        (True, list(map(str, GOOD["csv"](0).values()))),
        (False, ["a.png", "a man", "1", "train", "c"]),
        (True, list(map(str, GOOD["csv"](2).values()))),
    ]
)
def test_csv(images, work, rows):
    assume(
        not any(
            "\ud800" <= character <= "\udfff" or character == "\0"
            for _, row in rows
            for cell in row
            for character in cell
        )
    )
    check("csv", rows, images, work)
