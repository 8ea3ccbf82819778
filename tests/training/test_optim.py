import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_mra import MRAForPreTraining
from mra.training.optim import PARTS, create_optimizer, is_decayed, is_in_part, learning_rate_factor, parameter_groups
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
