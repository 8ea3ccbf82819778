"""Layers of a model in eval mode with weights in the layout and precision that suit a CPU, for inference."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import nn
from transformers.activations import GELUActivation

from layers_mra import MRAFusionLayer, MRATextLayer, MRATextModel, MRAVisionModel, mix_values, visibility_mask
from mra.common.private_interfaces import pack_linear


# Approximate tokens per product, for which oneDNN optimises the layout of weights.
ROWS_PER_PRODUCT = 1024

# Tokens of the first stage per pass: enough rows for the products of the last stages, few enough for a CPU's cache.
TOKENS_PER_PASS = 12288


class PackedLinear:
    """Linear layers with the same input, merged into one with concatenated outputs and an activation.

    On a CPU oneDNN uses its own weight layout, as in TorchInductor with frozen weights. In float32 that is a fifth faster at
    these sizes: the layout is computed once, and bias and GELU are fused into the product.

    Args:
        linears: the layers.
        dtype: dtype of weights and products.
        activation: applied to the result.

    Raises:
        ValueError: if a layer is not a plain `nn.Linear`, such as one with an adapter, whose own weight is not all it does.
    """

    def __init__(self, linears: list[nn.Linear], dtype: torch.dtype, activation: nn.Module | None = None) -> None:
        for linear in linears:
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"a layer of the model is a {type(linear).__name__}, expected a plain linear layer: merge adapters into "
                    "the weights with merge_and_unload() before encoding and matching"
                )
        weight = torch.cat([linear.weight.detach() for linear in linears]).to(dtype)
        biases = [cast(torch.Tensor | None, linear.bias) for linear in linears]
        bias = (
            None if biases[0] is None else torch.cat([cast(torch.Tensor, each).detach() for each in biases]).to(dtype)
        )
        is_gelu = (
            isinstance(activation, nn.GELU | GELUActivation) and getattr(activation, "approximate", "none") == "none"
        )
        packed = pack_linear(weight, bias, ROWS_PER_PRODUCT, is_gelu) if weight.device.type == "cpu" else None
        self._product = packed or (lambda states, added=None: _plain_product(states, weight, bias, added))
        self.activation = None if packed and is_gelu else activation

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(..., in)` to `(..., out)`."""
        states = self._product(states)
        return states if self.activation is None else self.activation(states)

    def added_to(self, residual: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Map `(..., in)` to `(..., out)` of a layer without activation, and add that to `(..., out)`."""
        return self._product(states, residual)


def _plain_product(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, added: torch.Tensor | None
) -> torch.Tensor:
    result = F.linear(states, weight, bias)
    return result if added is None else result + added


class PackedNorm:
    """A layer norm with weights in a dtype, which the states have too.

    Args:
        norm: the layer.
        dtype: dtype of the weights.
    """

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.shape, self.eps = list(norm.normalized_shape), norm.eps
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise `(..., width)`."""
        return F.layer_norm(states, self.shape, self.weight, self.bias, self.eps)


# ---------------------------------------------------------------- text


class PackedTextLayer:
    """Self-attention and feed-forward part of a BERT layer in eval mode.

    Args:
        layer: the layer; its cross-attention is left to the caller.
        dtype: dtype of weights and products.

    Raises:
        ValueError: if a layer is not a plain linear layer.
    """

    def __init__(self, layer: MRATextLayer | MRAFusionLayer, dtype: torch.dtype) -> None:
        self.attention, own = layer.attention, layer.attention.self
        self.num_heads, self.head_size = own.num_attention_heads, own.attention_head_size
        self.norm_dtype = dtype if own.query.weight.device.type == "cpu" else own.query.weight.dtype
        self.queries_keys_values = PackedLinear([own.query, own.key, own.value], dtype)
        self.text_output = PackedLinear([layer.attention.output.dense], dtype)
        self.text_norm = PackedNorm(layer.attention.output.LayerNorm, self.norm_dtype)
        self.widen = PackedLinear([layer.intermediate.dense], dtype, layer.intermediate.intermediate_act_fn)
        self.narrow = PackedLinear([layer.output.dense], dtype)
        self.norm = PackedNorm(layer.output.LayerNorm, self.norm_dtype)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Reshape `(batch, length, width)` to `(batch, heads, length, head width)`."""
        return states.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)

    def read_text(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Apply self-attention to states `(batch, length, width)`; the mask comes from [`visibility_mask`]."""
        queries, keys, values = self.queries_keys_values(states).chunk(3, dim=-1)
        context = mix_values(self.attention, queries, self.split_heads(keys), self.split_heads(values), mask)
        return self.text_norm(self.text_output.added_to(states, context))

    def feed_forward(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward part to states `(batch, length, width)`."""
        return self.norm(self.narrow.added_to(states, self.widen(states)))


class PackedText:
    """The text-only layers in eval mode, optimised for inference on a CPU; weights are copied.

    Args:
        text_model: the tower.
        dtype: float32 or bfloat16.

    Raises:
        ValueError: if a layer is not a plain linear layer.
    """

    def __init__(self, text_model: MRATextModel, dtype: torch.dtype) -> None:
        self.embeddings, self.dtype = text_model.embeddings, dtype
        layers = cast(list[MRATextLayer], list(cast(nn.ModuleList, text_model.encoder["layer"])))
        self.layers = [PackedTextLayer(layer, dtype) for layer in layers]
        self.attention = cast(str, layers[0].attention.self.config._attn_implementation)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map `(batch, length)` tokens and their mask to `(batch, length, hidden_size)` of the dtype."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            mask = visibility_mask(attention_mask, self.dtype, self.attention)
            states = self.embeddings(input_ids=input_ids).to(self.dtype)
            for layer in self.layers:
                states = layer.feed_forward(layer.read_text(states, mask))
        return states


# ---------------------------------------------------------------- vision


class PackedVision:
    """The vision tower in eval mode, optimised for inference on a CPU.

    Computes what `MRAVisionModel` computes with less moving of data: the tokens stay in the order of windows through a whole
    stage and are gathered only where the windows shift, instead of being rolled, cut and put together in every block. Weights
    are packed (see [`PackedLinear`]), and the position bias and the mask of shifted windows are added up once.

    In bfloat16 products, attention and the sums between them are bfloat16, the last layer norm float32. Weights are copied:
    create a new one after the model has changed.

    Args:
        vision_model: the tower, see [`can_pack`].
        dtype: float32 or bfloat16.

    Attributes:
        steps: what maps the tokens of one layer to those of the next, in order.

    Raises:
        ValueError: if a layer is not a plain linear layer.
    """

    def __init__(self, vision_model: MRAVisionModel, dtype: torch.dtype) -> None:
        swin = cast(SwinTransformer, vision_model.swin)
        self.dtype = dtype
        self.patch_embed, self.norm = cast(PatchEmbed, swin.patch_embed), cast(nn.LayerNorm, swin.norm)
        self.steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
        order = torch.arange(self.patch_embed.num_patches)  # token of the stage's grid at each place
        for stage in cast(Any, swin.layers):
            blocks = cast(list[SwinTransformerBlock], list(stage.blocks))
            if not isinstance(stage.downsample, nn.Identity):
                wanted = _window_order(blocks[0])
                self.steps.append(_Merging(stage.downsample, order, wanted, blocks[0].input_resolution, dtype))
                order = wanted
            for block in blocks:
                wanted = _window_order(block)
                if not torch.equal(order, wanted):
                    self.steps.append(_Reordering(order, wanted))
                    order = wanted
                self.steps.append(PackedBlock(block, dtype))
        self.to_grid = _Reordering(order, torch.arange(len(order)))

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 3, height, width)` to `(batch, 1 + patches, hidden_size)` float32; token 0 is the mean."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            images = max(1, TOKENS_PER_PASS // self.patch_embed.num_patches)
            return torch.cat([self._encode(some) for some in pixel_values.split(images)])

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 3, height, width)` to `(batch, patches, width)`, which the first step takes."""
        embed = self.patch_embed
        return embed(pixel_values.to(embed.proj.weight.dtype)).flatten(1, 2).to(self.dtype)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.embed(pixel_values)
        for step in self.steps:
            states = step(states)
        norm = self.norm
        states = F.layer_norm(states.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        patches = self.to_grid(states)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)


def can_pack(vision_model: MRAVisionModel) -> bool:
    """Return whether the windows of every stage cover its grid exactly; elsewhere timm pads it in every block."""
    blocks = [block for block in vision_model.swin.modules() if isinstance(block, SwinTransformerBlock)]
    pairs = [(cast(Any, block.input_resolution), cast(Any, block.window_size)) for block in blocks]
    return all(side % window == 0 for pair in pairs for side, window in zip(*pair, strict=True))


class _Reordering:
    """Moves tokens `(batch, tokens, width)` from one order to another."""

    def __init__(self, before: torch.Tensor, after: torch.Tensor) -> None:
        self.places = before.argsort()[after]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return states.index_select(1, self.places)


class _Merging:
    """Joins 2 x 2 tokens of the previous stage into one, in the order of the next stage's first windows."""

    def __init__(self, merging: Any, before: torch.Tensor, after: torch.Tensor, grid: Any, dtype: torch.dtype) -> None:
        height, width = grid
        tokens = torch.arange(4 * height * width).view(height, 2, width, 2)
        parts = tokens.permute(0, 2, 3, 1).reshape(height * width, 4)  # columns before rows, as timm joins them
        self.gather = _Reordering(before, parts[after].flatten())
        self.norm, self.reduction = PackedNorm(merging.norm, dtype), PackedLinear([merging.reduction], dtype)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return self.reduction(self.norm(self.gather(states).unflatten(1, (-1, 4)).flatten(2)))


class PackedBlock:
    """A Swin block on tokens that lie in the order of its windows.

    Args:
        block: the block.
        dtype: float32 or bfloat16.

    Raises:
        ValueError: if a layer is not a plain linear layer.
    """

    def __init__(self, block: SwinTransformerBlock, dtype: torch.dtype) -> None:
        attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
        self.heads, self.window = attention.num_heads, cast(int, block.window_area)
        self.is_fused = dtype == torch.float32
        table = attention.relative_position_bias_table.detach().float()
        pairs = table[attention.relative_position_index]  # tokens of a window, the same, heads
        bias = pairs.permute(2, 0, 1)[None]
        if block.attn_mask is not None:
            bias = bias + cast(torch.Tensor, block.attn_mask).float()[:, None]
        self.bias = bias.to(dtype)
        self.norm1, self.norm2 = (
            PackedNorm(cast(nn.LayerNorm, block.norm1), dtype),
            PackedNorm(cast(nn.LayerNorm, block.norm2), dtype),
        )
        self.queries_keys_values = PackedLinear([with_scaled_queries(attention)], dtype)
        self.output = PackedLinear([attention.proj], dtype)
        self.widen = PackedLinear([mlp.fc1], dtype, mlp.act)
        self.narrow = PackedLinear([mlp.fc2], dtype)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, tokens, width)` to the same shape."""
        states = self.output.added_to(states, self.attend(self.queries_keys_values(self.norm1(states))))
        return self.narrow.added_to(states, self.widen(self.norm2(states)))

    def attend(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the means of values `(batch, tokens, width)` for projected `(batch, tokens, 3 width)`."""
        batch, width = len(projected), projected.shape[-1] // 3
        parts = projected.view(-1, self.window, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.is_fused:  # image by image, because the mask of shifted windows would have to be repeated for a batch
            windows = projected.shape[1] // self.window
            mask = self.bias.expand(windows, -1, -1, -1)
            contexts = [
                F.scaled_dot_product_attention(*some, attn_mask=mask, scale=1.0) for some in parts.split(windows, 1)
            ]
            context = torch.cat(contexts)
        else:  # faster in bfloat16 on a CPU
            queries, keys, values = parts.contiguous()
            scores = (queries @ keys.transpose(-1, -2)).unflatten(0, (batch, -1)).add_(self.bias)
            context = scores.softmax(dim=-1).flatten(0, 1) @ values
        return context.transpose(1, 2).reshape(batch, -1, width)


def with_scaled_queries(attention: Any) -> nn.Linear:
    """Return the projection to queries, keys and values of a window's attention, its scale applied to the queries."""
    if type(attention.qkv) is not nn.Linear:
        return attention.qkv
    scaled = copy.deepcopy(attention.qkv)
    for parameter in scaled.parameters():
        parameter.data[: len(parameter) // 3] *= attention.scale
    return scaled


def _window_order(block: SwinTransformerBlock) -> torch.Tensor:
    """Return the token of the grid, row by row, at each place of the block's shifted windows."""
    (height, width), (rows, columns) = (
        cast(tuple[int, int], pair) for pair in (block.input_resolution, block.window_size)
    )
    shifts = tuple(-shift for shift in cast(tuple[int, int], block.shift_size))
    grid = torch.arange(height * width).view(height, width).roll(shifts, (0, 1))
    return grid.view(height // rows, rows, width // columns, columns).transpose(1, 2).flatten()
