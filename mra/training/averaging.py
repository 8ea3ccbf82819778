"""Exponential moving average of the weights during training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mra.training.checkpoint_manifest import zero_stage


# Of the files that `accelerator.save_state` writes for registered objects: the schedule, the position, the average.
AVERAGE_FILE = "custom_checkpoint_2.pkl"


def check_averaging(accelerator: Accelerator, decay: float | None) -> None:
    """Check that every process holds all weights, if they are averaged.

    Raises:
        ValueError: if FSDP or ZeRO-3 shards them.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator) == 3
    if decay is not None and sharded:
        raise ValueError(
            f"`ema_decay` is {decay}, but FSDP and ZeRO-3 shard the weights that each process averages: leave it out, or "
            "train with data parallelism or ZeRO-2 (accelerate_configs/zero2_4xa100.yaml)"
        )


def check_average(checkpoint: Path, recipe: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds an average if, and only if, the run needs one.

    Args:
        checkpoint: the checkpoint to continue from.
        recipe: resolved arguments of this run.

    Raises:
        ValueError: if not.
    """
    decay, has_average = recipe.get("ema_decay"), (checkpoint / AVERAGE_FILE).is_file()
    if decay is not None and not has_average:
        raise ValueError(
            f"`ema_decay` is {decay}, but {checkpoint} holds no averaged weights, because its run had none: leave it out, or "
            "start a new run from the weights (--model_name_or_path)"
        )
    if decay is None and has_average:
        raise ValueError(
            f"`ema_decay` is left out, but {checkpoint} holds averaged weights: set it to the value in its recipe.yaml"
        )


def create_average(model: nn.Module, decay: float | None, device: torch.device) -> AveragedModel | None:
    """Create the moving average of a model's weights and of the statistics of its BatchNorm.

    The first update copies the weights; each later one takes `decay` of the average and `1 - decay` of the weights. Whole
    numbers among the buffers, such as the index tables of Swin, are copied: averaged, they would be rounded down.

    Args:
        model: not yet prepared.
        decay: share of the average that an update keeps, 0 to 1; None for no average.
        device: device of the average. The counter of updates stays on the CPU, where reading it does not wait for the device.

    Returns:
        The average, whose `module` is the averaged model; None for no average.
    """
    if decay is None:
        return None
    average_floats = get_ema_multi_avg_fn(decay)

    def update(averaged: Any, current: Any, num_averaged: Any) -> None:
        if averaged[0].is_floating_point():
            average_floats(averaged, current, num_averaged)
        else:
            for ours, theirs in zip(averaged, current, strict=True):
                ours.copy_(theirs)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    average.module.to(device)
    return average


def update_average(accelerator: Accelerator, average: AveragedModel | None, model: Any) -> None:
    """Take the weights of a prepared model into the average, if there is one; call this after each optimizer step."""
    if average is not None:
        unwrapped: Any = accelerator.unwrap_model(model)
        average.update_parameters(unwrapped)


def models_of_run(model: Any, average: AveragedModel | None) -> dict[str, Any]:
    """Return the models that a run validates and saves, by the suffix of their folders."""
    return {"": model} if average is None else {"": model, "_ema": average.module}
