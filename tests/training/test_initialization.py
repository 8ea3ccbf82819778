"""Starting points: the official Swin file, a BERT folder, a pretrained MRA at another size."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining
from mra.training.initialization import load_bert_weights, load_for_finetuning, load_swin_weights
from mra.training.published_layout import resize_bias_table
from tests.helpers.tiny import TEXT, tiny_batch, tiny_config, tiny_model


REFERENCE = Path(__file__).resolve().parents[1] / "reference"
TABLE = "relative_position_bias_table"
WIDTH, DEPTHS, HEADS = 8, (2, 2, 2, 2), (1, 2, 4, 8)


def swin_config(image_size=(224, 224), windows=(7, 7, 7, 7), **fields) -> MRAConfig:
    vision = {"image_size": image_size, "window_size": windows, "depths": DEPTHS, "num_heads": HEADS}
    return tiny_config(vision_config=vision, **fields)


def official_swin(window=7) -> dict[str, torch.Tensor]:
    """The layout of the official file: merging ends a stage, index and mask buffers and the classifier are stored."""
    shapes = {"patch_embed.proj.weight": (WIDTH, 3, 4, 4), "patch_embed.proj.bias": (WIDTH,)}
    shapes |= {"patch_embed.norm.weight": (WIDTH,), "patch_embed.norm.bias": (WIDTH,)}
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        dim = WIDTH * 2**stage
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            for name, shape in {
                "norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,),
                "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
            }.items():  # fmt: skip
                shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
            shapes[f"{prefix}.attn.{TABLE}"] = ((2 * window - 1) ** 2, heads)
            shapes[f"{prefix}.attn.relative_position_index"] = (window**2, window**2)
            if block % 2 and stage < 3:
                shapes[f"{prefix}.attn_mask"] = (4, window**2, window**2)
        if stage < 3:
            merging = f"layers.{stage}.downsample"
            shapes |= {f"{merging}.reduction.weight": (2 * dim, 4 * dim)}
            shapes |= {f"{merging}.norm.weight": (4 * dim,), f"{merging}.norm.bias": (4 * dim,)}
    shapes |= {"norm.weight": (8 * WIDTH,), "norm.bias": (8 * WIDTH,)}
    shapes |= {"head.weight": (100, 8 * WIDTH), "head.bias": (100,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# ---------------------------------------------------------------- official Swin


@pytest.fixture(scope="module")
def swin_file(tmp_path_factory):
    weights = official_swin()
    path = tmp_path_factory.mktemp("swin") / "swin.pth"
    torch.save({"model": weights}, path)
    return path, weights


@pytest.mark.parametrize("nested", [True, False])
def test_official_swin_file(nested, swin_file, tmp_path):
    path, weights = swin_file
    if not nested:
        path = tmp_path / "bare.pth"
        torch.save(weights, path)
    model = MRAForPreTraining(swin_config())
    load_swin_weights(model, str(path))
    loaded = model.mra.vision_model.swin.state_dict()
    for stage in range(3):  # the layer that ends stage N begins stage N + 1
        for name in ("norm.weight", "norm.bias", "reduction.weight"):
            ours = loaded[f"layers.{stage + 1}.downsample.{name}"]
            assert torch.equal(ours, weights[f"layers.{stage}.downsample.{name}"])
    same = [name for name in weights if name in loaded and "downsample" not in name]
    assert all(torch.equal(loaded[name], weights[name]) for name in same)
    assert len(same) == len(loaded) - 9


@pytest.mark.parametrize("reverse", [False, True])
def test_bias_tables_are_resized_whatever_the_order(reverse, swin_file, tmp_path):
    path, weights = swin_file
    if reverse:
        path = tmp_path / "reversed.pth"
        torch.save(dict(reversed(weights.items())), path)
    model = MRAForPreTraining(swin_config((384, 256), (8, 8, 8, 4)))
    load_swin_weights(model, str(path))
    loaded = model.mra.vision_model.swin.state_dict()
    for stage, window in enumerate((8, 8, 8, 4)):
        name = f"layers.{stage}.blocks.1.attn.{TABLE}"
        assert loaded[name].shape[0] == (2 * window - 1) ** 2
        assert torch.equal(loaded[name], resize_bias_table(weights[name], window))


def test_swin_errors_name_what_is_wrong(swin_file, tmp_path):
    weights = dict(swin_file[1])
    model = MRAForPreTraining(swin_config())
    with pytest.raises(ValueError, match=r"'nowhere\.pth'"):
        load_swin_weights(model, "nowhere.pth")
    del weights["norm.bias"]
    weights["layers.9.blocks.0.norm1.weight"] = torch.zeros(8)
    torch.save(weights, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"missing \['norm.bias'\], unknown \['layers.9.blocks.0.norm1.weight'\]"):
        load_swin_weights(model, str(tmp_path / "wrong.pth"))


# ---------------------------------------------------------------- bias tables


@pytest.mark.parametrize("reverse", [False, True])
def test_fidelity_resized_tables(reverse):
    tensors = load_file(REFERENCE / "resize_tables.safetensors")
    names = [name.removeprefix("src.") for name in tensors if name.startswith("src.")]
    for name in reversed(names) if reverse else names:
        expected = tensors[f"dst.{name}"]
        window = 4 if "layers.3" in name else 8
        torch.testing.assert_close(resize_bias_table(tensors[f"src.{name}"], window), expected, rtol=0, atol=1e-5)


def test_fidelity_resized_smooth_tables():
    vectors = json.loads((REFERENCE / "resize_tables.json").read_text())
    source = torch.tensor(vectors["smooth_src"])
    for window, name in ((8, "smooth_dst_15"), (4, "smooth_dst_7")):
        expected = torch.tensor(vectors[name])
        torch.testing.assert_close(resize_bias_table(source, window), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [(1, 3), (2, 4), (2, 1), (3, 7), (12, 8)])
def test_tables_of_any_window(source, target):
    constant = torch.full(((2 * source - 1) ** 2, 3), 0.7)
    resized = resize_bias_table(constant, target)
    assert resized.shape == ((2 * target - 1) ** 2, 3)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.7))
    assert resize_bias_table(constant, source) is constant


def test_tables_keep_their_precision():
    assert resize_bias_table(torch.randn(9, 2).half(), 3).dtype == torch.float16


# ---------------------------------------------------------------- BERT


def make_bert(folder, cls=BertForMaskedLM, **fields):
    torch.manual_seed(1)
    config = BertConfig(**{k: v for k, v in TEXT.items() if k != "num_fusion_layers"} | {"vocab_size": 50} | fields)
    bert = cls(config)
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.normal_()
    bert.save_pretrained(folder)
    return bert


def text_config(**fields):
    return tiny_config(text_config={"vocab_size": 50} | fields)


def test_bert_folder(tmp_path):
    bert = make_bert(tmp_path)
    torch.manual_seed(2)
    model = MRAForPreTraining(text_config())
    before = {name: p.clone() for name, p in model.mra.fusion_layers.named_parameters() if "crossattention" in name}
    load_bert_weights(model, str(tmp_path))
    source = bert.state_dict()
    text, fusion, head = (m.state_dict() for m in (model.mra.text_model, model.mra.fusion_layers, model.mlm_head))
    assert all(torch.equal(text[name], source[f"bert.{name}"]) for name in text)
    for name in fusion:
        if "crossattention" in name:
            assert torch.equal(fusion[name], before[name])
        else:
            layer, rest = name.split(".", 1)
            assert torch.equal(fusion[name], source[f"bert.encoder.layer.{int(layer) + 2}.{rest}"])
    assert all(torch.equal(head[name], source[f"cls.predictions.{name}"]) for name in head)
    assert model.mlm_head.decoder.weight is model.get_input_embeddings().weight


@torch.no_grad()
def test_text_states_are_those_of_bert(tmp_path):
    bert = make_bert(tmp_path).eval()
    model = MRAForPreTraining(text_config()).eval()
    load_bert_weights(model, str(tmp_path))
    input_ids = torch.randint(5, 50, (2, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    expected = bert(input_ids, mask, output_hidden_states=True).hidden_states[2]
    actual = model.get_text_hidden_states(input_ids, mask)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_bert_that_does_not_fit(tmp_path):
    make_bert(tmp_path, num_hidden_layers=6)
    with pytest.raises(ValueError, match="do not fit"):
        load_bert_weights(MRAForPreTraining(text_config()), str(tmp_path))
    with pytest.raises(ValueError, match=r"word_embeddings\.weight"):
        load_bert_weights(MRAForPreTraining(text_config(vocab_size=60, num_hidden_layers=6)), str(tmp_path))


def test_bert_without_a_head_is_told(tmp_path, caplog):
    make_bert(tmp_path, BertModel)
    with caplog.at_level(logging.WARNING):
        load_bert_weights(MRAForPreTraining(text_config()), str(tmp_path))
    assert "cls.predictions" in caplog.text


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    model = tiny_model(swin_config(temperature=0.05))
    with torch.no_grad():
        model.temperature.fill_(0.033)
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    return folder, model


def test_the_same_configuration_gives_the_same_model(pretrained):
    folder, model = pretrained
    loaded = load_for_finetuning(str(folder)).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_fine_tuning_at_another_size(pretrained):
    folder, model = pretrained
    vision = {"image_size": [384, 256], "window_size": [8, 8, 8, 4], "drop_path_rate": 0.3}
    loaded = load_for_finetuning(str(folder), vision_config=vision, label_smoothing=0.2)
    assert loaded.config.vision_config.depths == list(DEPTHS)
    assert (loaded.config.label_smoothing, loaded.config.vision_config.drop_path_rate) == (0.2, 0.3)
    assert loaded.temperature.item() == pytest.approx(0.033)
    for name, tensor in model.state_dict().items():
        if TABLE in name:
            window = 4 if "layers.3" in name else 8
            tensor = resize_bias_table(tensor, window)
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.mlm_head.decoder.weight is loaded.get_input_embeddings().weight
    batch = tiny_batch(loaded.config, size=2)
    assert loaded(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"projection_dim": 24}, {"norm.weight", "norm.bias", "norm.running_mean"}),
        ({"projection_type": "linear", "projection_dim": 256}, set()),
    ],
)
def test_another_projection_is_initialised_anew(fields, kept, pretrained, caplog):
    folder, model = pretrained
    with caplog.at_level(logging.WARNING):
        loaded = load_for_finetuning(str(folder), **fields)
    assert "vision_projection" in caplog.text and "newly initialised" in caplog.text
    assert loaded.config.projection_dim == fields["projection_dim"]
    before, after = model.state_dict(), loaded.state_dict()
    for name, tensor in before.items():
        if "_projection." not in name:
            assert torch.equal(after[name], tensor), name
    for name in kept:
        assert torch.equal(after[f"mra.text_projection.{name}"], before[f"mra.text_projection.{name}"])
    features = loaded.get_image_features(torch.randn(2, 3, 224, 224))
    assert features.shape == (2, fields["projection_dim"])


def test_another_vocabulary_is_refused(pretrained):
    with pytest.raises(ValueError, match="word_embeddings"):
        load_for_finetuning(str(pretrained[0]), text_config={"vocab_size": 99})
