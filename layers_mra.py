"""Parts that the MRA models are made of: pooling of tokens, packing of texts, attention, the fusion layer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertIntermediate,
    BertOutput,
    eager_attention_forward,
)


try:
    from .configuration_mra import MRATextConfig
except ImportError:  # run from the repository root
    from configuration_mra import MRATextConfig


NUM_PARTS = 3  # reference notes: AdaptiveAvgPool1d(3) over the tokens


# ---------------------------------------------------------------- pooling


def pool_parts(tokens: torch.Tensor, mask: torch.Tensor | None = None, num_parts: int = NUM_PARTS) -> torch.Tensor:
    """
    Splits the (visible) tokens in order into parts and averages each, as `AdaptiveAvgPool1d` does.

    Args:
        tokens: `(batch, length, width)`.
        mask: `(batch, length)`, 1 = visible, at least one a row; all tokens when absent.

    Returns:
        `(batch, num_parts * width)`.
    """
    if mask is None:
        parts = F.adaptive_avg_pool1d(tokens.transpose(1, 2), num_parts)  # batch, width, parts
        return parts.transpose(1, 2).flatten(1)
    visible = mask.bool()
    rank = visible.long().cumsum(dim=1) - 1
    count = visible.sum(dim=1, keepdim=True)
    part = torch.arange(num_parts, device=tokens.device)[None, :]
    start = (part * count) // num_parts  # batch, parts
    end = -((-(part + 1) * count) // num_parts)
    member = (rank[:, None] >= start[..., None]) & (rank[:, None] < end[..., None]) & visible[:, None]
    weights = member.to(tokens.dtype) / (end - start)[..., None].to(tokens.dtype)  # batch, parts, length
    return (weights @ tokens).flatten(1)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Averages `(batch, length, width)` tokens where `(batch, length)` `mask` is 1, to `(batch, width)`."""
    weights = mask.to(tokens.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights[:, None] @ tokens).squeeze(1)


class Packing:
    """
    Tokens of padded texts side by side, so that linear layers do not run on padding.

    Args:
        lengths: tokens of each text, which are known without asking the device.
        device: of the states.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.shape = len(lengths), max(lengths)
        is_token = torch.arange(self.shape[1]) < torch.tensor(lengths)[:, None]
        self.index = is_token.flatten().nonzero().squeeze(1).to(device, non_blocking=True)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Takes the tokens, `(tokens, width)`, out of `(texts, length, width)`."""
        return states.flatten(0, 1).index_select(0, self.index)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Puts `(tokens, width)` back to where they were in `(texts, length, width)`; padding is 0."""
        rows, length = self.shape
        return (
            states.new_zeros(rows * length, states.shape[1]).index_copy(0, self.index, states).view(rows, length, -1)
        )


# ---------------------------------------------------------------- attention


def visibility_mask(mask: torch.Tensor | None, dtype: torch.dtype, attn_implementation: str) -> torch.Tensor | None:
    """
    Widens `(batch, length)` 1 = visible to what attention takes, `(batch, 1, 1, length)`, without asking the device.

    Args:
        mask: `(batch, length)`, or `None` where everything is visible.
        dtype: of the attention scores, to which `eager` adds the mask.
        attn_implementation: `sdpa` takes booleans, `eager` numbers.
    """
    if mask is None:
        return None
    visible = mask[:, None, None].bool()
    if attn_implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def keys_and_values(
    attention: BertAttention, states: torch.Tensor, packing: Packing | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Projects states to keys and values.

    Args:
        attention: the block.
        states: `(batch, length, width)`, or `(tokens, width)` where they are packed.
        packing: where packed states belong.

    Returns:
        Keys and values, `(batch, heads, length, width of a head)` each.
    """
    projected = (attention.self.key(states), attention.self.value(states))
    if packing is not None:
        projected = map(packing.unpack, projected)
    size = attention.self.attention_head_size
    return tuple(part.unflatten(-1, (-1, size)).transpose(1, 2) for part in projected)


