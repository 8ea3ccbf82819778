import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_mra import MRAForPreTraining
from mra.training.optim import (
    PARTS,
    create_optimizer,
    create_schedule,
    is_decayed,
    is_in_part,
    learning_rate_factor,
    parameter_groups,
)
from mra.training.published_layout import to_mra_name
from tests.helpers.retrieval import tiny_config


REFERENCE = Path(__file__).parents[1] / "reference"
FINETUNING = ["late_vision_stages", "late_text_layers", "late_fusion_layers", "mlm_head", "match_head"]
PUBLISHED = SimpleNamespace(
    vision_config=SimpleNamespace(depths=[2, 2, 18, 2]),
    text_config=SimpleNamespace(num_text_layers=6, num_fusion_layers=6),
)


@pytest.mark.parametrize("recipe, parts", [("sda", ["cross_attention"]), ("cuhk", FINETUNING)])
def test_fidelity_of_parameter_groups(recipe, parts):
    published = json.loads((REFERENCE / f"optim_{recipe}.json").read_text())
    for name, expected in published.items():
        ours = to_mra_name(name, num_text_layers=6)
        multiplier = 2.0 if any(is_in_part(ours, part, PUBLISHED) for part in parts) else 1.0
        assert multiplier == expected["lr_multiplier"], ours
        assert (0.01 if is_decayed(ours) else 0.0) == expected["weight_decay"], ours


@pytest.mark.parametrize("name", ["linear_warmup2600", "step_warmup0.1", "step_rstp"])
def test_fidelity_of_schedules(name):
    table = json.loads((REFERENCE / "lr_tables.json").read_text())[name]
    for step, factor in table["step_factor"]:
        ours = learning_rate_factor(
            step,
            schedule=table["config"]["sched"],
            total_steps=table["num_training_steps"],
            warmup_steps=table["num_warmup_steps"],
        )
        assert ours == pytest.approx(factor, rel=1e-12, abs=1e-15), step


def test_drops_at_multiples_of_the_warm_up():
    """Published: at 4 and 7 times the warm-up; both ways agree where the warm-up is a tenth of the run."""

    def factors(drops, warmup, total=100):
        options = {"schedule": "step", "total_steps": total, "warmup_steps": warmup, "schedule_drops": drops}
        return [learning_rate_factor(step, **options) for step in range(total + 1)]

    def linear(step, warmup, total=100):
        return step / warmup if step < warmup else (total - step) / (total - warmup)

    assert factors("warmup", 10) == factors("run", 10)
    for step, factor in enumerate(factors("warmup", 5)):
        drop = 1.0 if step < 20 else 0.5 if step < 35 else 0.2
        assert factor == pytest.approx(drop * linear(step, 5)), step
    assert factors("run", 5)[20] == pytest.approx(80 / 95) and factors("run", 5)[40] == pytest.approx(0.5 * 60 / 95)
    assert factors("warmup", 25)[99] == pytest.approx(1 / 75)  # 4 times the warm-up lies behind the end
    with pytest.raises(ValueError, match="`schedule_drops` must be one of run, warmup, got 'end'"):
        factors("end", 10)


def test_linear_schedule_ends_at_the_final_factor():
    factors = [
        learning_rate_factor(step, schedule="linear", total_steps=10, warmup_steps=2, final_factor=0.1)
        for step in range(11)
    ]
    assert factors[:3] == [0.0, 0.5, 1.0] and factors[10] == pytest.approx(0.1)
    assert factors[6] == pytest.approx(0.55)
    with pytest.raises(ValueError, match="cosine"):
        learning_rate_factor(0, schedule="cosine", total_steps=1, warmup_steps=0)


@pytest.mark.parametrize(
    ("step", "total", "warmup", "factor"),
    [
        (0, 10, 0, 1.0),  # without a warm-up the first step is at the peak
        (3, 4, 2, 0.5),
        (10, 10, 2, 0.0),
        (12, 10, 2, 0.0),  # steps behind the end are at its factor
        (2, 2, 2, 0.0),  # a warm-up may take the whole run
    ],
)
def test_linear_schedule(step, total, warmup, factor):
    options = {"total_steps": total, "warmup_steps": warmup}
    assert learning_rate_factor(step, schedule="linear", **options) == factor
    final = learning_rate_factor(step, schedule="linear", final_factor=0.5, **options)
    assert final == pytest.approx(0.5 + factor / 2)


