"""Model: gradients, what is computed, pooling, regions, initialisation, precision, checkpointing, save and load."""

import copy
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import pipeline

import layers_mra
from batching_mra import FusionRows, TextLengths
from layers_mra import MRAFusionLayer, MRASwinBlock, MRATextLayer, masked_mean, pool_parts, selective_contexts
from modeling_mra import MRAForImageTextRetrieval, MRAForPreTraining, MRAModel, MRAVisionModel
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model, tiny_processor
from tests.oracle.plain import plain_fuse, plain_match_logits


AUGMENTED, REGION = ("augmented_itc_loss", "augmented_itm_loss"), ("region_itc_loss", "region_itm_loss")
TERMS = ("itc_loss", "itm_loss", "mlm_loss", *AUGMENTED, *REGION)
PLAIN = ("pixel_values", "input_ids", "attention_mask", "identity_ids")


@pytest.fixture(scope="module")
def config():
    return tiny_config(vision_config={"depths": [1, 1, 2, 1], "image_size": [128, 64], "window_size": [2, 2, 2, 2]})


@pytest.fixture(scope="module")
def model(config):
    return tiny_model(config)


@pytest.fixture(scope="module")
def batch(config):
    return tiny_batch(config)


def run(model, batch, seed=0, **kwargs):
    return model(**batch, **kwargs, generator=torch.Generator().manual_seed(seed))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("fields", [{}, {"projection_type": "linear"}, {"region_features": "published_code"}])
def test_every_parameter_gets_a_gradient(fields):
    model = tiny_model(tiny_config(**fields)).train()
    run(model, tiny_batch(model.config)).loss.backward()
    lacking = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lacking
    # one window of one token attends to itself alone: neither queries nor keys nor their bias matter there
    still = {n for n, p in model.named_parameters() if not p.grad.any()} - {
        "mra.vision_model.swin.layers.3.blocks.0.attn.relative_position_bias_table"
    }
    assert not still


@torch.no_grad()
def test_shapes(model, config, batch):
    images = model.get_image_hidden_states(batch["pixel_values"])
    texts = model.get_text_hidden_states(batch["input_ids"], batch["attention_mask"])
    vision, text = config.vision_config, config.text_config
    assert images.shape == (4, 1 + vision.num_patches, vision.hidden_size) == (4, 9, 64)
    assert texts.shape == (4, config.max_text_length, text.hidden_size)
    assert model.fuse(texts, batch["attention_mask"], images).shape == texts.shape
    assert model.match_logits(texts, batch["attention_mask"], images).shape == (4, 2)
    for features in (
        model.get_image_features(batch["pixel_values"]),
        model.get_text_features(batch["input_ids"], batch["attention_mask"]),
    ):
        assert features.shape == (4, config.projection_dim)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(images[:, 0], images[:, 1:].mean(dim=1))


@pytest.mark.parametrize(
    ("given", "terms", "texts", "pairs"),
    [
        ((), (), 4, 12),
        (("mlm_input_ids", "labels"), ("mlm_loss",), 8, 16),
        (("augmented_input_ids", "augmented_attention_mask"), AUGMENTED, 8, 24),
        (("phrase_input_ids", "phrase_attention_mask", "region_attention_mask", "phrase_ids"), REGION, 8, 24),
    ],
)
@torch.no_grad()
def test_what_is_not_passed_is_not_computed(given, terms, texts, pairs, model, batch, monkeypatch):
    """One pass through the text layers and one through the fusion layers, with the rows that the losses need."""
    seen = []

    def record(run):
        return lambda *args, **kwargs: seen.append(run(*args, **kwargs)) or seen[-1]

    for name in ("get_text_hidden_states", "fuse"):
        monkeypatch.setattr(model.mra, name, record(getattr(model.mra, name)))
    output = run(model, {name: batch[name] for name in (*PLAIN, *given)})
    assert {name for name in output if name in TERMS} == {"itc_loss", "itm_loss", *terms}
    assert [len(rows) for rows in seen] == [texts, pairs]


@torch.no_grad()
def test_loss_is_the_weighted_sum(batch):
    weights = {"itm_weight": 0.5, "mlm_weight": 2.0, "augmentation_weight": 0.3, "region_weight": 0.7}
    model = tiny_model(
        tiny_config(vision_config={"image_size": [128, 64], "window_size": [2] * 4}, **weights), MRAForPreTraining
    )
    output = run(model, batch)
    expected = (
        output.itc_loss
        + 0.5 * output.itm_loss
        + 2.0 * output.mlm_loss
        + 0.3 * (output.augmented_itc_loss + output.augmented_itm_loss)
        + 0.7 * (output.region_itc_loss + output.region_itm_loss)
    )
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("given", ["phrase_input_ids", "region_attention_mask", "mlm_input_ids", "labels"])
def test_inputs_that_go_together(model, batch, given):
    names = ("pixel_values", "input_ids", "attention_mask", given)
    with pytest.raises(ValueError, match=f"`{given}`"):
        model(**{name: batch[name] for name in names})


def test_images_of_another_size_are_refused(model, batch):
    with pytest.raises(ValueError, match="128 x 64"):
        model.get_image_features(batch["pixel_values"][..., :32])


