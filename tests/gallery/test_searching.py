"""Searches: the ranking of evaluation, scores, thresholds, images that cannot be read."""

import dataclasses
import shutil

import pytest
import torch

from mra.gallery import Gallery
from mra.gallery.token_cache import HEADER_BYTES
from mra.retrieval import RetrievalChoice, evaluate_retrieval
from mra.retrieval.encoders import TorchEncoder
from tests.helpers.galleries import draw_picture, encoder_of, make_split, save_tiny_model, write_pictures


@pytest.fixture
def bounded(monkeypatch):
    """A function that gives the encoder of a gallery a bound on log-odds by number of views."""

    def give(gallery, bounds):
        monkeypatch.setattr(type(gallery.encoder), "largest_log_odds", bounds)

    return give


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("rerank", [0, 5, 12])
def test_a_search_ranks_as_evaluation_does(open_new, model, rerank, views):
    """With one matched view, embeddings are still those of both."""
    split, encoder = make_split(), encoder_of(model)
    gallery = open_new(matched_views=views, token_dtype="float32")
    expected = evaluate_retrieval(encoder.model, encoder.processor, split, rerank_k=rerank, score_fusion="posterior")
    if rerank:
        expected = dataclasses.replace(expected, match_logits=expected.match_logits[:views]).with_fusion("posterior")
    gallery.build(split)
    for row in range(6):
        hits = gallery.search(split[row]["captions"][0], top=12, rerank=rerank).hits
        order = expected.scores[row].argsort(descending=True, stable=True).tolist()
        assert [int(hit.key) for hit in hits] == order
        similarity = torch.tensor([hit.similarity for hit in hits])
        torch.testing.assert_close(similarity, expected.similarity[row, order], rtol=0, atol=1e-6)
        if rerank:
            matched = dict(zip(expected.top_indices[row].tolist(), expected.match_scores[:, row].T, strict=True))
            for hit in hits:
                log_odds = matched.get(int(hit.key))
                probability = None if log_odds is None else log_odds.sigmoid().mean().item()
                assert hit.score == (None if probability is None else pytest.approx(probability, abs=1e-5))


def test_an_image_finds_itself_and_words_move_the_answer(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 8)
    gallery.build(tmp_path / "people")
    result = gallery.search(image=tmp_path / "people" / keys[3])
    assert (result.hits[0].key, result.hits[0].score, result.reranked) == (keys[3], None, 0)
    assert result.likely_in_gallery is None
    both = gallery.search("a red coat", image=gallery.image(keys[3]), top=8)
    alone = gallery.search("a red coat", top=8)
    of_image = {hit.key: hit.similarity for hit in result.hits}
    of_text = {hit.key: hit.similarity for hit in alone.hits}
    for hit in both.hits:
        assert hit.similarity == pytest.approx((of_image[hit.key] + of_text[hit.key]) / 2, abs=1e-5)
    assert both.reranked == 8 and both.hits[0].score is not None


def test_scores_do_not_depend_on_the_cache(model, tmp_path):
    keys = write_pictures(tmp_path / "people", 10)
    scores = []
    settings = {"encoder": encoder_of(model), "token_dtype": "float32"}
    for token_cache in (2**30, 0, 3 * (HEADER_BYTES + 4 * 3 * 64)):
        with Gallery(tmp_path / f"{token_cache}.db", token_cache=token_cache, **settings) as gallery:
            gallery.build(tmp_path / "people", batch_size=5)
            for _ in range(2):
                result = gallery.search("a red coat")
                scores.append({hit.key: hit.score for hit in result.hits})
            assert gallery.image_tokens(keys[0]).shape == (1, *gallery.encoder.token_shape[1:])
        assert (result.tokens_encoded == 0) == (token_cache == 2**30)
    for other in scores[1:]:
        assert other == {key: pytest.approx(score, abs=1e-5) for key, score in scores[0].items()}


def test_tokens_are_encoded_anew_where_the_cache_is_gone(model, tmp_path):
    write_pictures(tmp_path / "people", 5)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        first = gallery.search("a red coat")
    shutil.rmtree(tmp_path / "g.db" / "files" / "people" / "tokens")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        assert gallery.verify().tokens_missing == 5
        again = gallery.search("a red coat")
        assert (again.tokens_encoded, gallery.search("a red coat").tokens_encoded) == (5, 0)
    assert [hit.key for hit in again.hits] == [hit.key for hit in first.hits]


def test_a_picture_that_is_gone_is_ranked_by_similarity_alone(gallery, tmp_path, caplog):
    keys = write_pictures(tmp_path / "people", 5)
    gallery._state._token_cache = 0
    gallery.build(tmp_path / "people")
    (tmp_path / "people" / keys[0]).unlink()
    draw_picture(88).save(tmp_path / "people" / keys[1])
    scores = {hit.key: hit.score for hit in gallery.search("a red coat").hits}
    assert [key for key, score in scores.items() if score is None] and set(scores) == set(keys)
    assert {key for key, score in scores.items() if score is None} == set(keys[:2])
    assert "cannot be read" in caplog.text and "has changed since it was indexed" in caplog.text
    assert sorted(problem.key for problem in gallery.verify().problems) == sorted(keys[:2])
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        gallery.image(keys[1])


