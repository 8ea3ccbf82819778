import gzip
import json
import re
from pathlib import Path

import datasets
import pytest
from datasets import load_dataset

from data_scripts.pedes_layouts import camera_of
from data_scripts.prepare_pedes import main
from data_scripts.published_sizes import PUBLISHED, Size, compare_with_published
from tests.helpers.sources import draw, leftovers, read_set, run_client, write_json


OFFICIAL = {"cuhk": "reid_raw.json", "icfg": "ICFG-PEDES.json", "rstp": "data_captions.json"}
FOLDERS = {"cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
INNER = {"cuhk": "imgs/", "icfg": "", "rstp": ""}  # what official paths leave out
CUHK_PATHS = ["cam_a/000.jpg", "cam_b/001.png", "CUHK03/002.bmp", "cam_a/003.jpg", "Market/004.png", "cam_b/005.jpg"]
ICFG_PATHS = [  # person, number, camera and time, as in MSMT17; a training image may lie under test/
    "train/0000/0000_000_01_0303morning_0015_1.jpg",
    "test/0001/0001_002_14_0113noon_0033_0.jpg",
    "train/0000/0000_003_05_0302afternoon_0245_0.jpg",
    "test/0002/0002_001_05_0303morning_0006_2.jpg",
    "test/0002/0002_002_12_0303noon_0006_2.jpg",
    "test/0003/0003_000_07_0114morning_0006_2.jpg",
]
RSTP_PATHS = [f"{person:04d}_c{camera}_00{camera:02d}.jpg" for person, camera in enumerate((5, 14, 1, 7, 5, 2))]
PATHS = {"cuhk": CUHK_PATHS, "icfg": ICFG_PATHS, "rstp": RSTP_PATHS}
SPLITS = {
    "cuhk": ["train", "train", "train", "val", "test", "test"],
    "icfg": ["train", "train", "train", "test", "test", "test"],
    "rstp": ["train", "train", "train", "val", "test", "test"],
}
IDENTITIES = [1, 2, 1, 11_004, 12_004, 12_005]
CAMERAS = {
    "cuhk": ["cam_a", "cam_b", None, "cam_a", None, "cam_b"],
    "icfg": ["c1", "c14", "c5", "c5", "c12", "c7"],
    "rstp": ["c5", "c14", "c1", "c7", "c5", "c2"],
}
ODD = "一个 woman;\u3000she <br> $(function(){}) wears"


def captions(dataset: str, index: int) -> list[str]:
    if dataset == "icfg":
        return [f"caption of {index}"]
    return [f"first of {index}", ODD if index == 1 else f"second of {index}"] * (2 if index == 2 else 1)


def official_rows(dataset: str) -> list[dict]:
    path = "img_path" if dataset == "rstp" else "file_path"
    rows = []
    for index, name in enumerate(PATHS[dataset]):
        texts = captions(dataset, index)
        row = {"split": SPLITS[dataset][index], "captions": texts, path: name, "id": IDENTITIES[index]}
        rows.append(row if dataset == "rstp" else row | {"processed_tokens": [text.split() for text in texts]})
    return rows


def processed_rows(dataset: str, prefix: str | None = None) -> dict[str, list[dict]]:
    prefix = f"{FOLDERS[dataset]}/{INNER[dataset]}" if prefix is None else prefix
    splits: dict[str, list[dict]] = {}
    for index, name in enumerate(PATHS[dataset]):
        split = SPLITS[dataset][index]
        row = {"image": prefix + name, "image_id": IDENTITIES[index]}
        texts = captions(dataset, index)
        rows = [row | {"caption": text} for text in texts] if split == "train" else [row | {"caption": texts}]
        splits.setdefault(split, []).extend(rows)
    return splits


def draw_images(root: Path, *datasets: str) -> None:
    for dataset in datasets:
        for index, name in enumerate(PATHS[dataset]):
            draw(root / "images" / FOLDERS[dataset] / INNER[dataset] / name, index)


def expected(root: Path, dataset: str) -> dict[str, list[dict]]:
    splits: dict[str, list[dict]] = {}
    for index, name in enumerate(PATHS[dataset]):
        path = root / "images" / FOLDERS[dataset] / INNER[dataset] / name
        row = {"image": {"bytes": path.read_bytes(), "path": path.name}, "captions": captions(dataset, index)}
        row |= {"image_id": IDENTITIES[index], "camera": CAMERAS[dataset][index]}
        splits.setdefault({"val": "validation"}.get(SPLITS[dataset][index], SPLITS[dataset][index]), []).append(row)
    return splits


def prepare(root: Path, dataset: str, annotations: str, *options: str, images="images", output="out") -> Path:
    arguments = ["--dataset", dataset, "--annotations", str(root / annotations), "--images", str(root / images)]
    main([*arguments, "--output", str(root / output), *options])
    return root / output


def failure(root: Path, *arguments: str, **paths: str) -> str:
    with pytest.raises(SystemExit) as caught:
        prepare(root, *arguments, **paths)
    assert not (root / "out").exists() and leftovers(root / "out") == []
    return str(caught.value)


@pytest.fixture
def cuhk(tmp_path):
    draw_images(tmp_path, "cuhk")
    write_json(tmp_path / "raw/reid_raw.json", official_rows("cuhk"))
    return tmp_path


@pytest.fixture
def finetune(tmp_path):
    """The folder that holds the processed files of all three sets."""
    draw_images(tmp_path, *PATHS)
    for dataset in PATHS:
        for split, rows in processed_rows(dataset).items():
            write_json(tmp_path / "finetune" / f"{dataset}_{split}.json", rows)
    return tmp_path


@pytest.mark.parametrize("name", ["published", "annotations.json"])
@pytest.mark.parametrize("dataset", list(PATHS))
def test_official_files_are_read(tmp_path, dataset, name):
    draw_images(tmp_path, dataset)
    write_json(tmp_path / "raw" / (OFFICIAL[dataset] if name == "published" else name), official_rows(dataset))
    output = prepare(tmp_path, dataset, "raw", images=f"images/{FOLDERS[dataset]}")
    assert read_set(output) == expected(tmp_path, dataset)


@pytest.mark.parametrize("dataset", list(PATHS))
def test_processed_files_are_read_out_of_a_folder_of_three_sets(finetune, dataset):
    assert read_set(prepare(finetune, dataset, "finetune")) == expected(finetune, dataset)


@pytest.mark.parametrize("dataset", list(PATHS))
def test_a_single_processed_file_gives_its_split(finetune, dataset):
    written = read_set(prepare(finetune, dataset, f"finetune/{dataset}_test.json"))
    assert written == {"test": expected(finetune, dataset)["test"]}


def test_sets_are_told_by_content_when_names_say_nothing(tmp_path):
    draw_images(tmp_path, *PATHS)
    for number, dataset in enumerate(PATHS):
        for split, rows in processed_rows(dataset).items():
            write_json(tmp_path / "mixed" / f"{number}_{split}.json", rows)
    for dataset in PATHS:
        output = prepare(tmp_path, dataset, "mixed", output=f"out_{dataset}")
        assert read_set(output) == expected(tmp_path, dataset)


@pytest.mark.parametrize("images", ["images", "images/CUHK-PEDES", "images/CUHK-PEDES/imgs"])
@pytest.mark.parametrize("prefix", ["official", "", "imgs/", "CUHK-PEDES/imgs/"])
def test_the_image_root_may_be_named_at_any_level(cuhk, images, prefix):
    if prefix != "official":
        (cuhk / "raw/reid_raw.json").unlink()
        for split, rows in processed_rows("cuhk", prefix).items():
            write_json(cuhk / "raw" / f"cuhk_{split}.json", rows)
    assert read_set(prepare(cuhk, "cuhk", "raw", images=images)) == expected(cuhk, "cuhk")


@pytest.mark.parametrize(
    "images", ["./images/CUHK-PEDES/imgs/.", "images/CUHK-PEDES/imgs/", "pictures", "CUHK-PEDES/imgs"]
)
def test_the_image_root_may_be_written_in_any_way(cuhk, images, monkeypatch):
    for split, rows in processed_rows("cuhk", "CUHK-PEDES/imgs/").items():
        write_json(cuhk / "raw" / f"cuhk_{split}.json", rows)
    (cuhk / "raw/reid_raw.json").unlink()
    (cuhk / "pictures").symlink_to(cuhk / "images/CUHK-PEDES/imgs")
    monkeypatch.chdir(cuhk / "images" if images.startswith("CUHK") else cuhk)
    main(["--dataset", "cuhk", "--annotations", str(cuhk / "raw"), "--images", images, "--output", str(cuhk / "out")])
    assert read_set(cuhk / "out") == expected(cuhk, "cuhk")


def test_paths_of_windows_are_read(cuhk):
    rows = official_rows("cuhk")
    for row in rows[::2]:
        row["file_path"] = row["file_path"].replace("/", "\\")
    write_json(cuhk / "raw/reid_raw.json", rows)
    assert read_set(prepare(cuhk, "cuhk", "raw")) == expected(cuhk, "cuhk")


def test_a_row_that_needs_another_folder_than_the_others_is_an_error(cuhk):
    folder = cuhk / "images/CUHK-PEDES"
    (folder / "Market").mkdir()
    (folder / "imgs/Market/004.png").rename(folder / "Market/004.png")
    message = failure(cuhk, "cuhk", "raw", images="images/CUHK-PEDES")
    file = cuhk / "raw/reid_raw.json"
    assert message.startswith(f"prepare_pedes: {file}, row 4 (counting from 0), field file_path: another path rule: ")
    assert "when read from --images" in message and f"{file}, row 0 was found when read below imgs/" in message
    written = read_set(prepare(cuhk, "cuhk", "raw", "--on_error", "skip", images="images/CUHK-PEDES"))
    assert {split: len(rows) for split, rows in written.items()} == {"train": 3, "validation": 1, "test": 1}


def test_a_path_that_names_two_pictures_is_an_error(cuhk):
    draw(cuhk / "images/CUHK-PEDES/cam_a/003.jpg", 99)
    assert "row 3 (counting from 0), field file_path: another path rule" in failure(
        cuhk, "cuhk", "raw", images="images/CUHK-PEDES"
    )


def test_a_fresh_process_loads_it(cuhk):
    output = prepare(cuhk, "cuhk", "raw")
    code = f"""
import json
from datasets import load_dataset
splits = load_dataset({str(output)!r})
for name, split in splits.items():
    streamed = list(load_dataset({str(output)!r}, split=name, streaming=True))
    assert [row["captions"] for row in streamed] == list(split["captions"])
assert {{row["image"].size for split in splits.values() for row in split}} == {{(12, 24)}}
print(json.dumps({{name: split.remove_columns("image")[:] for name, split in splits.items()}}))
"""
    loaded = json.loads(run_client(code, cuhk / "elsewhere"))
    for split, rows in expected(cuhk, "cuhk").items():
        for name in ("captions", "image_id", "camera"):
            assert loaded[split][name] == [row[name] for row in rows]


def test_two_processes_write_the_same_rows(finetune, monkeypatch):
    monkeypatch.setattr("data_scripts.builders._CHUNK", 1)
    rows = processed_rows("cuhk")
    rows["train"][1]["caption"] = ""
    write_json(finetune / "finetune/cuhk_train.json", rows["train"])
    (finetune / "images/CUHK-PEDES/imgs" / CUHK_PATHS[2]).write_text("no image")
    one = prepare(finetune, "cuhk", "finetune", "--on_error", "skip", output="one")
    two = prepare(finetune, "cuhk", "finetune", "--on_error", "skip", "--num_proc", "2", output="two")
    assert read_set(one) == read_set(two)
    assert (one / "rejected.jsonl").read_text() == (two / "rejected.jsonl").read_text()
    assert len((one / "rejected.jsonl").read_text().splitlines()) == 5  # a caption, and four of an image


def swap(rows: list[dict], first: int, second: int) -> list[dict]:
    """Rows with two people exchanged."""
    return [row | {"id": {first: second, second: first}.get(row["id"], row["id"])} for row in rows]


CHANGES = {
    "exchanged ids": lambda rows: swap(rows, 1, 2),
    "other ids": lambda rows: [row | {"id": row["id"] + 1000} for row in rows],
    "other captions": lambda rows: [
        row | {"captions": [text.replace("first", "other") for text in row["captions"]]} for row in rows
    ],
}


def test_a_set_prepared_again_is_loaded_as_it_is_now(cuhk, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cuhk / "cache")
    for change in [list, *CHANGES.values()]:
        rows = change(official_rows("cuhk"))
        write_json(cuhk / "raw/reid_raw.json", rows)
        output = str(prepare(cuhk, "cuhk", "raw", "--overwrite"))
        wanted = [[row["captions"], row["id"]] for row in rows]
        loaded, streamed = load_dataset(output), load_dataset(output, streaming=True)
        for table in (loaded, streamed):
            assert [[row["captions"], row["image_id"]] for rows in table.values() for row in rows] == wanted


def test_sets_of_one_name_are_told_apart(cuhk, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cuhk / "cache")
    first = prepare(cuhk, "cuhk", "raw", output="a/cuhk")
    write_json(cuhk / "raw/reid_raw.json", swap(official_rows("cuhk"), 12_004, 12_005))
    second = prepare(cuhk, "cuhk", "raw", output="b/cuhk")
    ids = [list(load_dataset(str(folder), split="test")["image_id"]) for folder in (first, second)]
    assert ids == [[12_004, 12_005], [12_005, 12_004]]


def test_equal_rows_give_equal_names(cuhk):
    first, second = (prepare(cuhk, "cuhk", "raw", output=name) for name in ("one", "two"))
    names = [sorted(path.name for path in (folder / "data").iterdir()) for folder in (first, second)]
    assert names[0] == names[1]
    assert (first / "README.md").read_text().replace(str(first), str(second)) == (second / "README.md").read_text()


def test_other_pixels_of_equal_size_give_another_name(cuhk):
    name = official_rows("cuhk")[0]["file_path"]
    (image,) = [path for path in cuhk.rglob(Path(name).name) if path.as_posix().endswith(name)]
    content, names = image.read_bytes(), []
    for end in (b"\0", b"\1"):  # behind the pixels, where readers do not look
        image.write_bytes(content + end)
        folder = prepare(cuhk, "cuhk", "raw", "--overwrite")
        names.append({path.name for path in (folder / "data").iterdir()})
    assert len(names[0] - names[1]) == 1


def test_what_is_printed(cuhk, capsys):
    prepare(cuhk, "cuhk", "raw")
    printed = capsys.readouterr()
    assert "train: 3 images, 8 captions, 2 people" in printed.out
    assert "test: 2 images, 4 captions, 2 people" in printed.out
    assert "validation: 1 of 3,078 images (3,077 missing), 2 of 6,158 captions (6,156 missing)" in printed.err
    prepare(cuhk, "cuhk", "raw", "--overwrite", "--no_size_check")
    assert capsys.readouterr().err.count("3,078") == 0


# Rows that cannot be used


def change_caption(value):
    return lambda root, rows: rows[4].update(captions=value)


ERRORS = {
    "missing": (
        lambda root, rows: (root / "images/CUHK-PEDES/imgs/Market/004.png").unlink(),
        "missing image",
        "file_path",
    ),
    "corrupt": (
        lambda root, rows: (root / "images/CUHK-PEDES/imgs/Market/004.png").write_bytes(b"\x89PNG\r\n"),
        "corrupt image",
        "file_path",
    ),
    "parent": (lambda root, rows: rows[4].update(file_path="../004.png"), "path leaves the image root", "file_path"),
    "absolute": (
        lambda root, rows: rows[4].update(file_path="/etc/004.png"),
        "path leaves the image root",
        "file_path",
    ),
    "path type": (lambda root, rows: rows[4].update(file_path=None), "wrong type", "file_path"),
    "no captions": (change_caption([]), "empty caption", "captions"),
    "empty caption": (change_caption(["a man", " "]), "empty caption", "captions[1]"),
    "caption type": (change_caption(["a man", 5]), "wrong type", "captions[1]"),
    "captions type": (change_caption(5), "wrong type", "captions"),
    "identity": (lambda root, rows: rows[4].update(id="12004"), "wrong type", "id"),
    "no identity": (lambda root, rows: rows[4].pop("id"), "missing field", "id"),
    "split": (lambda root, rows: rows[4].update(split="gallery"), "unknown split", "split"),
    "identity nan": (lambda root, rows: rows[4].update(id=float("nan")), "wrong type", "id"),
    "identity infinite": (lambda root, rows: rows[4].update(id=float("inf")), "wrong type", "id"),
    "identity huge": (lambda root, rows: rows[4].update(id=10**30), "wrong type", "id"),
    "half character": (change_caption(["a man", "a \ud83d woman"]), "invalid text", "captions[1]"),
    "half character in path": (
        lambda root, rows: rows[4].update(file_path="Market/\udce9.png"),
        "invalid text",
        "file_path",
    ),
    "split type": (lambda root, rows: rows[4].update(split="\ud83d"), "unknown split", "split"),
    "nested captions": (change_caption(json.loads("[" * 500 + "]" * 500)), "wrong type", "captions[0]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_unusable_row_is_named_or_left_out(cuhk, case, capsys):
    change, reason, name = ERRORS[case]
    rows = official_rows("cuhk")
    change(cuhk, rows)
    file = write_json(cuhk / "raw/reid_raw.json", rows)
    message = failure(cuhk, "cuhk", "raw")
    assert message.startswith(f"prepare_pedes: {file}, row 4 (counting from 0), field {name}: {reason}: ")
    assert message.endswith("or pass --on_error skip to leave such rows out.")

    output = prepare(cuhk, "cuhk", "raw", "--on_error", "skip")
    written = read_set(output)
    assert [row["image_id"] for rows in written.values() for row in rows].count(12_004) == 0
    assert sum(len(rows) for rows in written.values()) == 5
    (record,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert (record["file"], record["row"], record["reason"]) == (str(file), 4, reason)
    assert f"1 {reason}" in capsys.readouterr().out


def test_a_caption_of_a_processed_image_is_left_out_alone(finetune):
    rows = processed_rows("cuhk")["train"]
    rows[1]["caption"] = "!"
    rows[5]["image_id"] = 77  # a caption of the third image, said to be of another person
    file = write_json(finetune / "finetune/cuhk_train.json", rows)
    assert f"{file}, row 5 (counting from 0), field image_id: conflicting person: row 4 gives" in failure(
        finetune, "cuhk", "finetune"
    )
    written = read_set(prepare(finetune, "cuhk", "finetune", "--on_error", "skip"))["train"]
    assert [len(row["captions"]) for row in written] == [1, 2, 3]


def test_images_in_two_splits_are_noted(cuhk, capsys):
    rows = official_rows("cuhk")
    rows.append(rows[0] | {"split": "test"})
    rows.append(rows[1])
    write_json(cuhk / "raw/reid_raw.json", rows)
    prepare(cuhk, "cuhk", "raw")
    printed = capsys.readouterr().out
    assert "note: 1 images are in two splits" in printed
    assert "note: 1 rows name an image that another row of the split also names" in printed


# Files


UNREADABLE = {
    "cut off": (lambda text: text[: len(text) // 2], "may be cut off|Unterminated|Expecting|Invalid"),
    "empty": (lambda text: b"", "row 0 .*the file is empty"),
    "no rows": (lambda text: b"[]", "the list has no rows"),
    "page": (lambda text: b"<!DOCTYPE html><html><body>404</body></html>", "row 0 .*an HTML or XML page"),
    "UTF-16": (lambda text: text.decode().encode("utf-16"), "row 0 .*UTF-16.*save the file as UTF-8"),
    "Latin-1": (
        lambda text: text.replace(b"second of 2", b"caf\xe9 of 2", 1),
        r"row 5 .*not UTF-8 .byte 0xe9.*save the file as UTF-8",
    ),
    "packed": (gzip.compress, "packed with gzip.*unpack it"),
    "nested": (lambda text: b"[" * 100_000, "nested too deeply"),
    "other fields": (
        lambda text: text.replace(b'"image_id"', b'"person"'),
        "row 0 .*expected the fields image, caption",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_file_of_a_folder_is_an_error_or_listed(finetune, case, capsys):
    change, message = UNREADABLE[case]
    file = finetune / "finetune/cuhk_train.json"
    file.write_bytes(change(file.read_bytes()))
    printed = failure(finetune, "cuhk", "finetune")
    assert printed.startswith(f"prepare_pedes: {file}: row ") and re.search(message, printed), printed

    output = prepare(finetune, "cuhk", "finetune", "--on_error", "skip")
    written = read_set(output)
    assert [len(written[split]) for split in ("validation", "test")] == [1, 2]
    (record,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert (record["file"], record["reason"]) == (str(file), "unreadable JSON") and re.search(
        message, record["problem"]
    )
    printed = capsys.readouterr().out
    assert f"note: {file} cannot be read from row {record['row']} (counting from 0)" in printed
    assert ("note: there is no train split" in printed) == ("train" not in written)
    assert record["row"] == 0 or len(written["train"]) in (2, 3)  # what came before is kept


def test_a_packed_file_and_a_broken_link_are_no_less_unreadable(finetune):
    file = finetune / "finetune/cuhk_train.json"
    packed = file.with_name("cuhk_train.json.gz")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert f"{packed}: row 0 (counting from 0) cannot be read: the file is packed" in failure(
        finetune, "cuhk", "finetune"
    )
    packed.unlink()
    file.symlink_to("nowhere")
    assert f"{file}: row 0 (counting from 0) cannot be read: No such file" in failure(finetune, "cuhk", "finetune")


def test_what_is_left_alone_is_said(finetune, capsys):
    (finetune / "finetune/README.txt").write_text("about")
    (finetune / "finetune/._cuhk_val.json").write_bytes(b"\x00\x05\x16\x07")
    (finetune / "finetune/icfg_train.json").write_text("[{")
    write_json(finetune / "finetune/words.json", {"a": 1})
    assert read_set(prepare(finetune, "cuhk", "finetune")) == expected(finetune, "cuhk")
    printed = capsys.readouterr().out
    for reason in (
        "README.txt (neither .json nor .jsonl)",
        "icfg_train.json (ICFG-PEDES by its name, but cannot be read)",
        "icfg_test.json (ICFG-PEDES)",
        "rstp_val.json (RSTPReid)",
        "words.json (no PEDES annotations)",
    ):
        assert reason in printed


def test_a_file_that_may_belong_to_any_set_is_an_error(finetune):
    rows = [{"image": "a/b.jpg", "caption": ["a man"], "image_id": 1}]
    write_json(finetune / "finetune/test.json", rows)
    assert "neither name nor paths show whether test.json belongs to CUHK-PEDES" in failure(
        finetune, "cuhk", "finetune"
    )


def test_another_set_than_named_is_an_error(cuhk):
    message = failure(cuhk, "icfg", "raw")
    assert "holds CUHK-PEDES, not ICFG-PEDES; pass --dataset cuhk" in message


def test_several_official_files_are_an_error(cuhk):
    write_json(cuhk / "raw/copy.json", official_rows("cuhk"))
    assert "holds several official files: copy.json, reid_raw.json; pass one of them" in failure(cuhk, "cuhk", "raw")
    assert read_set(prepare(cuhk, "cuhk", "raw/copy.json")) == expected(cuhk, "cuhk")


def test_a_split_that_nothing_tells_is_an_error(cuhk):
    file = write_json(cuhk / "processed/queries.json", processed_rows("cuhk")["test"])
    message = failure(cuhk, "cuhk", "processed")
    assert f"{file}: cannot distinguish the validation from the test split" in message
    write_json(cuhk / "train/captions.json", processed_rows("cuhk")["train"])
    assert list(read_set(prepare(cuhk, "cuhk", "train"))) == ["train"]


def test_files_without_annotations_are_an_error(cuhk):
    write_json(cuhk / "other/a.json", [{"boxes": [], "image": "a", "caption": "b", "image_id": 1}])
    (cuhk / "other/b.json").write_text("{")
    message = failure(cuhk, "cuhk", "other")
    assert "no PEDES annotations in a.json, b.json; expected the official file" in message
    assert "row 0 (counting from 0) cannot be read" in failure(cuhk, "cuhk", "other/b.json")


def test_wrong_image_folders_are_named(cuhk):
    assert "none of 6 images looked for is there" in failure(cuhk, "cuhk", "raw", images="raw")
    assert "is a file; expected the folder" in failure(cuhk, "cuhk", "raw", images="raw/reid_raw.json")


@pytest.mark.parametrize(
    ("path", "camera"),
    [
        ("CUHK-PEDES/imgs/cam_a/0012.jpg", "cam_a"),
        ("Market/0002_c1s1_000451_03.jpg", None),
        ("0000_c5_0022.jpg", "c5"),
        ("RSTPReid/0000_c14_0022.jpg", "c14"),
        ("test/0001/0001_002_04_0113noon_0033_0.jpg", "c4"),
        ("0001_002.jpg", None),
    ],
)
def test_cameras_are_read_off_the_path(path, camera):
    assert camera_of(path) == camera


def test_published_sizes_are_compared_split_by_split():
    whole = dict(PUBLISHED["icfg"])
    assert compare_with_published("icfg", whole) == []
    assert compare_with_published("icfg", {"train": whole["train"]}) == ["test: missing (19,848 images published)"]
    lines = compare_with_published("icfg", whole | {"train": Size(34_670, 34_680, 3_102), "validation": Size(1, 2, 1)})
    assert lines == [
        "train: 34,670 of 34,674 images (4 missing), 34,680 of 34,674 captions (6 too many)",
        "validation: not in the published dataset (1 images)",
    ]


# Captions of one's own


OWN = """path,caption,identity,split,camera
cam_a/a.jpg,"a man, walking",7,,
b.png,a woman,8,val,gate 2
cam_a/a.jpg,he wears red,7,train,
c.jpg,a child,9,test,gate 1
"""


@pytest.fixture
def own(tmp_path):
    for seed, name in enumerate(("cam_a/a.jpg", "b.png", "c.jpg")):
        draw(tmp_path / "images" / name, seed)
    (tmp_path / "people.csv").write_text(OWN)
    return tmp_path


def test_a_csv_file_is_read(own, capsys):
    output = prepare(own, "csv", "people.csv")
    rows = {split: [dict(row) for row in rows] for split, rows in read_set(output).items()}
    contents = {row.pop("image")["bytes"] for rows in rows.values() for row in rows}
    assert contents == {path.read_bytes() for path in (own / "images").rglob("*.*")}
    assert rows == {
        "train": [{"captions": ["a man, walking", "he wears red"], "image_id": 7, "camera": "cam_a"}],
        "validation": [{"captions": ["a woman"], "image_id": 8, "camera": "gate 2"}],
        "test": [{"captions": ["a child"], "image_id": 9, "camera": "gate 1"}],
    }
    printed = capsys.readouterr()
    assert "train: 1 images, 2 captions, 1 people" in printed.out and "published" not in printed.err
    card = (output / "README.md").read_text()
    assert "license: unknown" in card and "published" not in card and "research" not in card
    assert run_client(
        f"from datasets import load_dataset; print(load_dataset({str(output)!r})['test'][0]['captions'])", own / "x"
    )


def test_a_csv_set_prepared_again_is_loaded_as_it_is_now(own, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", own / "cache")
    for first, second in ((7, 9), (9, 7)):
        rows = [f"cam_a/a.jpg,a man,{first}", f"c.jpg,a man,{second}"]
        (own / "people.csv").write_text("path,caption,identity\n" + "\n".join(rows))
        output = str(prepare(own, "csv", "people.csv", "--overwrite"))
        assert list(load_dataset(output, split="train")["image_id"]) == [first, second]


PEOPLE = "path,caption,identity\nanna/0.png,a woman,1\nbo/0.png,a man,2\ncleo/0.png,a child,3\n"


@pytest.fixture
def people(tmp_path):
    for seed, name in enumerate(("anna", "bo", "cleo")):
        draw(tmp_path / "photos" / name / "0.png", seed)
    (tmp_path / "people.csv").write_text(PEOPLE)
    return tmp_path


def test_nobody_gets_the_pictures_of_another(people):
    message = failure(people, "csv", "people.csv", images="photos/anna")
    assert f"{people / 'people.csv'}, row 1 (counting from 0), field path: missing image: " in message
    assert "its first anna/ left out" in message
    rows = read_set(prepare(people, "csv", "people.csv", "--on_error", "skip", images="photos/anna"))["train"]
    assert [(row["image_id"], row["image"]["bytes"]) for row in rows] == [
        (1, (people / "photos/anna/0.png").read_bytes())
    ]
    rows = read_set(prepare(people, "csv", "people.csv", "--overwrite", images="photos"))["train"]
    assert [row["image"]["bytes"] for row in rows] == [
        (people / "photos" / name / "0.png").read_bytes() for name in ("anna", "bo", "cleo")
    ]


def test_rows_of_an_image_are_joined_however_its_path_is_written(people):
    (people / "people.csv").write_text(PEOPLE + "./bo\\0.png,he walks,2\nbo//0.png,a boy,3\n")
    assert "row 4 (counting from 0), field identity: conflicting person" in failure(
        people, "csv", "people.csv", images="photos"
    )
    (people / "people.csv").write_text(PEOPLE + "./bo\\0.png,he walks,2\n")
    rows = read_set(prepare(people, "csv", "people.csv", images="photos"))["train"]
    assert [row["captions"] for row in rows] == [["a woman"], ["a man", "he walks"], ["a child"]]


def test_a_csv_that_breaks_is_named_or_left_out_from_there(people, capsys):
    file = people / "people.csv"
    file.write_bytes(PEOPLE.replace("a child", "un \xe9l\xe8ve").encode("latin-1"))
    message = failure(people, "csv", "people.csv", images="photos")
    assert (
        f"{file}: row 2 (counting from 0, without the header) cannot be read: it is not UTF-8 (byte 0xe9)" in message
    )
    assert "save the file as UTF-8" in message
    output = prepare(people, "csv", "people.csv", "--on_error", "skip", images="photos")
    assert [row["image_id"] for row in read_set(output)["train"]] == [1, 2]
    assert "cannot be read from row 2" in capsys.readouterr().out


def test_split_and_camera_may_be_left_out(own):
    (own / "people.csv").write_text("identity,path,caption\n1,b.png,a woman\n")
    assert list(read_set(prepare(own, "csv", "people.csv"))) == ["train"]


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ("b.png,a woman,anna,val,", "wrong type", "identity"),
        ("b.png,a woman,1_0,val,", "wrong type", "identity"),
        (f"b.png,a woman,{10**30},val,", "wrong type", "identity"),
        ("b.png,,8,val,", "missing field", "caption"),
        ("b.png,...,8,val,", "empty caption", "caption"),
        (",a woman,8,val,", "missing field", "path"),
        ("nowhere.png,a woman,8,val,", "missing image", "path"),
        ("../b.png,a woman,8,val,", "path leaves the image root", "path"),
        ("b.png,a woman,8,gallery,", "unknown split", "split"),
        ("cam_a/a.jpg,a woman,8,,", "conflicting person", "identity"),
        ("b.png,a woman,8,val,gate 9", "conflicting camera", "camera"),
    ],
)
def test_an_unusable_csv_row_is_named_or_left_out(own, row, reason, field):
    file = own / "people.csv"
    file.write_text(OWN + row + "\n")
    assert f"{file}, row 4 (counting from 0), field {field}: {reason}: " in failure(own, "csv", "people.csv")
    output = prepare(own, "csv", "people.csv", "--on_error", "skip")
    assert sum(len(rows) for rows in read_set(output).values()) == 3
    (record,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert (record["row"], record["reason"]) == (4, reason)


def test_a_csv_without_its_columns_is_an_error(own):
    (own / "people.csv").write_text("image,text\na,b\n")
    assert "must name the columns path, caption, identity" in failure(own, "csv", "people.csv")
    assert "is not a file; expected a CSV file with --dataset csv" in failure(own, "csv", "images")