def test_a_batch_of_one_identity_has_no_negatives(model, batch):
    same = batch | {"identity_ids": torch.full((4,), 9), "phrase_ids": torch.full((4,), 9)}
    output = run(model, same)
    assert output.loss.isfinite()
    with torch.no_grad():
        images = model.get_image_hidden_states(batch["pixel_values"])
        texts = model.get_text_hidden_states(batch["input_ids"], batch["attention_mask"])
        logits = model.match_logits(texts, batch["attention_mask"], images)
    torch.testing.assert_close(output.itm_loss, F.cross_entropy(logits, torch.ones(4, dtype=torch.long)))


@torch.no_grad()
def test_matching_pairs_and_labels(model, batch, monkeypatch):
    """Matched pairs, then (text, negative image), then (negative text, image): the loss is the mean over all of them."""
    drawn = iter([torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])])
    monkeypatch.setattr("losses_mra.choose_hard_negatives", lambda s, *_: (next(drawn), torch.ones(4).bool()))
    output = model(**{name: batch[name] for name in PLAIN})
    images = model.get_image_hidden_states(batch["pixel_values"])
    texts = model.get_text_hidden_states(batch["input_ids"], batch["attention_mask"])
    losses = []
    for text, image, label in (
        ([0, 1, 2, 3], [0, 1, 2, 3], 1),
        ([0, 1, 2, 3], [1, 2, 3, 0], 0),
        ([2, 3, 0, 1], [0, 1, 2, 3], 0),
    ):
        logits = model.match_logits(texts[text], batch["attention_mask"][text], images[image])
        losses.append(F.cross_entropy(logits, torch.full((4,), label)))
    torch.testing.assert_close(output.itm_loss, torch.stack(losses).mean())


@torch.no_grad()
def test_negative_images_are_drawn_first_and_by_text(model, batch, monkeypatch):
    seen = []

    def choose(similarity, identities, generator):
        seen.append(similarity)
        return torch.tensor([2, 3, 0, 1]), torch.ones(4).bool()

    monkeypatch.setattr("losses_mra.choose_hard_negatives", choose)
    output = model(**{name: batch[name] for name in PLAIN})
    text_to_image = output.text_embeds @ output.image_embeds.t() / model.temperature
    torch.testing.assert_close(seen[0], text_to_image)
    torch.testing.assert_close(seen[1], text_to_image.t())


@torch.no_grad()
def test_the_generator_repeats_the_losses(model, batch):
    losses = []
    for seed in (5, 5, 6, 7, 8):
        torch.rand(3)
        losses.append(run(model, batch, seed).itm_loss)
    assert torch.equal(losses[0], losses[1])
    assert len(torch.stack(losses).unique()) > 1


@pytest.mark.parametrize("projection", ["part_pooling", "linear"])
@torch.no_grad()
def test_skipping_padding_changes_nothing(projection, batch):
    vision = {"image_size": [128, 64], "window_size": [2] * 4}
    model = tiny_model(tiny_config(vision_config=vision, projection_type=projection))
    short = dict(batch)
    keep = torch.arange(56) < torch.tensor([[40], [9], [40], [23]])
    for prefix in ("", "augmented_", "phrase_"):
        keep = keep.roll(1, dims=0)
        short |= {f"{prefix}{name}": batch[f"{prefix}{name}"] * keep for name in ("input_ids", "attention_mask")}
        if not prefix:
            short |= {
                "mlm_input_ids": batch["mlm_input_ids"] * keep,
                "labels": torch.where(keep, batch["labels"], -100),
            }
    names = {"caption": "", "augmented": "augmented_", "phrase": "phrase_"}
    tokens = {kind: short[f"{prefix}attention_mask"].sum(dim=1).tolist() for kind, prefix in names.items()}
    whole, packed = run(model, short), run(model, short, lengths=TextLengths(**tokens, masked=tokens["caption"]))
    for name in TERMS:
        torch.testing.assert_close(packed[name], whole[name])


@torch.no_grad()
def test_texts_are_encoded_alike_without_their_padding(model, batch):
    mask = (torch.arange(56) < torch.tensor([[40], [9], [41], [23]])).long()
    whole = model.get_text_hidden_states(batch["input_ids"], mask)
    packed = model.mra.get_text_hidden_states(batch["input_ids"], mask, [40, 9, 41, 23])
    torch.testing.assert_close(packed, whole * mask[..., None])


@torch.no_grad()
def test_shorter_captions_are_padded_for_their_features(model, batch):
    mask = (torch.arange(56) < 20).long().expand(4, -1)
    whole = model.get_text_features(batch["input_ids"] * mask, mask)
    short = batch["input_ids"][:, :20], mask[:, :20]
    torch.testing.assert_close(model.get_text_features(*short), whole)
    torch.testing.assert_close(model.mra(None, *short).text_embeds, whole)
    torch.testing.assert_close(model.mra(None, short[0]).text_embeds, whole)


