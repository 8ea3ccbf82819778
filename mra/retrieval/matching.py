"""Matching scores of (text, image) pairs for inference: what pairs share is computed once, what nothing reads never."""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from layers_mra import MRAFusionLayer, mix_values, visibility_mask
from mra.common.private_interfaces import pack_linear
from mra.common.sharding import without_lone_row
from mra.retrieval.encode import TextEncodings, forward_context, inner_model
from mra.retrieval.score_fusion import match_scores


# Pairs in a forward pass: on a CPU its activations should stay in the cache, an accelerator wants to be kept busy.
BATCH_SIZES = {"cpu": 32}
DEFAULT_BATCH_SIZE = 512

# Pairs whose images' keys and values are brought together at a time on a CPU: 5 MB at full size, for the same reason.
PAIRS_PER_GATHER = 8

# What oneDNN lays weights out for: tokens of a forward pass, roughly.
ROWS_PER_PRODUCT = 1024

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class PairMatcher:
    """The fusion layers and the matching head of a model, arranged for many pairs.

    Gives the scores of `MRAModel.match_logits` in fewer multiply-adds than a training step can do with:

    - keys and values of an image are computed once;
    - in the first fusion layer a text meets no image before its cross-attention has projected its queries, so all that
      is computed once a text and forward pass;
    - texts are padded to the longest of their forward pass only: the fusion layers hide padding;
    - the last layer runs for [CLS] alone, and its self-attention does not project the other tokens: the key projection
      is applied to the one query instead, and the value projection to the one weighted mean.

    The weights are copied, in the layout and precision that suit the device: make a new one when the model has changed.

    Args:
        model: an MRAModel or a model whose `.mra` is one, in eval mode.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.model = inner_model(model)
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, dtype or parameter.dtype
        with torch.no_grad():
            self.layers = [
                _PackedLayer(layer, self.dtype) for layer in cast(list[MRAFusionLayer], list(self.model.fusion_layers))
            ]

    def match(
        self,
        texts: TextEncodings,
        image_hidden_states: torch.Tensor,
        pair_texts: torch.Tensor,
        pair_images: torch.Tensor,
        batch_size: int | None = None,
        log_odds: bool = False,
    ) -> torch.Tensor:
        """Score (text, image) pairs; arguments, result and errors are those of `match_pairs`."""
        logits = self.pair_logits(texts, image_hidden_states, pair_texts, pair_images, batch_size)
        return match_scores(logits, log_odds)

    def pair_logits(
        self,
        texts: TextEncodings,
        image_hidden_states: torch.Tensor,
        pair_texts: torch.Tensor,
        pair_images: torch.Tensor,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """Compute both logits of (text, image) pairs, from which every fusion of scores follows.

        Arguments and errors are those of `match_pairs`.

        Returns:
            `(views, pairs, 2)` float32 on the CPU, class 1 being "match".
        """
        if batch_size is None:
            batch_size = BATCH_SIZES.get(self.device.type, DEFAULT_BATCH_SIZE)
        batches = cut_by_length(texts.lengths[pair_texts], batch_size)
        num_views = image_hidden_states.shape[1]
        scores = torch.empty(num_views, len(pair_texts), 2)
        with forward_context(self.model, self.dtype):
            for view in range(num_views):
                keys_values = self.project_images(image_hidden_states[:, view].to(self.device, self.dtype))
                for batch in batches:
                    pairs = slice(batch.start, batch.stop)
                    rows, text_index = pair_texts[pairs].unique(return_inverse=True)
                    hidden_states, attention_mask = texts.padded(rows)
                    hidden_states = hidden_states.to(self.device, self.dtype)
                    attention_mask = None if attention_mask.all() else attention_mask.to(self.device)

                    def logits(
                        text_index: torch.Tensor,
                        image_index: torch.Tensor,
                        texts: torch.Tensor = hidden_states,
                        mask: torch.Tensor | None = attention_mask,
                        images: KeysValues = keys_values,
                    ) -> torch.Tensor:
                        return self.match_logits(texts, mask, images, text_index, image_index)

                    of_pairs = {"text_index": text_index, "image_index": pair_images[pairs]}
                    of_pairs = {name: index.to(self.device) for name, index in of_pairs.items()}
                    scores[view, pairs] = without_lone_row(logits, **of_pairs).float().cpu()
        return scores

    def project_images(self, image_hidden_states: torch.Tensor) -> KeysValues:
        """Project (images, 1 + patches, hidden) to keys and values of each layer, (images, heads, tokens, width) each."""
        keys_values = []
        for layer in self.layers:
            projected = layer.image_keys_values(image_hidden_states)
            keys_values.append(tuple(layer.split_heads(states) for states in projected.chunk(2, dim=-1)))
        return keys_values

    def match_logits(
        self,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_keys_values: KeysValues,
        text_index: torch.Tensor,
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the logits of pairs, to be called under `forward_context`.

        Args:
            text_hidden_states: (texts, length, text hidden_size) of the text-only layers.
            attention_mask: (texts, length), 1 = token; None where there is no padding.
            image_keys_values: from `project_images`.
            text_index: (pairs,), index into the texts.
            image_index: (pairs,), index into the images.

        Returns:
            (pairs, 2), class 1 being "match".
        """
        implementation = cast(str, self.model.config.text_config._attn_implementation)
        mask = visibility_mask(attention_mask, text_hidden_states.dtype, implementation)
        first, *others = self.layers
        states = first.read_text(text_hidden_states, mask)
        if not others:
            states = states[:, :1]
        queries = first.image_queries(states).index_select(0, text_index)
        states = first.read_images(states.index_select(0, text_index), queries, image_keys_values[0], image_index)
        if attention_mask is not None:
            attention_mask = attention_mask.index_select(0, text_index)
        if mask is not None:
            mask = mask.index_select(0, text_index)
        for layer, keys_values in zip(others, image_keys_values[1:], strict=True):
            if layer is others[-1]:
                states = layer.read_text_for_first(states, attention_mask)
            else:
                states = layer.read_text(states, mask)
            states = layer.read_images(states, layer.image_queries(states), keys_values, image_index)
        return self.model.match_head(states[:, 0])


