"""Time a fine-tuning step in chunks and one that recomputes each layer; compare the gradients of chunks and accumulation.

Gradients are those of the tiny model, in double precision; with `--full_size` only times are measured.

python benchmarks/chunked_step.py --json
python benchmarks/chunked_step.py --full_size --batch_size 16 --json
"""

import sys
from pathlib import Path
from typing import Any, cast


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/chunked_step.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import asdict, dataclass

import torch

from batching_mra import TextLengths
from benchmarks.measure import Cost, ModelBenchmark, describe_device, make_config, show
from benchmarks.train_step import make_batch
from modeling_mra import MRAForPreTraining
from mra.common.arguments import option, parse_arguments


@dataclass
class ChunkedStepBenchmark(ModelBenchmark):
    """Options of this benchmark."""

    batch_size: int = option(64, "rows per step")
    chunk_size: int = option(4, "images of a chunk, and rows of each accumulated batch")
    steps: int = option(1, "timed steps of each kind")


def main(argv: list[str] | None = None) -> None:
    """Print the costs of both steps and their ratio, and how far losses and gradients are from those of the whole batch."""
    (args,) = parse_arguments([ChunkedStepBenchmark], description=__doc__, argv=argv, config=False)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    bench = ChunkedStep(args)
    results = {"device": describe_device(bench.device), "dtype": args.dtype, "batch_size": args.batch_size}
    results |= {"chunk_size": args.chunk_size}
    costs = {"recomputed": Cost(), "chunks": Cost()}
    for _ in range(args.steps):  # alternating, so that changes in machine speed favour neither
        for kind, cost in costs.items():
            with cost.measured(bench.device):
                bench.step(kind)
    for kind, cost in costs.items():
        results[f"{kind}_seconds"] = cost.seconds / args.steps
        results[f"{kind}_cpu_seconds"] = cost.cpu_seconds / args.steps
    results["cpu_ratio"] = costs["chunks"].cpu_seconds / costs["recomputed"].cpu_seconds
    results["seconds_ratio"] = costs["chunks"].seconds / costs["recomputed"].seconds
    results |= {} if args.full_size else bench.differences()
    show(results, args.json)


class ChunkedStep:
    """A random model and a batch with augmented captions, and the three ways to take a step on it."""

    def __init__(self, args: ChunkedStepBenchmark) -> None:
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.chunk_size = args.chunk_size
        self.model = MRAForPreTraining(make_config(args.full_size))
        self.model.to(self.device).train()  # pyright: ignore[reportArgumentType]  # a decorator hides `self`
        self.batch: dict[str, Any] = make_batch(self.model.config, args.batch_size)

    def step(self, kind: str) -> float:
        """Run forward and backward pass, leave the gradient in the model, and return the contrastive loss.

        Args:
            kind: `recomputed` is the whole batch whose layers recompute their activations, `chunks` the same in chunks,
                `accumulated` the mean over batches of a chunk's size.
        """
        model = self.model
        model.chunk_size = self.chunk_size if kind == "chunks" else None
        if kind == "recomputed":
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()
        model.zero_grad()
        rows = len(self.batch["input_ids"])
        size = self.chunk_size if kind == "accumulated" else rows
        contrast = 0.0
        for start in range(0, rows, size):
            batch = self.take_rows(slice(start, start + size))
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                output = model(**batch, generator=torch.Generator(self.device).manual_seed(0))
            share = len(batch["input_ids"]) / rows
            (output.loss * share).backward()
            contrast += output.itc_loss.item() * share
        return contrast

    def take_rows(self, rows: slice) -> dict[str, Any]:
        """Return some rows of the batch on the device."""
        lengths: dict[str, Any] = asdict(self.batch["lengths"])
        lengths = {name: value[rows] if isinstance(value, list) else value for name, value in lengths.items()}
        tensors = {name: value[rows].to(self.device) for name, value in self.batch.items() if torch.is_tensor(value)}
        return tensors | {"lengths": TextLengths(**lengths)}

    def differences(self) -> dict[str, float]:
        """Return contrastive losses and the gradients' relative distances from that of the whole batch, without dropout."""
        self.model.double()
        self.batch["pixel_values"] = self.batch["pixel_values"].double()
        self.dtype = torch.float32  # no autocast
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                cast(Any, module).drop_prob = 0.0
        results = {"itc_loss": self.step("recomputed")}
        expected = self.gradient()
        for kind in ("chunks", "accumulated"):
            results[f"{kind}_itc_loss"] = self.step(kind)
            results[f"{kind}_gradient_difference"] = ((self.gradient() - expected).norm() / expected.norm()).item()
        return results

    def gradient(self) -> torch.Tensor:
        """Return the gradients of all parameters in one vector."""
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
