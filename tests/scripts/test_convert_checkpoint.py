"""Conversion of released checkpoints: both ways, every tensor, every border."""

import json
import logging
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import convert_checkpoint
from configuration_mra import MRAConfig
from convert_checkpoint import convert_to_folder, convert_to_published, main, read_checkpoint
from modeling_mra import MRAForPreTraining
from mra.training.published_layout import (
    derived_buffers,
    from_published,
    infer_config,
    is_derived_buffer,
    to_mra_name,
    to_published,
    to_published_name,
)
from processing_mra import MRAProcessor
from tests.helpers.tiny import TOKENIZER, tiny_batch, tiny_config, tiny_model
from tests.reference.fill_rule import TIED, fill_


ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"
PUBLISHED = {"cuhk": (384, 256), "icfg": (384, 256), "rstp": (384, 256), "sda": (224, 224)}
WORDS, BIAS = "text_encoder.bert.embeddings.word_embeddings.weight", "text_encoder.cls.predictions.bias"
STORED = {
    "h": 384,
    "w": 256,
    "vision_config": {"drop_rate": 0.1, "drop_path_rate": 0.2},
    "text_config": {"num_attention_heads": 2},
    "temp": 0.07,
    "max_tokens": 56,
    "LabelSmooth": 0.2,
    "region": 0.8,
    "icfg_rstp": True,
    "train_file": ["data/train.json"],
    "schedular": {"lr": 3e-05},
}


def small_config(**fields) -> MRAConfig:
    """384 x 256 pixels, windows 8 and 4, two blocks in the first and last stages, so that there are shift masks."""
    vision = {"image_size": [384, 256], "window_size": [8, 8, 8, 4], "depths": [2, 1, 1, 2]}
    return tiny_config(vision_config=vision, **fields)


def published_state(config) -> dict[str, torch.Tensor]:
    model = tiny_model(config)
    with torch.no_grad():
        model.temperature.fill_(0.0421)
    return {name: tensor.clone() for name, tensor in to_published(model).items()}


def save(path, state_dict, stored=STORED):
    torch.save({"model": state_dict, "config": stored} if stored is not None else state_dict, path)
    return path


def equal(left, right):
    return (
        list(left) == list(right)
        and all(left[name].dtype == right[name].dtype for name in left)
        and all(torch.equal(left[name], right[name]) for name in left)
    )


@pytest.fixture(scope="module")
def state_dict():
    return published_state(small_config())


@pytest.fixture(scope="module")
def converted(state_dict, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    save(folder / "small.pth", state_dict)
    config = convert_to_folder(folder / "small.pth", folder / "model", tokenizer=str(TOKENIZER))
    return folder / "model", config


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_layouts(name):
    """Names, order, shapes and precision of the four released layouts, both ways, without their memory."""
    layout = json.loads((REFERENCE / f"keys_{name}.json").read_text())
    with torch.device("meta"):
        state_dict = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in layout.items()}
    bare = {key: tensor for key, tensor in state_dict.items() if not is_derived_buffer(key)} | {"temp": torch.ones(())}
    config = infer_config(bare, {}, PUBLISHED[name])
    vision, text = config.vision_config, config.text_config
    assert (vision.embed_dim, vision.depths, vision.num_heads) == (128, [2, 2, 18, 2], [4, 8, 16, 32])
    assert vision.window_size == ([7, 7, 7, 7] if name == "sda" else [8, 8, 8, 4])
    assert (text.num_text_layers, text.num_fusion_layers, text.vocab_size) == (6, 6, 30522)
    assert (config.projection_type, config.projection_dim) == (
        ("linear", 256) if name == "rstp" else ("part_pooling", 2048)
    )
    with torch.device("meta"):
        model = MRAForPreTraining(config)
    published = to_published(model)
    assert list(published) == list(layout)
    assert {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in published.items()} == layout
    weights = [key for key in layout if not is_derived_buffer(key)]
    layers = text.num_text_layers
    assert {to_mra_name(key, layers) for key in weights} == model.state_dict().keys()
    for key in weights:
        ours = to_mra_name(key, layers)
        if key != TIED[1]:  # the published head holds its bias twice
            assert to_published_name(ours, layers, config.projection_type == "part_pooling") == key
        assert list(model.state_dict()[ours].shape) == (layout[key][0] if key != "temp" else [1]), key
    # the image size is in the shift masks too
    masks = {key: tensor for key, tensor in derived_buffers(config).items() if key.endswith("attn_mask")}
    assert tuple(infer_config(bare | masks).vision_config.image_size) == PUBLISHED[name]


