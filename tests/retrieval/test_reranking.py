"""mra/retrieval/reranking.py against the matching head applied pair by pair to padded captions."""

import pytest
import torch

from mra.retrieval.encode import encode_images, encode_texts
from mra.retrieval.evaluation import read_captions
from mra.retrieval.matching import match_pairs
from mra.retrieval.reranking import rerank, similarity_matrix, top_k
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor
from tests.oracle.plain import plain_rerank


@pytest.fixture(scope="module")
def world():
    model, processor, dataset = tiny_model(), tiny_processor(), tiny_dataset()
    captions, _, _ = read_captions(dataset)
    texts = encode_texts(model, processor, captions, keep_hidden_states=True)
    images = encode_images(model, processor, dataset, keep_hidden_states=True, batch_size=4)
    return model, processor, dataset, captions, texts, images


@torch.no_grad()
def score_every_pair(model, processor, dataset, captions):
    """(views, captions, images) match logits by the plain layers, captions padded to their full length."""
    inputs = processor(text=captions)
    text_states = model.get_text_hidden_states(**inputs)
    pixels = processor(images=[row["image"] for row in dataset])["pixel_values"]
    everything = torch.arange(len(pixels)).repeat(len(captions), 1)
    return torch.stack(
        [
            plain_rerank(
                model.mra, text_states, inputs["attention_mask"], model.get_image_hidden_states(view), everything
            )
            for view in (pixels, pixels.flip(-1))
        ]
    )


def test_rerank_equals_pair_by_pair(world):
    model, processor, dataset, captions, texts, images = world
    similarity = similarity_matrix(texts.embeds, images.embeds)
    top_indices = top_k(similarity, 6)
    oracle = score_every_pair(model, processor, dataset, captions)
    expected = oracle.gather(2, top_indices.expand(2, -1, -1))
    assert expected.std() > 0.05  # scores differ, so that a wrong pairing would show
    for batch_size in (1, 5, 1000):
        scores = rerank(model, texts, images, top_indices, batch_size=batch_size)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_images_in_nobodys_top_k(world):
    model, _, _, captions, texts, images = world
    top_indices = torch.tensor([[9, 1]]).repeat(len(captions), 1)
    scores = rerank(model, texts, images, top_indices)
    whole = rerank(model, texts, images, torch.arange(10).repeat(len(captions), 1))
    torch.testing.assert_close(scores, whole[..., [9, 1]], rtol=0, atol=1e-4)


def test_match_pairs_in_half_precision(world):
    model, _, _, _, texts, images = world
    pairs = torch.tensor([0, 3, 5]), torch.tensor([2, 2, 9])
    exact = match_pairs(model, texts, images.hidden_states, *pairs)
    half = match_pairs(model, texts, images.hidden_states, *pairs, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and half.shape == (2, 3)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.3)


def test_similarity_and_top_k():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(7, 4, generator=generator), torch.randn(5, 4, generator=generator)
    similarity = similarity_matrix(queries, gallery)
    torch.testing.assert_close(similarity, queries @ gallery.T)
    assert torch.equal(top_k(similarity, 3), similarity.argsort(dim=1, descending=True)[:, :3])
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k must be between 1 and the gallery's 5 images, got {k}"):
            top_k(similarity, k)


def test_arguments_are_checked(world):
    model, processor, dataset, captions, texts, images = world
    top_indices = torch.zeros(len(captions), 1, dtype=torch.long)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        rerank(model, texts, images, top_indices, batch_size=0)
    without = encode_images(model, processor, dataset)
    with pytest.raises(ValueError, match="keep_hidden_states=True"):
        rerank(model, texts, without, top_indices)
