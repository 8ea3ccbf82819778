import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import datasets
import pytest
from datasets import load_dataset

from data_scripts.prepare_sda import main
from tests.helpers.sources import (
    ROOT,
    draw,
    image_size,
    leftovers,
    read_set,
    run_client,
    sda_row,
    truncate,
    write_json,
    write_sda,
)


FIRST = "sda_5000_10000.json"
SECOND = "sda_10000_15000.json"


@pytest.fixture
def source(tmp_path):
    rows = write_sda(tmp_path)
    return tmp_path, rows


def prepare(root, *options, images="images/SDA", output="out/sda"):
    main(
        ["--annotations", str(root / "sda"), "--images", str(root / images), "--output", str(root / output), *options]
    )
    return root / output


def failure(root, *options, **paths) -> str:
    with pytest.raises(SystemExit) as caught:
        prepare(root, *options, **paths)
    assert leftovers(root / paths.get("output", "out/sda")) == []
    return str(caught.value)


def test_rows_come_out_as_they_went_in(source):
    root, rows = source
    output = prepare(root)
    written = read_set(output)["train"]
    expected = rows[FIRST] + rows[SECOND]
    (shard,) = (output / "data").iterdir()
    assert re.fullmatch(r"train-00000-of-00001-[0-9a-f]{16}\.parquet", shard.name)
    assert len(written) == len(expected) == 9
    for got, row in zip(written, expected, strict=True):
        assert got["image"]["bytes"] == (root / "images/SDA" / row["image"]).read_bytes()
        assert [got[name] for name in ("caption", "image_id", "phrases", "logits")] == [
            row[name] for name in ("caption", "image_id", "phrases", "logits")
        ]
        assert [pytest.approx(box) for box in got["boxes"]] == row["boxes"]
    assert leftovers(output) == []


@pytest.mark.parametrize("images", ["images", "images/SDA"])
@pytest.mark.parametrize("prefix", ["", "SDA/"])
def test_the_image_root_may_be_named_at_any_level(source, images, prefix):
    root, rows = source
    for name, values in rows.items():
        write_json(root / "sda" / name, [row | {"image": prefix + row["image"]} for row in values])
    assert len(read_set(prepare(root, images=images))["train"]) == 9


def test_a_fresh_process_loads_it(source, tmp_path):
    root, rows = source
    output = prepare(root, "--num_proc", "2")
    code = f"""
import json
from datasets import load_dataset
whole = load_dataset({str(output)!r})
streamed = load_dataset({str(output)!r}, "region", split="train", streaming=True)
pairs = load_dataset({str(output)!r}, "caption")
pairs_streamed = load_dataset({str(output)!r}, "caption", split="train", streaming=True)
table = whole["train"]
assert str(table.features["boxes"]) == "List(List(Value('float32'), length=4))", table.features
assert [row["caption"] for row in streamed] == list(table["caption"])
assert pairs["train"].column_names == ["image", "caption", "image_id"]
assert [set(row) for row in pairs_streamed] == [{{"image", "caption", "image_id"}}] * len(table)
assert streamed.features == table.features
print(json.dumps([row | {{"image": row["image"].size}} for row in table]))
"""
    loaded = json.loads(run_client(code, tmp_path / "elsewhere"))
    expected = rows[FIRST] + rows[SECOND]
    assert [row["image_id"] for row in loaded] == [row["image_id"] for row in expected]
    assert [row["phrases"] for row in loaded] == [row["phrases"] for row in expected]
    assert {tuple(row["image"]) for row in loaded} == {(12, 24)}


def test_two_processes_write_the_same_rows(source):
    root, rows = source
    rows[FIRST][1]["caption"] = " "
    rows[SECOND][2]["boxes"] = [[0.5, 0.5, 2, 0.5]]
    write_json(root / "sda" / FIRST, rows[FIRST])
    write_json(root / "sda" / SECOND, rows[SECOND])
    one = prepare(root, "--on_error", "skip", output="out/one")
    two = prepare(root, "--on_error", "skip", "--num_proc", "2", output="out/two")
    assert len(list((two / "data").iterdir())) == 2
    assert read_set(one) == read_set(two)
    (digest,), others = ({path.stem.split("-")[-1] for path in (folder / "data").iterdir()} for folder in (one, two))
    assert others == {digest}
    assert (one / "rejected.jsonl").read_text() == (two / "rejected.jsonl").read_text()


