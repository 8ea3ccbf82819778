"""Count the peak memory of a recipe's training step from tensor sizes, without an accelerator or computation.

    python benchmarks/memory.py --recipe recipes/pretrain_sda.yaml --gradient_checkpointing vision --json

Fake tensors (`FakeTensorMode`) pass a step of forward, backward and AdamW, and [`MemoryCount`] sums the live memory: weights,
gradients, optimizer state, the batch, and activations, also temporary ones. An accelerator's allocator and libraries need
additional memory, its fused attention less; its autocast keeps more in float32 than that of the CPU, which is counted here.
"""

import sys
from pathlib import Path


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/memory.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.initialization import no_init_weights

from batching_mra import TextLengths
from benchmarks.measure import caption_lengths, show
from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining
from mra.common.arguments import option, parse_arguments, require
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
    chunk_size: int | None = option(None, "images whose activations are held at a time; the recipe's when left out")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "precision of the forward pass")
    json: bool = option(False, "print the result as JSON in the last line")

    def __post_init__(self) -> None:
        size = self.chunk_size
        require(size is None or size > 0, "chunk_size", "at least 1, or left out", size)
        self.read_recipe()

    def read_recipe(self) -> dict:
        """Return the recipe's keys and values, empty without a recipe."""
        return read_mapping(self.recipe) if self.recipe else {}


def main(argv: list[str] | None = None) -> None:
    """Print the peak memory of the recipe's batch by part, and the largest batch for some card sizes."""
    (args,) = parse_arguments([MemoryBenchmark], description=__doc__, argv=argv, config=False)
    recipe = args.read_recipe()
    batch_size = args.batch_size or recipe.get("per_device_batch_size", 4)
    chunk_size = args.chunk_size or recipe.get("chunk_size")
    config, with_regions = read_recipe(recipe) if args.recipe else (tiny_config(), True)
    dtype = getattr(torch, args.dtype)
    peaks = {
        size: peak_of_step(config, with_regions, size, args.gradient_checkpointing, dtype, chunk_size)
        for size in (batch_size, 2 * batch_size)
    }
    total, double = (sum(parts.values()) for parts in peaks.values())
    a_row = (double - total) / batch_size  # memory grows linearly with the batch
    fixed = total - a_row * batch_size
    results = {"recipe": str(args.recipe), "batch_size": batch_size, "dtype": args.dtype}
    results |= {"gradient_checkpointing": args.gradient_checkpointing, "chunk_size": chunk_size}
    results |= {"peak_gib": total / GIB}
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
    config: MRAConfig,
    with_regions: bool,
    batch_size: int,
    checkpointing: str,
    dtype: torch.dtype,
    chunk_size: int | None = None,
) -> dict[str, int]:
    """Return the bytes alive at the peak of the second step, by kind of tensor.

    Args:
        config: the model's configuration.
        with_regions: whether to train on regions and phrases instead of augmented captions.
        batch_size: rows.
        checkpointing: `none`, `selective`, `vision` or `all`.
        dtype: dtype of the forward passes, under autocast unless it is float32.
        chunk_size: images whose activations are held at a time; all at once when `None`.
    """
    with no_init_weights():
        model = MRAForPreTraining(config).train()
    model.tie_weights()
    set_gradient_checkpointing(model, checkpointing)
    model.chunk_size = chunk_size
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    forget_values(model, mode)
    batch = make_batch(config, with_regions, batch_size)
    batch = {name: mode.from_tensor(value) if torch.is_tensor(value) else value for name, value in batch.items()}
    with mode:
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():  # a step of any other but the first begins with the optimizer's state
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        count = MemoryCount()
        count.track("weights", *model.parameters())
        count.track("optimizer", *tree_leaves(list(optimizer.state.values())))
        count.track("other", *model.buffers(), *batch.values())
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: count.track("gradients", p.grad))
        with count:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
    return {kind: count.peak[kind] for kind in ("weights", "gradients", "optimizer", "activations", "other")}


class MemoryCount(TorchDispatchMode):
    """Bytes of the storages that are alive, by kind, and those at the peak.

    PyTorch's `MemTracker` gives the same sums, but visits every module after every operation: it takes ten times as long, and
    a batch in many chunks has many operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = Counter(), Counter()
        self._kinds = WeakIdKeyDictionary()  # storage -> its kind, in a list that outlives it

    def track(self, kind: str, *tensors: Any) -> None:
        """Count the storages of tensors as one kind until they are freed; other objects are passed over."""
        for tensor in tensors:
            if torch.is_tensor(tensor):
                self._track(kind, tensor.untyped_storage())

    def _track(self, kind: str, storage: torch.UntypedStorage) -> None:
        known = self._kinds.get(storage)
        if known is None:
            known = self._kinds[storage] = [kind]
            weakref.finalize(storage, self._free, known, storage.nbytes()).atexit = False
        else:
            self.live[known[0]] -= storage.nbytes()
            known[0] = kind
        self.live[kind] += storage.nbytes()

    def _free(self, known: list[str], size: int) -> None:
        self.live[known[0]] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it allocates."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self._kinds:
                self.track("activations", tensor)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return result


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
