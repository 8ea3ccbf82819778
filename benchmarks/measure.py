"""Measurement of time, memory and matmul rate, and the JSON output of all benchmarks."""

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from configuration_mra import MRAConfig
from mra.common.arguments import option
from mra.common.private_interfaces import pack_linear


MIB = 2**20


# A tiny model of the same structure, used without `--full_size`.
SMALL = {
    "vision_config": {"image_size": [64, 32], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_fusion_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "projection_dim": 16,
}

# Approximate tokens of a CUHK-PEDES caption with [CLS] and [SEP].
MEAN_LENGTH, LENGTH_DEVIATION, SHORTEST = 28, 8, 10


@dataclass
class ModelBenchmark:
    """Options of all benchmarks of the model."""

    full_size: bool = option(False, "use the published architecture instead of a tiny model")
    json: bool = option(False, "print the result as JSON in the last line")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "device to run on")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the forward passes")
    threads: int = option(1, "CPU threads; more than one would also count waiting as CPU time")
    seed: int = option(0, "seed of weights and inputs")


@dataclass
class Cost:
    """Cost of some work.

    Attributes:
        seconds: wall-clock time.
        cpu_seconds: CPU time of all threads of this process; other processes on the machine hardly change it.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextlib.contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Add the cost of the block, including its queued work on an accelerator."""
        synchronize(device)
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        yield
        synchronize(device)
        self.seconds += time.perf_counter() - seconds
        self.cpu_seconds += time.process_time() - cpu_seconds

    def on(self, device: torch.device) -> float:
        """Return CPU-seconds on a CPU, wall-clock seconds otherwise."""
        return self.cpu_seconds if device.type == "cpu" else self.seconds


def make_config(full_size: bool) -> MRAConfig:
    """Return the published architecture for CUHK-PEDES and ICFG-PEDES, or a tiny one."""
    return MRAConfig() if full_size else MRAConfig(**SMALL)


def caption_lengths(count: int, longest: int) -> torch.Tensor:
    """Return the tokens of `(count,)` captions in random order: quantiles of a normal distribution with a fixed mean."""
    quantiles = torch.distributions.Normal(MEAN_LENGTH, LENGTH_DEVIATION).icdf((torch.arange(count) + 0.5) / count)
    return quantiles[torch.randperm(count)].round().long().clamp(SHORTEST, longest)


def synchronize(device: torch.device) -> None:
    """Wait for all queued work of an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Return the multiply-adds per second (CPU-second on a CPU) of a large matrix product.

    The best of several repeats and, on a CPU in float32, of MKL and oneDNN, which differ by half on some processors.
    """
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: left @ right]
    if device.type == "cpu" and dtype == torch.float32 and (packed := pack_linear(right, None, size)) is not None:
        products.append(lambda: packed(left))
    costs = []
    for product in products:
        product()
        for _ in range(repeats):
            cost = Cost()
            with cost.measured(device):
                product()
            costs.append(cost.on(device))
    return size**3 / min(costs)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the accelerator since `reset_peak_memory`, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the parent's memory at the start of this process
        return 1024 * int(cast(re.Match, re.search(r"VmHWM:\s*(\d+) kB", status.read_text()))[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Reset an accelerator's peak memory; that of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def describe_device(device: torch.device) -> str:
    """Return the name of the accelerator, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def show(results: dict, as_json: bool) -> None:
    """Print named results, followed by one line of JSON with `as_json`."""
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    if as_json:
        print(json.dumps(results))
