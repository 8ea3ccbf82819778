"""Digests of a folder's files: damage to any of them is noticed and named."""

import json

import pytest

from mra.common.digests import DIGESTS_FILE, check_digests, write_digests


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name in (
        "config.json",
        "model.safetensors",
        "data/a.parquet",
        "README.md",
        "modeling_mra.py",
        "retrieval.json",
    ):
        (tmp_path / name).write_text(f"{name} of 1")
    return tmp_path


def test_files_that_count_are_listed(folder):
    write_digests(folder)
    assert set(json.loads((folder / DIGESTS_FILE).read_text())) == {"config.json", "model.safetensors"}
    write_digests(folder, "data/*.parquet")
    assert set(json.loads((folder / DIGESTS_FILE).read_text())) == {"data/a.parquet"}


def test_damage_is_named(folder):
    check_digests(folder)  # of another library
    write_digests(folder)
    for name in ("README.md", "modeling_mra.py", "retrieval.json"):
        (folder / name).write_text("another")
    check_digests(folder)
    (folder / "config.json").write_text("config.json of 2")
    with pytest.raises(
        ValueError, match=r"^--model .*config.json was changed after it was written: .*remove .*digests"
    ):
        check_digests(folder, "--model")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        check_digests(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udcff"])
def test_damaged_digests_are_named(folder, text):
    (folder / DIGESTS_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"digests.json is damaged"):
        check_digests(folder)