def test_phrases_have_scores_of_their_own(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 4)
    gallery.build(tmp_path / "people")
    scores = gallery.match(["a red coat with a long belt", "shoes"], keys)
    assert scores.shape == (2, 4)
    alone = gallery.match(["shoes"], [keys[2]])
    assert scores[1, 2] == pytest.approx(alone.item(), abs=1e-5)
    (hit,) = gallery.search("shoes", where=f'key == "{keys[2]}"').hits
    assert hit.score == pytest.approx(alone.item(), abs=1e-5)


def test_the_threshold_marks_hits(gallery, tmp_path):
    write_pictures(tmp_path / "people", 8)
    gallery.build(tmp_path / "people")
    scores = sorted(hit.score for hit in gallery.search("a red coat").hits)
    result = gallery.search("a red coat", threshold=scores[4])
    assert sum(hit.likely for hit in result.hits) == 4
    assert gallery.search("a red coat", threshold=1.0).likely_in_gallery is False
    assert gallery.search("a red coat", threshold=0.0).likely_in_gallery is True


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "text or image must be given, or both"),
        ({"text": " "}, "text must have at least one word"),
        ({"text": "x", "top": 0}, "top must be at least 1"),
        ({"text": "x", "rerank": -1}, "rerank must be at least 0"),
        ({"text": "x", "threshold": 2}, "threshold must be a probability"),
        ({"text": "x", "where": "hat == 1"}, "'hat' is not a field of this gallery"),
        ({"image": "nowhere.jpg"}, "image nowhere.jpg cannot be read"),
    ],
)
def test_wrong_searches_say_why(model, tmp_path, options, message):
    write_pictures(tmp_path / "people", 2)
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        with pytest.raises(ValueError, match="there is no gallery at"):
            gallery.search("x")
        gallery.build(tmp_path / "people")
        with pytest.raises(ValueError, match=message):
            gallery.search(**options)


def test_ranking_takes_the_weight_chosen_for_the_model(tmp_path):
    """`posterior` of the saved choice, unless it was made without mirror images."""
    model = save_tiny_model(tmp_path / "model")
    assert TorchEncoder(model).match_weight is None
    figures = {"R1": 50.0, "mAP": 40.0}
    choice = RetrievalChoice(4, "validation", 9, "posterior", 0.4, True, 0.05, {8: figures})
    choice.save(model)
    write_pictures(tmp_path / "pictures", 4)
    with Gallery(":memory:", encoder=TorchEncoder(model)) as gallery:
        gallery.build(tmp_path / "pictures")
        assert gallery.search("a red coat", rerank=3).match_weight == 0.4
        assert gallery.search("a red coat", rerank=0).match_weight is None
    dataclasses.replace(choice, flip=False).save(model)
    assert TorchEncoder(model).match_weight is None


@pytest.mark.parametrize("in_rounds", [False, True])
def test_a_search_that_overlaps_a_removal_writes_nothing_back(gallery, bounded, tmp_path, monkeypatch, in_rounds):
    if in_rounds:
        monkeypatch.setattr("mra.gallery.searching.ROUND_SIZES", {"cpu": 1})
        bounded(gallery, {1: 1e9})
    keys = write_pictures(tmp_path / "people", 4)
    gallery.build(tmp_path / "people")
    content = next(record.content for record in gallery._state.store.records(keys=[keys[0]]))
    gallery._state.tokens.keep_only(set())
    encode, is_removed = gallery.encoder.encode_images, []

    def encode_and_remove(images, **options):
        if not is_removed:
            is_removed.append(gallery.remove(keys=[keys[0]]))
        return encode(images, **options)

    monkeypatch.setattr(gallery.encoder, "encode_images", encode_and_remove)
    assert gallery.search("a red coat", top=1).matched == 4
    assert is_removed == [1] and content not in gallery._state.tokens and len(gallery._state.tokens) == 3


def test_a_query_embedding_that_is_not_finite_is_refused(gallery, tmp_path, monkeypatch):
    write_pictures(tmp_path / "people", 2)
    gallery.build(tmp_path / "people")
    encode = gallery.encoder.encode_texts

    def encode_badly(texts):
        encodings = encode(texts)
        return dataclasses.replace(encodings, embeds=encodings.embeds * float("nan"))

    monkeypatch.setattr(gallery.encoder, "encode_texts", encode_badly)
    with pytest.raises(ValueError, match="embedding of text 0, counted from 0, is not finite"):
        gallery.search("a red coat", rerank=0)


