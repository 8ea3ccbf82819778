"""Time one step of fine-tuning with augmented captions: a plain implementation as published, and `MRAForPreTraining`.

`MRAForPreTraining` runs with the given `--checkpointing`, with `vision`, which recomputes the image layers, and without any.

python benchmarks/train_step.py --full_size --json
python benchmarks/train_step.py --full_size --json --device cuda --dtype bfloat16 --batch_size 32
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/train_step.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import nn
from transformers import AutoTokenizer

from batching_mra import ImageTokens, TextBatch
from benchmarks.measure import (
    MIB,
    Cost,
    ModelBenchmark,
    caption_lengths,
    describe_device,
    make_config,
    peak_memory,
    show,
)
from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining
from mra.common.arguments import option, parse_arguments
from mra.training.collator import TrainingCollator
from mra.training.model_setup import set_gradient_checkpointing
from tests.oracle.plain import plain_finetuning_losses, plain_itm_loss, plain_mlm_loss, plain_negatives


TOKENIZER = Path(__file__).resolve().parent.parent / "data_scripts" / "sample" / "tokenizer"
LOSSES = ("itc_loss", "itm_loss", "mlm_loss", "augmented_itc_loss", "augmented_itm_loss", "loss")
Variant = Literal["plain", "ours", "ours_vision", "ours_without_checkpointing"]
VARIANTS = get_args(Variant)
_OURS: tuple[Variant, ...] = VARIANTS[1:]


@dataclass
class TrainStepBenchmark(ModelBenchmark):
    """Options of this benchmark."""

    batch_size: int = option(8, "rows per step")
    steps: int = option(1, "timed steps of each kind")
    checkpointing: Literal["none", "selective", "vision", "all"] = option(
        "selective", "what our layers recompute in the backward pass to save memory"
    )
    memory_of: Variant | None = option(None, "run one step of a kind and print only its peak memory")


def main(argv: list[str] | None = None) -> None:
    """Print the costs of the steps, of matching and masked language alone, the ratios and the difference of losses."""
    (args,) = parse_arguments([TrainStepBenchmark], description=__doc__, argv=argv, config=False)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    before = peak_memory(device)
    bench = Benchmark(args.full_size, args.batch_size, device, getattr(torch, args.dtype), args.checkpointing)
    if args.memory_of:
        bench.step(args.memory_of)
        print(max(peak_memory(device) - before, 1))
        return
    results = {"device": describe_device(device), "dtype": args.dtype, "batch_size": args.batch_size}
    lengths = bench.batch["lengths"]
    results |= {"caption_lengths": lengths.caption, "max_masked": lengths.max_masked}
    if device.type != "cpu":
        for variant in VARIANTS:
            bench.step(variant)
            bench.fusion_step(variant)
    for name, step in (("", bench.step), ("fusion_", bench.fusion_step)):
        costs = {variant: Cost() for variant in VARIANTS}
        for _ in range(args.steps):  # alternating, so that changes in machine speed favour neither
            for variant in VARIANTS:
                with costs[variant].measured(device):
                    step(variant)
        for variant, cost in costs.items():
            results[f"{variant}_{name}seconds"] = cost.seconds / args.steps
            results[f"{variant}_{name}cpu_seconds"] = cost.cpu_seconds / args.steps
        for variant in _OURS:
            end = variant.removeprefix("ours")
            results[f"{name}cpu_ratio{end}"] = costs["plain"].cpu_seconds / costs[variant].cpu_seconds
            results[f"{name}seconds_ratio{end}"] = costs["plain"].seconds / costs[variant].seconds
    results["max_abs_difference"] = bench.difference()
    memory = {variant: memory_in_another_process(variant, args) for variant in VARIANTS}
    results |= {f"{variant}_peak_memory_mib": peak / MIB for variant, peak in memory.items()}
    results |= {
        f"peak_memory_ratio{variant.removeprefix('ours')}": memory["plain"] / memory[variant] for variant in _OURS
    }
    show(results, args.json)


class Benchmark:
    """A random model, a batch, and both kinds of training step.

    Args:
        full_size: the published architecture instead of a tiny one.
        batch_size: rows.
        device: device of the model.
        dtype: dtype of the forward passes, under autocast unless it is float32.
        checkpointing: what the layers of `ours` recompute: `none`, `selective`, `vision` or `all`.
    """

    def __init__(
        self, full_size: bool, batch_size: int, device: torch.device, dtype: torch.dtype, checkpointing: str
    ) -> None:
        self.device, self.dtype = device, dtype
        self.checkpointing = {"ours": checkpointing, "ours_vision": "vision"}
        self.model = MRAForPreTraining(make_config(full_size))
        self.model.to(device).train()  # pyright: ignore[reportArgumentType]  # a decorator hides `self`
        batch = make_batch(self.model.config, batch_size)
        self.batch: dict[str, Any] = {
            name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()
        }

    def set_up(self, variant: str) -> None:
        """Set attention and checkpointing of one kind."""
        self.model.set_attn_implementation("eager" if variant == "plain" else "sdpa")
        set_gradient_checkpointing(self.model, self.checkpointing.get(variant, "none"))

    def losses(self, variant: str) -> dict[str, torch.Tensor]:
        """Run the forward pass of one kind, with hard negatives drawn from the same seed."""
        self.set_up(variant)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if variant == "plain":
                return plain_finetuning_losses(self.model, self.batch, generator)
            return self.model(**self.batch, generator=generator)

    def step(self, variant: str) -> None:
        """Run the forward and backward pass of one kind."""
        self.losses(variant)["loss"].backward()
        self.model.zero_grad()

    def fusion_step(self, variant: str) -> None:
        """Run matching and masked language alone, forward and backward, from encoded images and captions."""
        self.set_up(variant)
        encoded = self.encode()
        run = self.plain_fusion_loss if variant == "plain" else self.fusion_loss
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = run(*encoded, generator)
        loss.backward()
        self.model.zero_grad()

    def encode(self) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """Return random hidden states (with gradient) of images and both captions, and random embeddings."""
        config, size = self.model.config, len(self.batch["input_ids"])
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, generator=generator)

        images = random(size, 1 + config.vision_config.num_patches, config.vision_config.hidden_size).requires_grad_()
        shape = size, config.max_text_length, config.text_config.hidden_size
        texts = [random(*shape).requires_grad_() for _ in range(2)]
        image_embeds, *text_embeds = (nn.functional.normalize(random(size, config.projection_dim)) for _ in range(3))
        return images, texts, image_embeds, text_embeds

    def plain_fusion_loss(
        self,
        images: torch.Tensor,
        texts: Sequence[torch.Tensor],
        image_embeds: torch.Tensor,
        text_embeds: Sequence[torch.Tensor],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Compute the losses in three independent passes through the fusion layers."""
        model, batch = self.model, self.batch
        loss = plain_mlm_loss(model, images, batch["mlm_input_ids"], batch["attention_mask"], batch["labels"])
        for states, embeds, prefix in zip(texts, text_embeds, ("", "augmented_"), strict=True):
            negatives = plain_negatives(model, image_embeds, embeds, batch["identity_ids"], generator)
            loss = loss + plain_itm_loss(model.mra, images, states, batch[f"{prefix}attention_mask"], *negatives)
        return loss

    def fusion_loss(
        self,
        images: torch.Tensor,
        texts: Sequence[torch.Tensor],
        image_embeds: torch.Tensor,
        text_embeds: Sequence[torch.Tensor],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Compute the fusion losses as `MRAForPreTraining.forward` does from encoded images and captions."""
        model, batch, lengths = self.model, self.batch, self.batch["lengths"]
        mask, identities = batch["attention_mask"], batch["identity_ids"]
        caption = TextBatch("caption", batch["input_ids"], mask, lengths.caption, identities)
        augmented = TextBatch(
            "augmented",
            batch["augmented_input_ids"],
            batch["augmented_attention_mask"],
            lengths.augmented,
            identities,
        )
        masked = TextBatch(
            "masked", batch["mlm_input_ids"], mask, lengths.masked, None, batch["labels"], lengths.max_masked
        )
        model._encode_texts([masked])
        for text, states, embeds in zip((caption, augmented), texts, text_embeds, strict=True):
            text.hidden_states = states
            text.pairs = model._draw_pairs(image_embeds, embeds, identities, generator)
        model._fuse_texts([caption, augmented, masked], ImageTokens(images))
        losses = model._match(caption), model._match(augmented), model._predict_masked(masked)
        return torch.stack([loss for loss in losses if loss is not None]).sum()

    def difference(self) -> float:
        """Return the largest difference between the losses of the plain step and ours, without dropout."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                cast(Any, module).drop_prob = 0.0
        with torch.no_grad():
            plain, ours = self.losses("plain"), self.losses("ours")
        return max((plain[name] - ours[name]).abs().item() for name in LOSSES)


def make_batch(config: MRAConfig, batch_size: int) -> dict:
    """Build a batch of captions of random words and realistic lengths with the training collator."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())

    def captions() -> list[str]:
        lengths = caption_lengths(batch_size, config.max_text_length) - 2  # [CLS] and [SEP]
        return [" ".join(words[i] for i in torch.randint(len(words), (int(length),))) for length in lengths]

    pixels = torch.randn(batch_size, 3, *config.vision_config.image_size)
    examples = [
        {
            "pixel_values": image,
            "caption": caption,
            "augmented_caption": augmented,
            "mask_seed": row,
            "identity_id": row,
        }
        for row, (image, caption, augmented) in enumerate(zip(pixels, captions(), captions(), strict=True))
    ]
    return TrainingCollator(tokenizer, config.max_text_length)(examples)


def memory_in_another_process(variant: str, args: TrainStepBenchmark) -> int:
    """Return the bytes that one step, weights and gradients included, adds to a process that only imported its libraries."""
    names = ("batch_size", "checkpointing", "device", "dtype", "threads")
    options = [f"--{name}={getattr(args, name)}" for name in names]
    command = [sys.executable, __file__, f"--memory_of={variant}", *options]
    command += ["--full_size"] if args.full_size else []
    # Freed large tensors then return to the system at once, so that only live memory is counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