CHANGES = {
    "exchanged ids": lambda row: {"image_id": {1: 2, 2: 1}.get(row["image_id"], row["image_id"])},
    "other ids": lambda row: {"image_id": row["image_id"] + 1000},
    "other phrases": lambda row: {"phrases": [phrase.replace("part", "side") for phrase in row["phrases"]]},
    "other captions": lambda row: {"caption": row["caption"].replace("person", "figure")},
}


def test_a_set_prepared_again_is_loaded_as_it_is_now(source, monkeypatch):
    root, rows = source
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    names = ("image_id", "phrases", "caption")
    for change in [lambda row: {}, *CHANGES.values()]:
        for name in (FIRST, SECOND):
            write_json(root / "sda" / name, [row | change(row) for row in rows[name]])
        output = str(prepare(root, "--overwrite"))
        expected = [[(row | change(row))[name] for row in rows[FIRST] + rows[SECOND]] for name in names]
        loaded = load_dataset(output, split="train")
        assert [list(loaded[name]) for name in names] == expected
        assert list(load_dataset(output, "caption", split="train")["image_id"]) == expected[0]
        assert [row["image_id"] for row in load_dataset(output, split="train", streaming=True)] == expected[0]


def test_chunks_of_one_file_go_to_several_processes(source, monkeypatch):
    root, rows = source
    monkeypatch.setattr("data_scripts.builders._CHUNK", 2)
    (root / "sda" / SECOND).unlink()
    two = prepare(root, "--num_proc", "2")
    assert len(list((two / "data").iterdir())) == 2
    assert [row["image_id"] for row in read_set(two)["train"]] == [row["image_id"] for row in rows[FIRST]]


# Rows that cannot be used


def absolute(root, row):
    row["image"] = str(root / "images/SDA" / row["image"])


def link_out(root, row):
    path = root / "images/SDA" / row["image"]
    path.rename(root / "secret.png")
    path.symlink_to(root / "secret.png")


def field(name, value):
    def change(root, row):
        if value is KeyError:
            del row[name]
        else:
            row[name] = value

    return change


def image_file(act):
    return lambda root, row: act(root / "images/SDA" / row["image"])


ONE_BOX = {"boxes": [[0.5, 0.5, 0.5, 0.5]], "logits": [0.5], "phrases": ["a hat"]}


def region(**changes):
    return lambda root, row: row.update(ONE_BOX | changes)