@pytest.mark.parametrize("views, token_cache", [(1, 0), (2, 2**30)])
def test_early_stopping_finds_what_full_reranking_finds(model, bounded, tmp_path, views, token_cache):
    write_pictures(tmp_path / "people", 40)
    gallery = Gallery(":memory:", encoder=encoder_of(model), matched_views=views, token_cache=token_cache)
    gallery.build(tmp_path / "people")
    texts = ["a red coat and white shoes", "a blue coat and black shoes"]
    full = [gallery.search(text, top=5) for text in texts]
    assert {result.matched for result in full} == {40} and gallery.largest_log_odds is None
    log_odds = [hit.score for text in texts for hit in gallery.search(text, top=40).hits]
    bound = torch.tensor(log_odds, dtype=torch.float64).logit().max().item() + 0.1
    bounded(gallery, {views: bound, 3 - views: 1e9})
    fewer = []
    for text, expected in zip(texts, full, strict=True):
        result = gallery.search(text, top=5)
        fewer.append(result.matched < 40)
        assert [(hit.key, hit.score) for hit in result.hits] == [
            (hit.key, pytest.approx(hit.score, abs=1e-5)) for hit in expected.hits
        ]
        assert result.matched in range(8, 41, 8) and result.reranked == 40
        assert result.tokens_encoded == (0 if token_cache else result.matched)
        assert set(result.timings) == {"encode", "search", "tokens", "rerank"}
        assert gallery.search(text, top=5, early_stop=False).matched == 40
    assert any(fewer)


def test_a_calibrated_gallery_stops_by_the_larger_bound(open_new, bounded, tmp_path):
    write_pictures(tmp_path / "people", 4)
    gallery = open_new()
    gallery.build(tmp_path / "people")
    calibrated = gallery.calibrate(make_split(), rerank=4).largest_log_odds
    assert gallery.largest_log_odds == calibrated
    bounded(gallery, {1: calibrated - 1, 2: calibrated + 9})
    assert gallery.largest_log_odds == calibrated
    bounded(gallery, {1: calibrated + 1})
    assert gallery.largest_log_odds == calibrated + 1


def test_old_galleries_open_as_they_are(model, tmp_path):
    """Built before one view and half precision were the default, and calibrated before the bound was measured."""
    write_pictures(tmp_path / "people", 12)
    settings = {"encoder": encoder_of(model)}
    with Gallery(tmp_path / "g.db", matched_views=2, token_dtype="float32", **settings) as gallery:
        gallery.build(tmp_path / "people")
        gallery.calibrate(make_split(), rerank=4)
        before = gallery.search("a red coat", top=3, early_stop=False)
        saved = gallery._state.info["calibration"]
        gallery._state.write_info(calibration={name: saved[name] for name in saved if name != "largest_log_odds"})
    with Gallery(tmp_path / "g.db", **settings) as gallery:
        assert gallery.calibration.largest_log_odds is None and gallery.largest_log_odds is None
        after = gallery.search("a red coat", top=3)
        assert (after.hits, after.matched, after.tokens_encoded) == (before.hits, 12, 0)
        write_pictures(tmp_path / "more", 2, first=20)
        gallery.add(tmp_path / "more", prefix="more/")
        assert gallery.image_tokens("more/cam_2/020.jpg").shape[0] == gallery.stats().matched_views == 2
        assert gallery.stats().token_dtype == "float32"


def test_one_view_is_that_of_the_upright_image(open_new, tmp_path):
    keys = write_pictures(tmp_path / "people", 3)
    for cached in (True, False):
        gallery = open_new(token_dtype="float32", collection=f"cached_{cached}", token_cache=2**30 if cached else 0)
        gallery.build(tmp_path / "people")
        upright = gallery.encoder.encode_images([gallery.image(key) for key in keys]).hidden_states[:, :1]
        for key, expected in zip(keys, upright.numpy(), strict=True):
            assert gallery.image_tokens(key) == pytest.approx(expected, rel=0, abs=1e-5)
        assert gallery.stats().matched_views == 1


def test_encoders_that_always_encode_both_views_are_used(model, tmp_path):
    class Older(TorchEncoder):
        def encode_images(self, images):
            return super().encode_images(images)

    write_pictures(tmp_path / "people", 3)
    with Gallery(":memory:", encoder=Older(model, device="cpu"), token_cache=0) as gallery:
        gallery.build(tmp_path / "people")
        assert gallery.search("a red coat").tokens_encoded == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"matched_views": 3}, "matched_views must be one of 1, 2, got 3"),
        ({"token_dtype": "int8"}, "token_dtype must be one of float32, float16, got 'int8'"),
    ],
)
def test_wrong_settings_of_a_new_gallery_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Gallery(tmp_path / "g.db", **settings)
    assert not (tmp_path / "g.db").exists()


def test_an_encoder_of_one_view_cannot_match_two(model, tmp_path, monkeypatch):
    encoder = TorchEncoder(model, device="cpu")
    monkeypatch.setattr(encoder, "token_shape", (1, *encoder.token_shape[1:]))
    write_pictures(tmp_path / "people", 2)
    message = r"matched_views must be 1 with model .*, got 2"
    with Gallery(":memory:", encoder=encoder, matched_views=2) as gallery, pytest.raises(ValueError, match=message):
        gallery.build(tmp_path / "people")