@pytest.mark.parametrize(("window", "shift", "size"), [(8, 4, (96, 64)), (7, 3, (56, 56)), (4, 2, (12, 8))])
def test_index_and_mask_buffers_follow_the_published_formulas(window, shift, size):
    """Checked on the first stage of a model whose patches are as many as `size`."""
    vision = {"image_size": [4 * s for s in size], "depths": [2], "num_heads": [1], "window_size": [window]}
    buffers = derived_buffers(tiny_config(vision_config=vision))
    position = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    distance = position[:, :, None] - position[:, None, :] + window - 1
    index = distance[0] * (2 * window - 1) + distance[1]
    assert torch.equal(buffers["vision_encoder.layers.0.blocks.0.attn.relative_position_index"], index)
    regions = torch.zeros(size)
    for number, (rows, columns) in enumerate(
        (r, c)
        for r in (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for c in (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    ):
        regions[rows, columns] = number
    parts = regions.unfold(0, window, window).unfold(1, window, window).reshape(-1, window * window)
    mask = torch.where(parts[:, None] == parts[:, :, None], 0.0, -100.0)
    assert torch.equal(buffers["vision_encoder.layers.0.blocks.1.attn_mask"], mask)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"projection_type": "linear", "projection_dim": 256},
        {"text_config": {"num_hidden_layers": 5, "num_fusion_layers": 3, "intermediate_size": 48}},
        {"vision_config": {"depths": [1, 1, 3, 2], "image_size": [320, 192], "window_size": [8, 8, 4, 2]}},
        {"vision_config": {"depths": [2, 2, 1], "num_heads": [1, 2, 4], "window_size": [2] * 3, "mlp_ratio": 2.0}},
    ],
)
def test_any_depth_and_width(fields):
    """Architecture and weights come back from the tensors and the number of BERT heads alone."""
    config = tiny_config(**{"vision_config": {"depths": [2, 1, 2, 1]}} | fields)
    state_dict = published_state(config)
    inferred = infer_config(state_dict, {"text_config": {"num_attention_heads": 2}})
    for name in ("image_size", "patch_size", "embed_dim", "depths", "num_heads", "mlp_ratio", "effective_window_size"):
        assert getattr(inferred.vision_config, name) == getattr(config.vision_config, name), name
    for name in ("num_hidden_layers", "num_fusion_layers", "intermediate_size", "vocab_size", "num_attention_heads"):
        assert getattr(inferred.text_config, name) == getattr(config.text_config, name), name
    assert inferred.projection_type == config.projection_type
    assert inferred.projection_dim == config.projection_dim
    model = MRAForPreTraining.from_pretrained(None, config=inferred, state_dict=from_published(state_dict, inferred))
    assert equal(to_published(model), state_dict)


def test_published_choices(state_dict):
    config = infer_config(state_dict, STORED)
    assert (config.region_features, config.itc_gradient, config.region_weight) == ("published_code", "published", 0.64)
    assert (config.label_smoothing, config.max_text_length, config.temperature) == (0.2, 56, 0.07)
    assert (config.vision_config.drop_rate, config.vision_config.drop_path_rate) == (0.1, 0.2)
    assert infer_config(state_dict).temperature == pytest.approx(0.0421)


def test_image_size(state_dict):
    assert infer_config(state_dict, {}).vision_config.image_size == [384, 256]
    with pytest.raises(ValueError, match="`image_size` is"):
        infer_config(state_dict, {}, (224, 224))
    unmasked = {name: tensor for name, tensor in state_dict.items() if not name.endswith("attn_mask")}
    assert infer_config(unmasked, {"h": 128, "w": 64}).vision_config.image_size == [128, 64]
    assert infer_config(unmasked, {"vision_config": {"h": 128, "w": 64}}).vision_config.image_size == [128, 64]
    assert infer_config(unmasked, {}, (256, 128)).vision_config.image_size == [256, 128]
    with pytest.raises(ValueError, match="--image_size HEIGHT WIDTH"):
        infer_config(unmasked, {"vision_config": "configs/swin.json"})


