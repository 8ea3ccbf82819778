"""Matching logits of many (text, image) pairs for inference: what pairs share is computed once, what nobody reads never."""

import torch

from modeling_mra import attend, keys_and_values, mix_values, visibility_mask


# Pairs whose images' keys and values are brought together at a time on a CPU: 5 MB at full size, which its cache holds.
PAIRS_PER_GATHER = 8


def match_logits(
    model,
    text_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_keys_values: list[tuple[torch.Tensor, torch.Tensor]],
    text_index: torch.Tensor,
    image_index: torch.Tensor,
) -> torch.Tensor:
    """Score pairs as `MRAModel.match_logits` does, in fewer multiply-adds than training can do with.

    In the first fusion layer a text meets no image before its cross-attention has projected its queries, so all that is
    computed once a text. The last layer runs for [CLS] alone, and its self-attention never projects the other tokens: the
    key projection is applied to the one query and the value projection to the one weighted mean instead.

    Args:
        model: an MRAModel in eval mode.
        text_hidden_states: (texts, length, text hidden_size) of the text-only layers.
        attention_mask: (texts, length), 1 = token; None where there is no padding.
        image_keys_values: what `MRAModel.get_image_keys_values` gave for the images.
        text_index: (pairs,), index into the texts.
        image_index: (pairs,), index into the images.

    Returns:
        (pairs, 2), class 1 being "match".
    """
    layers, implementation = model.fusion_layers, model.config.text_config._attn_implementation
    mask = visibility_mask(attention_mask, text_hidden_states.dtype, implementation)
    first = layers[0]
    states = attend(first.attention, text_hidden_states, *keys_and_values(first.attention, text_hidden_states), mask)
    queries = first.crossattention.self.query(states)
    states, queries = states.index_select(0, text_index), queries.index_select(0, text_index)
    if attention_mask is not None:
        attention_mask, mask = attention_mask.index_select(0, text_index), mask.index_select(0, text_index)
    for number, (layer, keys_values) in enumerate(zip(layers, image_keys_values, strict=True)):
        if number == 0 and len(layers) == 1:
            states, queries = states[:, :1], queries[:, :1]
        elif number == len(layers) - 1:
            states = _attend_from_first(layer.attention, states, attention_mask)
        elif number > 0:
            states = attend(layer.attention, states, *keys_and_values(layer.attention, states), mask)
        if number > 0:
            queries = layer.crossattention.self.query(states)
        context = _read_images(layer.crossattention, queries, *keys_values, image_index)
        states = layer.crossattention.output(context, states)
        states = layer.output(layer.intermediate(states), states)
    return model.match_head(states[:, 0])


def _read_images(attention, queries, keys, values, image_index) -> torch.Tensor:
    """Cross-attention of (pairs, length, width) queries, each to its image of the (images, heads, tokens, width) ones."""
    step = PAIRS_PER_GATHER if queries.device.type == "cpu" else len(queries)
    contexts = [
        mix_values(attention, some, keys.index_select(0, images), values.index_select(0, images), None)
        for some, images in zip(queries.split(step), image_index.split(step), strict=True)
    ]
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def _attend_from_first(attention, states, attention_mask) -> torch.Tensor:
    """Self-attention of the first of (pairs, length, width) tokens, to (pairs, 1, width)."""
    inner, first = attention.self, states[:, :1]
    num_heads, width = inner.num_attention_heads, inner.attention_head_size
    key, value = (linear.weight.unflatten(0, (num_heads, width)) for linear in (inner.key, inner.value))
    queries = inner.query(first).view(-1, num_heads, width).transpose(0, 1)  # heads, pairs, width of a head
    queries = (queries @ key).transpose(0, 1)  # pairs, heads, width; a bias of the keys adds the same to every score
    scores = (queries @ states.transpose(1, 2)).float() * inner.scaling  # pairs, heads, length
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
    means = scores.softmax(dim=-1).to(states.dtype) @ states  # pairs, heads, width
    context = (means.transpose(0, 1) @ value.transpose(1, 2)).transpose(0, 1).flatten(1)
    return attention.output((context + inner.value.bias)[:, None], first)
