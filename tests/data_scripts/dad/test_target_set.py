"""What is no target set is told by name, and by row."""

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value

from data_scripts.dad.target_set import load_target, read_target
from tests.helpers.training import make_pedes, make_sda


def test_a_prepared_set_is_loaded(tmp_path):
    make_pedes(3).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert len(load_target(str(tmp_path))) == 3 and load_target(str(tmp_path), "validation") is None
    assert read_target(load_target(str(tmp_path)), 1)["image"].mode == "RGB"


def test_another_kind_of_set_is_refused(tmp_path):
    make_sda(3).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"common\.dataset .* has no column 'captions', only .*mra prepare pedes"):
        load_target(str(tmp_path))


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"broken")
    with pytest.raises(
        ValueError, match=rf"common\.dataset {tmp_path} cannot be read: {tmp_path}/train-00000-of-00001\.parquet: "
    ):
        load_target(str(tmp_path))

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ValueError, match=r"pedez is not a folder, and the Hub cannot be reached; .*Couldn't reach"):
        load_target("pedez")


def test_a_row_with_a_broken_image_is_named():
    features = Features({"image": Image(), "captions": List(Value("string")), "image_id": Value("int64")})
    rows = {"image": [{"bytes": b"no image", "path": None}], "captions": [["a man"]], "image_id": [1]}
    with pytest.raises(ValueError, match="image of row 0"):
        read_target(Dataset.from_dict(rows, features=features), 0)
