"""Count the peak memory of a recipe's training step from tensor sizes, without an accelerator or computation.

    python benchmarks/memory.py --recipe recipes/pretrain_sda.yaml --gradient_checkpointing vision --json

Fake tensors (`FakeTensorMode`) pass two steps of forward, backward and AdamW, and PyTorch's `MemTracker` sums the live memory:
weights, gradients, optimizer state, activations. An accelerator's allocator and libraries need additional memory, its fused
attention less; its autocast keeps more in float32 than that of the CPU, which is counted here.
"""

import sys
from pathlib import Path


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/memory.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import dataclass
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.initialization import no_init_weights

from batching_mra import TextLengths
from benchmarks.measure import caption_lengths, show
from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining
from mra.common.arguments import option, parse_arguments
from mra.common.recipes import read_mapping
from mra.training.model_setup import set_gradient_checkpointing


GIB = 2**30
BUDGETS = (12, 24, 40)  # GB, as cards are sold
SHAPE = ("image_size", "window_size", "drop_rate", "drop_path_rate")
PHRASE_LENGTH = 6  # tokens of a phrase with its [CLS] and [SEP]


@dataclass
class MemoryBenchmark:
    """Options of this benchmark."""

    recipe: Path | None = option(
        None, "recipe to pretrain or fine-tune the published architecture; a tiny model when left out"
    )
    batch_size: int | None = option(None, "rows per batch; the recipe's when left out")
    gradient_checkpointing: Literal["none", "selective", "vision", "all"] = option(
        "none", "what the layers recompute in the backward pass"
    )
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "precision of the forward pass")
    json: bool = option(False, "print the result as JSON in the last line")

    def __post_init__(self) -> None:
        self.read_recipe()

    def read_recipe(self) -> dict:
        """Return the recipe's keys and values, empty without a recipe."""
        return read_mapping(self.recipe) if self.recipe else {}


def main(argv: list[str] | None = None) -> None:
    """Print the peak memory of the recipe's batch by part, and the largest batch for some card sizes."""
    (args,) = parse_arguments([MemoryBenchmark], description=__doc__, argv=argv, config=False)
    recipe = args.read_recipe()
    batch_size = args.batch_size or recipe.get("per_device_batch_size", 4)
    config, with_regions = read_recipe(recipe) if args.recipe else (tiny_config(), True)
    dtype = getattr(torch, args.dtype)
    peaks = {
        size: peak_of_step(config, with_regions, size, args.gradient_checkpointing, dtype)
        for size in (batch_size, 2 * batch_size)
    }
    total, double = (sum(parts.values()) for parts in peaks.values())
    a_row = (double - total) / batch_size  # memory grows linearly with the batch
    fixed = total - a_row * batch_size
    results = {"recipe": str(args.recipe), "batch_size": batch_size, "dtype": args.dtype}
    results |= {"gradient_checkpointing": args.gradient_checkpointing, "peak_gib": total / GIB}
    results |= {f"{name}_gib": size / GIB for name, size in peaks[batch_size].items()}
    results |= {f"batch_that_fits_{budget}_gb": max(int((1e9 * budget - fixed) // a_row), 0) for budget in BUDGETS}
    show(results, args.json)


def tiny_config() -> MRAConfig:
    """Return the configuration of the other benchmarks without `--full_size`."""
    from benchmarks.measure import make_config

    return make_config(full_size=False)


def read_recipe(recipe: dict) -> tuple[MRAConfig, bool]:
    """Return the published architecture with a recipe's changes, and whether it trains on regions, as for a new run.

    The architecture of the model folder that a recipe starts from is not read.
    """
    vision = {name: recipe[name] for name in SHAPE if recipe.get(name) is not None}
    projection = {name: recipe[name] for name in ("projection_type", "projection_dim") if recipe.get(name)}
    fields = {**(recipe.get("model_config") or {}), **projection}
    fields["vision_config"] = {**fields.get("vision_config", {}), **vision}
    return MRAConfig(**fields), recipe.get("model_name_or_path") is None


def peak_of_step(
    config: MRAConfig, with_regions: bool, batch_size: int, checkpointing: str, dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes alive at the peak of the second step, by kind of tensor.

    Args:
        config: the model's configuration.
        with_regions: whether to train on regions and phrases instead of augmented captions.
        batch_size: rows.
        checkpointing: `none`, `selective`, `vision` or `all`.
        dtype: dtype of the forward passes, under autocast unless it is float32.
    """
    with no_init_weights():
        model = MRAForPreTraining(config).train()
    model.tie_weights()
    set_gradient_checkpointing(model, checkpointing)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    forget_values(model, mode)
    batch = make_batch(config, with_regions, batch_size)
    batch = {name: mode.from_tensor(value) if torch.is_tensor(value) else value for name, value in batch.items()}
    with mode:
        optimizer = torch.optim.AdamW(model.parameters())
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    names = {"PARAM": "weights", "GRAD": "gradients", "OPT": "optimizer", "ACT": "activations"}
    parts = dict.fromkeys([*names.values(), "other"], 0)
    for kind, size in peak.items():
        if kind != "Total":
            parts[names.get(getattr(kind, "name", kind), "other")] += size
    return parts


def forget_values(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace weights and buffers by fake tensors, keeping tied weights tied."""
    fakes = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in fakes:
                    fakes[parameter] = torch.nn.Parameter(mode.from_tensor(parameter.detach()))
                module._parameters[name] = fakes[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def make_batch(config: MRAConfig, with_regions: bool, batch_size: int) -> dict:
    """Return the arguments of `MRAForPreTraining.forward` with captions of realistic lengths."""
    shape, rows = (batch_size, config.max_text_length), torch.arange(batch_size)
    tokens, mask = torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
    lengths = caption_lengths(batch_size, config.max_text_length).tolist()
    batch = {
        "pixel_values": torch.zeros(batch_size, 3, *config.vision_config.image_size),
        "input_ids": tokens,
        "attention_mask": mask,
        "mlm_input_ids": tokens,
        "labels": tokens,
        "identity_ids": rows,
        "lengths": TextLengths(
            caption=lengths,
            augmented=None if with_regions else lengths,
            phrase=[PHRASE_LENGTH] * batch_size if with_regions else None,
            masked=lengths,
            max_masked=10,
        ),
    }
    if not with_regions:
        return batch | {"augmented_input_ids": tokens, "augmented_attention_mask": mask}
    return batch | {
        "phrase_input_ids": tokens,
        "phrase_attention_mask": mask,
        "phrase_ids": rows,
        "region_attention_mask": torch.ones(batch_size, 1 + config.vision_config.num_patches),
    }


if __name__ == "__main__":
    main()