@torch.no_grad()
def test_retrieval_head_scores_every_pair(model, config, batch):
    retrieval = MRAForImageTextRetrieval(config).eval()
    retrieval.mra.load_state_dict(model.mra.state_dict())
    texts = {name: batch[name][:3] for name in ("input_ids", "attention_mask")}
    output = retrieval(batch["pixel_values"], **texts, return_match_logits=True)
    assert output.similarity.shape == (3, 4) and output.match_logits.shape == (3, 4, 2)
    torch.testing.assert_close(output.similarity, output.text_embeds @ output.image_embeds.t())
    images = model.get_image_hidden_states(batch["pixel_values"])
    hidden = model.get_text_hidden_states(**texts)
    pair = model.match_logits(hidden[2:3], texts["attention_mask"][2:3], images[1:2])
    torch.testing.assert_close(output.match_logits[2, 1], pair[0])
    assert retrieval(batch["pixel_values"], **texts).match_logits is None


# ---------------------------------------------------------------- pooling and regions


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 24, 48])
def test_masked_parts_equal_adaptive_pooling_of_the_visible(count):
    tokens = torch.randn(3, 48, 5)
    mask = torch.zeros(3, 48)
    for row in mask:
        row[torch.randperm(48)[:count]] = 1
    pooled = pool_parts(tokens, mask)
    for row in range(3):
        visible = tokens[row][mask[row].bool()]
        expected = F.adaptive_avg_pool1d(visible.t(), 3).t().flatten()
        torch.testing.assert_close(pooled[row], expected)
    if count == 48:
        torch.testing.assert_close(pooled, pool_parts(tokens))


def test_every_stage_has_its_own_window():
    for sides in ([8, 4], [8, 4, 2]):
        depths, heads = [1] * len(sides), [2] * len(sides)
        vision = {"image_size": [128, 64], "depths": depths, "num_heads": heads, "window_size": sides}
        swin = MRAVisionModel(tiny_config(vision_config=vision | {"patch_size": 8}).vision_config).swin
        windows = [m.window_size for m in swin.modules() if isinstance(m, WindowAttention)]
        assert windows == [(side, side) for side in sides]


def test_masked_mean():
    tokens = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    expected = torch.stack([(tokens[0, 0] + tokens[0, 3]) / 2, tokens[1, 1]])
    torch.testing.assert_close(masked_mean(tokens, mask), expected)


@pytest.mark.parametrize("choice", ["paper", "published_code"])
@pytest.mark.parametrize("projection", ["part_pooling", "linear"])
@torch.no_grad()
def test_region_features(choice, projection, batch, monkeypatch):
    """What reaches the contrastive loss and the cross-attention."""
    vision = {"image_size": [128, 64], "window_size": [2] * 4}
    model = tiny_model(tiny_config(vision_config=vision, region_features=choice, projection_type=projection))
    seen = {}

    def record(*args, f=model.mra.fuse, **kwargs):
        seen.update(tokens=args[2], mask=args[3], image_index=kwargs["rows"].image_index)
        return f(*args, **kwargs)

    projected = []
    monkeypatch.setattr(model.mra, "fuse", record)
    monkeypatch.setattr(
        model.mra, "project_image", lambda *a, f=model.mra.project_image: projected.append(f(*a)) or projected[-1]
    )
    model(**batch)
    patch_mask = batch["region_attention_mask"][:, 1:]
    images = model.get_image_hidden_states(batch["pixel_values"])
    patches = images[:, 1:]
    mean = torch.stack([row[mask.bool()].mean(dim=0) for row, mask in zip(patches, patch_mask, strict=True)])
    if projection == "linear":
        expected = mean
    else:
        expected = pool_parts(patches, patch_mask if choice == "paper" else None)
    expected = F.normalize(model.mra.vision_projection(expected), dim=-1)
    torch.testing.assert_close(projected[0], expected)

    # 12 pairs of regions and phrases, then those of captions: every pair sees its own of the image's tokens
    region_images = seen["image_index"][:12]
    expected = [row[mask.bool()] for row, mask in zip(patches, patch_mask, strict=True)]
    if choice == "paper":
        expected = [torch.cat([row, token[None]]) for row, token in zip(expected, mean, strict=True)]
    for pair, image in enumerate(region_images):
        torch.testing.assert_close(seen["tokens"][image][seen["mask"][pair].bool()], expected[image])
    for pair, image in list(enumerate(seen["image_index"]))[12:]:
        torch.testing.assert_close(seen["tokens"][image][seen["mask"][pair].bool()], images[image])


@torch.no_grad()
def test_hidden_patches_do_not_reach_the_matching_head(model, batch):
    images = model.get_image_hidden_states(batch["pixel_values"])
    texts = model.get_text_hidden_states(batch["input_ids"], batch["attention_mask"])
    mask = batch["region_attention_mask"]
    changed = torch.where(mask[..., None].bool(), images, torch.randn_like(images))
    before = model.match_logits(texts, batch["attention_mask"], images, mask)
    torch.testing.assert_close(model.match_logits(texts, batch["attention_mask"], changed, mask), before)


# ---------------------------------------------------------------- fusion in fewer steps


