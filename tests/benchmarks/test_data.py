"""Benchmarks of the data: the plain pipeline gives our batches, and both scripts end in what they promise."""

import json
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from accelerate import PartialState

from benchmarks import data, large_set
from mra.training.masking import TokenMasker
from tests.helpers.training import make_caption, make_tokenizer
from tests.oracle.plain_data import plain_mask


def test_plain_masks_are_those_of_the_masker():
    rng, tokenizer = random.Random(0), make_tokenizer()
    captions = [make_caption(rng, 1, 30) for _ in range(300)]
    ids = tokenizer(captions, padding="max_length", max_length=56, truncation=True, return_tensors="np")["input_ids"]
    for masker in (TokenMasker(tokenizer), TokenMasker(tokenizer, skipgram_probability=0.9, skipgram_max_length=5)):
        masked, labels = masker(ids, np.arange(300))
        for row in range(300):
            assert plain_mask(masker, ids[row].tolist(), row) == (masked[row].tolist(), labels[row].tolist())


def test_input_of_training(capsys):
    data.main(["--images", "8", "--batch_size", "4", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["max_token_difference"] == 0 and result["pillow_max_abs_difference"] < 1e-3
    assert result["crops_max_abs_difference"] <= 4 and result["mean_abs_difference"] < 1.5
    assert result["cpu_ratio"] > 0
    assert {f"{source}_cpu_ratio" for source in data.SOURCES} <= result.keys()


@pytest.mark.parametrize("streamed", [False, True])
def test_large_set(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", None)
    large_set.write_set(tmp_path / "sda", 400)
    options = SimpleNamespace(batches=10, batch_size=20, num_workers=1)
    found = large_set.measure(tmp_path / "sda", tmp_path / "cache", streamed, options)
    PartialState._reset_state()
    assert 0 < found["seconds_to_open"] < found["seconds_to_first_batch"] and found["images_per_second"] > 0
    assert 0 < found["mib_before"] < found["mib_early"] and found["mib_open"] > 0
    assert any((tmp_path / "cache").rglob("*.arrow")) != streamed


@pytest.mark.slow
def test_large_set_in_processes_of_its_own(capsys):
    large_set.main(["--rows", "400", "--batches", "4", "--batch_size", "20", "--num_workers", "1", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {f"{way}_mib_late" for way in ("table_first", "table", "streamed")} <= result.keys()
