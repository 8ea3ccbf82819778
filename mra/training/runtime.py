"""Setup around the training loop: accelerator, plan of steps, seeds, stop signal and banner."""

import copy
import hashlib
import logging
import math
import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from mra.common.sharding import check_processes
from mra.training.arguments import OptimizationArguments, RunArguments
from mra.training.zero_checkpoints import is_cut_for_others


logger = get_logger(__name__)

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PATIENCE = timedelta(hours=2)  # while one process downloads, decodes or saves


# ---------------------------------------------------------------- accelerator


def create_accelerator(args: RunArguments) -> Accelerator:
    """Set up devices and processes from `accelerate launch`, precision and trackers from the recipe.

    Args:
        args: a `RunArguments`.

    Raises:
        ValueError: if a tracker is unknown or not installed, several processes do not know of each other, or they cannot share
            the statistics of BatchNorm.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # at INFO it logs every file that it writes
    on_cpu = os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu" or not torch.accelerator.is_available()
    backend = {"backend": "gloo"} if on_cpu and "LOCAL_RANK" in os.environ else {}  # DeepSpeed would choose nccl
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        log_with=[*check_trackers(args.log_with)] or None,
        project_dir=args.output_dir,
        # The batch dispatcher resumes at the wrong position.
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False, non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE, **backend)],
    )
    check_processes(accelerator.num_processes)
    is_alone = accelerator.distributed_type == DistributedType.NO
    if args.sync_batchnorm and not is_alone and accelerator.device.type == "cpu":
        raise ValueError(
            "`sync_batchnorm` is true, but the processes run on a CPU, where torch.nn.SyncBatchNorm does not work: leave it "
            "out, or train on GPUs"
        )
    return accelerator


def configure_deepspeed(accelerator: Accelerator, args: OptimizationArguments, checkpoint: Path | None = None) -> None:
    """Pass DeepSpeed the settings that it needs before `prepare`.

    Args:
        accelerator: the run's accelerator; without DeepSpeed, nothing is done.
        args: an `OptimizationArguments`, for the gradient clipping.
        checkpoint: the checkpoint that will be loaded, or None.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Under ZeRO-3 transformers would shard the weights while loading; here they are resized first, and `prepare`
    # shards them.
    unset_hf_deepspeed_config()
    config = _deepspeed_config(accelerator)
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["gradient_clipping"] = args.max_grad_norm or 0.0
    precision = accelerator.mixed_precision
    if precision != "no":
        # DeepSpeed's own mixed precision would keep weights, BatchNorm and temperature in half precision. With autocast
        # they stay in float32, as under data parallelism. Gradients are summed in float32 too.
        config[precision] = {"enabled": False}
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": str(AUTOCAST_DTYPES[precision]).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        }
    if is_cut_for_others(accelerator, checkpoint):
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    return cast(Any, accelerator.state.deepspeed_plugin).deepspeed_config


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Return the autocast dtype of training, whichever library sets it up, or None if autocast is off."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    section = _deepspeed_config(accelerator).get("torch_autocast", {})
    return getattr(torch, section["dtype"]) if section.get("enabled") else None


def check_trackers(names: list[str]) -> list[str]:
    """Check that every tracker is installed and return the names.

    Raises:
        ValueError: if one is not; the message names it.
    """
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in [str(known) for known in LOGGER_TYPE_TO_CLASS]:
            raise ValueError(f"`log_with`: unknown tracker {name!r}; installed ones are {available or 'none'}")
        if name not in available:
            package = "pip install 'mra-retrieval[tracking]'" if name == "tensorboard" else f"pip install {name}"
            raise ValueError(f"`log_with`: {name} is not installed: {package}")
    return names


def start_trackers(accelerator: Accelerator, project_name: str, recipe: dict) -> None:
    """Start the trackers and pass them the run's arguments as plain types."""
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in recipe.items() if v is not None}
    accelerator.init_trackers(project_name, config=plain)


def synchronize_batchnorm(model: nn.Module, args: RunArguments) -> nn.Module:
    """Let the BatchNorm layers of a model share their statistics among the processes if `sync_batchnorm` asks for it.

    Names and values of the weights stay the same, and a saved folder loads as a plain model. Outside training, and on one
    process, the layers compute as before.

    Args:
        model: changed in place; not yet prepared.
        args: a `RunArguments`.
    """
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if args.sync_batchnorm else model