# ---------------------------------------------------------------- every tensor is accounted for


def change(state_dict, **changes):
    """A copy without the tensors whose new value is None."""
    changed = state_dict | {name: value for name, value in changes.items() if value is not None}
    return {name: tensor for name, tensor in changed.items() if changes.get(name, tensor) is not None}


NORM = "vision_encoder.layers.0.blocks.0.norm2.weight"
INDEX = "vision_encoder.layers.0.blocks.0.attn.relative_position_index"
MASK = "vision_encoder.layers.3.blocks.1.attn_mask"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder.pooler.weight": torch.zeros(1), "extra": torch.zeros(1)}, r"unknown \(2\): .*pooler.*, extra"),
        ({NORM: None, "itm_head.3.bias": None}, rf"missing \(2\): {NORM}, itm_head\.3\.bias"),
        ({INDEX: None}, rf"missing \(1\): {INDEX}"),
        ({NORM: torch.zeros(3)}, rf"of another shape \(1\): {NORM} \(3,\) instead of \(8,\)"),
        ({INDEX: torch.zeros(64, 64, dtype=torch.long)}, rf"different from the architecture \(1\): {INDEX}"),
        ({MASK: torch.zeros(6, 16, 16)}, rf"different from the architecture \(1\): {MASK}"),
        ({"text_encoder.bert.embeddings.position_ids": torch.zeros(1, 64)}, "position_ids"),
        ({BIAS: torch.ones(509)}, rf"different from the weight it is tied to \(1\): {TIED[1]}"),
        ({"text_encoder.bert.encoder.layer.1.output.dense.bias": None}, r"missing \(1\): .*layer\.1\.output"),
        ({"vision_encoder.patch_embed.proj.weight": None}, "patch_embed"),
        ({"vision_proj.2.weight": None}, r"vision_proj\.2\.weight"),
        ({"temp": None}, "temp"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(changes, message, state_dict, tmp_path):
    path = save(tmp_path / "wrong.pth", change(state_dict, **changes))
    with pytest.raises(ValueError, match=message):
        convert_to_folder(path, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.pth"]


def test_a_whole_layer_that_is_missing(state_dict):
    lacking = {name: tensor for name, tensor in state_dict.items() if "encoder.layer.1." not in name}
    with pytest.raises(ValueError, match=r"missing \(16\): .*encoder\.layer\.1\."):
        from_published(lacking, infer_config(lacking))


# ---------------------------------------------------------------- conversion


def test_the_folder(converted):
    folder, config = converted
    names = {path.name for path in folder.iterdir()}
    code = {f"{name}_mra.py" for name in ("configuration", "layers", "losses", "modeling", "processing")}
    assert code | {"config.json", "model.safetensors", "README.md", "published_config.json"} <= names
    assert {"processor_config.json", "tokenizer_config.json"} <= names
    assert json.loads((folder / "published_config.json").read_text()) == STORED
    processor = MRAProcessor.from_pretrained(folder)
    assert processor.caption_style == "clean"
    assert processor.image_processor.size == {"height": 384, "width": 256}
    card = (folder / "README.md").read_text()
    assert card.startswith("---") and "small.pth" in card and "384 x 256" in card
    assert MRAConfig.from_pretrained(folder).vision_config.to_dict() == config.vision_config.to_dict()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@torch.no_grad()
def test_the_model_computes_what_it_did(converted):
    loaded = MRAForPreTraining.from_pretrained(converted[0]).eval()
    model = tiny_model(small_config())
    batch = tiny_batch(model.config, size=2)
    assert loaded.temperature.item() == pytest.approx(0.0421)
    assert torch.equal(
        loaded.get_image_features(batch["pixel_values"]), model.get_image_features(batch["pixel_values"])
    )
    captions = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(loaded.get_text_features(*captions), model.get_text_features(*captions))


def test_round_trip(converted, state_dict, tmp_path):
    convert_to_published(converted[0], tmp_path / "back.pth")
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(content) == {"model", "config"}
    assert content["config"] == STORED
    assert equal(content["model"], state_dict)
    assert [path.name for path in tmp_path.iterdir()] == ["back.pth"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_of_half_precision(dtype, state_dict, tmp_path):
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state_dict.items()}
    half["temp"] = state_dict["temp"]
    convert_to_folder(save(tmp_path / "half.pth", half), tmp_path / "model")
    convert_to_published(tmp_path / "model", tmp_path / "back.pth")
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True)["model"], half)


