"""What is loaded is what the files hold now, whatever `datasets` keeps in its cache."""

import json
import os

import datasets
import pytest
from accelerate import PartialState
from PIL import Image

from eval_retrieval import load_split as load_for_evaluation
from mra.common.tables import cache_folder, load_table, open_builder
from mra.gallery.sources import open_source
from mra.training.splits import load_split
from mra.training.streaming import Streaming


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
    tables = [load_table(name, "train"), load_table(name)["train"], load_split(name, "train")]
    return [list(table["image_id"]) for table in (*tables, load_for_evaluation(name, "train"), streamed.to_dataset())]


@pytest.mark.parametrize("card", [CARD, None])
def test_a_changed_folder_is_read_again(tmp_path, card):
    name = write_rows(tmp_path / "set", [1, 2, 1], card)
    assert load_everywhere(name) == [[1, 2, 1]] * 5
    write_rows(tmp_path / "set", [2, 1, 2], card)
    assert load_everywhere(name) == [[2, 1, 2]] * 5


def test_folders_of_one_name_are_told_apart(tmp_path):
    for ids in ([1, 2], [2, 1]):
        name = write_rows(tmp_path / str(ids[0]) / "set", ids)
        assert load_everywhere(name) == [ids] * 5


def test_an_unchanged_folder_is_not_copied_again(tmp_path, monkeypatch):
    name = write_rows(tmp_path / "set", [1, 2])
    first = load_table(name, "train")
    monkeypatch.chdir(tmp_path)
    again = load_table("set", "train")
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
        assert list(load_table(str(folder), "train")["image_id"]) == ids


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
