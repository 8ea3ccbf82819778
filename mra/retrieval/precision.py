"""The faster precision of a device: measured once on a CPU, for that processor, and remembered."""

import hashlib
import importlib.metadata
import json
import logging
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mra.common.environment import cpu_name
from mra.common.files import write_whole
from mra.retrieval.towers import Towers, forward_context, inner_model


logger = logging.getLogger("mra_retrieval")  # whose notes commands show

AUTO = "auto"
CACHE = Path("~/.cache/mra_retrieval/precision.json")

# Seconds to encode images in each precision; the best of several passes counts, since other work may disturb some.
PROBE_SECONDS = 1.0
PROBE_IMAGES = 2

# A gain that is not worth a rounded result.
LEAST_GAIN = 1.1


def resolve_dtype(model: PreTrainedModel, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of the forward passes for a setting; bfloat16 that is slower than float32 is warned of.

    "auto" is the faster of float32 and bfloat16. On an accelerator that is bfloat16 where it has it. On a CPU both encode
    images for a second, once for each processor, number of threads, version and architecture; the result is kept in
    `~/.cache/mra_retrieval/precision.json`, and logged. A model with other weights than float32 keeps their dtype.

    Args:
        model: an MRAModel, or a model with one as `.mra`, in eval mode, on the device to use.
        dtype: a dtype, its name, "auto", or None for that of the weights.
    """
    inner = inner_model(model)
    is_cpu = inner.device.type == "cpu"
    if dtype != AUTO:
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if is_cpu and named == torch.bfloat16 != inner.dtype and (gain := bfloat16_gain(model)) < 1:
            logger.warning(
                "bfloat16 is %.1f times slower than float32 on this CPU (%s): use float32, or auto",
                1 / gain,
                cpu_name(),
            )
        return named
    if inner.dtype != torch.float32:
        return None
    if not is_cpu:
        has_bfloat16 = inner.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    gain = bfloat16_gain(model)
    logger.info("bfloat16: %.1fx float32 on this CPU (%s)", gain, cpu_name())
    return torch.bfloat16 if gain >= LEAST_GAIN else torch.float32


def bfloat16_gain(model: PreTrainedModel) -> float:
    """Return how many times as fast as in float32 a model encodes images in bfloat16 on this CPU; see [`resolve_dtype`]."""
    key = _key(model)
    path = CACHE.expanduser()
    saved = _read(path)
    if key not in saved:
        seconds = _measure(model)
        saved[key] = seconds[torch.float32] / seconds[torch.bfloat16]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(saved, indent=2) + "\n")
        except OSError as error:
            logger.debug("%s is not written (%s): the next process measures again", path, error)
    return saved[key]


def _measure(model: PreTrainedModel) -> dict[torch.dtype, float]:
    """Return the seconds of the fastest pass over a few images in each precision, taken in turn."""
    towers = {dtype: Towers(model, dtype) for dtype in (torch.float32, torch.bfloat16)}
    pixels = torch.zeros(PROBE_IMAGES, *inner_model(model).vision_model.input_shape)
    best = dict.fromkeys(towers, float("inf"))
    for each in towers.values():
        _encode(each, pixels)  # packs the weights
    start, passes = time.perf_counter(), 0
    while passes < 2 or time.perf_counter() - start < PROBE_SECONDS * len(towers):
        for dtype, each in towers.items():
            before = time.perf_counter()
            _encode(each, pixels)
            best[dtype] = min(best[dtype], time.perf_counter() - before)
        passes += 1
    return best


def _encode(towers: Towers, pixels: torch.Tensor) -> None:
    with forward_context(towers.model, towers.dtype):
        towers.image_hidden_states(pixels)


def _key(model: PreTrainedModel) -> str:
    architecture = json.dumps(inner_model(model).config.vision_config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(architecture.encode()).hexdigest()[:12]
    versions = f"mra_retrieval {importlib.metadata.version('mra_retrieval')}, torch {torch.__version__}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {versions}, architecture {digest}"


def _read(path: Path) -> dict[str, float]:
    """Return the saved gains; none of a file that is missing or damaged, which is then written anew."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(saved, dict):
        return {}
    return {key: gain for key, gain in saved.items() if isinstance(gain, float) and gain > 0}