def test_round_trip_of_a_sharded_folder(converted, state_dict, tmp_path):
    model = MRAForPreTraining.from_pretrained(converted[0])
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    convert_to_published(tmp_path / "shards", tmp_path / "back.pth")
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state_dict)


def test_round_trip_of_a_model_trained_here(tmp_path):
    """Without a stored configuration one is written from which the architecture is read again."""
    config = small_config(projection_type="linear", label_smoothing=0.1)
    tiny_model(config).save_pretrained(tmp_path / "model")
    convert_to_published(tmp_path / "model", tmp_path / "model.pth")
    state_dict, stored = read_checkpoint(tmp_path / "model.pth")
    inferred = infer_config(state_dict, stored)
    assert inferred.vision_config.to_dict() == config.vision_config.to_dict()
    assert inferred.text_config.to_dict() == config.text_config.to_dict()
    assert inferred.label_smoothing == 0.1


def test_bare_state_dict_without_tokenizer(state_dict, tmp_path, caplog):
    path = save(tmp_path / "bare.pth", state_dict, stored=None)
    with caplog.at_level(logging.WARNING):
        convert_to_folder(path, tmp_path / "model")
    assert "contains no processor" in caplog.text
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert "processor_config.json" not in names and "published_config.json" not in names
    assert "no processor" in (tmp_path / "model" / "README.md").read_text()
    convert_to_published(tmp_path / "model", tmp_path / "back.pth")
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state_dict)


def test_old_file_format_and_other_entries(state_dict, tmp_path, caplog):
    path = tmp_path / "old.pth"
    content = {"model": state_dict, "config": STORED, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.WARNING):
        convert_to_folder(path, tmp_path / "model")
    assert "not part of a model: epoch, optimizer" in caplog.text


