"""Time, memory and matmul rate, and the last line of every benchmark: one JSON object."""

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


# A model of the same shape that takes no time: what `--full_size` is not.
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

# Tokens of a caption of CUHK-PEDES with its [CLS] and [SEP], roughly.
MEAN_LENGTH, LENGTH_DEVIATION, SHORTEST = 28, 8, 10


@dataclass
class ModelBenchmark:
    """Options that every benchmark of the model has."""

    full_size: bool = option(False, "the published sizes instead of a tiny model")
    json: bool = option(False, "end with one line that holds the result as JSON")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, ...")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the forward passes")
    threads: int = option(1, "of the CPU; one never waits for another, which would count as CPU time")
    seed: int = option(0, "of weights and inputs")


@dataclass
class Cost:
    """What some work took.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of all threads of this process together; what other processes do on the machine hardly changes it.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextlib.contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Add what the block takes, the work that it leaves to an accelerator included."""
        synchronize(device)
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        yield
        synchronize(device)
        self.seconds += time.perf_counter() - seconds
        self.cpu_seconds += time.process_time() - cpu_seconds

    def on(self, device: torch.device) -> float:
        """CPU-seconds on a CPU, seconds elsewhere."""
        return self.cpu_seconds if device.type == "cpu" else self.seconds


def make_config(full_size: bool) -> MRAConfig:
    """Return the published architecture for CUHK-PEDES and ICFG-PEDES, or a tiny one."""
    return MRAConfig() if full_size else MRAConfig(**SMALL)


def caption_lengths(count: int, longest: int) -> torch.Tensor:
    """Return the tokens of `(count,)` captions in random order: quantiles of a normal distribution with a fixed mean."""
    quantiles = torch.distributions.Normal(MEAN_LENGTH, LENGTH_DEVIATION).icdf((torch.arange(count) + 0.5) / count)
    return quantiles[torch.randperm(count)].round().long().clamp(SHORTEST, longest)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Multiply-adds a second that one large matrix product reaches; on a CPU a CPU-second.

    The best of some repeats, and on a CPU in float32 of the two libraries there, MKL and oneDNN, which differ by half on some
    processors.
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
    """Bytes: of the accelerator since `reset_peak_memory`, of this process since its start on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        return 1024 * int(cast(re.Match, re.search(r"VmHWM:\s*(\d+) kB", status.read_text()))[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the count of an accelerator's peak memory; that of a process cannot be restarted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def describe_device(device: torch.device) -> str:
    """Name of the accelerator, or the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def show(results: dict, as_json: bool) -> None:
    """Print named results, and with `as_json` one line of JSON after them."""
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    if as_json:
        print(json.dumps(results))
