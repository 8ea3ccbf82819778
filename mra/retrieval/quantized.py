"""The vision tower with linear layers in int8, calibrated on the first images that it encodes."""

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from layers_mra import MRAVisionModel
from mra.common.environment import cpu_name
from mra.common.private_interfaces import has_int8_products, pack_int8_linear
from mra.retrieval.packed import (
    ROWS_PER_PRODUCT,
    PackedBlock,
    PackedNorm,
    PackedVision,
    can_pack,
    with_scaled_queries,
)


logger = logging.getLogger("mra_retrieval")  # whose notes commands show

# Images encoded in float32 first, whose activations give the ranges of int8.
CALIBRATION_IMAGES = 32

# Images that a block and the tower are compared with float32 on.
COMPARED_IMAGES = 4

# A block keeps float32 if int8 changes what it adds to its input by more than this part, in the Euclidean norm.
LARGEST_ERROR = 0.1

# Least cosine of an image's hidden state of the tower to that in float32.
LEAST_COSINE = 0.99


class QuantizedVision:
    """The vision tower in eval mode on a CPU, its blocks with linear layers in int8.

    The first `CALIBRATION_IMAGES` are encoded in float32, and the ranges of their activations are those of int8. Inputs of
    linear layers are uint8 with one scale for a layer, weights int8 with one for each output. Where the channels of an input
    differ in range, which trained Swin models are known for (RepQ-ViT, arXiv 2212.08254), the difference is moved into the
    weights as in SmoothQuant (arXiv 2211.10438). Sums, norms and attention stay float32, and so does a block that int8 changes
    too much. What was encoded before depends on the images only, what follows on those of the calibration too.

    Args:
        vision_model: the tower, in float32.

    Raises:
        ValueError: if the CPU has no instructions for int8, or the tower cannot be packed; when calibrated, if int8 changes
            the embeddings too much.
    """

    def __init__(self, vision_model: MRAVisionModel) -> None:
        if not has_int8_products():
            raise ValueError(
                f"int8 needs VNNI or AMX instructions, which this CPU ({cpu_name()}) lacks: use --dtype auto"
            )
        if not can_pack(vision_model) or next(vision_model.parameters()).dtype != torch.float32:
            raise ValueError("int8 needs float32 weights and windows that cover their grid exactly: use --dtype auto")
        self.packed = PackedVision(vision_model, torch.float32)
        steps = self.packed.steps
        modules = vision_model.swin.modules()
        blocks = (module for module in modules if isinstance(module, SwinTransformerBlock))
        self._observers = {
            place: _Observer(next(blocks), step) for place, step in enumerate(steps) if isinstance(step, PackedBlock)
        }
        steps[:] = [self._observers.get(place, step) for place, step in enumerate(steps)]
        self._images_seen, self._lock = 0, threading.Lock()

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images; for arguments and result see [`PackedVision`]."""
        if not self._observers:
            return self.packed(pixel_values)
        with self._lock:
            states = self.packed(pixel_values)
            self._images_seen += len(pixel_values)
            if self._observers and self._images_seen >= CALIBRATION_IMAGES:
                self._quantize(pixel_values[:COMPARED_IMAGES], states[:COMPARED_IMAGES])
        return states

    @torch.no_grad()
    def _quantize(self, pixel_values: torch.Tensor, expected: torch.Tensor) -> None:
        """Replace the blocks, except those that int8 changes too much; none if the embeddings change too much."""
        states, in_float, observed = self.packed.embed(pixel_values), 0, self.packed.steps
        steps = list(observed)
        for place, step in enumerate(observed):
            exact = step(states)
            if isinstance(step, _Observer):
                quantized = step.quantized()
                error = (quantized(states) - exact).norm() / (exact - states).norm()
                is_close = bool(error <= LARGEST_ERROR)  # not for NaN
                steps[place] = quantized if is_close else step.block
                in_float += not is_close
            states = exact
        self.packed.steps = steps
        cosine = F.cosine_similarity(self.packed(pixel_values)[:, 0], expected[:, 0]).min().item()
        if not cosine >= LEAST_COSINE:
            self.packed.steps = observed  # the next images are refused too
            raise ValueError(
                f"int8 changes this model's embeddings too much (cosine {cosine:.3f} to float32): use --dtype auto"
            )
        logger.info(
            "int8: %d of %d blocks of the image encoder, calibrated on the first %d images; cosine to float32 at least %.4f "
            "on %d of them",
            len(self._observers) - in_float,
            len(self._observers),
            self._images_seen,
            cosine,
            len(pixel_values),
        )
        self._observers = {}


@dataclass
class _Ranges:
    """Least and largest value of each channel so far, at least from 0 to 0."""

    least: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def of(cls, width: int) -> "_Ranges":
        return cls(torch.zeros(width), torch.zeros(width))

    def see(self, states: torch.Tensor) -> torch.Tensor:
        """Widen the ranges to the states `(..., width)`, and return these."""
        least, largest = states.flatten(0, -2).aminmax(dim=0)
        self.least, self.largest = self.least.minimum(least), self.largest.maximum(largest)
        return states

    def smoothing(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what to divide each channel by, and to multiply its weights `(out, width)` with (SmoothQuant, alpha 0.5)."""
        of_states = self.least.abs().maximum(self.largest).clamp(min=1e-5)
        return (of_states / weight.abs().amax(dim=0).clamp(min=1e-5)).sqrt()

    def scale_and_zero(self, divisor: torch.Tensor | float = 1.0) -> tuple[float, int]:
        """Return the step of uint8 and the number that means zero, for channels divided by the divisor."""
        least, largest = (self.least / divisor).min().item(), (self.largest / divisor).max().item()
        scale = max(largest - least, 1e-8) / 255
        return scale, round(-least / scale)


