"""How deep to re-rank: the choice on hand-made scores, and its file."""

import dataclasses
import json

import pytest
import torch

from mra_retrieval import RerankDepth, choose_rerank_depth, evaluate_retrieval
from mra_retrieval.rerank_depth import depths_to_try
from tests.retrieval_helpers import tiny_dataset, tiny_model, tiny_processor


DEPTH = RerankDepth(4, "CUHK validation", 100, "posterior", 0.5, True, 0.05, {2: {"R1": 50.0, "mAP": 40.0}})


@pytest.fixture(scope="module")
def result():
    return evaluate_retrieval(
        tiny_model(),
        tiny_processor(),
        tiny_dataset(num_ids=8),
        rerank_k=12,
        score_fusion="posterior",
        match_weight=0.5,
    )


def similar_in_this_order(result, rank_of_right: list[int], is_found_by_matching: bool):
    """A result of one query a rank: the right image has that rank by similarity; matching puts it first, or is flat."""
    num_queries, num_images = len(rank_of_right), 12
    similarity = torch.linspace(1, 0, num_images).expand(num_queries, -1)
    match_scores = torch.zeros(1, num_queries, num_images)
    if is_found_by_matching:
        match_scores[0, range(num_queries), rank_of_right] = 100.0
    gallery_ids = torch.arange(num_images)
    return dataclasses.replace(
        result,
        similarity=similarity,
        top_indices=torch.arange(num_images).expand(num_queries, -1),
        match_scores=match_scores,
        query_ids=torch.tensor(rank_of_right),
        gallery_ids=gallery_ids,
    )


def test_powers_of_two_and_the_largest_are_tried():
    assert depths_to_try(1) == [1]
    assert depths_to_try(8) == [1, 2, 4, 8]
    assert depths_to_try(12) == [1, 2, 4, 8, 12]


def test_least_depth_that_reaches_every_right_image_is_chosen(result):
    depth = choose_rerank_depth(similar_in_this_order(result, [0, 3, 1], True), "hand-made")
    assert depth.rerank_k == 4  # the right image at rank 3, counted from 0, is the fourth
    assert depth.tried[4]["R1"] == depth.tried[12]["R1"] == 100
    assert depth.tried[2]["R1"] == pytest.approx(200 / 3, abs=1e-3)
    assert (depth.chosen_on, depth.gallery_size, depth.score_fusion, depth.match_weight) == (
        "hand-made",
        12,
        "posterior",
        0.5,
    )


def test_matching_that_changes_nothing_needs_no_depth(result):
    assert choose_rerank_depth(similar_in_this_order(result, [0, 3, 1], False), "hand-made").rerank_k == 1


def test_a_loss_within_the_tolerance_is_taken(result):
    hand_made = similar_in_this_order(result, [0] * 9 + [11], True)
    assert choose_rerank_depth(hand_made, "hand-made").rerank_k == 12
    assert choose_rerank_depth(hand_made, "hand-made", tolerance=10.01).rerank_k == 1


def test_every_depth_gives_what_an_evaluation_at_that_depth_gives(result):
    depth = choose_rerank_depth(result, "tiny")
    for k in (2, 8):
        alone = evaluate_retrieval(
            tiny_model(),
            tiny_processor(),
            tiny_dataset(num_ids=8),
            rerank_k=k,
            score_fusion="posterior",
            match_weight=0.5,
        )
        assert depth.tried[k] == {name: alone.metrics["reranked"][name] for name in ("R1", "mAP")}


def test_needs_an_evaluation_with_reranking(result):
    with pytest.raises(ValueError, match="only be chosen from an evaluation with re-ranking"):
        choose_rerank_depth(dataclasses.replace(result, match_scores=None), "tiny")


def test_file_is_read_back_and_fits_what_it_was_chosen_for(tmp_path):
    assert DEPTH.save(tmp_path).name == "retrieval.json"
    assert [path.name for path in tmp_path.iterdir()] == ["retrieval.json"]
    depth = RerankDepth.load(str(tmp_path))
    assert depth == DEPTH
    assert depth.fits("posterior", 0.5, True)
    assert not depth.fits("posterior", 0.4, True) and not depth.fits("posterior", 0.5, False)
    assert not depth.fits("single", 0.5, True)
    single = dataclasses.replace(DEPTH, score_fusion="single", match_weight=None)
    assert single.fits("single", 1.0, True) and single.fits("single", 0.5, True)


def test_model_without_a_choice(tmp_path):
    assert RerankDepth.load(str(tmp_path)) is None


@pytest.mark.parametrize("text", ["[]", "{}", "no json", json.dumps({"rerank_k": 4})])
def test_damaged_file_is_named(tmp_path, text):
    (tmp_path / "retrieval.json").write_text(text)
    with pytest.raises(ValueError, match=r"retrieval\.json of model .* is no saved choice .*: remove it"):
        RerankDepth.load(str(tmp_path))