@torch.no_grad()
def test_fusion_of_pairs_equals_the_plain_layers(model, batch):
    images = model.get_image_hidden_states(batch["pixel_values"])
    texts = model.get_text_hidden_states(batch["input_ids"], batch["attention_mask"])
    text_index, image_index = torch.tensor([0, 2, 2, 1, 3]), torch.tensor([1, 1, 0, 2, 2])
    mask, regions = batch["attention_mask"], batch["region_attention_mask"].clone()
    regions[:, 0] = 1
    regions = regions[image_index]
    expected = plain_fuse(model.mra, texts[text_index], mask[text_index], images[image_index], regions)
    fused = model.fuse(texts, mask, images, regions, rows=FusionRows(text_index, image_index))
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)
    keys_values = model.get_image_keys_values(images)
    positions = torch.tensor([[0, 3], [1, 1], [1, 1], [4, 2], [0, 5]])
    fused = model.fuse(texts, mask, None, regions, keys_values, FusionRows(text_index, image_index, positions))
    expected = expected.gather(1, positions[..., None].expand(-1, -1, expected.shape[-1]))
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)
    counts = [2, 1, 2, 1, 2]
    rows = FusionRows(text_index, image_index, positions, position_counts=counts)
    fused = model.fuse(texts, mask, None, regions, keys_values, rows)
    expected[[1, 3], 1] = 0
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)
    expected = plain_match_logits(model.mra, texts, mask, images)
    torch.testing.assert_close(model.match_logits(texts, mask, images), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_fusion_layer_is_first_and_last(batch):
    model = tiny_model(tiny_config(text_config={"num_hidden_layers": 3, "num_fusion_layers": 1}))
    images = model.get_image_hidden_states(batch["pixel_values"][..., :64, :32])
    texts = model.get_text_hidden_states(batch["input_ids"], batch["attention_mask"])
    text_index, image_index = torch.tensor([0, 2, 2, 1, 3]), torch.tensor([1, 1, 0, 2, 2])
    mask = batch["attention_mask"]
    expected = plain_match_logits(model.mra, texts[text_index], mask[text_index], images[image_index])
    logits = model.match_logits(texts, mask, images, text_index=text_index, image_index=image_index)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_masked_tokens_are_predicted_alike_at_few_positions(model, batch):
    few = run(model, batch, lengths=TextLengths(max_masked=int((batch["labels"] != -100).sum(dim=1).max())))
    torch.testing.assert_close(few.mlm_loss, run(model, batch).mlm_loss)


# ---------------------------------------------------------------- initialisation


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return MRAForPreTraining(
        tiny_config(
            temperature=0.05,
            vision_config={"embed_dim": 32, "image_size": [128, 64], "window_size": [4, 4, 4, 2]},
        )
    )


def test_initial_values(fresh):
    assert fresh.temperature.item() == pytest.approx(0.05)
    for name, module in fresh.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
        if isinstance(module, nn.BatchNorm1d):
            assert (module.running_mean == 0).all() and (module.running_var == 1).all(), name
            assert module.num_batches_tracked == 0, name
        if isinstance(module, nn.Linear):
            assert module.bias is None or (module.bias == 0).all(), name
            if module.weight.numel() > 500:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
        if isinstance(module, WindowAttention):
            assert module.relative_position_bias_table.abs().max() < 0.1, name
    tables = [m.relative_position_bias_table.flatten() for m in fresh.modules() if isinstance(m, WindowAttention)]
    assert torch.cat(tables).std().item() == pytest.approx(0.02, rel=0.15)
    assert (fresh.mlm_head.bias == 0).all()
    assert (fresh.get_input_embeddings().weight[fresh.config.text_config.pad_token_id] == 0).all()


HEADS = {
    "vision_config": {"embed_dim": 32, "image_size": [128, 64], "window_size": [4, 4, 4, 2]},
    "projection_dim": 64,
}


HEAD_NAMES = ("mra.vision_projection", "mra.text_projection", "mra.match_head")


def heads_of(model):
    return {n.removeprefix("mra."): p for n, p in model.named_parameters() if n.startswith(HEAD_NAMES)}


def assert_as_torch(weight, bias):
    """Like `nn.Linear(fan_in, ...)`: weights and bias uniform within 1 / sqrt(fan_in)."""
    bound = weight.shape[1] ** -0.5
    for values in (weight.flatten(), bias):
        assert 0.9 * bound < values.abs().max() <= bound and abs(values.mean()) < 4 * bound / (3 * len(values)) ** 0.5
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=4 / (values.numel() * 5 / 4) ** 0.5)
    default = nn.Linear(weight.shape[1], weight.shape[0])
    assert weight.std().item() == pytest.approx(default.weight.std().item(), rel=0.05)


@pytest.mark.parametrize("projection_type", ["part_pooling", "linear"])
def test_published_initial_heads(projection_type):
    torch.manual_seed(1)
    model = MRAForPreTraining(tiny_config(**HEADS, projection_type=projection_type, head_initialization="published"))
    heads = heads_of(model)
    for name in ("vision_projection", "text_projection"):
        if projection_type == "linear":
            assert_as_torch(heads[f"{name}.weight"], heads[f"{name}.bias"])
            continue
        weight, bias = heads[f"{name}.linear.weight"], heads[f"{name}.linear.bias"]
        assert weight.std().item() == pytest.approx(1e-5, rel=0.05) and abs(weight.mean().item()) < 1e-6
        assert weight.abs().max() > 3e-5 and (bias == 0).all()  # a normal, not a uniform of that deviation
        assert (heads[f"{name}.norm.weight"] == 1).all() and (heads[f"{name}.norm.bias"] == 0).all()
    assert_as_torch(heads["match_head.0.weight"], heads["match_head.0.bias"])
    assert heads["match_head.3.weight"].abs().max() <= 64**-0.5 and heads["match_head.3.bias"].abs().max() > 0
    assert (heads["match_head.1.weight"] == 1).all() and (heads["match_head.1.bias"] == 0).all()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not name.startswith(HEAD_NAMES):
            assert (module.bias == 0).all(), name