def test_drops_of_short_runs():
    options = {"schedule": "step", "warmup_steps": 0}
    assert learning_rate_factor(1, total_steps=2, **options) == 0.5 * 0.5  # a drop lies at step 0.8
    assert (
        learning_rate_factor(1, total_steps=2, schedule_drops="warmup", **options) == 0.5
    )  # and none without a warm-up


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0.25, {0: 0.0, 1: 0.5, 2: 1.0, 10: 0.1}),  # a share: the first 2 of 10 steps, rounded down
        (1, {0: 0.0, 1: 1.0, 10: 0.1}),  # one step
        (5, {1: 0.2, 5: 1.0, 10: 0.1}),
        (0, {0: 1.0, 10: 0.1}),
    ],
)
def test_schedule_of_a_recipe(warmup, expected):
    args = {"num_warmup_steps": warmup, "schedule": "linear", "schedule_drops": "run", "learning_rate": 1e-3}
    schedule = create_schedule(SimpleNamespace(**args, final_learning_rate=1e-4), 10)
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)


def test_drops_of_a_recipe():
    args = {"num_warmup_steps": 1, "schedule": "step", "learning_rate": 1e-3, "final_learning_rate": 0}
    factors = [create_schedule(SimpleNamespace(**args, schedule_drops=drops), 11)(5) for drops in ("run", "warmup")]
    assert factors == pytest.approx([0.5 * 0.6, 0.5 * 0.6])  # behind 40% of the run, and 4 times the warm-up
    factors = [create_schedule(SimpleNamespace(**args, schedule_drops=drops), 11)(7) for drops in ("run", "warmup")]
    assert factors == pytest.approx([0.5 * 0.4, 0.2 * 0.4])


def test_every_parameter_is_in_one_group():
    model = MRAForPreTraining(tiny_config())
    groups = parameter_groups(model, 1e-3, 0.01, 2.0, FINETUNING)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-3, 0.01),
        (1e-3, 0.0),
        (2e-3, 0.01),
        (2e-3, 0.0),
    ]
    embedding = id(model.get_input_embeddings().weight)
    assert any(embedding == id(parameter) for parameter in groups[0]["params"])


class Heads(nn.Module):
    """Parameters of a few names, the first neither decayed nor at the plain rate."""

    def __init__(self):
        super().__init__()
        self.config = tiny_config()
        self.match_head, self.mlm_head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.match_head.weight.requires_grad_(False)


def test_groups_have_one_order_whatever_comes_first():
    model = Heads()
    groups = parameter_groups(model, 1.0, 0.5, 3.0, ["match_head", "cross_attention"])
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1.0, 0.5), (1.0, 0.0), (3.0, 0.0)]
    parameters = [model.mlm_head.weight, model.mlm_head.bias, model.match_head.bias]  # frozen ones have no group
    assert all(len(group["params"]) == 1 for group in groups)
    assert all(group["params"][0] is parameter for group, parameter in zip(groups, parameters, strict=True))


def test_rates_are_multiplied_on_request():
    for arguments in ((), (3.0,), (1.0, ["match_head"])):
        groups = parameter_groups(Heads(), 1.0, 0.5, *arguments)
        assert {group["lr"] for group in groups} == {1.0}
    assert {group["lr"] for group in parameter_groups(Heads(), 1.0, 0.5, multiplied_parts=["match_head"])} == {1.0}


def test_every_part_names_parameters_of_the_model():
    model = MRAForPreTraining(tiny_config())
    for part in PARTS:
        assert any(is_in_part(name, part, model.config) for name, _ in model.named_parameters()), part
    with pytest.raises(ValueError, match="`part`"):
        is_in_part("temperature", "temperature", model.config)


def test_optimizer_takes_its_arguments():
    args = SimpleNamespace(
        learning_rate=1e-4,
        weight_decay=0.02,
        learning_rate_multiplier=3.0,
        multiplied_parts=["match_head"],
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-7,
    )
    optimizer = create_optimizer(MRAForPreTraining(tiny_config()), args)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-4, 3e-4, 3e-4])
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-7) for group in optimizer.param_groups)
    assert all(group["fused"] is None for group in optimizer.param_groups)  # PyTorch chooses
    fused = create_optimizer(MRAForPreTraining(tiny_config()), args, fused=True)
    assert all(group["fused"] for group in fused.param_groups)
