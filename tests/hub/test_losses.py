"""Losses against oracles that follow the formulas row by row."""

import copy
import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from losses_mra import (
    choose_hard_negatives,
    contrastive_loss,
    contrastive_targets,
    masked_language_loss,
    matching_loss,
    weighted_sum,
)
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model


ROOT = Path(__file__).resolve().parents[2]


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
    labels[[0, 2, 3]] = -100  # tokens that were not masked do not count
    torch.testing.assert_close(masked_language_loss(logits, labels), logits[1].logsumexp(0) - logits[1, 8])
    empty = masked_language_loss(torch.zeros(0, 9, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert empty.item() == 0 and empty.requires_grad


def test_losses_of_half_precision_are_computed_in_full():
    logits, labels = torch.randn(4, 9), torch.tensor([1, 8, 0, 3])
    assert masked_language_loss(logits.bfloat16(), labels).dtype == torch.float32
    assert matching_loss(logits[:, :2].bfloat16(), torch.tensor([0, 1, 1, 0])).dtype == torch.float32


def test_weighted_sum_leaves_out_what_is_absent():
    terms = {"one": (0.5, torch.tensor(4.0)), "two": (3.0, None), "three": (1.0, torch.tensor(1.0))}
    assert weighted_sum(terms).item() == 3


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


# ---------------------------------------------------------------- a loss of one's own


LOSS = '''

def compactness_loss(embeds: torch.Tensor, identity_ids: torch.Tensor) -> torch.Tensor:
    """
    Return the mean squared distance of embeddings to the mean of their identity.

    Args:
        embeds: `(batch, width)`.
        identity_ids: `(batch,)`.
    """
    same = (identity_ids[:, None] == identity_ids[None, :]).to(embeds.dtype)
    means = same @ embeds / same.sum(dim=1, keepdim=True)
    return (embeds - means).square().sum(dim=1).mean()
'''
FIELD = "    compactness_weight: float | int = 0.3\n"
TERM = """            "compactness_loss": (config.compactness_weight, losses.compactness_loss(caption.embeds, identity_ids)),
"""


def edited(text: str, before: str, added: str) -> str:
    assert text.count(before) == 1
    return text.replace(before, before + added)


@pytest.fixture(scope="module")
def with_another_loss(tmp_path_factory):
    """The [Hub] files as a package, with a function, a field and a line of the forward more."""
    root = tmp_path_factory.mktemp("source")
    package = root / "with_another_loss"
    package.mkdir()
    texts = {path.name: path.read_text() for path in ROOT.glob("*_mra.py")}
    texts["losses_mra.py"] += LOSS
    texts["configuration_mra.py"] = edited(
        texts["configuration_mra.py"], "    region_weight: float | int = 0.8\n", FIELD
    )
    texts["modeling_mra.py"] = edited(
        texts["modeling_mra.py"], '            "mlm_loss": (config.mlm_weight, mlm_loss),\n', TERM
    )
    for name, text in texts.items():
        (package / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        yield importlib.import_module("with_another_loss.modeling_mra")


def test_a_loss_is_one_function_one_field_and_one_line(with_another_loss, tmp_path):
    plain = tiny_model(tiny_config())
    config = with_another_loss.MRAConfig(**plain.config.to_dict(), compactness_weight=0.5)
    model = with_another_loss.MRAForPreTraining(config).eval()
    model.load_state_dict(plain.state_dict())
    batch = tiny_batch(plain.config)
    before, output = (m(**batch, generator=torch.Generator().manual_seed(0)) for m in (plain, model))
    first, second, *others = output.text_embeds  # rows 0 and 1 are of one person
    assert batch["identity_ids"][0] == batch["identity_ids"][1] and len(batch["identity_ids"].unique()) == 1 + len(
        others
    )
    expected = (first - second).square().sum() / 2 / 4
    torch.testing.assert_close(output.compactness_loss, expected)
    torch.testing.assert_close(output.loss, before.loss + 0.5 * expected)
    assert list(output)[: len(before)] == list(before) and output["compactness_loss"] is output.to_tuple()[-1]
    # accelerate, FSDP and data loaders rebuild an output in these ways
    rebuilt = [tree_map(torch.clone, output), type(output)(dict(output)), copy.copy(output)]
    for other in rebuilt:
        assert list(other) == list(output) and torch.equal(other["compactness_loss"], output.compactness_loss)
    gradients = [
        torch.autograd.grad(o.loss, m.mra.text_projection.linear.weight)[0]
        for o, m in ((before, plain), (output, model))
    ]
    assert not torch.equal(*gradients)
    model.save_pretrained(tmp_path)
    assert with_another_loss.MRAConfig.from_pretrained(tmp_path).compactness_weight == 0.5
    with pytest.raises(ValueError, match="`compactness_weight` must not be negative"):
        with_another_loss.MRAConfig(compactness_weight=-1)
