"""How deep to re-rank: the choice on hand-made scores."""

import dataclasses

import pytest
import torch

from mra.retrieval import choose_rerank_depth, evaluate_retrieval
from mra.retrieval.rerank_depth import LARGEST_K, TOLERANCE, depths_to_try
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor


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
    match_logits = torch.zeros(1, num_queries, num_images, 2)
    if is_found_by_matching:
        match_logits[0, range(num_queries), rank_of_right, 1] = 100.0
    gallery_ids = torch.arange(num_images)
    return dataclasses.replace(
        result,
        similarity=similarity,
        top_indices=torch.arange(num_images).expand(num_queries, -1),
        match_logits=match_logits,
        query_ids=torch.tensor(rank_of_right),
        gallery_ids=gallery_ids,
    )


def test_powers_of_two_and_the_largest_are_tried():
    assert depths_to_try(1) == [1]
    assert depths_to_try(8) == [1, 2, 4, 8]
    assert depths_to_try(12) == [1, 2, 4, 8, 12]
    assert depths_to_try(LARGEST_K) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]  # 512 as published


def test_least_depth_that_reaches_every_right_image_is_chosen(result):
    rerank_k, tried = choose_rerank_depth(similar_in_this_order(result, [0, 3, 1], True))
    assert rerank_k == 4  # the right image at rank 3, counted from 0, is the fourth
    assert tried[4]["R1"] == tried[12]["R1"] == 100
    assert tried[2]["R1"] == pytest.approx(200 / 3, abs=1e-3)


def test_matching_that_changes_nothing_needs_no_depth(result):
    assert choose_rerank_depth(similar_in_this_order(result, [0, 3, 1], False))[0] == 1


def test_a_loss_within_the_tolerance_is_taken(result):
    hand_made = similar_in_this_order(result, [0] * 9 + [11], True)
    assert choose_rerank_depth(hand_made)[0] == 12
    assert choose_rerank_depth(hand_made, tolerance=10)[0] == 1  # nine of ten are first without matching
    assert choose_rerank_depth(hand_made, tolerance=9.99)[0] == 12
    assert choose_rerank_depth(similar_in_this_order(result, [0, 3, 1], True), tolerance=0)[0] == 4


def test_a_point_of_loss_is_too_much_unless_asked_for(result):
    hand_made = similar_in_this_order(result, [0] * 99 + [11], True)
    assert TOLERANCE < 0.5  # of a percentage point
    assert choose_rerank_depth(hand_made)[0] == 12


def test_depth_at_which_only_one_of_the_two_metrics_holds_is_too_small(result):
    hand_made = similar_in_this_order(result, [0], True)
    assert hand_made.match_logits is not None
    hand_made.match_logits[0, 0, 3, 1] = 100.0
    hand_made.gallery_ids[3] = 0  # a second right image at rank 3: R@1 holds from k = 1, mAP from k = 4
    rerank_k, tried = choose_rerank_depth(hand_made)
    assert tried[1]["R1"] == 100 and tried[1]["mAP"] < tried[4]["mAP"]
    assert rerank_k == 4
    hand_made = similar_in_this_order(result, [0] * 9 + [1], True)  # at k = 1, R@1 loses 10 points and mAP 5
    rerank_k, tried = choose_rerank_depth(hand_made, tolerance=7)
    assert (tried[1]["R1"], tried[1]["mAP"]) == (pytest.approx(90), pytest.approx(95))
    assert rerank_k == 2


def test_every_depth_gives_what_an_evaluation_at_that_depth_gives(result):
    _, tried = choose_rerank_depth(result)
    for k in (2, 8):
        alone = evaluate_retrieval(
            tiny_model(),
            tiny_processor(),
            tiny_dataset(num_ids=8),
            rerank_k=k,
            score_fusion="posterior",
            match_weight=0.5,
        )
        assert tried[k] == {name: alone.metrics["reranked"][name] for name in ("R1", "mAP")}


def test_needs_an_evaluation_with_reranking(result):
    with pytest.raises(ValueError, match="only be chosen from an evaluation with re-ranking"):
        choose_rerank_depth(dataclasses.replace(result, match_logits=None))
