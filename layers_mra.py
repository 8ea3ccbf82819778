"""Building blocks of the MRA models: pooling of tokens, attention, layers, vision and text tower."""

import functools
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPredictionHeadTransform,
    eager_attention_forward,
)


try:
    from .batching_mra import LayerRoute, Packing
    from .configuration_mra import MRATextConfig, MRAVisionConfig
except ImportError:  # run from the repository root
    if __package__:
        raise
    from batching_mra import LayerRoute, Packing
    from configuration_mra import MRATextConfig, MRAVisionConfig


NUM_PARTS = 3  # reference notes: AdaptiveAvgPool1d(3) over the tokens
LONG_PRODUCT = 512  # input width from which `selective_contexts` keeps the result of a linear layer


# ---------------------------------------------------------------- pooling


def pool_parts(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Split the visible tokens in order into `NUM_PARTS` parts and average each, as `AdaptiveAvgPool1d` does.

    Args:
        tokens: `(batch, length, width)`.
        mask: `(batch, length)`, 1 = visible, at least one in each row; all tokens when absent.

    Returns:
        `(batch, NUM_PARTS * width)`.
    """
    if mask is None:
        parts = F.adaptive_avg_pool1d(tokens.transpose(1, 2), NUM_PARTS)  # batch, width, parts
        return parts.transpose(1, 2).flatten(1)
    visible = mask.bool()
    rank = visible.long().cumsum(dim=1) - 1
    count = visible.sum(dim=1, keepdim=True)
    part = torch.arange(NUM_PARTS, device=tokens.device)[None, :]
    start = (part * count) // NUM_PARTS  # batch, parts
    end = -((-(part + 1) * count) // NUM_PARTS)
    member = (rank[:, None] >= start[..., None]) & (rank[:, None] < end[..., None]) & visible[:, None]
    weights = member.to(tokens.dtype) / (end - start)[..., None].to(tokens.dtype)  # batch, parts, length
    return (weights @ tokens).flatten(1)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average `(batch, length, width)` tokens where the `(batch, length)` mask is 1; return `(batch, width)`."""
    weights = mask.to(tokens.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights[:, None] @ tokens).squeeze(1)


# ---------------------------------------------------------------- attention


def visibility_mask(
    mask: torch.Tensor | None, dtype: torch.dtype, attn_implementation: str | None
) -> torch.Tensor | None:
    """Widen a mask to the `(batch, 1, 1, length)` that attention takes, without asking the device.

    Args:
        mask: `(batch, length)`, 1 = visible, or `None` where everything is visible.
        dtype: of the attention scores, to which `eager` adds the mask.
        attn_implementation: `sdpa` takes booleans, `eager` numbers.
    """
    if mask is None:
        return None
    visible = mask[:, None, None].bool()
    if attn_implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def split_heads(attention: BertAttention, states: torch.Tensor) -> torch.Tensor:
    """Split projected `(batch, length, width)` into `(batch, heads, length, width of a head)`."""
    return states.unflatten(-1, (-1, attention.self.attention_head_size)).transpose(1, 2)


def keys_and_values(
    attention: BertAttention, states: torch.Tensor, packing: Packing | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project states to keys and values.

    Args:
        attention: the block.
        states: `(batch, length, width)`, or `(tokens, width)` if they are packed.
        packing: layout of packed states.

    Returns:
        Keys and values, `(batch, heads, length, width of a head)` each.
    """
    keys, values = attention.self.key(states), attention.self.value(states)
    if packing is not None:
        keys, values = packing.unpack(keys), packing.unpack(values)
    return split_heads(attention, keys), split_heads(attention, values)


def mix_values(
    attention: BertAttention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Average the values for each of the projected `(batch, queries, width)` queries; return the same shape."""
    inner = attention.self
    run = ALL_ATTENTION_FUNCTIONS.get_interface(inner.config._attn_implementation, eager_attention_forward)
    dropout = inner.dropout.p if inner.training else 0.0
    heads = split_heads(attention, queries)
    context, _ = run(inner, heads, keys, values, mask, dropout=dropout, scaling=inner.scaling)
    return context.reshape(queries.shape)


def attend(
    attention: BertAttention,
    hidden_states: torch.Tensor,
    packing: Packing,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Run a BERT attention block on precomputed keys and values.

    Args:
        attention: the block.
        hidden_states: `(tokens, width)`, packed.
        packing: their layout, `(batch, queries)`.
        keys: `(batch, heads, length, width of a head)`.
        values: same shape as the keys.
        mask: from [`visibility_mask`].
    """
    queries = packing.unpack(attention.self.query(hidden_states))
    context = mix_values(attention, queries, keys, values, mask)
    return attention.output(packing.pack(context), hidden_states)


# ---------------------------------------------------------------- gradient checkpointing


def _keep_long_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decide whether a checkpointed layer keeps the result of an operator or computes it again in the backward pass.

    A value of a linear layer costs as many multiplications as its input is wide, and takes as much memory as any other.
    Attention is never kept: each of its values costs little, and skipping the dropout that is fused into it would give
    the following dropouts other random numbers than in the forward pass.
    """
    is_linear = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    if is_linear and args[-1].shape[0] >= LONG_PRODUCT:  # the weight, (in, out)
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# The `context_fn` of `activation_checkpointing_enable` with which layers keep the results of wide linear layers.
selective_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_long_products)


# ---------------------------------------------------------------- layers


class MRASwinBlock(GradientCheckpointingLayer, SwinTransformerBlock):
    """timm's Swin block with the gradient checkpointing of the other layers."""


class MRATextLayer(GradientCheckpointingLayer):
    """BERT layer on packed texts; its weights are named as in `BertLayer`."""

    def __init__(self, config: MRATextConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer_idx=layer_idx)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, hidden_states: torch.Tensor, packing: Packing, mask: torch.Tensor | None) -> torch.Tensor:
        """Map `(tokens, width)` to `(tokens, width)`; `mask` comes from [`visibility_mask`]."""
        keys, values = keys_and_values(self.attention, hidden_states, packing)
        hidden_states = attend(self.attention, hidden_states, packing, keys, values, mask)
        return self.output(self.intermediate(hidden_states), hidden_states)


class MRAFusionLayer(GradientCheckpointingLayer):
    """BERT layer with cross-attention to the image between self-attention and the feed-forward layers."""

    def __init__(self, config: MRATextConfig, image_width: int, layer_idx: int) -> None:
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
        image_keys: torch.Tensor,
        image_values: torch.Tensor,
        self_mask: torch.Tensor | None,
        cross_mask: torch.Tensor | None,
        route: LayerRoute,
    ) -> torch.Tensor:
        """Run the layer on pairs of text and image.

        Args:
            hidden_states: `(tokens, width)` of the texts, packed as the route says.
            image_keys: `(images, heads, image tokens, width of a head)`.
            image_values: same shape as the keys.
            self_mask: mask of the texts, from [`visibility_mask`].
            cross_mask: mask of the pairs' images, from [`visibility_mask`].
            route: which text meets which image, and where the result is read.

        Returns:
            `(tokens, width)` of the pairs, or `(queries, width)` where the route names tokens to read.
        """
        packing = route.packing
        keys, values = keys_and_values(self.attention, hidden_states, packing)
        if route.reading is not None:
            positions, packing = route.reading
            hidden_states = hidden_states.index_select(0, positions)
        hidden_states = attend(self.attention, hidden_states, packing, keys, values, self_mask)
        if route.pairing is not None:
            text_index, pair_packing = route.pairing
            hidden_states = pair_packing.pack(packing.unpack(hidden_states).index_select(0, text_index))
            packing = pair_packing
        if route.image_index is not None:
            image_keys, image_values = (p.index_select(0, route.image_index) for p in (image_keys, image_values))
        hidden_states = attend(self.crossattention, hidden_states, packing, image_keys, image_values, cross_mask)
        return self.output(self.intermediate(hidden_states), hidden_states)