def whole_model(model: Any) -> Any:
    """Return the unwrapped model, or a copy with all weights if ZeRO-3 or FSDP2 sharded it; every process must call this.

    Outside training the processes run different numbers of batches, so they must not wait for each other's shards.
    """
    parameter = next(model.parameters())
    by_deepspeed, by_fsdp = hasattr(parameter, "ds_id"), isinstance(model, FSDPModule)
    if not (by_deepspeed or by_fsdp):
        return model
    plain_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.random.fork_rng():
        copied = plain_class(copy.deepcopy(model.config)).to(parameter.device, parameter.dtype)
    if by_fsdp:
        copied.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        return copied
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        copied.load_state_dict(model.state_dict())
    return copied


# ---------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """Number of steps of a run.

    Attributes:
        samples_per_batch: pairs in one batch over all processes.
        steps_per_epoch: optimizer steps per epoch; the last takes the remaining batches.
        num_epochs: epochs started.
        total_steps: optimizer steps of the run.
        counted_steps: the same, counting the dropped incomplete last batch of each epoch.
    """

    samples_per_batch: int
    steps_per_epoch: int
    num_epochs: int
    total_steps: int
    counted_steps: int

    def schedule_steps(self, count_dropped_batch: bool) -> int:
        """Return the length of the learning-rate schedule in steps, with or without dropped batches."""
        return self.counted_steps if count_dropped_batch else self.total_steps


def make_plan(num_rows: int, per_device_batch_size: int, num_processes: int, args: RunArguments) -> Plan:
    """Count the steps of a run.

    Args:
        num_rows: training pairs.
        per_device_batch_size: pairs per process and batch.
        num_processes: number of processes.
        args: a `RunArguments`.

    Raises:
        ValueError: if the dataset does not fill one batch of every process.
    """
    samples_per_batch = per_device_batch_size * num_processes
    batches = num_rows // samples_per_batch
    if batches == 0:
        raise ValueError(
            f"`per_device_batch_size`: {num_rows} training pairs do not fill one batch of {per_device_batch_size} on "
            f"each of {num_processes} processes; lower it, or raise data_fraction"
        )
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    counted_per_epoch = math.ceil(num_rows / samples_per_batch / args.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    counted_steps = args.max_train_steps or args.num_train_epochs * counted_per_epoch
    num_epochs = math.ceil(total_steps / steps_per_epoch)
    return Plan(samples_per_batch, steps_per_epoch, num_epochs, total_steps, counted_steps)


def group_factor(accelerator: Accelerator, index: int, num_batches: int) -> float:
    """Return the factor on a batch's loss that makes a step use the mean of its accumulated batches.

    Accelerate and DeepSpeed divide every loss by `gradient_accumulation_steps`, but the last step of an epoch takes only the
    remaining batches. Groups start where the loader starts, because checkpoints are saved after steps.

    Args:
        accelerator: divides losses by its `gradient_accumulation_steps`.
        index: index of the batch, counted from where the loader started.
        num_batches: batches that the loader yields until the end of the epoch.
    """
    full = accelerator.gradient_accumulation_steps
    return full / min(full, num_batches - index // full * full)


# ---------------------------------------------------------------- seeds and signals


def seed_negatives(generator: torch.Generator, seed: int, micro_step: int, process_index: int) -> torch.Generator:
    """Seed the draw of hard negatives from the position in the run, so that a resumed run draws the same."""
    text = f"{seed} {micro_step} {process_index}".encode()
    return generator.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little"))


class StopSignal:
    """Handler that records SIGTERM, so that the loop can save and stop; a second SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        self._process = os.getpid()
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self._process:  # a forked worker, on which the terminating process waits
            os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------- what the user sees


def show_banner(title: str, facts: dict[str, object]) -> None:
    """Log a title and facts about the run, once."""
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    logger.info("\n".join([f"***** {title} *****", *lines]))


def describe_plan(
    accelerator: Accelerator, model: nn.Module, plan: Plan, args: RunArguments, batch_size: int, num_rows: int
) -> dict:
    """Return the banner's facts about model, data, hardware and length of a run."""
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return {
        "training pairs": f"{num_rows:,}",
        "parameters": f"{parameters / 1e6:.2f} M",
        "processes": f"{accelerator.num_processes} ({accelerator.distributed_type.value}, {accelerator.device})",
        "precision": str(autocast_dtype(accelerator) or torch.float32).removeprefix("torch."),
        "batch": f"{batch_size} x {accelerator.num_processes} processes x {args.gradient_accumulation_steps} accumulated",
        "optimizer steps": f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch)",
        "output": str(Path(args.output_dir)),
    }


def progress_bar(accelerator: Accelerator, total_steps: int, step: int) -> tqdm:
    """Create the progress bar over optimizer steps, shown on the main process."""
    return tqdm(total=total_steps, initial=step, disable=not accelerator.is_main_process, desc="steps")
