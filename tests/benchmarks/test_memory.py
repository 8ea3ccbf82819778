"""The counted memory of a training step."""

import json

import pytest
import torch
import yaml

import layers_mra
from benchmarks import memory
from benchmarks.measure import make_config
from modeling_mra import MRAForPreTraining
from tests.helpers.tiny import tiny_config


@pytest.mark.slow
def test_parts_of_the_peak(monkeypatch):
    monkeypatch.setattr(layers_mra, "LONG_PRODUCT", 16)  # as a tiny model has them
    config = make_config(full_size=False)
    weights = sum(p.numel() * p.element_size() for p in MRAForPreTraining(config).parameters())
    peaks = {
        checkpointing: memory.peak_of_step(config, True, 8, checkpointing, torch.float32)
        for checkpointing in ("none", "selective", "all")
    }
    for parts in peaks.values():
        assert parts["weights"] == weights
        assert parts["optimizer"] >= 2 * weights  # Adam's moments, and a step count for each tensor
    assert peaks["selective"]["activations"] < 0.8 * peaks["none"]["activations"]
    assert peaks["all"]["activations"] < 0.9 * peaks["selective"]["activations"]


@pytest.mark.slow
def test_a_large_batch_in_chunks_takes_less_than_half():
    """The tokens of 16 rows and the activations of a chunk of 2, instead of the activations of 16 rows."""
    config = tiny_config(max_text_length=24)
    whole, in_chunks = (
        memory.peak_of_step(config, False, 16, "none", torch.float32, size)["activations"] for size in (None, 2)
    )
    assert in_chunks < 0.5 * whole


def test_the_count_is_what_is_alive():
    """Each tensor holds 2 MiB; a view holds nothing of its own."""
    count = memory.MemoryCount()
    tensor = torch.zeros(2**19)
    count.track("other", tensor, "no tensor")
    with count:
        first = tensor + 1
        second = first.view(2, -1)
        del first
        assert count.live == {"other": 2**21, "activations": 2**21}
        count.track("gradients", second)
        assert +count.live == {"other": 2**21, "gradients": 2**21}
        third = second * 2
        del second, third
        fourth = tensor + 1
    assert count.peak == {"other": 2**21, "gradients": 2**21, "activations": 2**21}
    assert +count.live == {"other": 2**21, "activations": fourth.nbytes}


@pytest.mark.slow
def test_recipe_and_cards(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "finetune.yaml"
    fields = {
        "model_name_or_path": "x",
        "image_size": [64, 32],
        "projection_type": "linear",
        "per_device_batch_size": 4,
    }
    recipe.write_text(yaml.safe_dump(fields))
    config, with_regions = memory.read_recipe(fields)
    assert config.projection_type == "linear" and config.vision_config.image_size == [64, 32] and not with_regions
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1]}
    config, with_regions = memory.read_recipe({"model_config": {"vision_config": sizes}, "image_size": [64, 32]})
    assert (config.vision_config.embed_dim, config.vision_config.image_size, with_regions) == (8, [64, 32], True)
    with pytest.raises(SystemExit):
        memory.main(["--recipe", str(tmp_path / "none.yaml")])
    assert "no recipe at" in capsys.readouterr().err
    with_regions = False
    monkeypatch.setattr(memory, "read_recipe", lambda recipe: (make_config(full_size=False), with_regions))
    memory.main(["--recipe", str(recipe), "--dtype", "float32", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["chunk_size"] is None
    parts = sum(result[f"{name}_gib"] for name in ("weights", "gradients", "optimizer", "activations", "other"))
    assert result["batch_size"] == 4 and abs(parts - result["peak_gib"]) < 1e-9
    assert result["batch_that_fits_12_gb"] < result["batch_that_fits_24_gb"] < result["batch_that_fits_40_gb"]
    recipe.write_text(yaml.safe_dump(fields | {"chunk_size": 2}))
    for argument, size in (([], 2), (["--chunk_size", "3"], 3)):
        memory.main(["--recipe", str(recipe), "--json", *argument])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["chunk_size"] == size
