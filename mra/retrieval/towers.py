"""The towers of a model, in the layout and precision that suit the device they run on."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from transformers import PreTrainedModel

from modeling_mra import MRAModel
from mra.retrieval.packed import PackedText, PackedVision, can_pack
from mra.retrieval.quantized import QuantizedVision


class Towers:
    """The towers of a model in eval mode, for repeated calls.

    On a CPU in float32 or bfloat16 they run packed (see `mra.retrieval.packed`), with a copy of the weights: create new ones
    after the model has changed. Elsewhere they run as they are, under autocast if the dtype is not that of the weights, and so
    does a vision tower whose windows overhang its grid.

    Args:
        model: an MRAModel, or a model with one as `.mra`, in eval mode, on the device to use.
        dtype: dtype of the forward passes; None for that of the weights. int8 is that of the image encoder's linear layers on
            a CPU, see [`QuantizedVision`], and all else is float32.

    Attributes:
        model: the MRAModel.
        device: its device.
        dtype: dtype of the forward passes.

    Raises:
        ValueError: when first used on a CPU, if a linear layer is not a plain one, such as one with an adapter; for int8 on
            another device, or see [`QuantizedVision`].
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.model = inner_model(model)
        self.device, self.dtype = device_and_dtype(model, dtype)
        self._is_packed = self.device.type == "cpu" and self.dtype in (torch.float32, torch.bfloat16)
        self._is_quantized = dtype == torch.int8
        if self._is_quantized and not self._is_packed:
            raise ValueError(
                f"int8 runs on a CPU with float32 weights, the model is on {self.device}: use --dtype auto"
            )

    @classmethod
    def of(cls, model: "PreTrainedModel | Towers", dtype: torch.dtype | None = None) -> "Towers":
        """Return the towers of a model, or the towers given.

        Raises:
            ValueError: if towers are given and run in another dtype.
        """
        if not isinstance(model, Towers):
            return cls(model, dtype)
        if dtype not in (None, model.dtype):
            raise ValueError(f"the towers run in {model.dtype}, got dtype {dtype}: leave it out")
        return model

    @functools.cached_property
    def _vision(self) -> Callable[[torch.Tensor], torch.Tensor]:
        if self._is_quantized:
            return QuantizedVision(self.model.vision_model)
        if self._is_packed and can_pack(self.model.vision_model):
            return PackedVision(self.model.vision_model, self.dtype)
        return self.model.get_image_hidden_states

    @functools.cached_property
    def _text(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return PackedText(self.model.text_model, self.dtype) if self._is_packed else self.model.get_text_hidden_states

    def image_hidden_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode pixels as `MRAModel.get_image_hidden_states` does; call this under `forward_context`."""
        return self._vision(pixel_values)

    def text_hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode tokens as `MRAModel.get_text_hidden_states` does; call this under `forward_context`."""
        return self._text(input_ids, attention_mask)


def inner_model(model: PreTrainedModel) -> MRAModel:
    """Return the `.mra` of a model with a head, or the MRAModel itself."""
    return cast(MRAModel, getattr(model, "mra", model))


@contextlib.contextmanager
def forward_context(model: torch.nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run forward passes without gradient, under autocast if `dtype` differs from the dtype of the weights."""
    device, dtype = device_and_dtype(model, dtype)
    weights_dtype = next(model.parameters()).dtype
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != weights_dtype):
        yield


def device_and_dtype(model: torch.nn.Module, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Return the device of a model, and the dtype of its forward passes: that of the weights if none or int8 is given."""
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype if dtype in (None, torch.int8) else dtype
