"""mra/retrieval/evaluation.py: the whole evaluation on a tiny model and set."""

import datasets
import pytest
import torch

from modeling_mra import MRAForPreTraining
from mra.retrieval import evaluate_retrieval, evaluation, format_table, fuse_scores, retrieval_metrics
from mra.retrieval.evaluation import below_similarity, draw_queries, read_captions
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def world():
    return tiny_model(), tiny_processor(), tiny_dataset()


def test_stages_fit_together(world):
    model, processor, dataset = world
    result = evaluate_retrieval(model, processor, dataset, rerank_k=4, batch_size=4, rerank_batch_size=7)
    assert result.counts == {"identities": 5, "images": 10, "captions": 15}
    assert result.query_rows.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    assert result.gallery_ids.tolist() == dataset["image_id"][:]
    ids = result.gallery_ids[result.query_rows], result.gallery_ids
    assert list(result.metrics) == ["similarity", "reranked"]
    assert list(result.metrics["similarity"]) == ["R1", "R5", "R10", "mAP", "mINP"]
    assert result.metrics["similarity"] == retrieval_metrics(result.similarity, *ids)
    assert result.metrics["reranked"] == retrieval_metrics(result.reranked, *ids)
    assert (result.score_fusion, result.match_weight, result.ranking) == ("published", None, "published, k 4")
    fused = fuse_scores(result.similarity, result.top_indices, result.match_scores, "published")
    assert torch.equal(result.reranked, fused) and result.scores is result.reranked
    assert set(result.timings) == {"encode_images", "encode_texts", "rank", "rerank", "fuse", "pairs_per_second"}


def test_batch_sizes_change_nothing(world):
    model, processor, dataset = world
    small = evaluate_retrieval(model, processor, dataset, rerank_k=4, batch_size=3, rerank_batch_size=2)
    large = evaluate_retrieval(model, processor, dataset, rerank_k=4)
    assert small.metrics == large.metrics
    torch.testing.assert_close(small.match_scores, large.match_scores, rtol=0, atol=1e-4)


def test_similarity_alone_and_no_flip(world):
    model, processor, dataset = world
    for rerank_k in (None, 0):
        result = evaluate_retrieval(model, processor, dataset, rerank_k=rerank_k, flip=False)
        assert list(result.metrics) == ["similarity"] and result.reranked is None and result.rerank_k == 0
        assert result.scores is result.similarity
    one_view = evaluate_retrieval(model, processor, dataset, rerank_k=2, flip=False)
    assert one_view.match_scores.shape == (1, 15, 2)


def test_image_to_text_equals_a_naive_oracle(world):
    """Each image asks for the captions of its person; an image of somebody without captions asks for nothing."""
    model, processor, dataset = world
    dataset = dataset.map(lambda row: {"captions": [] if row["image_id"] == 102 else row["captions"]})
    result = evaluate_retrieval(model, processor, dataset)
    hits, precisions = {1: 0, 5: 0, 10: 0}, []
    for image in (0, 1, 2, 3, 6, 7, 8, 9):
        order = sorted(range(len(result.captions)), key=lambda caption: -result.similarity[caption, image].item())
        right = [result.query_ids[caption] == result.gallery_ids[image] for caption in order]
        for k in hits:
            hits[k] += any(right[:k])
        ranks = [rank for rank, is_right in enumerate(right, start=1) if is_right]
        precisions.append(sum(number / rank for number, rank in enumerate(ranks, start=1)) / len(ranks))
    metrics, num_images = result.image_to_text()
    assert num_images == 8 and {k: metrics[f"R{k}"] for k in hits} == {k: 100 * count / 8 for k, count in hits.items()}
    assert metrics["mAP"] == pytest.approx(100 * sum(precisions) / 8)


def test_fusion_is_passed_on(world):
    model, processor, dataset = world
    result = evaluate_retrieval(model, processor, dataset, rerank_k=3, score_fusion="published")
    expected = fuse_scores(result.similarity, result.top_indices, result.match_scores, "published", world_size=4)
    assert torch.equal(result.reranked, expected)
    result = evaluate_retrieval(model, processor, dataset, rerank_k=3, score_fusion="posterior", match_weight=0.3)
    no, yes = result.match_logits.unbind(-1)
    assert torch.equal(result.match_scores, yes - no) and result.ranking == "posterior 0.3, k 3"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matching_score_that_is_not_finite_is_named(world, monkeypatch, value):
    """One pair of a mirror image: scaled with the others, it would make all of them equal."""
    _, processor, dataset = world
    compute = evaluation.rerank_logits

    def broken(*arguments, **options):
        logits = compute(*arguments, **options)
        logits[1, 2, 0, 1] = value
        return logits

    monkeypatch.setattr(evaluation, "rerank_logits", broken)
    with pytest.raises(ValueError, match=f"the caption 'a .*' .row 1. and the image of row . .mirrored. is {value}"):
        evaluate_retrieval(world[0], processor, dataset, rerank_k=3)