def mix_values(
    attention: BertAttention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Averages the values for each of the projected `(batch, queries, width)` queries, whose shape the result has."""
    inner = attention.self
    heads = queries.unflatten(-1, (-1, inner.attention_head_size)).transpose(1, 2)
    run = ALL_ATTENTION_FUNCTIONS.get_interface(inner.config._attn_implementation, eager_attention_forward)
    dropout = inner.dropout.p if inner.training else 0.0
    context, _ = run(inner, heads, keys, values, mask, dropout=dropout, scaling=inner.scaling)
    return context.reshape(queries.shape)


def attend(
    attention: BertAttention,
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    packing: Packing | None = None,
) -> torch.Tensor:
    """
    Runs a BERT attention block to keys and values that are already there.

    Args:
        attention: the block.
        hidden_states: `(batch, queries, width)`, or `(tokens, width)` where they are packed.
        keys, values: `(batch, heads, length, width of a head)`.
        mask: from [`visibility_mask`].
        packing: where packed states belong.
    """
    queries = attention.self.query(hidden_states)
    queries = queries if packing is None else packing.unpack(queries)
    context = mix_values(attention, queries, keys, values, mask)
    return attention.output(context if packing is None else packing.pack(context), hidden_states)


# ---------------------------------------------------------------- layers


class MRAFusionLayer(GradientCheckpointingLayer):
    """BERT layer with cross-attention to the image between its self-attention and its feed-forward part."""

    def __init__(self, config: MRATextConfig, image_width: int, layer_idx: int):
        super().__init__()
        self.attention = BertAttention(config, layer_idx=layer_idx)
        self.crossattention = BertAttention(config, layer_idx=layer_idx, is_cross_attention=True)
        self.crossattention.self.key = nn.Linear(image_width, config.hidden_size)
        self.crossattention.self.value = nn.Linear(image_width, config.hidden_size)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        self_mask: torch.Tensor | None,
        image_keys: torch.Tensor,
        image_values: torch.Tensor,
        cross_mask: torch.Tensor | None,
        text_index: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """
        Runs the layer on pairs of text and image.

        Args:
            hidden_states: `(texts, length, width)`, or `(tokens, width)` where they are packed.
            self_mask: mask of the texts, from [`visibility_mask`].
            image_keys, image_values: `(images, heads, 1 + patches, width of a head)`.
            cross_mask: mask of the pairs' images.
            text_index, image_index: `(pairs,)` text and image of each pair; row i with row i when absent. The texts
                attend to themselves before they are paired.
            positions: `(texts, n)`, where to compute the output; everywhere when absent.
            packing: packs the texts of the pairs: those that come, or those that are paired here.

        Returns:
            `(pairs, length or n, width)`, or `(tokens, width)` where they are packed and no positions are chosen.
        """
        incoming = packing if hidden_states.ndim == 2 else None
        keys, values = keys_and_values(self.attention, hidden_states, incoming)
        if positions is not None:
            hidden_states = hidden_states if incoming is None else incoming.unpack(hidden_states)
            hidden_states = torch.take_along_dim(hidden_states, positions[..., None], dim=1)
            incoming = packing = None
        hidden_states = attend(self.attention, hidden_states, keys, values, self_mask, incoming)
        if text_index is not None:
            hidden_states = hidden_states.index_select(0, text_index)
        if packing is not None and incoming is None:
            hidden_states = packing.pack(hidden_states)
        if image_index is not None:
            image_keys, image_values = (
                image_keys.index_select(0, image_index),
                image_values.index_select(0, image_index),
            )
        hidden_states = attend(self.crossattention, hidden_states, image_keys, image_values, cross_mask, packing)
        return self.output(self.intermediate(hidden_states), hidden_states)


class MRAPartProjection(nn.Module):
    """BatchNorm, dropout and a linear layer on pooled parts (reference notes, "Projection 2048")."""

    def __init__(self, width: int, projection_dim: int, dropout: float):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, projection_dim)

    def forward(self, parts: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(self.norm(parts)))