ERRORS = {
    "missing": (image_file(os.unlink), "missing image", "image"),
    "truncated": (image_file(truncate), "corrupt image", "image"),
    "empty file": (image_file(lambda path: path.write_bytes(b"")), "corrupt image", "image"),
    "not an image": (image_file(lambda path: path.write_text("<html>")), "corrupt image", "image"),
    "folder": (field("image", "c_0_5000"), "missing image", "image"),
    "parent": (field("image", "c_0_5000/../../secret.png"), "path leaves the image root", "image"),
    "windows parent": (field("image", "c_0_5000\\..\\..\\secret.png"), "path leaves the image root", "image"),
    "absolute": (absolute, "path leaves the image root", "image"),
    "drive": (field("image", "C:/secret.png"), "path leaves the image root", "image"),
    "link": (link_out, "path leaves the image root", "image"),
    "no path": (field("image", 5), "wrong type", "image"),
    "empty path": (field("image", ""), "missing image", "image"),
    "no caption": (field("caption", KeyError), "missing field", "caption"),
    "empty caption": (field("caption", "  \n"), "empty caption", "caption"),
    "punctuation": (field("caption", "..."), "empty caption", "caption"),
    "caption type": (field("caption", 3), "wrong type", "caption"),
    "id type": (field("image_id", "7"), "wrong type", "image_id"),
    "id bool": (field("image_id", True), "wrong type", "image_id"),
    "phrases short": (region(phrases=[]), "different lengths", "boxes"),
    "logits long": (region(logits=[0.5, 0.5]), "different lengths", "boxes"),
    "logits absent": (region(logits=None), "different lengths", "boxes"),
    "logit type": (region(logits=["high"]), "wrong type", "logits[0]"),
    "empty phrase": (region(phrases=[""]), "empty phrase", "phrases[0]"),
    "pixels": (region(boxes=[[100, 200, 50, 80]]), "box outside 0..1", "boxes[0]"),
    "negative": (region(boxes=[[0.5, -0.1, 0.5, 0.5]]), "box outside 0..1", "boxes[0]"),
    "corners": (region(boxes=[[0.3, 0.3, 0.9, 0.9]]), "box outside 0..1", "boxes[0]"),
    "no area": (region(boxes=[[0.5, 0.5, 0, 0.5]]), "box without area", "boxes[0]"),
    "nan": (region(boxes=[[0.5, 0.5, float("nan"), 0.5]]), "wrong type", "boxes[0]"),
    "too large": (region(boxes=[[0.5, 0.5, 10**400, 0.5]]), "wrong type", "boxes[0]"),
    "infinite logit": (region(logits=[float("inf")]), "wrong type", "logits[0]"),
    "logit beyond 32 bits": (region(logits=[1e39]), "wrong type", "logits[0]"),
    "id nan": (field("image_id", float("nan")), "wrong type", "image_id"),
    "id of 31 digits": (field("image_id", 10**30), "wrong type", "image_id"),
    "half character": (field("caption", "a man \udc00"), "invalid text", "caption"),
    "half character in phrase": (region(phrases=["a hat \ud800"]), "invalid text", "phrases[0]"),
    "half character in path": (field("image", "c_0_5000/\ud800.jpg"), "invalid text", "image"),
    "nested caption": (field("caption", json.loads("[" * 500 + "]" * 500)), "wrong type", "caption"),
    "three numbers": (region(boxes=[[0.5, 0.5, 0.5]]), "wrong type", "boxes[0]"),
    "boxes type": (region(boxes={"0": 1}), "wrong type", "boxes"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_unusable_row_is_named_or_left_out(source, case, capsys):
    root, rows = source
    change, reason, name = ERRORS[case]
    draw(root / "secret.png", 1)
    change(root, rows[SECOND][1])
    write_json(root / "sda" / SECOND, rows[SECOND])
    message = failure(root)
    assert message.startswith(
        f"prepare_sda: {root / 'sda' / SECOND}, row 1 (counting from 0), field {name}: {reason}: "
    )
    assert message.endswith("or pass --on_error skip to leave such rows out.")
    assert "expected" in message or "cannot be decoded" in message
    assert not (root / "out/sda").exists()

    output = prepare(root, "--on_error", "skip")
    assert [row["image_id"] for row in read_set(output)["train"]] == [0, 1, 2, 3, 4, 5, 7, 8]
    (record,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert (record["file"], record["row"], record["reason"]) == (str(root / "sda" / SECOND), 1, reason)
    assert f"1 {reason}" in capsys.readouterr().out
    assert "1 rows of the source" in (output / "README.md").read_text()


def test_a_row_that_is_no_object_is_named(source):
    root, rows = source
    write_json(root / "sda" / SECOND, [*rows[SECOND], ["a"]])
    assert "row 4 (counting from 0), field (all): wrong type: expected an object, got ['a']" in failure(root)


def test_rounded_and_overhanging_boxes_and_absent_regions_are_kept(source):
    root, rows = source
    rows[FIRST][0] |= {
        "boxes": [[1.0004, 0.5, 0.02, 1.0009], [0.2, 0.5, 0.42, 0.5]],
        "logits": [1, 0],
        "phrases": ["a", "b"],
    }
    for name in ("boxes", "logits", "phrases"):
        del rows[FIRST][1][name]
        rows[FIRST][2][name] = None
    write_json(root / "sda" / FIRST, rows[FIRST])
    written = read_set(prepare(root))["train"]
    assert written[0]["boxes"] == [pytest.approx([1, 0.5, 0.02, 1]), pytest.approx([0.2, 0.5, 0.42, 0.5])]
    assert [row["boxes"] for row in written[1:3]] == [[], []]


def test_links_out_of_the_root_can_be_allowed(source):
    root, _ = source
    (root / "images/SDA/c_0_5000").rename(root / "disk2")
    (root / "images/SDA/c_0_5000").symlink_to(root / "disk2")
    assert "a link to" in failure(root)
    assert len(read_set(prepare(root, "--follow_symlinks"))["train"]) == 9


def test_an_error_in_one_of_two_processes_reaches_the_user_plainly(source):
    root, rows = source
    rows[SECOND][3]["caption"] = ""
    write_json(root / "sda" / SECOND, rows[SECOND])
    message = failure(root, "--num_proc", "2")
    assert message.startswith(
        f"prepare_sda: {root / 'sda' / SECOND}, row 3 (counting from 0), field caption: empty caption"
    )


def test_a_process_that_dies_is_told(source, monkeypatch):
    root, _ = source
    test_process = os.getpid()
    monkeypatch.setattr("data_scripts.image_files.decode", lambda content: os.getpid() == test_process or os._exit(9))
    assert "a worker died" in failure(root, "--num_proc", "2")


@pytest.mark.parametrize("num_proc", ["1", "2"])
def test_a_full_disk_is_told_plainly(source, monkeypatch, num_proc):
    root, _ = source

    def write_table(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ParquetWriter.write_table", write_table)
    message = failure(root, "--num_proc", num_proc)
    assert (
        message.startswith("prepare_sda: ")
        and "cannot be written: the disk is full (No space left on device" in message
    )


def test_a_file_cut_off_is_an_error_before_any_work_or_left_out(source):
    root, _ = source
    truncate(root / "sda" / FIRST)
    message = failure(root)
    assert f"{root / 'sda' / FIRST}: row " in message and "cannot be read" in message
    output = prepare(root, "--on_error", "skip")
    (record,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert record["reason"] == "unreadable JSON"
    written = [row["image_id"] for row in read_set(output)["train"]]
    assert written == [*range(record["row"]), 5, 6, 7, 8] and 0 < record["row"] < 5


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "the file is empty"), (b"<html>", "an HTML or XML page"), (b'[{"caption": "caf\xe9"}]', "byte 0xe9")],
)
def test_a_file_that_is_no_json_is_an_error_or_left_out(source, content, problem, capsys):
    root, _ = source
    (root / "sda" / SECOND).write_bytes(content)
    assert f"{root / 'sda' / SECOND}: row 0 (counting from 0) cannot be read: " in failure(root)
    assert problem in failure(root)
    assert len(read_set(prepare(root, "--on_error", "skip"))["train"]) == 5
    assert f"note: {root / 'sda' / SECOND} cannot be read from row 0" in capsys.readouterr().out


def test_a_row_of_windows_is_read(source):
    root, rows = source
    rows[FIRST][1]["image"] = rows[FIRST][1]["image"].replace("/", "\\")
    write_json(root / "sda" / FIRST, rows[FIRST])
    written = read_set(prepare(root))["train"]
    assert written[1]["image"]["bytes"] == (root / "images/SDA/c_0_5000/1_0.png").read_bytes()
    assert written[1]["image"]["path"] == "1_0.png"


def test_a_literal_name_with_a_backslash_comes_first(source):
    root, rows = source
    draw(root / "images/SDA/c_0_5000\\1_0.png", 99)
    rows[FIRST][1]["image"] = "c_0_5000\\1_0.png"
    write_json(root / "sda" / FIRST, rows[FIRST])
    written = read_set(prepare(root))["train"]
    assert written[1]["image"]["bytes"] == (root / "images/SDA/c_0_5000\\1_0.png").read_bytes()


def test_images_named_twice_are_noted(source, capsys):
    root, rows = source
    write_json(root / "sda" / FIRST, rows[FIRST] + rows[FIRST][:2])
    prepare(root)
    assert "note: 2 rows name an image that another row also names" in capsys.readouterr().out


# Output


def test_the_script_runs_by_path_and_warns_of_missing_rows(source):
    root, _ = source
    command = [sys.executable, str(ROOT / "data_scripts/prepare_sda.py"), "--annotations", str(root / "sda")]
    command += ["--images", str(root / "images/SDA"), "--output", "a/b/sda"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_DATASETS_DISABLE_PROGRESS_BARS"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "9 rows in" in run.stdout and "rows/s" in run.stdout
    assert "train: 9 of 1,217,750 images (1,217,741 missing)" in run.stderr
    assert "9/9" in run.stderr  # the progress bar knows the total
    assert (root / "a/b/sda/README.md").is_file()
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "exists; expected a new folder; pass --overwrite to replace it" in run.stderr


def test_the_size_check_can_be_left_out(source, capsys):
    root, _ = source
    prepare(root, "--no_size_check")
    assert "published" not in capsys.readouterr().err


def test_an_output_is_replaced_only_if_it_is_a_prepared_set(source):
    root, rows = source
    (root / "out/sda").mkdir(parents=True)  # an empty folder is as good as none
    prepare(root)
    assert "exists; expected a new folder" in failure(root)
    write_json(root / "sda" / SECOND, rows[SECOND][:1])
    assert len(read_set(prepare(root, "--overwrite"))["train"]) == 6
    (root / "out/notes").mkdir()
    (root / "out/notes/diary.txt").write_text("dear diary")
    assert "is not a prepared dataset, so --overwrite does not replace it" in failure(
        root, "--overwrite", output="out/notes"
    )
    assert (root / "out/notes/diary.txt").exists()


def test_an_error_leaves_the_set_that_was_there(source):
    root, rows = source
    before = read_set(prepare(root))
    rows[FIRST][0]["caption"] = ""
    write_json(root / "sda" / FIRST, rows[FIRST])
    failure(root, "--overwrite")
    assert read_set(root / "out/sda") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--annotations", "nowhere"], "--annotations nowhere does not exist"),
        (["--images", "nowhere"], "--images nowhere does not exist; expected the folder that holds the images"),
        (["--images", "."], "missing image: none of 9 images looked for is there"),
        (["--num_proc", "0"], "2"),
        (["--max_shard_size", "big"], "2"),
    ],
)
def test_wrong_arguments_are_named(source, change, message, monkeypatch):
    root, _ = source
    monkeypatch.chdir(root / "sda")
    assert message in failure(root, *change)


def test_pedes_annotations_are_sent_to_the_other_script(source):
    root, _ = source
    write_json(root / "sda" / FIRST, [{"split": "train", "captions": ["a"], "file_path": "a.jpg", "id": 1}])
    assert "use `mra prepare pedes`" in failure(root)


def test_no_row_left_is_an_error(source):
    root, rows = source
    for name, values in rows.items():
        write_json(root / "sda" / name, [row | {"caption": ""} for row in values])
    assert "no row can be used (9 empty caption); nothing was written" in failure(root, "--on_error", "skip")
    for name in rows:
        write_json(root / "sda" / name, [])
    assert "the annotations have no usable row" in failure(root)


def test_shards_stay_below_the_size(source):
    root, _ = source
    rows = [sda_row(index) for index in range(9)] * 60  # batches of 200 rows
    for name in (FIRST, SECOND):
        (root / "sda" / name).unlink()
    write_json(root / "sda" / "all.json", rows)
    output = prepare(root, "--max_shard_size", "100KB")
    assert len(list((output / "data").glob("train-0000?-of-00003-*.parquet"))) == 3
    written = read_set(output)["train"]
    assert [row["caption"] for row in written] == [row["caption"] for row in rows]
    assert image_size(written[-1]) == (12, 24)


@pytest.mark.parametrize("num_proc", ["1", "2"])
def test_a_killed_run_leaves_nothing_that_looks_finished(source, num_proc):
    root, rows = source
    write_json(root / "sda" / FIRST, rows[FIRST] * 8000)
    output = root / "out/sda"
    command = [sys.executable, "-m", "data_scripts.prepare_sda", "--annotations", str(root / "sda")]
    command += ["--images", str(root / "images/SDA"), "--output", str(output), "--num_proc", num_proc]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(output.parent.glob(".unfinished-*-sda/**/*.parquet")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(SystemExit, match="another run is writing it"):
        prepare(root)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run.communicate(timeout=10)  # ends when no process of the run holds the pipes
    assert not output.exists()
    write_json(root / "sda" / FIRST, rows[FIRST])
    prepare(root, "--num_proc", num_proc)
    assert len(read_set(output)["train"]) == 9
    assert leftovers(output) == []


def test_one_row_does_not_decide_where_all_paths_start(tmp_path):
    """The first path is found without its leading folder, all others as they are: it is the one that is left out."""
    rows = [sda_row(index, folder="part") for index in range(5)]
    for row in rows:
        draw(tmp_path / "images" / row["image"], row["image_id"])
    rows[0]["image"] = f"images/{rows[0]['image']}"
    write_json(tmp_path / "sda" / "sda_5000_10000.json", rows)
    output = prepare(tmp_path, "--on_error", "skip", images="images")
    assert [row["image_id"] for row in read_set(output)["train"]] == [1, 2, 3, 4]
