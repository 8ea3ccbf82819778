"""Fast matching scores of (text, image) pairs for inference, without repeated or unused computations."""

import contextlib
from typing import cast

import torch
from transformers import PreTrainedModel

from layers_mra import MRAFusionLayer, mix_values, visibility_mask
from mra.common.sharding import without_lone_row
from mra.retrieval.encode import TextEncodings
from mra.retrieval.packed import PackedLinear, PackedNorm, PackedTextLayer
from mra.retrieval.score_fusion import match_scores
from mra.retrieval.towers import forward_context, inner_model


# Pairs per forward pass: small enough for a CPU's cache, large enough to keep an accelerator busy.
BATCH_SIZES = {"cpu": 32}
DEFAULT_BATCH_SIZE = 512

# Pairs for which image keys and values are gathered at a time on a CPU: 5 MB at full size, to fit the cache.
PAIRS_PER_GATHER = 8

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class PairMatcher:
    """The fusion layers and the matching head of a model, optimised for many pairs.

    Computes the scores of `MRAModel.match_logits` with fewer multiply-adds than a training step:

    - keys and values of an image are computed once;
    - the first fusion layer, up to the queries of its cross-attention, is independent of the image and computed once per
      text and forward pass;
    - texts are padded only to the longest of their forward pass, because the fusion layers mask padding;
    - the last layer runs only for [CLS], and its self-attention does not project the other tokens: the key projection
      is applied to the single query, and the value projection to the single weighted mean.

    Weights are copied, in a layout and precision suited to the device: create a new matcher after the model has changed.

    Args:
        model: an MRAModel, or a model with one as `.mra`, in eval mode.
        dtype: dtype of the forward passes (autocast on an accelerator); None for that of the weights.

    Raises:
        ValueError: if a linear layer is not a plain one, such as one with an adapter.
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
        """Score (text, image) pairs; for arguments, result and errors see `match_pairs`."""
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
        """Compute both logits of (text, image) pairs, as needed by every fusion of scores.

        For arguments and errors see `match_pairs`.

        Returns:
            `(views, pairs, 2)` float32 on the CPU, class 1 is "match".
        """
        if batch_size is None:
            batch_size = BATCH_SIZES.get(self.device.type, DEFAULT_BATCH_SIZE)
        batches = cut_by_length(texts.lengths[pair_texts], batch_size)
        num_views = image_hidden_states.shape[1]
        scores = torch.empty(num_views, len(pair_texts), 2)
        with self._context():
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

    def _context(self) -> contextlib.AbstractContextManager:
        """Packed layers compute in their own dtype; PyTorch's autocast does not know their products."""
        return torch.no_grad() if self.device.type == "cpu" else forward_context(self.model, self.dtype)

    def project_images(self, image_hidden_states: torch.Tensor) -> KeysValues:
        """Project `(images, 1 + patches, hidden)` to each layer's keys and values, `(images, heads, tokens, width)`."""
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
        """Compute the logits of pairs; call this without gradient, on an accelerator under `forward_context`.

        Args:
            text_hidden_states: output of the text-only layers, `(texts, length, hidden)`.
            attention_mask: `(texts, length)`, 1 for tokens, 0 for padding; None without padding.
            image_keys_values: result of `project_images`.
            text_index: text of each pair, `(pairs,)`.
            image_index: image of each pair, `(pairs,)`.

        Returns:
            Logits `(pairs, 2)`; class 1 is "match".
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
        return self.model.match_head(states[:, 0].to(self.model.dtype))


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
        model: an MRAModel, or a model with one as `.mra`, in eval mode.
        texts: encoded texts with hidden states.
        image_hidden_states: `(images, views, 1 + patches, hidden)`; the keys and values of all images must fit the device.
        pair_texts: text of each pair, `(pairs,)`. Pairs sorted by text length waste no computation.
        pair_images: image of each pair, `(pairs,)`.
        batch_size: most pairs per forward pass; None for a number chosen for the device.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
        log_odds: whether to subtract the logit of class 0.

    Returns:
        `(views, pairs)` float32 on the CPU: the logit of class 1, "match", or its log-odds.

    Raises:
        ValueError: if the batch size is not positive.
    """
    matcher = PairMatcher(model, dtype)
    return matcher.match(texts, image_hidden_states, pair_texts, pair_images, batch_size, log_odds)


def cut_by_length(lengths: torch.Tensor, batch_size: int) -> list[range]:
    """Cut pairs sorted by text length into forward passes.

    A forward pass that is at least half full ends before longer texts, to avoid padding its texts.

    Args:
        lengths: text length of each pair in tokens, `(pairs,)`.
        batch_size: most pairs per forward pass.

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


class _PackedLayer(PackedTextLayer):
    """An `MRAFusionLayer` in eval mode, with projections of the same input merged into one product."""

    def __init__(self, layer: MRAFusionLayer, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.crossattention = layer.crossattention
        own, cross = layer.attention.self, layer.crossattention.self
        self.scaling = own.scaling
        self.key, self.value = (
            linear.weight.to(dtype).unflatten(0, (self.num_heads, self.head_size)) for linear in (own.key, own.value)
        )
        self.value_bias = own.value.bias.to(dtype)
        self.query = PackedLinear([own.query], dtype)
        self.image_queries = PackedLinear([cross.query], dtype)
        self.image_keys_values = PackedLinear([cross.key, cross.value], dtype)
        self.image_output = PackedLinear([layer.crossattention.output.dense], dtype)
        self.image_norm = PackedNorm(layer.crossattention.output.LayerNorm, self.norm_dtype)

    def read_text_for_first(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Apply self-attention to the first of the states `(batch, length, width)`; return `(batch, 1, width)`."""
        first = states[:, :1]
        states = states.to(self.value.dtype)
        queries = self.split_heads(self.query(first)).transpose(0, 2)[0]  # heads, batch, width of a head
        # The key bias adds a constant to all scores of a head, which the softmax cancels.
        queries = (queries @ self.key).transpose(0, 1)  # batch, heads, width
        scores = (queries @ states.transpose(1, 2)).float() * self.scaling  # batch, heads, length
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        means = scores.softmax(dim=-1).to(states.dtype) @ states  # batch, heads, width
        context = (means.transpose(0, 1) @ self.value.transpose(1, 2)).transpose(0, 1).flatten(1) + self.value_bias
        return self.text_norm(self.text_output(context)[:, None] + first)

    def read_images(
        self,
        states: torch.Tensor,
        queries: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """Apply cross-attention to the image of each pair, and the feed-forward part, to `(pairs, length, width)` states."""
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
        return self.feed_forward(self.image_norm(self.image_output(context) + states))