class MRALanguageHead(nn.Module):
    """BERT's masked-language head, whose decoder is tied to the word embeddings.

    `BertLMPredictionHead` shares its bias with the decoder. Here only the head holds it, because FSDP2 refuses to shard a
    parameter shared by two modules that are not in one group, as embeddings and decoder are.
    """

    def __init__(self, config: MRATextConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def resize_bias(self, size: int) -> None:
        """Give the bias one value for each of `size` words; new words start at 0.

        Raises:
            ValueError: if DeepSpeed ZeRO-3 has partitioned the bias.
        """
        if self.bias.numel() == 0:
            raise ValueError("`resize_token_embeddings` must be called before DeepSpeed ZeRO-3 partitions the weights")
        self.bias.data = F.pad(self.bias.data, (0, size - len(self.bias)))  # a negative width cuts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., hidden_size)` to logits `(..., vocab_size)`."""
        return self.decoder(self.transform(hidden_states)) + self.bias


class MRAPartProjection(nn.Module):
    """BatchNorm, dropout and a linear layer on pooled parts (reference notes, "Projection 2048")."""

    def __init__(self, width: int, projection_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, projection_dim)

    def forward(self, parts: torch.Tensor) -> torch.Tensor:
        """Map `(batch, width)` to `(batch, projection_dim)`; a BatchNorm with frozen weights keeps its statistics."""
        norm = self.norm
        if norm.training and not norm.weight.requires_grad:
            # An adapter does not save the buffers of its base model: statistics updated in training would be lost.
            parts = F.batch_norm(parts, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            parts = norm(parts)
        return self.linear(self.dropout(parts))


# ---------------------------------------------------------------- towers


class MRAVisionModel(nn.Module):
    """timm Swin without its head; the mean of its tokens is prepended to them."""

    swin: SwinTransformer

    def __init__(self, config: MRAVisionConfig) -> None:
        super().__init__()
        swin = timm.create_model(
            "swin_base_patch4_window7_224",
            pretrained=False,
            num_classes=0,
            img_size=tuple(config.image_size),
            patch_size=config.patch_size,
            in_chans=config.num_channels,
            embed_dim=config.embed_dim,
            depths=tuple(config.depths),
            num_heads=tuple(config.num_heads),
            window_size=tuple((side, side) for side in config.effective_window_size),  # two ints would be one window
            mlp_ratio=config.mlp_ratio,
            proj_drop_rate=config.drop_rate,
            drop_path_rate=config.drop_path_rate,
        )
        self.swin = cast(SwinTransformer, swin)
        for module in self.swin.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
            # timm shifts along the longer side even where the window covers the shorter one; the published Swin does not
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = MRASwinBlock  # timm builds its blocks itself
                block = cast(Any, module)  # timm declares both sizes as an int or a pair
                if min(block.input_resolution) <= min(block.window_size):
                    block.shift_size = (0, 0)
                    block.init_non_persistent_buffers()
        self.dropout = nn.Dropout(config.drop_rate)
        self.input_shape = (config.num_channels, *config.image_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 3, height, width)`, of any float type, to `(batch, 1 + patches, hidden_size)`.

        Raises:
            ValueError: if the pixels have another shape or are integers.
        """
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != self.input_shape:
            channels, height, width = self.input_shape
            raise ValueError(
                f"`pixel_values` must be a batch of {height} x {width} pixels (height x width) of shape (batch, "
                f"{channels}, {height}, {width}), got {tuple(pixel_values.shape)}: prepare the images with the model's "
                "MRAProcessor"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be normalised floats, got {pixel_values.dtype}: prepare the images with the "
                "model's MRAProcessor"
            )
        dtype = cast(nn.Conv2d, self.swin.patch_embed.proj).weight.dtype
        hidden_states = self.swin.patch_embed(pixel_values.to(dtype))
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.swin.norm(self.swin.layers(hidden_states))  # batch, rows, columns, width
        patches = hidden_states.flatten(1, 2)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)

    def set_fused_attention(self, fused: bool) -> None:
        """Choose between `scaled_dot_product_attention` and plain matrix products in every window."""
        for module in self.swin.modules():
            if isinstance(module, WindowAttention):
                module.fused_attn = fused


class MRATextModel(nn.Module):
    """BERT's embeddings and its text-only layers; the weights are named as in `BertModel`."""

    def __init__(self, config: MRATextConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        layers = [MRATextLayer(config, index) for index in range(config.num_text_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor | None, packing: Packing) -> torch.Tensor:
        """Encode `(texts, length)` tokens to packed `(tokens, hidden_size)`; `mask` comes from [`visibility_mask`]."""
        hidden_states = packing.pack(self.embeddings(input_ids=input_ids))
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            hidden_states = layer(hidden_states, packing, mask)
        return hidden_states
