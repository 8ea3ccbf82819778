"""Counts of operations: against published sizes, and against a count by hand."""

import pytest
import torch

from benchmarks.diffusion_cost import count, hours, millions, stable_diffusion, text_scorers


def test_matrix_products_and_their_backward_pass():
    weight, inputs = torch.zeros(5, 7, requires_grad=True), torch.zeros(3, 5)
    assert count(lambda: inputs @ weight) == 2 * 3 * 5 * 7 / 1e12
    assert count(lambda: (inputs @ weight).sum().backward()) == 2 * (2 * 3 * 5 * 7) / 1e12  # no gradient of the inputs
    assert millions(torch.nn.Linear(1000, 1000)) == 1.001


def test_stable_diffusion_has_its_published_size():
    costs = stable_diffusion()
    (unet, one, _), (controlnet, control, _) = costs["UNet, one pass"], costs["ControlNet, one pass"]
    assert unet == pytest.approx(859.5, abs=0.1) and controlnet == pytest.approx(361.3, abs=0.1)
    image, pair = (
        next(cost[1] for name, cost in costs.items() if part in name) for part in ("an image", "a training")
    )
    assert image == pytest.approx(60 * (one + control) + costs["autoencoder, decode"][1])
    assert (
        costs["autoencoder, encode"][1] + one + 3 * control
        < pair
        < costs["autoencoder, encode"][1] + 3 * (one + control)
    )


def test_a_vision_transformer_by_hand():
    """ViT-B/32: 49 patches of 3 x 32 x 32, then 12 layers of 4 + 8 square products of 768 and attention, a projection."""
    (cost,) = text_scorers().values()
    layers = 12 * (2 * 50 * 12 * 768**2 + 2 * 2 * 50 * 50 * 768)
    assert cost[1] == pytest.approx((2 * 49 * 3072 * 768 + layers + 2 * 768 * 512) / 1e12, rel=1e-6)


def test_hours_add_operations_and_weights_read():
    assert hours((1.0, 0.36, 0.0), teraflops=10, bandwidth=1) == pytest.approx(1.0)
    assert hours((1.0, 0.36, 36.0), teraflops=10, bandwidth=2) == pytest.approx(1.5)