def match_pairs(
    model: PreTrainedModel,
    texts: TextEncodings,
    image_hidden_states: torch.Tensor,
    pair_texts: torch.Tensor,
    pair_images: torch.Tensor,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    log_odds: bool = False,
) -> torch.Tensor:
    """Score (text, image) pairs with the fusion layers and the matching head; see `PairMatcher` for repeated calls.

    Args:
        model: an MRAModel or a model whose `.mra` is one, in eval mode.
        texts: with hidden states.
        image_hidden_states: (images, views, 1 + patches, hidden), a few images: their keys and values must fit the device.
        pair_texts: (pairs,), index into `texts`. Pairs that come sorted by the length of their text waste nothing.
        pair_images: (pairs,), index into `image_hidden_states`.
        batch_size: most pairs in a forward pass; None for what suits the device.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
        log_odds: subtract the logit of class 0.

    Returns:
        (views, pairs) float32 on the CPU: the logit of class 1, "match", or its log-odds.

    Raises:
        ValueError: if the batch size is not positive.
    """
    matcher = PairMatcher(model, dtype)
    return matcher.match(texts, image_hidden_states, pair_texts, pair_images, batch_size, log_odds)


def cut_by_length(lengths: torch.Tensor, batch_size: int) -> list[range]:
    """Cut pairs that come sorted by text length into forward passes.

    A forward pass that is at least half full ends where longer texts begin, which would pad those it holds.

    Args:
        lengths: (pairs,), tokens of the text of each.
        batch_size: most pairs in a forward pass.

    Raises:
        ValueError: if the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    batches, start = [], 0
    for end in lengths.unique_consecutive(return_counts=True)[1].cumsum(0).tolist():
        while end - start >= batch_size:
            batches.append(range(start, start + batch_size))
            start += batch_size
        if end > start and (2 * (end - start) >= batch_size or end == len(lengths)):
            batches.append(range(start, end))
            start = end
    return batches


class _PackedLayer:
    """An `MRAFusionLayer` in eval mode whose projections of the same input are one product each."""

    def __init__(self, layer: MRAFusionLayer, dtype: torch.dtype) -> None:
        self.layer = layer
        self.attention, self.crossattention = layer.attention, layer.crossattention
        own, cross = layer.attention.self, layer.crossattention.self
        self.num_heads, self.head_size = own.num_attention_heads, own.attention_head_size
        self.query, self.key, self.value = (
            linear.weight.to(dtype).unflatten(0, (self.num_heads, self.head_size))
            for linear in (own.query, own.key, own.value)
        )
        self.queries_keys_values = _PackedLinear([own.query, own.key, own.value], dtype)
        self.text_output = _PackedLinear([layer.attention.output.dense], dtype)
        self.image_queries = _PackedLinear([cross.query], dtype)
        self.image_keys_values = _PackedLinear([cross.key, cross.value], dtype)
        self.image_output = _PackedLinear([layer.crossattention.output.dense], dtype)
        self.widen = _PackedLinear([layer.intermediate.dense], dtype, layer.intermediate.intermediate_act_fn)
        self.narrow = _PackedLinear([layer.output.dense], dtype)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> (batch, heads, length, width of a head)."""
        return states.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)

    def read_text(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention of (batch, length, width) states."""
        queries, keys, values = self.queries_keys_values(states).chunk(3, dim=-1)
        context = mix_values(self.attention, queries, self.split_heads(keys), self.split_heads(values), mask)
        return self.attention.output.LayerNorm(self.text_output(context) + states)

    def read_text_for_first(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention of the first of (batch, length, width) states, to (batch, 1, width)."""
        own, first = self.attention.self, states[:, :1]
        states = states.to(self.value.dtype)
        queries = self.split_heads(own.query(first)).transpose(0, 2)[0]  # heads, batch, width of a head
        # A bias of the keys adds the same to every score of a head, so it drops out of the softmax.
        queries = (queries @ self.key).transpose(0, 1)  # batch, heads, width
        scores = (queries @ states.transpose(1, 2)).float() * own.scaling  # batch, heads, length
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        means = scores.softmax(dim=-1).to(states.dtype) @ states  # batch, heads, width
        context = (means.transpose(0, 1) @ self.value.transpose(1, 2)).transpose(0, 1).flatten(1) + own.value.bias
        return self.attention.output.LayerNorm(self.attention.output.dense(context)[:, None] + first)

    def read_images(
        self,
        states: torch.Tensor,
        queries: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """Cross-attention of (pairs, length, width) states to the image of each pair, and the feed-forward part."""
        step = PAIRS_PER_GATHER if queries.device.type == "cpu" else len(queries)
        contexts = [
            mix_values(
                self.crossattention,
                some,
                keys_values[0].index_select(0, images),
                keys_values[1].index_select(0, images),
                None,
            )
            for some, images in zip(queries.split(step), image_index.split(step), strict=True)
        ]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        states = self.crossattention.output.LayerNorm(self.image_output(context) + states)
        return self.layer.output.LayerNorm(self.narrow(self.widen(states)) + states)


class _PackedLinear:
    """Linear layers that read the same input as one, whose outputs are concatenated, and an activation.

    On a CPU in float32 oneDNN multiplies by a weight laid out for it, as TorchInductor does with frozen weights. That is a
    fifth faster at these sizes: the weight is laid out once, and bias and GELU are fused into the product.
    """

    def __init__(self, linears: list[nn.Linear], dtype: torch.dtype, activation: nn.Module | None = None) -> None:
        weight = torch.cat([linear.weight for linear in linears]).to(dtype)
        bias = torch.cat([linear.bias for linear in linears]).to(dtype)
        is_plain_cpu = weight.device.type == "cpu" and dtype == torch.float32
        is_gelu = isinstance(activation, GELUActivation)
        packed = pack_linear(weight, bias, ROWS_PER_PRODUCT, is_gelu) if is_plain_cpu else None
        self.product = packed or partial(F.linear, weight=weight, bias=bias)
        self.activation = None if packed and is_gelu else activation

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        states = self.product(states)
        return states if self.activation is None else self.activation(states)
