"""What is loaded is what the files hold now, whatever `datasets` keeps in its cache."""

import errno
import json
import os
import re
import shutil

import datasets
import pytest
from accelerate import PartialState
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from mra.common.command_line import FullDiskError
from mra.common.streaming import Streaming
from mra.common.tables import cache_folder, files_digest, load_split, open_builder, split_names
from mra.gallery.sources import open_source


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of its own, and the state that loggers ask for."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def write_rows(folder, ids, card: str | None = CARD):
    """A set of one shard, its name, size and modification time always the same."""
    shard = folder / "data/train-00000-of-00001.parquet"
    shard.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image_id": ids}).to_parquet(shard)
    os.utime(shard, ns=(10**18, 10**18))
    if card:
        (folder / "README.md").write_text(card)
    return str(folder)


def load_everywhere(name: str) -> list[list[int]]:
    streamed = load_split(name, "train", Streaming(1, 10, 1))
    tables = [load_split(name, "train"), load_split(name), load_split(name, "train[:100%]"), streamed.to_dataset()]
    return [list(table["image_id"]) for table in tables]


@pytest.mark.parametrize("card", [CARD, None])
def test_a_changed_folder_is_read_again(tmp_path, card):
    name = write_rows(tmp_path / "set", [1, 2, 1], card)
    assert load_everywhere(name) == [[1, 2, 1]] * 4
    write_rows(tmp_path / "set", [2, 1, 2], card)
    assert load_everywhere(name) == [[2, 1, 2]] * 4


def test_folders_of_one_name_are_told_apart(tmp_path):
    for ids in ([1, 2], [2, 1]):
        name = write_rows(tmp_path / str(ids[0]) / "set", ids)
        assert load_everywhere(name) == [ids] * 4


def test_an_unchanged_folder_is_not_copied_again(tmp_path, monkeypatch):
    name = write_rows(tmp_path / "set", [1, 2])
    first = load_split(name, "train")
    monkeypatch.chdir(tmp_path)
    again = load_split("set", "train")
    assert again.cache_files == first.cache_files
    assert open_builder("set").cache_dir.startswith(str(tmp_path / "cache"))


def test_the_hub_keeps_its_own_place():
    assert cache_folder("user/nowhere") is None