def test_drawn_queries_are_ranked_in_the_whole_gallery(world):
    """A query has the result that it has among all of them, and a seed always draws the same."""
    model, processor, dataset = world
    whole = evaluate_retrieval(model, processor, dataset, rerank_k=3)
    part = evaluate_retrieval(model, processor, dataset, rerank_k=3, num_queries=5, seed=4)
    drawn = draw_queries(len(whole.captions), 5, 4)
    assert part.captions == [whole.captions[query] for query in drawn] and part.gallery_ids.equal(whole.gallery_ids)
    torch.testing.assert_close(part.similarity, whole.similarity[drawn], atol=1e-5, rtol=0)
    assert part.query_ids.equal(whole.query_ids[drawn]) and part.query_rows.equal(whole.query_rows[drawn])
    assert part.top_indices.equal(whole.top_indices[drawn]) and part.counts["images"] == len(dataset)
    assert (part.sample, whole.sample) == ("5 captions drawn by seed 4", None)
    assert evaluate_retrieval(model, processor, dataset, num_queries=len(whole.captions)).sample is None


def test_every_caption_is_drawn_as_often():
    draws = torch.stack([torch.bincount(draw_queries(10, 4, seed), minlength=10) for seed in range(2000)])
    assert draws.max() == 1 and (draws.sum(dim=1) == 4).all()
    assert (draws.double().mean(dim=0) - 0.4).abs().max() < 0.05  # 4.5 standard errors
    assert draw_queries(10, 4, 0).tolist() == sorted(draw_queries(10, 4, 0).tolist())


def test_k_is_capped_with_a_note(world, caplog):
    model, processor, dataset = world
    result = evaluate_retrieval(model, processor, dataset, rerank_k=512)
    assert result.rerank_k == 10
    assert "rerank_k 512 is larger than the gallery: re-ranking all 10 images" in caplog.text


def test_training_model_is_left_as_it_was(world):
    _, processor, dataset = world
    model = tiny_model(MRAForPreTraining)
    model.train()
    model.mra.vision_projection.eval()
    state = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    evaluate_retrieval(model, processor, dataset, rerank_k=2)
    assert model.training and model.mra.text_projection.training and not model.mra.vision_projection.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_arguments_are_checked(world):
    model, processor, dataset = world
    with pytest.raises(ValueError, match="rerank_k must be 0"):
        evaluate_retrieval(model, processor, dataset, rerank_k=-1)
    with pytest.raises(ValueError, match="score_fusion must be one of"):
        evaluate_retrieval(model, processor, dataset, score_fusion="sum")
    with pytest.raises(ValueError, match="batch size must be at least 1"):
        evaluate_retrieval(model, processor, dataset, batch_size=0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [None], "caption": ["a"], "image_id": [1]},
            "no column captions: expected image, captions, image_id",
        ),
        ({"image": [None], "captions": ["a"], "image_id": [1]}, "row 0: captions must be a list of texts, got 'a'"),
        (
            {"image": [None] * 2, "captions": [["a"], ["b", " "]], "image_id": [1, 2]},
            "row 1: a caption must be a text",
        ),
        ({"image": [None], "captions": [["a"]], "image_id": ["7"]}, "image_id must be an integer in every row"),
        ({"image": [], "captions": [], "image_id": []}, "the dataset has no rows"),
    ],
)
def test_datasets_are_checked(columns, message):
    with pytest.raises(ValueError, match=message):
        read_captions(datasets.Dataset.from_dict(columns))


def test_images_without_captions_stay_in_the_gallery():
    columns = {"image": [None] * 2, "captions": [[], ["b"]], "image_id": [1, 2]}
    captions, rows, identities = read_captions(datasets.Dataset.from_dict(columns))
    assert captions == ["b"] and rows.tolist() == [1] and identities.tolist() == [1, 2]
    empty = datasets.Dataset.from_dict(
        {"image": [None], "captions": [[]], "image_id": [1]},
        features=datasets.Features(
            {
                "image": datasets.Value("null"),
                "captions": datasets.List(datasets.Value("string")),
                "image_id": datasets.Value("int64"),
            }
        ),
    )
    with pytest.raises(ValueError, match="no row has a caption"):
        read_captions(empty)


def test_below_similarity():
    metrics = {"similarity": {"R1": 50.0, "mAP": 40.0}}
    assert below_similarity(metrics) is None
    assert below_similarity(metrics | {"reranked": {"R1": 50.0, "mAP": 40.0}}) is None
    found = below_similarity(metrics | {"reranked": {"R1": 60.0, "mAP": 39.5}})
    assert found == "re-ranking is below similarity alone: mAP 39.50 against 40.00"


def test_table():
    metrics = {"R1": 77.2104, "R5": 90.66, "R10": 100.0, "mAP": 68.5, "mINP": 5.0}
    assert format_table({"similarity": metrics}).splitlines() == [
        "               R@1     R@5    R@10     mAP    mINP",
        "similarity   77.21   90.66  100.00   68.50    5.00",
    ]
