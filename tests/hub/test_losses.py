"""Losses against oracles that follow the formulas row by row."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses_mra import (
    choose_hard_negatives,
    contrastive_loss,
    contrastive_targets,
    masked_language_loss,
    matching_loss,
)


def naive_contrastive(image, text, identities, temperature, smoothing):
    total, count = 0.0, len(image)
    for queries, keys in ((image, text), (text, image)):
        for i in range(count):
            scores = [float(queries[i] @ keys[j]) / temperature for j in range(count)]
            normaliser = math.log(sum(math.exp(score) for score in scores))
            positives = [j for j in range(count) if identities[j] == identities[i]]
            for j in range(count):
                target = (j in positives) / len(positives)
                if 0 < smoothing < 1:
                    target = (1 - smoothing) * target + smoothing / count
                total -= target * (scores[j] - normaliser)
    return total / count / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("identities", [[0, 1, 2, 3, 4], [7, 7, 3, 7, 3], [1, 1, 1, 1, 1]])
def test_contrastive_loss_equals_the_formula(identities, smoothing):
    image, text = F.normalize(torch.randn(2, 5, 8, dtype=torch.float64), dim=-1)
    loss = contrastive_loss(image, text, torch.tensor(identities), torch.tensor(0.1), smoothing)
    assert float(loss) == pytest.approx(naive_contrastive(image, text, identities, 0.1, smoothing), rel=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_contrastive_loss_in_chunks_is_the_same(chunk_size):
    embeds = F.normalize(torch.randn(2, 7, 8, dtype=torch.float64), dim=-1)
    identities, temperature = torch.tensor([3, 3, 1, 0, 1, 1, 9]), torch.tensor(0.1, dtype=torch.float64)
    results = []
    for size in (None, chunk_size):
        inputs = [tensor.clone().requires_grad_() for tensor in (*embeds, temperature)]
        loss = contrastive_loss(inputs[0], inputs[1], identities, inputs[2], 0.2, size)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for whole, in_chunks in zip(*results, strict=True):
        torch.testing.assert_close(in_chunks, whole, rtol=1e-12, atol=1e-12)


def test_contrastive_loss_in_chunks_keeps_no_matrix():
    """Of a batch of 64, no tensor of 64 x 64 numbers is saved for the backward pass."""
    image, text = F.normalize(torch.randn(2, 64, 8), dim=-1).requires_grad_()
    sizes = {None: [], 4: []}
    for chunk_size, saved in sizes.items():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            contrastive_loss(image, text, torch.arange(64), torch.tensor(0.1), 0.0, chunk_size)
    assert max(sizes[None]) == 64 * 64 and max(sizes[4]) == 64 * 8


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_targets_are_distributions(smoothing):
    targets = contrastive_targets(torch.tensor([5, 5, 2]), smoothing)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    assert targets[0, 0] == targets[0, 1] > targets[0, 2]


def test_matching_loss_leaves_out_pairs_without_a_negative():
    logits = torch.randn(3, 2)
    kept = F.cross_entropy(logits[:2], torch.tensor([1, 0]))
    assert torch.equal(matching_loss(logits, torch.tensor([1, 0, -100])), kept)


def test_masked_language_loss():
    logits, labels = torch.randn(4, 9), torch.tensor([1, 8, 0, 3])
    oracle = sum(logits[i].logsumexp(0) - logits[i, labels[i]] for i in range(4)) / 4
    torch.testing.assert_close(masked_language_loss(logits, labels), oracle)
    empty = masked_language_loss(torch.zeros(0, 9, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert empty.item() == 0 and empty.requires_grad


def test_losses_of_half_precision_are_computed_in_full():
    logits, labels = torch.randn(4, 9), torch.tensor([1, 8, 0, 3])
    assert masked_language_loss(logits.bfloat16(), labels).dtype == torch.float32
    assert matching_loss(logits[:, :2].bfloat16(), torch.tensor([0, 1, 1, 0])).dtype == torch.float32


# ---------------------------------------------------------------- hard negatives


SIMILARITY = torch.tensor([[9.0, 1.0, 0.0, -12.0], [0.0, 0.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 9.0, 0.0]])
IDENTITIES = torch.tensor([0, 1, 2, 2])
DRAWS = 2000


def test_negatives_follow_the_softmax():
    weights = SIMILARITY.softmax(dim=1) + 1e-5
    weights[IDENTITIES[:, None] == IDENTITIES[None, :]] = 0
    expected = weights / weights.sum(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([choose_hard_negatives(SIMILARITY, IDENTITIES, generator)[0] for _ in range(DRAWS)])
    shares = F.one_hot(draws, 4).float().mean(dim=0)
    assert not shares[IDENTITIES[:, None] == IDENTITIES[None, :]].any()
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / math.sqrt(DRAWS))


def test_negatives_keep_a_floor():
    """Softmax alone would never draw the third column; 1e-5 of each makes it half of what is left."""
    similarity = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0], [0.0, 0.0, 200.0]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([choose_hard_negatives(similarity, torch.arange(3), generator)[0] for _ in range(DRAWS)])
    assert (draws[:, 0] == 1).float().mean() == pytest.approx(0.5, abs=0.05)


def test_negatives_repeat_with_the_generator():
    draws = []
    for _ in range(2):
        torch.rand(7)  # the global generator has no say
        generator = torch.Generator().manual_seed(3)
        draws.append(torch.stack([choose_hard_negatives(SIMILARITY, IDENTITIES, generator)[0] for _ in range(20)]))
    assert torch.equal(*draws)
    assert len(draws[0].unique(dim=0)) > 1


def test_a_row_without_another_identity_has_no_negative():
    _, exists = choose_hard_negatives(torch.randn(3, 3), torch.tensor([4, 4, 4]))
    assert not exists.any()
    _, exists = choose_hard_negatives(torch.randn(3, 3), torch.tensor([4, 4, 5]))
    assert exists.all()


def test_negatives_take_half_precision():
    negatives, exists = choose_hard_negatives(torch.randn(3, 3).bfloat16(), torch.arange(3))
    assert exists.all() and not (negatives == torch.arange(3)).any()


def test_a_diverged_model_does_not_fail_in_the_draw():
    similarity = torch.randn(3, 3)
    similarity[1] = float("nan")
    negatives, exists = choose_hard_negatives(similarity, torch.arange(3))
    assert exists.all() and not (negatives == torch.arange(3)).any()
