"""mra/retrieval/score_fusion.py against the fused scores of the reference evaluation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mra.retrieval import score_fusion
from mra.retrieval.metrics import retrieval_metrics
from mra.retrieval.score_fusion import fuse_scores


REFERENCE = Path(__file__).parents[1] / "reference"
EVALUATION = json.loads((REFERENCE / "evaluation_b.json").read_text())


def reference_case(flip):
    tensors = load_file(REFERENCE / "evaluation_b.safetensors")
    similarity = tensors[f"sims_t2i_hflip{flip}"]
    views = [tensors["itm_match_logit_all_pairs"], tensors["itm_match_logit_all_pairs_flipped_images"]][: 1 + flip]
    top_indices = similarity.topk(EVALUATION["k_test"], dim=1).indices
    match_scores = torch.stack([view.gather(1, top_indices) for view in views])
    return similarity, top_indices, match_scores, tensors


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(
    ("method", "world_size"), [("single", 1), ("published", 1), ("published", 2), ("published", 4)]
)
def test_fidelity_fused_scores(flip, method, world_size):
    similarity, top_indices, match_scores, tensors = reference_case(flip)
    fused = fuse_scores(similarity, top_indices, match_scores, method, world_size)
    name = f"hflip{flip}_world{world_size}"
    torch.testing.assert_close(fused, tensors[f"score_t2i_{name}"], rtol=0, atol=1e-6)
    ids = torch.tensor(EVALUATION["q_pids"]), torch.tensor(EVALUATION["g_pids"])
    assert retrieval_metrics(fused, *ids) == pytest.approx(EVALUATION["runs"][name]["metrics"], abs=1e-4)
    expected = EVALUATION["runs"][f"sims_only_hflip{flip}"]
    assert retrieval_metrics(similarity, *ids) == pytest.approx(expected, abs=1e-4)


def test_published_is_what_four_processes_give():
    similarity, top_indices, match_scores, tensors = reference_case(1)
    fused = fuse_scores(similarity, top_indices, match_scores, "published")
    torch.testing.assert_close(fused, tensors["score_t2i_hflip1_world4"], rtol=0, atol=1e-6)
    # `single` pays no regard to the argument that only `published` has.
    single = fuse_scores(similarity, top_indices, match_scores, "single", world_size=4)
    assert torch.equal(single, fuse_scores(similarity, top_indices, match_scores, "published", world_size=1))


def test_published_closed_form():
    """A row is ranked by (s - m) / (1000 - m) + world * 0.002 * z, whichever process owns it."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(11, 9, generator=generator, dtype=torch.float64)
    match_scores = torch.randn(1, 11, 9, generator=generator, dtype=torch.float64)
    top_indices = torch.arange(9).repeat(11, 1)
    fused = fuse_scores(similarity, top_indices, match_scores, "published", world_size=3)
    scaled = (similarity - similarity.min()) / (similarity.max() - similarity.min())
    for first, last in ((0, 4), (4, 8), (8, 11)):  # slices of 11 // 3 + 1
        rows = match_scores[0, first:last]
        expected = 2 + (rows - rows.min()) / (1000 - rows.min()) + 0.006 * scaled[first:last]
        torch.testing.assert_close(fused[first:last].double(), expected, rtol=0, atol=1e-6)


def test_posterior_adds_log_odds_and_scaled_similarity():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(5, 7, generator=generator)
    log_odds = torch.randn(2, 5, 3, generator=generator)
    top_indices = similarity.topk(3, dim=1).indices
    fused = fuse_scores(similarity, top_indices, log_odds, "posterior", temperature=0.1, match_weight=0.5)
    for query in range(5):
        ranked = top_indices[query].tolist()
        for rank, image in enumerate(ranked):
            expected = similarity[query, image] / 0.1 + (log_odds[0, query, rank] + log_odds[1, query, rank]) / 4
            torch.testing.assert_close(fused[query, image], expected)
        others = [image for image in range(7) if image not in ranked]
        assert fused[query, others].max() <= fused[query, ranked].min()
        assert fused[query, others].argsort().equal(similarity[query, others].argsort())
    with pytest.raises(ValueError, match="needs the learned temperature"):
        fuse_scores(similarity, top_indices, log_odds, "posterior")


@pytest.mark.parametrize("method", ["single", "published"])
def test_rows_in_chunks_change_nothing(method, monkeypatch):
    similarity, top_indices, match_scores, _ = reference_case(1)
    whole = fuse_scores(similarity, top_indices, match_scores, method)
    monkeypatch.setattr(score_fusion, "ROWS_PER_CHUNK", 3)
    assert torch.equal(fuse_scores(similarity, top_indices, match_scores, method), whole)


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_few_queries_and_equal_scores_stay_finite(world_size):
    """Processes without rows, and a matrix without any range, divide by zero in the published code."""
    similarity = torch.full((3, 4), 0.5)
    top_indices = torch.tensor([[0, 1], [1, 2], [3, 0]])
    for match_scores in (torch.zeros(2, 3, 2), torch.arange(12.0).view(2, 3, 2)):
        fused = fuse_scores(similarity, top_indices, match_scores, "published", world_size)
        assert fused.isfinite().all()


@pytest.mark.parametrize("method", ["single", "published", "posterior"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_score_that_is_not_finite_is_named(method, value):
    similarity, top_indices, match_scores, _ = reference_case(1)
    broken = match_scores.clone()
    broken[1, 3, 2] = value
    pair = f"matching score of query 3 and image {int(top_indices[3, 2])} .mirrored. is {value}, as are 0 more"
    with pytest.raises(ValueError, match=pair):
        fuse_scores(similarity, top_indices, broken, method, temperature=0.1)
    similarity = similarity.clone()
    similarity[2, 5] = value
    with pytest.raises(ValueError, match=f"similarity of query 2 and image 5 is {value}"):
        fuse_scores(similarity, top_indices, match_scores, method, temperature=0.1)


def test_arguments_are_checked():
    similarity, top_indices, match_scores, _ = reference_case(0)
    with pytest.raises(ValueError, match="match_weight must be finite and at least 0, got -1"):
        fuse_scores(similarity, top_indices, match_scores, "posterior", temperature=0.1, match_weight=-1)
    with pytest.raises(ValueError, match="score_fusion must be one of single, published, posterior, got 'both'"):
        fuse_scores(similarity, top_indices, match_scores, "both")
    with pytest.raises(ValueError, match=r"match_scores must be \(views, 20, k\)"):
        fuse_scores(similarity, top_indices, match_scores[0])
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        fuse_scores(similarity, top_indices, match_scores, "published", world_size=0)
