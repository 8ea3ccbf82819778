"""Plain implementations of what MRA computes in fewer steps: padded, row by row of the definition, nothing shared.

They are what the benchmarks compare with and what the tests take for the truth.
"""

import torch
from transformers.masking_utils import create_bidirectional_mask


def plain_fuse(model, text_hidden_states, attention_mask, image_hidden_states, image_attention_mask=None):
    """
    Runs every fusion layer on every token of every row.

    Args:
        model: an `MRAModel`.
        text_hidden_states: `(pairs, length, text hidden_size)`.
        attention_mask: `(pairs, length)`.
        image_hidden_states: `(pairs, 1 + patches, vision hidden_size)`.
        image_attention_mask: `(pairs, 1 + patches)`; all visible when absent.

    Returns:
        `(pairs, length, text hidden_size)`.
    """
    config = model.config.text_config
    self_mask = create_bidirectional_mask(config, text_hidden_states, attention_mask)
    cross_mask = create_bidirectional_mask(
        config, text_hidden_states, image_attention_mask, encoder_hidden_states=image_hidden_states
    )
    hidden_states = text_hidden_states
    for layer in model.fusion_layers:
        hidden_states, _ = layer.attention(hidden_states, self_mask)
        hidden_states, _ = layer.crossattention(
            hidden_states, encoder_hidden_states=image_hidden_states, encoder_attention_mask=cross_mask
        )
        hidden_states = layer.output(layer.intermediate(hidden_states), hidden_states)
    return hidden_states


def plain_match_logits(model, text_hidden_states, attention_mask, image_hidden_states, image_attention_mask=None):
    """Scores pairs of rows, given as to [`plain_fuse`]: `(pairs, 2)` logits."""
    fused = plain_fuse(model, text_hidden_states, attention_mask, image_hidden_states, image_attention_mask)
    return model.match_head(fused[:, 0])


@torch.no_grad()
def plain_rerank(model, text_hidden_states, attention_mask, image_hidden_states, top_indices):
    """
    Scores each query's top k, one query at a time, on captions padded to their full length.

    Args:
        model: an `MRAModel`.
        text_hidden_states: `(queries, max_text_length, text hidden_size)`.
        attention_mask: `(queries, max_text_length)`.
        image_hidden_states: `(images, 1 + patches, vision hidden_size)`.
        top_indices: `(queries, k)`.

    Returns:
        `(queries, k)` logits of class 1.
    """
    scores = torch.empty(top_indices.shape)
    for query, images in enumerate(top_indices):
        logits = plain_match_logits(
            model,
            text_hidden_states[query].expand(len(images), -1, -1),
            attention_mask[query].expand(len(images), -1),
            image_hidden_states[images],
        )
        scores[query] = logits[:, 1]
    return scores
