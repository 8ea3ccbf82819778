"""mra/retrieval/score_fusion.py against the fused scores of the reference evaluation."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mra.retrieval import score_fusion
from mra.retrieval.metrics import retrieval_metrics
from mra.retrieval.score_fusion import fuse_scores, fusion_name, require_finite


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


def scaled(matrix: torch.Tensor) -> torch.Tensor:
    """Scale a whole matrix to 0..1; one of equal values gives 0."""
    low, high = matrix.min(), matrix.max()
    return (matrix - low) / (high - low) if high > low else torch.zeros_like(matrix)


def fused_by_processes(similarity, top_indices, views, world_size, weight):
    """Do what every process of the published evaluation does with the whole matrix, in float64; add up the results."""
    count = len(similarity)
    step = count // world_size + 1
    total = torch.zeros_like(similarity)
    for process in range(world_size):
        own = range(min(count, process * step), min(count, (process + 1) * step))
        total += weight * scaled(similarity)
        if not own:
            total += 1  # in place of 0 / 0
            continue
        for scores in views:
            matrix = torch.full_like(similarity, 1000)
            for query in own:
                matrix[query] = scores[query].min()
                for image, score in zip(top_indices[query], scores[query], strict=True):
                    matrix[query, image] = score
            total += scaled(matrix) / len(views)
    return total


def fused_by_odds(similarity, top_indices, views, temperature, weight):
    """Add the logarithms of the likelihoods pair by pair."""
    log_odds = views.mean(dim=0)
    total = similarity / temperature + weight * log_odds.min(dim=1).values[:, None]
    for query, images in enumerate(top_indices.tolist()):
        for image, odds in zip(images, log_odds[query], strict=True):
            total[query, image] = similarity[query, image] / temperature + weight * odds
    return total


@st.composite
def evaluations(draw):
    """Similarities, top k and matching scores of one or two views, with ties."""
    queries, images, views = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    k = draw(st.integers(1, images))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    decimals = draw(st.integers(0, 6))  # few of them make ties
    similarity = torch.randn(queries, images, generator=generator, dtype=torch.float64).round(decimals=decimals)
    scores = 5 * torch.randn(views, queries, k, generator=generator, dtype=torch.float64).round(decimals=decimals)
    return similarity, similarity.topk(k, dim=1).indices, scores


@given(evaluation=evaluations(), world_size=st.integers(1, 6), weight=st.sampled_from([0.0, 0.002, 0.5]))
def test_any_published_fusion_is_the_sum_over_the_processes(evaluation, world_size, weight):
    fused = fuse_scores(*evaluation, "published", world_size, weight)
    expected = fused_by_processes(*evaluation, world_size, weight)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), expected, rtol=0, atol=1e-5)
    single = fuse_scores(*evaluation, "single", world_size, weight)
    torch.testing.assert_close(single.double(), fused_by_processes(*evaluation, 1, weight), rtol=0, atol=1e-5)


@given(evaluation=evaluations(), temperature=st.floats(0.01, 2), weight=st.floats(0, 3))
def test_any_posterior_adds_logarithms_of_likelihoods(evaluation, temperature, weight):
    fused = fuse_scores(*evaluation, "posterior", temperature=temperature, match_weight=weight)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), fused_by_odds(*evaluation, temperature, weight), rtol=1e-5, atol=1e-4)
    # Without a weight of their own, log-odds count as much as the similarity.
    plain = fuse_scores(*evaluation, "posterior", temperature=temperature)
    torch.testing.assert_close(plain.double(), fused_by_odds(*evaluation, temperature, 1), rtol=1e-5, atol=1e-4)


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
    similarity, top_indices, scores, _ = reference_case(0)
    for weight in (-1, -1e-9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"match_weight must be finite and at least 0, got {weight}"):
            fuse_scores(similarity, top_indices, scores, "posterior", temperature=0.1, match_weight=weight)
    for temperature in (0, -0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"needs the learned temperature, .* got {temperature}"):
            fuse_scores(similarity, top_indices, scores, "posterior", temperature=temperature)
    with pytest.raises(ValueError, match="score_fusion must be one of single, published, posterior, got 'both'"):
        fuse_scores(similarity, top_indices, scores, "both")
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        fuse_scores(similarity, top_indices, scores, "published", world_size=0)


def test_shapes_must_agree():
    similarity, top_indices, scores, _ = reference_case(1)
    more = torch.cat([similarity, similarity[:1]])
    for wrong in (
        (similarity, top_indices, scores[0]),
        (similarity, top_indices, scores[None]),
        (similarity, top_indices[:, 1:], scores),
        (similarity, top_indices, scores[:, :, 1:]),
        (similarity, top_indices, scores[:, 1:]),
        (similarity[1:], top_indices, scores),
        (more, top_indices, scores),  # one query was not matched with any image
    ):
        queries = len(wrong[0])
        message = (
            rf"match_scores must be \(views, {queries}, k\) and top_indices \({queries}, k\), got \({len(wrong[2])}"
        )
        for method in ("single", "published", "posterior"):
            with pytest.raises(ValueError, match=message):
                fuse_scores(*wrong, method, temperature=0.1)


def test_the_first_broken_pair_is_named_in_any_number_of_dimensions():
    logits = torch.zeros(2, 3, 4, 2)
    require_finite(logits, lambda text, image: "none")
    logits[1, 2, 3, 1] = float("inf")
    logits[1, 2, 1, 1] = float("-inf")
    message = r"the logit of text 2, image 1 \(mirrored\) is -inf, as are 1 more"
    with pytest.raises(ValueError, match=message):
        require_finite(logits, lambda text, image: f"text {text}, image {image}", "logit")
    logits[0, 1, 0] = float("nan")
    with pytest.raises(ValueError, match="the matching score of text 1, image 0 is nan, as are 3 more"):
        require_finite(logits, lambda text, image: f"text {text}, image {image}")


def test_the_logits_of_the_head_are_reduced():
    logits = torch.tensor([[[1.0, 3.0], [2.0, -4.0]]])
    assert score_fusion.match_scores(logits, log_odds=False).tolist() == [[3.0, -4.0]]
    assert score_fusion.match_scores(logits, log_odds=True).tolist() == [[2.0, -6.0]]


def test_a_fusion_is_named_with_its_weight():
    assert fusion_name("posterior", 0.25) == "posterior 0.25"
    assert (fusion_name("published", 0.25), fusion_name("single")) == ("published", "single")