class _Observer:
    """A block in float32 that records the ranges of its linear layers' inputs."""

    def __init__(self, block: SwinTransformerBlock, packed: PackedBlock) -> None:
        self.source, self.block = block, packed
        hidden, width = cast(nn.Linear, block.mlp.fc1).weight.shape
        self.normed1, self.context, self.normed2 = (_Ranges.of(width) for _ in range(3))
        self.hidden = _Ranges.of(hidden)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        block = self.block
        context = block.attend(block.queries_keys_values(self.normed1.see(block.norm1(states))))
        states = block.output.added_to(states, self.context.see(context))
        hidden = block.widen(self.normed2.see(block.norm2(states)))
        return block.narrow.added_to(states, self.hidden.see(hidden))

    def quantized(self) -> "_QuantizedBlock":
        return _QuantizedBlock(self)


class _QuantizedBlock:
    """A Swin block with int8 products; what maps its activations to uint8 is part of the operations before."""

    def __init__(self, seen: _Observer) -> None:
        attention, mlp = seen.source.attn, seen.source.mlp
        self.block = seen.block
        qkv = with_scaled_queries(attention)
        output = cast(nn.Linear, attention.proj)
        # What the output projection reads is a mean of values, so scale and zero of its input are applied to the values.
        smoothing = seen.context.smoothing(output.weight)
        scale, zero = seen.context.scale_and_zero(smoothing)
        width = output.in_features
        factors = torch.cat([torch.ones(2 * width), 1 / (smoothing * scale)])
        shifts = torch.cat([torch.zeros(2 * width), torch.full((width,), zero + 0.5)])
        self.norm1, self.queries_keys_values = _normed(
            seen.block.norm1, seen.normed1, qkv.weight * factors[:, None], qkv.bias * factors + shifts
        )
        self.output = pack_int8_linear(output.weight * smoothing, output.bias, ROWS_PER_PRODUCT, scale, zero)
        self.norm2, self.widen = _normed(seen.block.norm2, seen.normed2, mlp.fc1.weight, mlp.fc1.bias, gelu=True)
        self.of_hidden = seen.hidden.scale_and_zero()
        self.narrow = pack_int8_linear(mlp.fc2.weight, mlp.fc2.bias, ROWS_PER_PRODUCT, *self.of_hidden)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        context = self.block.attend(self.queries_keys_values(_uint8(self.norm1(states))))
        states = self.output(_uint8(context), states)
        hidden = self.widen(_uint8(self.norm2(states)), None, self.of_hidden)
        return self.narrow(hidden, states)


def _normed(
    norm: PackedNorm, seen: _Ranges, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False
) -> tuple[PackedNorm, Callable[..., torch.Tensor]]:
    """Return a norm whose result only has to be rounded down to uint8, and the linear layer that reads it."""
    smoothing = seen.smoothing(weight)
    scale, zero = seen.scale_and_zero(smoothing)
    scaled = copy.copy(norm)
    scaled.weight = norm.weight / (smoothing * scale)
    scaled.bias = norm.bias / (smoothing * scale) + zero + 0.5
    return scaled, pack_int8_linear(weight * smoothing, bias, ROWS_PER_PRODUCT, scale, zero, gelu)


def _uint8(states: torch.Tensor) -> torch.Tensor:
    """Round down; what lies outside of the ranges seen becomes the nearest number."""
    return states.clamp_(0, 255).to(torch.uint8)
