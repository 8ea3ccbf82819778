"""mra/retrieval/reranking.py against the matching head applied pair by pair to padded captions."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mra.common.sharding import Shard
from mra.retrieval import reranking
from mra.retrieval.encode import ImageEncodings, TextEncodings, encode_images, encode_texts
from mra.retrieval.evaluation import read_captions
from mra.retrieval.matching import PairMatcher, match_pairs
from mra.retrieval.reranking import rerank, rerank_logits, similarity_matrix, top_k
from tests.helpers.properties import examples
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


@pytest.fixture(scope="module")
def every_pair(world):
    model, processor, dataset, captions, _, _ = world
    return score_every_pair(model, processor, dataset, captions)


def test_rerank_equals_pair_by_pair(world, every_pair):
    model, _, _, _, texts, images = world
    similarity = similarity_matrix(texts.embeds, images.embeds)
    top_indices = top_k(similarity, 6)
    expected = every_pair.gather(2, top_indices.expand(2, -1, -1))
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


@examples(15)
@given(data=st.data())
def test_any_images_of_each_query_equal_pair_by_pair(world, every_pair, data):
    """k = 1, one image more than once, and one that is the first of every query, too."""
    model, _, _, captions, texts, images = world
    k, some = data.draw(st.integers(1, 3)), data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    rows = st.lists(st.sampled_from(some), min_size=k, max_size=k)
    top_indices = torch.tensor(data.draw(st.lists(rows, min_size=len(captions), max_size=len(captions))))
    scores = rerank(model, texts, images, top_indices, batch_size=data.draw(st.integers(1, 20)))
    assert scores.shape == (2, len(captions), k) and scores.dtype == torch.float32
    expected = every_pair.gather(2, top_indices.expand(2, -1, -1))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_log_odds_are_the_difference_of_both_logits(world):
    model, _, _, captions, texts, images = world
    top_indices = torch.arange(3).repeat(len(captions), 1)
    logits = rerank_logits(model, texts, images, top_indices)
    assert logits.shape == (2, len(captions), 3, 2)
    assert torch.equal(rerank(model, texts, images, top_indices), logits[..., 1])
    assert torch.equal(rerank(model, texts, images, top_indices, log_odds=True), logits[..., 1] - logits[..., 0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_process_gets_the_scores_of_all(world, monkeypatch, world_size):
    """Three batches of images: of four processes the last holds no image at all."""
    model, _, _, captions, texts, images = world
    owned, barrier = {}, threading.Barrier(world_size)

    def exchange(results, num_batches, shard):
        owned[shard.rank] = results
        barrier.wait(60)
        yield from (owned[batch % world_size][batch // world_size] for batch in range(num_batches))

    monkeypatch.setattr(reranking, "gather_in_order", exchange)
    top_indices = torch.tensor([[9, 4, 0, 5]]).repeat(len(captions), 1)

    def run(rank):
        rows = torch.tensor([row for batch in images.batches[rank::world_size] for row in batch], dtype=torch.long)
        own = ImageEncodings(images.embeds, images.hidden_states[rows] if len(rows) else None, rows, images.batches)
        return rerank(model, texts, own, top_indices, shard=Shard(rank, world_size))

    with ThreadPoolExecutor(world_size) as pool:
        of_processes = list(pool.map(run, range(world_size)))
    monkeypatch.undo()
    for scores in of_processes:
        assert torch.equal(scores, rerank(model, texts, images, top_indices))


def test_pairs_of_a_batch_of_images_are_ordered_by_the_length_of_their_text(world, monkeypatch):
    """Otherwise short texts are padded to the longest; of equal lengths, the first query comes first.

    An unstable sort keeps that order on some processors only, so it is not enough to look at the result.
    """
    model, _, _, captions, texts, images = world
    stable, argsort = [], torch.Tensor.argsort

    def noting(values, **options):
        stable.append(options["stable"])
        return argsort(values, **options)

    monkeypatch.setattr(torch.Tensor, "argsort", noting)
    seen, score = [], PairMatcher.pair_logits

    def recording(self, texts, hidden_states, pair_texts, pair_images, batch_size):
        seen.append(pair_texts.tolist())
        return score(self, texts, hidden_states, pair_texts, pair_images, batch_size)

    monkeypatch.setattr(PairMatcher, "pair_logits", recording)
    rerank(model, texts, images, torch.arange(10).repeat(len(captions), 1))
    lengths = texts.lengths.tolist()
    assert len(set(lengths)) > 1
    ordered = sorted(range(len(captions)), key=lambda text: (lengths[text], text))
    assert stable == [True, True]
    assert seen == [[text for text in ordered for _ in batch] for batch in images.batches]


@torch.no_grad()
def test_images_read_without_projection_give_the_same_logits(world, every_pair):
    model, _, _, _, texts, images = world
    matcher, pairs = PairMatcher(model), torch.arange(len(images.embeds))
    hidden_states, mask = texts.padded(torch.tensor([0, 1, 2]))
    assert not mask.all()  # some are padded
    for text in range(3):
        expected = every_pair[0, text]
        for are_projected in (True, False):
            read = matcher.read_by_layers(images.hidden_states[:, 0], are_projected)
            logits = matcher.match_logits(hidden_states, mask, read, torch.full_like(pairs, text), pairs)
            assert torch.allclose(logits[:, 1], expected, atol=2e-5)


def test_images_are_projected_where_that_costs_less(world, monkeypatch):
    model, _, _, _, texts, images = world
    chosen = []

    class Spy(PairMatcher):
        def read_by_layers(self, image_hidden_states, are_projected=True):
            chosen.append(are_projected)
            return super().read_by_layers(image_hidden_states, are_projected)

    matcher, pairs = Spy(model), torch.arange(len(images.embeds))
    word = TextEncodings(texts.embeds[:1], texts.hidden_states[:1], torch.tensor([1]))
    matcher.match(word, images.hidden_states[:, :1], torch.zeros_like(pairs), pairs)
    num_texts = len(texts.lengths)
    by_length = texts.lengths.argsort().repeat_interleave(len(pairs))
    matcher.match(texts, images.hidden_states[:, :1], by_length, pairs.repeat(num_texts))
    assert chosen == [False, True]


def test_a_bar_is_shown_only_if_asked_for(world, capfd):
    model, _, _, captions, texts, images = world
    top_indices = torch.zeros(len(captions), 1, dtype=torch.long)
    for compute in (rerank, rerank_logits):
        compute(model, texts, images, top_indices)
        assert capfd.readouterr().err == ""
        compute(model, texts, images, top_indices, progress=True)
        assert "re-ranking" in capfd.readouterr().err


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
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, queries @ gallery.T)
    for k in (1, 3, 5):
        assert torch.equal(top_k(similarity, k), similarity.argsort(dim=1, descending=True)[:, :k])
    for k in (-1, 0, 6):
        with pytest.raises(ValueError, match=f"k must be between 1 and the gallery's 5 images, got {k}"):
            top_k(similarity, k)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 1000])
def test_rows_in_chunks_change_nothing(monkeypatch, rows_per_chunk):
    generator = torch.Generator().manual_seed(1)
    queries, gallery = torch.randn(7, 4, generator=generator), torch.randn(5, 4, generator=generator)
    monkeypatch.setattr(reranking, "ROWS_PER_CHUNK", rows_per_chunk)
    similarity = similarity_matrix(queries, gallery)
    torch.testing.assert_close(similarity, queries @ gallery.T)
    assert torch.equal(top_k(similarity, 2), similarity.argsort(dim=1, descending=True)[:, :2])


@given(
    rows=st.integers(1, 8).flatmap(
        lambda images: st.lists(st.lists(st.integers(-2, 2), min_size=images, max_size=images), min_size=1, max_size=6)
    ),
    data=st.data(),
)
def test_of_equal_similarities_any_are_chosen_but_none_twice(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    chosen = top_k(torch.tensor(rows, dtype=torch.float32), k)
    assert chosen.shape == (len(rows), k)
    for row, images in zip(rows, chosen.tolist(), strict=True):
        assert [row[image] for image in images] == sorted(row, reverse=True)[:k] and len(set(images)) == k


def test_arguments_are_checked(world):
    model, processor, dataset, captions, texts, images = world
    top_indices = torch.zeros(len(captions), 1, dtype=torch.long)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        rerank(model, texts, images, top_indices, batch_size=0)
    without = encode_images(model, processor, dataset)
    with pytest.raises(ValueError, match="keep_hidden_states=True"):
        rerank(model, texts, without, top_indices)
    with pytest.raises(ValueError, match="keep_hidden_states=True"):
        rerank(model, encode_texts(model, processor, captions), images, top_indices)
