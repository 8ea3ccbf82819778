"""A training step in chunks: losses, gradients and statistics of the whole batch, with the activations of a chunk."""

import json
from unittest.mock import patch

import pytest
import torch
from torch import nn

import batching_mra
import layers_mra
from batching_mra import TEXTS_PER_IMAGE, TextLengths, run_in_chunks
from modeling_mra import MRAForPreTraining
from mra.training.model_setup import set_gradient_checkpointing
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model


ROWS = 11
CAPTIONS = ("pixel_values", "input_ids", "attention_mask", "mlm_input_ids", "labels", "identity_ids")
REGIONS = ("phrase_input_ids", "phrase_attention_mask", "region_attention_mask", "phrase_ids")
AUGMENTED = ("augmented_input_ids", "augmented_attention_mask")
STAGES = {"pretrain": CAPTIONS + REGIONS, "pretrain without regions": CAPTIONS, "finetune": CAPTIONS + AUGMENTED}


def make_step(stage, dropout=0.0, **fields):
    """A model in training mode, in double precision, and a batch of a stage with lengths, as the collator passes it."""
    config = tiny_config(**fields)
    model = tiny_model(config).train().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "drop_prob"):
            module.drop_prob = dropout
    batch = {name: value for name, value in tiny_batch(config, ROWS).items() if name in STAGES[stage]}
    batch["pixel_values"] = batch["pixel_values"].double()
    kinds = {"caption": "attention_mask", "augmented": "augmented_attention_mask", "phrase": "phrase_attention_mask"}
    lengths = {kind: batch[mask].sum(dim=1).tolist() for kind, mask in kinds.items() if mask in batch}
    batch["lengths"] = TextLengths(**lengths, masked=lengths["caption"], max_masked=10)
    return model, batch


def take_step(model, batch, chunk_size):
    """Losses, gradients and the statistics of BatchNorm of a step, which starts from the same state each time."""
    model.chunk_size = chunk_size
    model.zero_grad()
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    output = model(**batch, generator=torch.Generator().manual_seed(0))
    output.loss.backward()
    losses = {name: output[name].detach() for name in output if name.endswith("loss")}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(start, strict=False)
    return losses, gradients, statistics


def assert_same(ours, expected, relative):
    """Compare tensors by name, each to a part of its largest value."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 1e-6)  # the bias of keys has no gradient but rounding
        torch.testing.assert_close(
            ours[name], tensor, rtol=0, atol=relative * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("chunk_size", [2, ROWS + 1])
def test_step_in_chunks_is_that_of_the_whole_batch(stage, chunk_size):
    """No size divides the batch. Sums differ by rounding, of float32 where the losses compute in it: up to 1e-7."""
    model, batch = make_step(stage)
    losses, gradients, statistics = take_step(model, batch, None)
    assert statistics["mra.vision_projection.norm.num_batches_tracked"] == (2 if stage == "pretrain" else 1)
    in_chunks = take_step(model, batch, chunk_size)
    assert len(gradients) == len(list(model.parameters())) and len(losses) == (4 if "without" in stage else 6)
    assert_same(in_chunks[0], losses, 1e-6)
    assert_same(in_chunks[1], gradients, 1e-6)
    assert_same(in_chunks[2], statistics, 1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {"itm_negatives": "all", "itc_chunk_size": 3},
        {"region_features": "published_code"},
        {"projection_type": "linear"},
        {"text_config": {"num_hidden_layers": 3, "num_fusion_layers": 1}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_other_choices_of_the_model_in_chunks(fields):
    model, batch = make_step("pretrain", **fields)
    losses, gradients, _ = take_step(model, batch, None)
    in_chunks = take_step(model, batch, 2)
    assert_same(in_chunks[0], losses, 1e-6)
    assert_same(in_chunks[1], gradients, 1e-6)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_dropout_is_replayed_in_the_backward_pass(stage):
    """The same chunks with their activations kept draw the same numbers, and need none again."""
    model, batch = make_step(stage, dropout=0.2)
    losses, gradients, _ = take_step(model, batch, 4)
    after = torch.get_rng_state()
    with patch.object(batching_mra, "checkpoint", lambda function, *rows, use_reentrant: function(*rows)):
        kept = take_step(model, batch, 4)
    assert torch.equal(after, torch.get_rng_state())
    assert_same(kept[0], losses, 0.0)
    assert_same(kept[1], gradients, 1e-12)
    assert losses["loss"] != take_step(make_step(stage)[0], batch, 4)[0]["loss"]


@pytest.mark.parametrize("checkpointing", ["selective", "vision", "all"])
def test_chunks_and_recomputed_layers_go_together(checkpointing, monkeypatch):
    monkeypatch.setattr(layers_mra, "LONG_PRODUCT", 16)  # as a tiny model has them
    model, batch = make_step("finetune", dropout=0.2)
    losses, gradients, _ = take_step(model, batch, 4)
    set_gradient_checkpointing(model, checkpointing)
    both = take_step(model, batch, 4)
    assert_same(both[0], losses, 0.0)
    assert_same(both[1], gradients, 1e-12)


def saved_bytes(model, batch, chunk_size):
    """Memory that the forward pass of a step keeps for the backward pass."""
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.chunk_size = chunk_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss  # its graph keeps the storages, so that no two have one address
    assert loss.requires_grad
    return sum(saved.values()) - sum(p.nbytes for p in model.parameters() if p.data_ptr() in saved)


def test_chunks_run_in_turn_and_again_in_the_backward_pass_alone():
    model, batch = make_step("finetune")
    model.chunk_size = 4
    images, texts, pairs = [], [], []
    model.mra.vision_model.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    model.mra.text_model.register_forward_pre_hook(lambda _, inputs: texts.append(len(inputs[0])))
    fuse = model.mra.fuse
    with patch.object(model.mra, "fuse", lambda *inputs: pairs.append(len(inputs[0])) or fuse(*inputs)):
        loss = model(**batch).loss
        expected = [4, 4, 3], [32, 1], [32, 32, 13]  # 3 kinds of text, 7 pairs for each image
        assert (images, texts, pairs) == expected and 4 * TEXTS_PER_IMAGE == 32
        loss.backward()
    assert (images, texts, pairs) == tuple(rows + rows[::-1] for rows in expected)


def test_little_is_kept_for_the_backward_pass():
    model, batch = make_step("finetune", vision_config={"depths": [2, 2, 2, 2]})
    assert saved_bytes(model, batch, 4) < 0.2 * saved_bytes(model, batch, None)


def test_without_gradients_nothing_is_cut():
    seen = []
    with torch.no_grad():
        run_in_chunks(lambda rows: seen.append(len(rows)) or rows, 2, torch.zeros(7, 3))
    assert seen == [7]


def test_chunks_keep_rows_of_tensors_and_lists_together():
    rows, numbers = torch.arange(7.0, requires_grad=True), list(range(7))
    result = run_in_chunks(lambda a, b: a * torch.tensor(b), 1, rows, numbers, per_image=3)
    assert result.tolist() == [n * n for n in numbers]
    result.sum().backward()
    assert rows.grad.tolist() == numbers


def test_the_chunk_size_is_not_saved(tmp_path):
    model, _ = make_step("finetune")
    model.chunk_size = 4
    model.save_pretrained(tmp_path)
    assert "chunk_size" not in json.loads((tmp_path / "config.json").read_text())
    assert MRAForPreTraining.from_pretrained(tmp_path).chunk_size is None
