"""Evaluation between epochs: its precision."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mra_training import validation
from mra_training.arguments import EvaluationArguments


@pytest.mark.parametrize(
    "mixed_precision, training", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", None)]
)
@pytest.mark.parametrize("eval_dtype", ["training", "float32"])
def test_precision_of_the_evaluation(monkeypatch, mixed_precision, training, eval_dtype):
    """Published: float32 whatever training runs in."""
    asked = {}
    monkeypatch.setattr(validation, "evaluate_retrieval", lambda *args, **options: asked.update(options))
    monkeypatch.setattr(validation, "broadcast", lambda tensors: tensors)
    accelerator = SimpleNamespace(
        unwrap_model=lambda model, keep_torch_compile: model, mixed_precision=mixed_precision, distributed_type="NO"
    )
    args = EvaluationArguments(eval_dtype=eval_dtype)
    validation.validate(accelerator, nn.Linear(2, 2), None, [1], args)
    assert asked["dtype"] == (torch.float32 if eval_dtype == "float32" else training)