class Anything:
    """Not a tensor or plain value."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"temp": Anything()}}, "cannot be read as tensors and plain values"),
        ({"model": {"temp": 0.07}, "config": {}}, "state dict"),
        ([1, 2], "state dict"),
        ({"model": {}, "config": "cuhk.yaml"}, "`config` must be a mapping"),
    ],
)
def test_files_that_are_no_checkpoint(content, message, tmp_path):
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "wrong.pth")


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="no file at"):
        read_checkpoint(tmp_path / "none.pth")


def test_tokenizers_that_do_not_fit(state_dict, tmp_path):
    fewer = state_dict | {name: state_dict[name][:300] for name in (WORDS, BIAS, *TIED)}
    with pytest.raises(ValueError, match="has 509 tokens, but the checkpoint has 300"):
        convert_to_folder(save(tmp_path / "fewer.pth", fewer), tmp_path / "model", tokenizer=str(TOKENIZER))
    path = save(tmp_path / "small.pth", state_dict)
    with pytest.raises(ValueError, match=r"`tokenizer`: .* cannot be loaded as AutoTokenizer"):
        convert_to_folder(path, tmp_path / "model", tokenizer=str(tmp_path / "nowhere"))
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------- output and command line


def test_an_existing_output_is_kept(converted, state_dict, tmp_path, capsys):
    path = save(tmp_path / "small.pth", state_dict)
    output = tmp_path / "model"
    arguments = ["--checkpoint", str(path), "--output", str(output)]
    main(arguments)
    stamp = (output / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="--overwrite"):
        main(arguments)
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp
    (output / "old.txt").touch()
    main([*arguments, "--overwrite"])
    assert not (output / "old.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not an MRA folder"):
        convert_to_folder(path, other, overwrite=True)
    assert (other / "thesis.txt").exists()
    with pytest.raises(ValueError, match="exists"):
        convert_to_published(output, path)
    with pytest.raises(ValueError, match="exists"):
        convert_to_published(output, other, overwrite=True)
    convert_to_published(output, path, overwrite=True)
    assert equal(read_checkpoint(path)[0], state_dict)


def test_a_failure_leaves_nothing(state_dict, tmp_path, monkeypatch):
    path = save(tmp_path / "small.pth", state_dict)
    monkeypatch.setattr(convert_checkpoint, "build_converted_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_to_folder(path, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["small.pth"]


def test_a_folder_that_is_not_whole(converted, tmp_path):
    with pytest.raises(ValueError, match="not a folder with a config"):
        convert_to_published(tmp_path, tmp_path / "back.pth")
    MRAForPreTraining.from_pretrained(converted[0]).mra.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"missing \['temperature'"):
        convert_to_published(tmp_path / "base", tmp_path / "back.pth")
    tiny_config().save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        convert_to_published(tmp_path / "config", tmp_path / "back.pth")


@pytest.mark.parametrize(
    "extra",
    [
        ["--to_published", "--tokenizer", "x"],
        ["--image_size", "384"],
        ["--checkpoin", "x"],
    ],
)
def test_wrong_command_lines(extra, tmp_path):
    with pytest.raises((SystemExit, ValueError)):
        main(["--checkpoint", "x.pth", "--output", str(tmp_path / "model"), *extra])
    assert not list(tmp_path.iterdir())


def test_push(state_dict, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(
        convert_checkpoint,
        "push_folder",
        lambda folder, hub, message: pushed.append((folder, hub.hub_model_id)) or "https://there",
    )
    path, output = save(tmp_path / "small.pth", state_dict), str(tmp_path / "model")
    main(["--checkpoint", str(path), "--output", output, "--push_to_hub", "user/mra"])
    assert pushed == [(output, "user/mra")]
    assert "https://there" in capsys.readouterr().out
    assert 'from_pretrained("user/mra"' in (tmp_path / "model" / "README.md").read_text()


# ---------------------------------------------------------------- files that differ, are damaged or of other models


def test_heads_that_the_checkpoint_does_not_tell(tmp_path, caplog):
    """64 wide with 2 heads: the guess of heads of 64 is 1, which is said; the option takes the true number."""
    state_dict = published_state(small_config(text_config={"hidden_size": 64, "num_attention_heads": 2}))
    stored = STORED | {"text_config": "configs/config_bert.json"}
    path = save(tmp_path / "small.pth", state_dict, stored)
    assert convert_to_folder(path, tmp_path / "guessed").text_config.num_attention_heads == 1
    assert "set it with --num_attention_heads" in caplog.text
    caplog.clear()
    main(["--checkpoint", str(path), "--output", str(tmp_path / "given"), "--num_attention_heads", "2"])
    assert "--num_attention_heads" not in caplog.text
    assert MRAConfig.from_pretrained(tmp_path / "given").text_config.num_attention_heads == 2
    for heads in (5, 0, -2):
        with pytest.raises(ValueError, match="must divide the text layers' width of 64"):
            infer_config(state_dict, stored, num_attention_heads=heads)
    with pytest.raises(ValueError, match="the checkpoint's configuration says 2"):
        infer_config(state_dict, STORED, num_attention_heads=4)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrappers_and_prefixes(wrapper, prefix, state_dict, tmp_path):
    prefixed = {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}
    torch.save({wrapper: prefixed, "config": STORED} if wrapper else prefixed, tmp_path / "other.pth")
    read, stored = read_checkpoint(tmp_path / "other.pth")
    assert equal(read, state_dict) and stored == (STORED if wrapper else None)


def test_two_state_dicts_are_ambiguous(state_dict, tmp_path):
    torch.save({"model": state_dict, "state_dict": state_dict}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"several state dicts \(model, state_dict\)"):
        read_checkpoint(tmp_path / "two.pth")


def test_numpy_values_in_the_configuration(state_dict, tmp_path):
    numbers = {
        "h": np.int64(384),
        "LabelSmooth": np.float32(0.5),
        "sizes": np.arange(3),
        "names": np.array(["a", "b"]),
        "flag": np.bool_(True),
        "dtype": np.dtype("float32"),
        "pair": (np.float64(0.5), 2),
        "tensor": torch.tensor(3),
    }
    path = save(tmp_path / "numpy.pth", state_dict, STORED | numbers)
    config = convert_to_folder(path, tmp_path / "model")
    assert config.label_smoothing == 0.5
    plain = json.loads((tmp_path / "model" / "published_config.json").read_text())
    assert {name: plain[name] for name in numbers} == {
        "h": 384, "LabelSmooth": 0.5, "sizes": [0, 1, 2], "names": ["a", "b"], "flag": True, "dtype": "float32",
        "pair": [0.5, 2], "tensor": 3,
    }  # fmt: skip


class Runs:
    """Code that unpickling would run."""

    def __reduce__(self):
        return print, ("run",)


def test_nothing_else_is_unpickled(state_dict, tmp_path, capsys):
    torch.save({"model": state_dict, "config": {"a": Runs()}}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"holds \S*print, which could run code"):
        read_checkpoint(tmp_path / "code.pth")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off(zipped, state_dict, tmp_path):
    torch.save({"model": state_dict, "config": STORED}, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in [*range(1, 40), *range(40, len(whole), len(whole) // 40), len(whole) - 1]:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth .*(truncated|empty).*download it again"):
            read_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Quota exceeded</html>", r"a web page \(HTML\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b'{"error": "not found"}', "cannot be read as tensors"),
    ],
)
def test_what_is_downloaded_in_place_of_a_checkpoint(content, message, tmp_path):
    (tmp_path / "wrong.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert_to_folder(tmp_path / "wrong.pth", tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.pth"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, state_dict, tmp_path):
    diverged = {name: tensor.clone() for name, tensor in state_dict.items()}
    diverged[NORM][3] = value
    with pytest.raises(ValueError, match=f"NaN or infinite values in 1 of .*{NORM}"):
        convert_to_folder(save(tmp_path / "diverged.pth", diverged), tmp_path / "model")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("RaSa", ["visual_encoder.blocks.0.norm1.weight", "visual_encoder_m.cls_token", "prd_head.weight", "image_queue"]),
        ("ALBEF", ["visual_encoder.blocks.0.norm1.weight", "visual_encoder_m.cls_token", "text_encoder.bert.x", "idx_queue"]),
        ("IRRA", ["base_model.visual.conv1.weight", "base_model.transformer.resblocks.0.x", "mlm_head.dense.weight"]),
        ("BLIP", ["visual_encoder.cls_token", "text_encoder.x", "text_decoder.bert.x"]),
        ("CLIP", ["visual.conv1.weight", "token_embedding.weight", "logit_scale"]),
        ("CLIP of transformers", ["vision_model.embeddings.x", "text_model.embeddings.x"]),
        ("Swin alone", ["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"]),
        ("BERT alone", ["bert.embeddings.word_embeddings.weight"]),
        ("a model of this project", ["mra.vision_model.swin.norm.weight"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module."])
def test_other_models_are_refused_by_name(model, names, prefix, tmp_path):
    torch.save({"model": {f"{prefix}{name}": torch.zeros(1) for name in names}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth: these weights belong to {model} \("):
        convert_to_folder(tmp_path / "other.pth", tmp_path / "model")


def test_the_output_is_tried_before_the_work(tmp_path, state_dict, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        convert_checkpoint, "read_checkpoint", lambda path: pytest.fail("read before the output was tried")
    )
    with pytest.raises(ValueError, match=r"`output` .*file is a file; expected a folder"):
        convert_to_folder(tmp_path / "any.pth", tmp_path / "file" / "model")


# ---------------------------------------------------------------- APTM


def aptm_layout() -> dict[str, tuple[list[int], str]]:
    """The layout of the RSTPReid checkpoint at 384 x 128: a grid of 96 x 32, 48 x 16, 24 x 8 and 12 x 4 tokens."""
    layout = json.loads((REFERENCE / "keys_rstp.json").read_text())
    # windows of 8 cover the third stage's 8 columns, windows of 4 the last one's 4: neither is shifted
    layout = {k: v for k, v in layout.items() if not re.match(r"vision_encoder\.layers\.[23]\..*attn_mask", k)}
    layout["vision_encoder.layers.0.blocks.1.attn_mask"][0] = [12 * 4, 64, 64]
    layout["vision_encoder.layers.1.blocks.1.attn_mask"][0] = [6 * 2, 64, 64]
    return layout


def test_full_size_layout_of_aptm():
    layout = aptm_layout()
    stored = {
        "h": 384,
        "w": 128,
        "vision_config": "configs/config_swinB_384.json",
        "text_config": "configs/config_bert.json",
    }
    with torch.device("meta"):
        state_dict = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in layout.items()}
    bare = {key: tensor for key, tensor in state_dict.items() if not is_derived_buffer(key)} | {"temp": torch.ones(())}
    config = infer_config(bare, stored)
    vision = config.vision_config
    assert (vision.image_size, vision.window_size, vision.grid_size) == ([384, 128], [8, 8, 8, 4], (12, 4))
    assert vision.effective_window_size == [8, 8, 8, 4] and config.text_config.num_attention_heads == 12
    assert (config.projection_type, config.projection_dim) == ("linear", 256)
    with torch.device("meta"):
        published = to_published(MRAForPreTraining(config))
    assert {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in published.items()} == layout
    assert list(published) == list(layout)
    masks = {key: tensor for key, tensor in derived_buffers(config).items() if key.endswith("attn_mask")}
    assert infer_config(bare | masks).vision_config.image_size == [384, 128]


def test_an_aptm_checkpoint(tmp_path):
    vision = {"image_size": [384, 128], "window_size": [8, 8, 8, 4], "depths": [2, 2, 2, 2]}
    config = tiny_config(vision_config=vision, projection_type="linear", projection_dim=256)
    state_dict = published_state(config)
    stored = {"h": 384, "w": 128, "text_config": {"num_attention_heads": 2}, "icfg_rstp": True, "k_test": 128}
    path = save(tmp_path / "aptm.pth", state_dict, stored)
    inferred = convert_to_folder(path, tmp_path / "model", tokenizer=str(TOKENIZER))
    assert inferred.vision_config.effective_window_size == [8, 8, 8, 4]
    processor = MRAProcessor.from_pretrained(tmp_path / "model")
    assert processor.image_processor.size == {"height": 384, "width": 128} and processor.caption_style == "clean"
    with torch.no_grad():
        batch = tiny_batch(config, size=2)
        expected = tiny_model(config).get_image_features(batch["pixel_values"])
        loaded = MRAForPreTraining.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(loaded.get_image_features(batch["pixel_values"]), expected)
    convert_to_published(tmp_path / "model", tmp_path / "back.pth")
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state_dict)


# ---------------------------------------------------------------- full size


@pytest.mark.slow
def test_full_size_checkpoint(tmp_path):
    """The released CUHK-PEDES layout in under two minutes and 4 GiB, and back to the same tensors."""
    layout = json.loads((REFERENCE / "keys_cuhk.json").read_text())
    buffers = derived_buffers(MRAConfig())
    state_dict = {
        name: buffers[name] if name in buffers else torch.zeros(shape, dtype=getattr(torch, dtype))
        for name, (shape, dtype) in layout.items()
    }
    fill_(state_dict)
    state_dict["temp"].fill_(0.07)
    for target, source in zip(TIED, (WORDS, BIAS), strict=True):
        state_dict[target] = state_dict[source]
    path = save(tmp_path / "ft_cuhk.pth", state_dict, {"h": 384, "w": 256, "icfg_rstp": False})
    script = [sys.executable, str(ROOT / "convert_checkpoint.py")]
    start = time.monotonic()
    arguments = ["--checkpoint", str(path), "--output", str(tmp_path / "model"), "--tokenizer", str(TOKENIZER)]
    subprocess.run([*script, *arguments], check=True)
    assert time.monotonic() - start < 120
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # in KiB
    model = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True)
    qkv = "layers.2.blocks.17.attn.qkv.weight"
    assert torch.equal(model.vision_model.swin.get_parameter(qkv), state_dict[f"vision_encoder.{qkv}"])
    arguments = ["--to_published", "--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "back.pth")]
    subprocess.run([*script, *arguments], check=True)
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True, mmap=True)["model"], state_dict)


@pytest.mark.parametrize("length", [0, 5, 100, 5000])
def test_weights_of_a_folder_that_were_cut_are_named(tmp_path, length):
    tiny_model(tiny_config()).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(
        ValueError, match=r"`checkpoint`: .*model\.safetensors cannot be read \(.*\); save or copy it again"
    ):
        convert_to_published(tmp_path / "model", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
