"""mra/retrieval/encode.py: features, mirrored views, packed captions, dealt batches."""

import logging

import pytest
import torch

from mra.common.sharding import Shard, cut_batches, without_lone_row
from mra.retrieval.encode import encode_images, encode_texts
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def world():
    return tiny_model(), tiny_processor(), tiny_dataset()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_name_the_row(world, value):
    _, processor, dataset = world
    model = tiny_model()
    model.mra.text_model.embeddings.word_embeddings.weight.data[processor.tokenizer.unk_token_id] = value
    with pytest.raises(ValueError, match="the embedding of text 1, counted from 0, is not finite"):
        encode_texts(model, processor, ["red coat", "\N{SNOWMAN}", "red"], batch_size=1)
    model.mra.vision_model.swin.norm.bias.data[0] = value
    with pytest.raises(ValueError, match=r"the embedding of image 0 \(and 9 more\), counted from 0, is not finite"):
        encode_images(model, processor, dataset)


@torch.no_grad()
def test_images_and_mirror_images(world, caplog):
    model, processor, dataset = world
    with caplog.at_level(logging.INFO):
        encodings = encode_images(model, processor, dataset, keep_hidden_states=True, batch_size=4)
    assert "hidden states of 10 images x 2 views" in caplog.text
    pixels = processor(images=[row["image"] for row in dataset])["pixel_values"]
    views = [pixels, pixels.flip(-1)]
    features = [model.get_image_features(view) for view in views]
    torch.testing.assert_close(encodings.embeds, (features[0] + features[1]) / 2, rtol=0, atol=1e-5)
    assert (encodings.embeds.norm(dim=1) < 1 - 1e-4).all()  # the mean is not normalised again
    hidden_states = torch.stack([model.get_image_hidden_states(view) for view in views], dim=1)
    torch.testing.assert_close(encodings.hidden_states, hidden_states, rtol=0, atol=1e-4)
    assert encodings.rows.tolist() == list(range(10))


def test_one_view_and_workers(world):
    model, processor, dataset = world
    images = [row["image"] for row in dataset]
    encodings = encode_images(model, processor, images, flip=False, batch_size=4)
    assert encodings.hidden_states is None
    torch.testing.assert_close(encodings.embeds.norm(dim=1), torch.ones(10))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    in_workers = encode_images(model, processor, dataset, flip=False, batch_size=4, num_workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(in_workers.embeds, encodings.embeds)


@torch.no_grad()
def test_texts_are_kept_without_padding(world):
    model, processor, _ = world
    texts = ["a person in a red coat", "a dress", "a person in a white shirt and black trousers with blue shoes"]
    encodings = encode_texts(model, processor, texts, keep_hidden_states=True, batch_size=2)
    inputs = processor(text=texts)
    lengths = inputs["attention_mask"].sum(dim=1)
    assert torch.equal(encodings.lengths, lengths)
    assert len(encodings.hidden_states) == lengths.sum()
    torch.testing.assert_close(encodings.embeds, model.get_text_features(**inputs), rtol=0, atol=1e-5)

    hidden_states = model.get_text_hidden_states(**inputs)
    order = torch.tensor([2, 1, 2])
    padded, attention_mask = encodings.padded(order)
    longest = int(lengths.max())
    assert torch.equal(attention_mask, inputs["attention_mask"][order, :longest])
    expected = hidden_states[order, :longest] * attention_mask[..., None]
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-4)


def test_half_precision_keeps_embeds_in_float32(world):
    model, processor, dataset = world
    options = {"keep_hidden_states": True, "batch_size": 4}
    exact = encode_images(model, processor, dataset, **options)
    half = encode_images(model, processor, dataset, dtype=torch.bfloat16, **options)
    assert half.embeds.dtype == torch.float32 and half.hidden_states.dtype == torch.bfloat16
    torch.testing.assert_close(half.embeds, exact.embeds, rtol=0, atol=0.1)
    stored = encode_texts(model, processor, ["a dress"], hidden_states_dtype=torch.float16, keep_hidden_states=True)
    assert stored.hidden_states.dtype == torch.float16


def test_batches_are_dealt_without_gaps():
    batches = cut_batches(10, 4)
    assert batches == [range(4), range(4, 8), range(8, 10)]
    shards = [Shard(rank, 2) for rank in range(2)]
    assert [shard.own(batches) for shard in shards] == [[batches[0], batches[2]], [batches[1]]]
    assert Shard(3, 4).own(batches) == []
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        cut_batches(10, 0)


def test_lone_rows_are_doubled():
    calls = []

    def add(left, right):
        calls.append((tuple(left.shape), tuple(right.shape)))
        return left + right

    for rows in (1, 3):
        ones = torch.ones(rows, 4)
        assert torch.equal(without_lone_row(add, left=ones, right=ones), 2 * ones)
    assert calls == [((2, 4), (2, 4)), ((3, 4), (3, 4))]


def test_bad_inputs_are_named(world):
    model, processor, _ = world
    with pytest.raises(ValueError, match="images is empty"):
        encode_images(model, processor, [])
    with pytest.raises(ValueError, match="texts is empty"):
        encode_texts(model, processor, [])
    with pytest.raises(ValueError, match="caption 3 must be a text with at least one word, got ' '"):
        encode_texts(model, processor, ["a", "a", "a", " "], batch_size=2)