def test_labels_of_a_folder_of_pictures_are_read_again(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 16)).save(folder / name)
    for ids in ([1, 2], [2, 1]):
        rows = [{"file_name": name, "image_id": number} for name, number in zip(("a.png", "b.png"), ids, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        os.utime(folder / "metadata.jsonl", ns=(10**18, 10**18))
        assert list(load_split(str(folder), "train")["image_id"]) == ids


def test_a_gallery_reads_a_changed_set(tmp_path):
    Image.new("RGB", (8, 16)).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    for person in (1, 2):
        rows = {"image": [image], "person": [person]}
        shard = tmp_path / "set/data/train-00000-of-00001.parquet"
        shard.parent.mkdir(parents=True, exist_ok=True)
        features = datasets.Features({"image": datasets.Image(), "person": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(shard)
        (tmp_path / "set/README.md").write_text(CARD)
        assert [item.columns for item in open_source(tmp_path / "set").items] == [{"person": person}]


def test_slices_of_splits(tmp_path):
    name = write_rows(tmp_path / "set", list(range(10)))
    for split, expected in {
        "train[:3]": [0, 1, 2],
        "train[-2:]": [8, 9],
        "train[50%:70%]": [5, 6],
    }.items():
        streamed = load_split(name, split, Streaming(1, 10, 1))
        assert list(load_split(name, split)["image_id"]) == expected == streamed.to_dataset()["image_id"][:]
    assert list(load_split(name, "train[:1]+train[9:]")["image_id"]) == [0, 9]
    assert split_names("train[:10%] + test") == ["train", "test"]
    with pytest.raises(ValueError, match=r"`streaming` reads one split, got train\[:1\]\+train\[9:\]"):
        load_split(name, "train[:1]+train[9:]", Streaming(1, 10, 1))


def test_what_is_not_there_is_named(tmp_path):
    name = write_rows(tmp_path / "set", [1])
    assert load_split(name, "validation", optional=True) is None
    with pytest.raises(ValueError, match=rf"^--data {name} has no split test\[:5\]: expected one of train$"):
        load_split(name, "test[:5]", argument="--data")
    with pytest.raises(ValueError, match=rf"^dataset {tmp_path}/none does not exist; expected a dataset"):
        load_split(f"{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"^images {tmp_path}/empty is a folder without data; expected pictures"):
        load_split(f"{tmp_path}/empty", argument="images", expected="pictures")
    with pytest.raises(ValueError, match=rf"^dataset {name} cannot be read: ValueError: Unknown|Unrecognized"):
        load_split(name, "train[:x]")
    datasets.Dataset.from_dict({"image_id": [1]}).to_parquet(tmp_path / "two/test.parquet")
    datasets.Dataset.from_dict({"image_id": [1]}).to_parquet(tmp_path / "two/train.parquet")
    with pytest.raises(ValueError, match=r"two has the splits train, test: choose one with `split`"):
        load_split(f"{tmp_path}/two")


def test_a_name_that_no_folder_has_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def fail(name, **options):
        asked.append(name)
        raise {"user/none": DatasetNotFoundError, "user/far": ConnectionError}[name]("the library's words")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(
        ValueError, match=r"^dataset user/none is neither a folder nor a dataset on the Hub; expected "
    ):
        load_split("user/none")
    with pytest.raises(ValueError, match=r"^dataset user/far is not a folder, and the Hub cannot be reached; "):
        load_split("user/far")
    for name in ("user/set/part", f"{tmp_path}/none", "a set"):  # not names that the Hub gives
        with pytest.raises(ValueError, match=f"^dataset {name} does not exist"):
            load_split(name)
    assert asked == ["user/none", "user/far"]


def test_a_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    """Its name may be one that the Hub gives."""
    write_rows(tmp_path / "user" / "set", [1, 2])
    monkeypatch.chdir(tmp_path)
    assert list(load_split("user/set")["image_id"]) == [1, 2]


def test_several_splits_are_joined(tmp_path):
    for split, ids in {"test": [3], "train": [1, 2]}.items():
        datasets.Dataset.from_dict({"image_id": ids}).to_parquet(tmp_path / f"set/{split}.parquet")
    for split, ids in {"all": [1, 2, 3], "train+test": [1, 2, 3], "test": [3]}.items():
        assert sorted(load_split(f"{tmp_path}/set", split)["image_id"]) == ids
    assert load_split(f"{tmp_path}/set", "train+other", optional=True) is None
    with pytest.raises(ValueError, match=r"has no split train\+other: expected one of train, test$"):
        load_split(f"{tmp_path}/set", "train+other")


def test_a_digest_tells_sets_apart_wherever_they_lie(tmp_path):
    name = write_rows(tmp_path / "set", [1, 2, 3])
    digest = files_digest(name)
    assert digest is not None and re.fullmatch("[0-9a-f]{16}", digest)
    shutil.copytree(name, tmp_path / "copy")
    assert files_digest(str(tmp_path / "copy")) == digest
    shard = tmp_path / "copy/data/train-00000-of-00001.parquet"
    shard.rename(shard.with_name("train-00000-of-00002.parquet"))
    assert files_digest(str(tmp_path / "copy")) != digest
    write_rows(tmp_path / "set", list(range(1000)))
    assert files_digest(name) not in (digest, files_digest(str(tmp_path / "copy")))


def test_what_holds_no_rows_has_no_digest(tmp_path):
    assert files_digest("user/set") is files_digest(str(tmp_path / "none")) is files_digest(str(tmp_path)) is None


@pytest.mark.parametrize("damage", ["cut off", "zeros inside", "another file"])
def test_a_damaged_file_is_named(tmp_path, damage):
    name = write_rows(tmp_path / "set", list(range(2000)), None)
    shard = tmp_path / "set/data/train-00001-of-00002.parquet"
    whole = (tmp_path / "set/data/train-00000-of-00001.parquet").read_bytes()
    contents = {"cut off": whole[:-50], "zeros inside": whole[:40] + bytes(1000) + whole[1040:], "another file": b"x"}
    shard.write_bytes(contents[damage])
    shard.with_name("train-00002-of-00002.parquet").write_bytes(b"damaged too")
    with pytest.raises(ValueError, match=rf"^dataset {name} cannot be read: {shard}: "):
        load_split(name, "train")


def test_a_full_disk_is_not_a_damaged_set(tmp_path, monkeypatch):
    name = write_rows(tmp_path / "set", [1])

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(FullDiskError, match=f"{tmp_path}/cache cannot be written: the disk is full"):
        load_split(name, "train")