def test_published_initial_heads_of_missing_weights_alone(tmp_path):
    """Loading keeps what the file holds and initialises the rest."""
    config = tiny_config(**HEADS, head_initialization="published")
    saved = MRAForPreTraining(config)
    with torch.no_grad():
        for parameter in heads_of(saved).values():
            parameter.fill_(0.25)
    state = {name: tensor for name, tensor in saved.state_dict().items() if "text_projection" not in name}
    saved.save_pretrained(tmp_path, state_dict=state)
    loaded = heads_of(MRAForPreTraining.from_pretrained(tmp_path))
    assert all((tensor == 0.25).all() for name, tensor in loaded.items() if "text_projection" not in name)
    assert loaded["text_projection.linear.weight"].std().item() == pytest.approx(1e-5, rel=0.05)


def test_the_published_start_of_the_heads_leaves_the_rest_alone():
    """Both choices draw the same other weights from a seed; only the language head's are drawn after the heads'."""
    models = []
    for choice in ("bert", "published"):
        torch.manual_seed(0)
        models.append(MRAForPreTraining(tiny_config(**HEADS, head_initialization=choice)).state_dict())
    differing = {name for name in models[0] if not torch.equal(models[0][name], models[1][name])}
    heads = ("_projection.linear.weight", "match_head.", "mlm_head.transform.dense.weight")
    assert differing and all(any(head in name for head in heads) for name in differing), differing
    with pytest.raises(ValueError, match="head_initialization"):
        tiny_config(head_initialization="timm")


