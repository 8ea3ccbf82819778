"""AdamW with the published parameter groups, and the learning-rate schedules."""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn

from configuration_mra import MRAConfig
from mra.training.arguments import PARTS, OptimizationArguments


_NORMS = ("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")
# `schedule: step`: (share of the run or multiple of the warm-up, factor on the linear schedule from there on).
_DROPS = {"run": ((0.4, 0.5), (0.7, 0.2)), "warmup": ((4, 0.5), (7, 0.2))}


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies to a parameter of `MRAForPreTraining`.

    Parameters with "bias" in their name, which includes the relative-position tables, and the encoders' norms are not decayed;
    the matching head's norm, the projections' BatchNorm and the temperature are (reference notes, "Optimisation").
    """
    if "bias" in name:
        return False
    return not name.endswith(_NORMS) or "_projection." in name


def is_in_part(name: str, part: str, config: MRAConfig) -> bool:
    """Return whether a parameter of `MRAForPreTraining` belongs to a named part of the model.

    The late parts are the last two Swin stages, text-only layers and fusion layers: stages 2-3 and BERT layers 4, 5,
    10 and 11 of the published model. The merging layer before the late stages is excluded, because the
    published encoder assigns it to the stage that it ends.

    Args:
        name: parameter name, as in `named_parameters()`.
        part: one of `PARTS`.
        config: the `MRAConfig`.

    Raises:
        ValueError: if the part is unknown.
    """
    stages, text = len(config.vision_config.depths), config.text_config
    prefixes = {
        "late_vision_stages": [f"swin.layers.{stages - 2}.blocks.", f"swin.layers.{stages - 1}."],
        "late_text_layers": [f"text_model.encoder.layer.{text.num_text_layers - i}." for i in (1, 2)],
        "late_fusion_layers": [f"fusion_layers.{text.num_fusion_layers - i}." for i in (1, 2)],
        "cross_attention": [".crossattention."],
        "mlm_head": ["mlm_head."],
        "match_head": ["match_head."],
    }
    if part not in prefixes:
        raise ValueError(f"`part` must be one of {', '.join(PARTS)}, got {part!r}")
    return any(prefix in name for prefix in prefixes[part])


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    learning_rate_multiplier: float = 1.0,
    multiplied_parts: tuple[str, ...] | list[str] = (),
) -> list[dict]:
    """Group the trained parameters of `MRAForPreTraining` by learning rate and weight decay.

    Returns:
        Up to four groups for AdamW: with and without decay at the plain rate, then the same at the multiplied rate.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            multiplied = any(is_in_part(name, part, cast(MRAConfig, model.config)) for part in multiplied_parts)
            groups.setdefault((multiplied, not is_decayed(name)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (learning_rate_multiplier if multiplied else 1.0),
            "weight_decay": 0.0 if spared else weight_decay,
        }
        for (multiplied, spared), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def create_optimizer(model: nn.Module, args: OptimizationArguments, fused: bool = False) -> torch.optim.AdamW:
    """Build AdamW with the parameter groups of an `OptimizationArguments`.

    Args:
        model: an `MRAForPreTraining`, not yet prepared.
        args: the arguments.
        fused: whether to use the fused kernel for all parameters.
    """
    groups = parameter_groups(
        model, args.learning_rate, args.weight_decay, args.learning_rate_multiplier, args.multiplied_parts
    )
    return torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=fused or None,
    )


def learning_rate_factor(
    step: int,
    *,
    schedule: str,
    total_steps: int,
    warmup_steps: int,
    final_factor: float = 0.0,
    schedule_drops: str = "run",
) -> float:
    """Return the factor on the peak learning rate; 0 at the first step of a warm-up (reference file `lr_tables.json`).

    Args:
        step: optimizer steps done before this one.
        schedule: `linear`, or `step`, which multiplies the linear factor by 1/2 from its first drop and by 1/5 from
            its second.
        total_steps: optimizer steps of the schedule.
        warmup_steps: steps over which the factor rises linearly to 1.
        final_factor: factor at which `linear` ends.
        schedule_drops: when `step` drops: `run`, at 40% and 70% of all steps; `warmup`, at 4 and 7 times the warm-up, as
            the published code counts (reference notes, "Optimisation").

    Raises:
        ValueError: if `schedule` or `schedule_drops` is unknown.
    """
    if schedule not in ("linear", "step"):
        raise ValueError(f"`schedule` must be linear or step, got {schedule!r}")
    if schedule_drops not in _DROPS:
        raise ValueError(f"`schedule_drops` must be one of {', '.join(_DROPS)}, got {schedule_drops!r}")
    if step < warmup_steps:
        factor = step / warmup_steps
    else:
        left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
        factor = final_factor + (1.0 - final_factor) * left
    if schedule == "step":
        unit = total_steps if schedule_drops == "run" else warmup_steps
        for start, drop in reversed(_DROPS[schedule_drops]):
            if step >= start * unit > 0:
                return factor * drop
    return factor


def create_schedule(args: OptimizationArguments, total_steps: int) -> Callable[[int], float]:
    """Return the learning-rate factor as a function of the optimizer step.

    Args:
        args: an `OptimizationArguments`.
        total_steps: optimizer steps of the schedule, see [`~mra.training.runtime.Plan.schedule_steps`].
    """
    share = args.num_warmup_steps < 1
    return partial(
        learning_rate_factor,
        schedule=args.schedule,
        total_steps=total_steps,
        warmup_steps=math.floor(args.num_warmup_steps * total_steps) if share else int(args.num_warmup_steps),
        final_factor=args.final_learning_rate / args.learning_rate,
        schedule_drops=args.schedule_drops,
    )