def test_epsilons(fresh):
    assert {m.eps for m in fresh.mra.vision_model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    for bert in (fresh.mra.text_model, fresh.mra.fusion_layers, fresh.mlm_head):
        assert {m.eps for m in bert.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    assert fresh.mra.match_head[1].eps == fresh.mra.vision_projection.norm.eps == 1e-5


def test_no_shift_where_the_window_covers_the_stage():
    config = tiny_config(vision_config={"image_size": [128, 64], "depths": [2] * 4, "window_size": [4, 4, 4, 4]})
    swin = MRAModel(config).vision_model.swin
    shifts = [[tuple(block.shift_size) for block in stage.blocks] for stage in swin.layers]
    assert shifts == [[(0, 0), (2, 2)], [(0, 0), (2, 2)], [(0, 0), (0, 0)], [(0, 0), (0, 0)]]
    assert [stage.blocks[1].attn_mask is None for stage in swin.layers] == [False, False, True, True]


def test_tied_weights(fresh):
    assert fresh.mlm_head.decoder.weight is fresh.get_input_embeddings().weight


# ---------------------------------------------------------------- precision, checkpointing, attention, compilation


def test_gradient_checkpointing_gives_the_same_gradients(config, batch):
    model = without_dropout(tiny_model(config)).train()
    blocks = [m for m in model.modules() if isinstance(m, (MRASwinBlock, MRATextLayer, MRAFusionLayer))]
    assert {type(block) for block in blocks} == {MRASwinBlock, MRATextLayer, MRAFusionLayer}
    calls = dict.fromkeys(blocks, 0)

    def count(module, *_):
        calls[module] += 1

    for block in blocks:
        attention = block.attn if hasattr(block, "attn") else block.attention
        attention.register_forward_hook(lambda *_, b=block: count(b))
    run(model, batch).loss.backward()
    plain, plain_calls = gradients(model), dict(calls)
    model.zero_grad()
    calls.update(dict.fromkeys(blocks, 0))
    model.activation_checkpointing_enable()
    run(model, batch).loss.backward()
    for block in blocks:
        assert calls[block] == 2 * plain_calls[block], type(block)
    checkpointed = gradients(model)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_repeats_no_wide_product(config, batch, dtype, monkeypatch):
    """With dropout and dropped paths: the same gradients, the same linear layers, everything else once more."""
    model = tiny_model(config).train()
    assert config.vision_config.drop_path_rate > 0 and config.text_config.hidden_dropout_prob > 0

    def step(shortest_kept):
        monkeypatch.setattr(layers_mra, "LONG_PRODUCT", shortest_kept)
        torch.manual_seed(1)
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = run(model, batch).loss
            loss.backward()
        counts = counter.get_flop_counts()["Global"]
        linear = sum(counts.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))
        return gradients(model), linear, sum(counts.values()) - linear

    plain, linear, attention = step(0)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": selective_contexts})
    for shortest_kept in (0, 32):  # the Swin has widths 8 to 64, its MLP 32 to 256
        selective, selective_linear, selective_attention = step(shortest_kept)
        assert selective_attention > attention
        assert (selective_linear == linear) == (shortest_kept == 0)
        assert selective_linear < 1.1 * linear
        assert selective.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(
                selective[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@torch.no_grad()
def test_attention_implementations_agree(config, batch):
    model = tiny_model(copy.deepcopy(config))  # the choice is kept in the configuration, which other tests share
    outputs = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        windows = [m.fused_attn for m in model.modules() if isinstance(m, WindowAttention)]
        assert set(windows) == {implementation == "sdpa"}
        outputs[implementation] = run(model, batch)
    for name in TERMS:
        torch.testing.assert_close(outputs["sdpa"][name], outputs["eager"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation_of_a_loaded_model(implementation, saved):
    model = MRAForPreTraining.from_pretrained(saved, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    assert model.config.text_config._attn_implementation == implementation
    assert {m.fused_attn for m in model.modules() if isinstance(m, WindowAttention)} == {implementation == "sdpa"}


def test_bfloat16(config, batch, saved):
    model = MRAForPreTraining.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    output = run(model, half)
    output.loss.backward()
    reference = MRAForPreTraining.from_pretrained(saved, dtype=torch.float32)
    assert {p.dtype for p in reference.parameters()} == {torch.float32}
    with torch.no_grad():
        assert output.mlm_loss.item() == pytest.approx(run(reference, batch).mlm_loss.item(), rel=0.05)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert run(reference, batch).loss.isfinite()


@torch.no_grad()
def test_float64_agrees(config, batch):
    model = tiny_model(config)
    single = run(model, batch)
    double = run(model.double(), batch | {"pixel_values": batch["pixel_values"].double()})
    for name in ("itc_loss", "mlm_loss", "region_itc_loss"):
        assert single[name].item() == pytest.approx(double[name].item(), rel=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward_equals_eager(config, batch):
    model = tiny_model(config)
    compiled = torch.compile(model)
    eager, fast = run(model, batch), run(compiled, batch)
    for name in TERMS:
        torch.testing.assert_close(fast[name], eager[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- save and load


@pytest.fixture(scope="module")
def saved(model, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_reloaded_model_is_the_same(model, saved, batch):
    assert "mlm_head.decoder.weight" not in load_file(saved / "model.safetensors")
    loaded, report = MRAForPreTraining.from_pretrained(saved, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.mlm_head.decoder.weight is loaded.get_input_embeddings().weight
    assert not loaded.training
    before, after = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert before.keys() == after.keys()
    assert any("attn_mask" in name for name in before) and any("relative_position_index" in name for name in before)
    for name, buffer in before.items():
        assert torch.equal(after[name], buffer), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(run(loaded, batch).loss, run(model, batch).loss)


@pytest.mark.parametrize("cls", [MRAModel, MRAForImageTextRetrieval])
@torch.no_grad()
def test_other_heads_load_the_same_folder(cls, model, saved, batch):
    loaded, report = cls.from_pretrained(saved, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.get_image_features(batch["pixel_values"])
    assert torch.equal(loaded.get_image_features(batch["pixel_values"]), expected)


@torch.no_grad()
def test_pretraining_loads_a_folder_of_the_base_model(model, saved, batch, tmp_path):
    MRAModel.from_pretrained(saved).save_pretrained(tmp_path)
    loaded = MRAForPreTraining.from_pretrained(tmp_path)
    assert loaded.temperature.item() == pytest.approx(0.07)
    expected = model.get_image_features(batch["pixel_values"])
    assert torch.equal(loaded.get_image_features(batch["pixel_values"]), expected)
    assert loaded.mlm_head.decoder.weight is loaded.get_input_embeddings().weight


ELSEWHERE = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

try:
    import modeling_mra
    sys.exit("the project can be imported here")
except ImportError:
    pass
torch.set_num_threads(1)
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
images = [Image.fromarray(np.arange(90 * 40 * 3, dtype=np.uint8).reshape(90, 40, 3))]
inputs = processor(images=images, text=["a man in a black coat"])
result = {"model_type": config.model_type}
for auto in (AutoModel, AutoModelForPreTraining):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        result[type(model).__name__] = [
            model.get_image_features(inputs["pixel_values"]).tolist(),
            model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).tolist(),
        ]
print(json.dumps(result))
"""


@torch.no_grad()
def test_a_process_that_cannot_import_the_project(model, config, saved, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    # -S leaves out site-packages, and with them an editable installation of the project: add back the libraries alone
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    start = f"import sys, runpy; sys.path += {libraries!r}; sys.argv = ['elsewhere.py', {str(saved)!r}]; "
    start += "runpy.run_path('elsewhere.py', run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-S", "-c", start], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result.pop("model_type") == "mra_retrieval"
    assert set(result) == {"MRAModel", "MRAForPreTraining"}
    images = [Image.fromarray(np.arange(90 * 40 * 3, dtype=np.uint8).reshape(90, 40, 3))]
    inputs = tiny_processor(config)(images=images, text=["a man in a black coat"])
    image = model.get_image_features(inputs["pixel_values"])
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    for image_features, text_features in result.values():
        torch.testing.assert_close(torch.tensor(image_features), image, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(text_features), text, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what users of the Hub do, and what is refused


@pytest.mark.parametrize(("size", "multiple", "expected"), [(530, None, 530), (400, None, 400), (530, 64, 576)])
@pytest.mark.parametrize("cls", [MRAModel, MRAForPreTraining, MRAForImageTextRetrieval])
def test_resized_vocabulary(cls, size, multiple, expected, tmp_path):
    model = tiny_model(tiny_config(), cls)
    words = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
    kept = min(len(words), expected)
    assert torch.equal(model.get_input_embeddings().weight[:kept], words[:kept])
    model.save_pretrained(tmp_path)
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.text_config.vocab_size == loaded.get_input_embeddings().num_embeddings == expected
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    if cls is MRAForPreTraining:
        assert loaded.mlm_head.bias.shape == (expected,)
        assert loaded.mlm_head.decoder.weight is loaded.get_input_embeddings().weight
        loaded.train()
        optimizer = torch.optim.AdamW(loaded.parameters())
        run(loaded, tiny_batch(loaded.config)).loss.backward()
        assert loaded.mlm_head.bias.grad.shape == (expected,)
        optimizer.step()


def test_resizing_keeps_the_bias_of_the_words():
    model = tiny_model(tiny_config())
    with torch.no_grad():
        model.mlm_head.bias.normal_()
    bias = model.mlm_head.bias.detach().clone()
    model.resize_token_embeddings(600, mean_resizing=False)
    assert torch.equal(model.mlm_head.bias[: len(bias)], bias) and not model.mlm_head.bias[len(bias) :].any()
    model.resize_token_embeddings(300)
    assert torch.equal(model.mlm_head.bias, bias[:300])
    assert isinstance(model.mlm_head.bias, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_pixels_are_cast_to_the_weights(dtype, model, batch):
    half = copy.deepcopy(model).to(dtype)
    assert batch["pixel_values"].dtype == torch.float32
    features = half.get_image_features(batch["pixel_values"])
    assert features.dtype == dtype
    assert F.cosine_similarity(features.float(), model.get_image_features(batch["pixel_values"])).min() > 0.98
    images = model.get_image_hidden_states(batch["pixel_values"])
    assert half.get_image_features(image_hidden_states=images).dtype == dtype
    assert run(half, batch).loss.isfinite()


@torch.no_grad()
def test_tuples_on_request(batch):
    config = tiny_config(vision_config={"image_size": [128, 64], "window_size": [2] * 4})
    inputs = {name: batch[name] for name in PLAIN[:3]}
    for cls in (MRAModel, MRAForPreTraining, MRAForImageTextRetrieval):
        model = tiny_model(copy.deepcopy(config), cls)
        expected = model(**inputs)
        model.config.return_dict = False
        for output in (model(**inputs), model(**inputs, return_dict=False)):
            assert isinstance(output, tuple) and len(output) == len(expected)
        assert model(**inputs, return_dict=True).keys() == expected.keys()


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_outputs_that_are_not_offered(option, batch):
    config = tiny_config(vision_config={"image_size": [128, 64], "window_size": [2] * 4})
    inputs = {name: batch[name] for name in PLAIN[:3]}
    for cls in (MRAModel, MRAForPreTraining, MRAForImageTextRetrieval):
        model = tiny_model(copy.deepcopy(config), cls)
        model(**inputs, **{option: False})
        with pytest.raises(ValueError, match=f"`{option}` is not supported"):
            model(**inputs, **{option: True})
        model.set_attn_implementation("eager")
        setattr(model.config, option, True)
        with pytest.raises(ValueError, match=f"`{option}` is not supported"):
            model(**inputs)


def test_unknown_keywords_are_refused(model, batch):
    inputs = {name: batch[name] for name in PLAIN[:3]}
    retrieval = MRAForImageTextRetrieval(model.config)
    for called in (model, model.mra, retrieval):
        with pytest.raises(TypeError, match="`attention_maks`: did you mean `attention_mask`"):
            called(**inputs, attention_maks=inputs["attention_mask"])
    for method in (model.get_text_features, retrieval.get_text_features, model.mra.get_text_features):
        with pytest.raises(TypeError, match="attention_maks"):
            method(inputs["input_ids"], attention_maks=inputs["attention_mask"])
    with pytest.raises(TypeError, match="pixels"):
        model.get_image_features(pixels=inputs["pixel_values"])
    types = torch.zeros_like(inputs["input_ids"])
    model(**inputs, token_type_ids=types, inputs_embeds=None)  # as tokenizers and adapters pass them
    with pytest.raises(ValueError, match="`token_type_ids`"):
        model(**inputs, token_type_ids=types + 1)


WRONG = {
    "input_ids as floats": ({"input_ids": lambda t: t.float()}, "`input_ids` must be integers"),
    "an unknown word": ({"input_ids": lambda t: t + 9000}, "`input_ids` must be from 0 to"),
    "an unknown word of a phrase": ({"phrase_input_ids": lambda t: t - 9000}, "`phrase_input_ids` must be from 0 to"),
    "an unknown label": ({"labels": lambda t: t + 9000}, "`labels` must be from 0 to"),
    "an empty text": ({"attention_mask": lambda t: t * 0}, "`attention_mask` must be 1 at the first position"),
    "padding on the left": ({"attention_mask": lambda t: t.flip(1)}, "padded on the left"),
    "an additive mask": ({"attention_mask": lambda t: (t - 1) * 10000.0}, "`attention_mask` must hold 1"),
    "a mask of another length": ({"augmented_attention_mask": lambda t: t[:, :9]}, "`augmented_attention_mask` must have"),
    "no mask": ({"phrase_attention_mask": lambda t: None}, "`phrase_attention_mask` go together"),
    "fewer images": ({"pixel_values": lambda t: t[:2]}, "`input_ids` and `pixel_values` must have as many rows"),
    "raw pixels": ({"pixel_values": lambda t: t.byte()}, "`pixel_values` must be normalised floats"),
    "another grid": ({"region_attention_mask": lambda t: t[:, :4]}, r"grid of 4 x 2 patches, got \(4, 4\)"),
    "an empty region": ({"region_attention_mask": lambda t: t * 0}, "must mark at least one patch"),
    "fewer identities": ({"identity_ids": lambda t: t[:2]}, "`identity_ids` must be of shape"),
    "fewer phrase ids": ({"phrase_ids": lambda t: t[:2]}, "`phrase_ids` must be of shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named(case, model, batch):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        run(model, batch | {name: change(batch[name]) for name, change in changes.items()})


def test_wrong_inputs_of_the_encoders_are_named(model, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    images = model.get_image_hidden_states(batch["pixel_values"])
    texts = model.get_text_hidden_states(ids, mask)
    for method in (model.get_text_features, model.get_text_hidden_states):
        with pytest.raises(ValueError, match="`input_ids` must be from 0 to"):
            method(ids + 9000, mask)
        with pytest.raises(ValueError, match="at most 64 tokens"):
            method(ids.repeat(1, 2))
    for call in (lambda: model.get_text_features(), lambda: model.get_image_features(), lambda: model.mra()):
        with pytest.raises(ValueError, match="must be given"):
            call()
    with pytest.raises(ValueError, match="`pixel_values` must be a batch"):
        model.get_image_features(batch["pixel_values"][0])
    with pytest.raises(ValueError, match="4 texts cannot be paired with 3 images"):
        model.fuse(texts, mask, images[:3])
    with pytest.raises(ValueError, match="`image_index` must be from 0 to 2"):
        model.match_logits(texts, mask, images[:3], image_index=torch.arange(4))
    with pytest.raises(ValueError, match=r"`lengths\.max_masked`, 1"):
        run(model, batch, lengths=TextLengths(max_masked=1))
    with pytest.raises(ValueError, match=r"`lengths\.caption` must hold 4 numbers"):
        run(model, batch, lengths=TextLengths([3, 4]))


@torch.no_grad()
def test_shorter_texts_are_padded_in_training_too(model, batch):
    texts = [name for name in batch if name.endswith(("input_ids", "attention_mask")) and "region" not in name]
    short = {name: batch[name][:, :20] for name in (*texts, "labels")}
    padded = {name: F.pad(t, (0, 36), value=-100 if name == "labels" else 0) for name, t in short.items()}
    for name in TERMS:
        assert torch.equal(run(model, batch | short)[name], run(model, batch | padded)[name])


@torch.no_grad()
def test_longer_texts_are_warned_of_once(model, batch, caplog):
    logging.Logger.warning_once.cache_clear()
    longer = F.pad(batch["input_ids"], (0, 4)), F.pad(batch["attention_mask"], (0, 4))
    for _ in range(2):
        model.get_text_features(*longer)
    assert caplog.text.count("texts of 60 tokens, but in training the model pooled over 56") == 1
    model.get_text_features(batch["input_ids"] * batch["attention_mask"])
    assert caplog.text.count("`attention_mask` is missing") == 1


@torch.no_grad()
def test_pipelines_and_loading_options(saved, model, batch, tmp_path):
    assert not hasattr(model, "generate") and not model.can_generate()
    assert MRAForPreTraining.from_pretrained(saved, torch_dtype="bfloat16").dtype == torch.bfloat16
    mapped = MRAForPreTraining.from_pretrained(saved, device_map="cpu")
    assert torch.equal(run(mapped, batch).loss, run(model, batch).loss)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(run(MRAForPreTraining.from_pretrained(tmp_path), batch).loss, run(model, batch).loss)
    retrieval = MRAForImageTextRetrieval.from_pretrained(saved)
    processor = tiny_processor(model.config)
    classify = pipeline(
        "zero-shot-image-classification",
        model=retrieval, tokenizer=processor.tokenizer, image_processor=processor.image_processor,
    )  # fmt: skip
    labels = ["a man in a black coat", "a woman in a red coat"]
    image = Image.fromarray(np.arange(90 * 40 * 3, dtype=np.uint8).reshape(90, 40, 3))
    found = {row["label"]: row["score"] for row in classify(image, candidate_labels=labels, hypothesis_template="{}")}
    inputs = processor(images=image, text=labels)
    expected = (retrieval(**inputs).similarity[:, 0] / retrieval.temperature).softmax(dim=0)
    assert [found[label] for label in labels] == pytest.approx(expected.tolist(), rel=1e-4)
