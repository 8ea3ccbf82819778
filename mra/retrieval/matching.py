"""Fast matching scores of (text, image) pairs for inference, without repeated or unused computations."""

import contextlib
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from layers_mra import MRAFusionLayer, mix_values, visibility_mask
from mra.common.sharding import without_lone_row
from mra.retrieval.encode import TextEncodings
from mra.retrieval.packed import PackedLinear, PackedNorm, PackedTextLayer
from mra.retrieval.score_fusion import match_scores
from mra.retrieval.towers import device_and_dtype, forward_context, inner_model


# Pairs per forward pass: small enough for a CPU's cache, large enough to keep an accelerator busy.
BATCH_SIZES = {"cpu": 32}
DEFAULT_BATCH_SIZE = 512

# Pairs for which image keys and values are gathered at a time on a CPU: 5 MB at full size, to fit the cache.
PAIRS_PER_GATHER = 8

# A multiply-add of [`_UnprojectedAttention`] on a CPU, compared with one of a packed product. On an AMD EPYC both ways took
# the same time at about 38 text tokens in float32, where this would be 1.3, and 46 in bfloat16, 1.15.
UNPROJECTED_COST = 1.3

# What a fusion layer reads: keys and values of all images, `(images, heads, tokens, head width)` each, or their hidden states,
# `(images, tokens, hidden)`.
LayerImages = tuple[torch.Tensor, torch.Tensor] | torch.Tensor


class PairMatcher:
    """The fusion layers and the matching head of a model, optimised for many pairs.

    Computes the scores of `MRAModel.match_logits` with fewer multiply-adds than a training step:

    - keys and values of an image are computed once, and for the last layer not at all (see below); on a CPU, for few and short
      texts, as in a search, for no layer (see [`_UnprojectedAttention`]);
    - the first fusion layer, up to the queries of its cross-attention, is independent of the image and computed once per
      text and forward pass;
    - texts are padded only to the longest of their forward pass, because the fusion layers mask padding;
    - the last layer runs only for [CLS], and neither of its attentions projects the tokens that it reads: the key projection
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
        self.device, self.dtype = device_and_dtype(self.model, dtype)
        with torch.no_grad():
            *others, last = cast(list[MRAFusionLayer], list(self.model.fusion_layers))
            self.layers = [_PackedLayer(layer, self.dtype, is_last=False) for layer in others]
            self.layers.append(_PackedLayer(last, self.dtype, is_last=True))

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
        lengths = texts.lengths[pair_texts]
        batches = cut_by_length(lengths, batch_size)
        num_images, num_views, num_tokens, _ = image_hidden_states.shape
        are_projected = self._are_images_projected(num_images, num_tokens, int(lengths.sum()))
        scores = torch.empty(num_views, len(pair_texts), 2)
        with self._context():
            for view in range(num_views):
                of_view = image_hidden_states[:, view].to(self.device, self.dtype)
                images = self.read_by_layers(of_view, are_projected)
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
                        images: list[LayerImages] = images,
                    ) -> torch.Tensor:
                        return self.match_logits(texts, mask, images, text_index, image_index)

                    of_pairs = {"text_index": text_index, "image_index": pair_images[pairs]}
                    of_pairs = {name: index.to(self.device) for name, index in of_pairs.items()}
                    scores[view, pairs] = without_lone_row(logits, **of_pairs).float().cpu()
        return scores

    def _context(self) -> contextlib.AbstractContextManager:
        """Packed layers compute in their own dtype; PyTorch's autocast does not know their products."""
        return torch.no_grad() if self.device.type == "cpu" else forward_context(self.model, self.dtype)

    def _are_images_projected(self, num_images: int, num_tokens: int, num_queries: int) -> bool:
        """Return whether keys and values cost less than reading hidden states, for images of so many tokens.

        Args:
            num_images: images of a call.
            num_tokens: tokens of an image.
            num_queries: text tokens of all pairs.
        """
        if self.device.type != "cpu":
            return True
        heads, head_size, states_width = self.layers[-1].unprojected_images.key.shape
        width = heads * head_size
        projected = num_tokens * width * (num_images * states_width + num_queries)
        unprojected = num_queries * states_width * (width + heads * num_tokens)
        return projected <= UNPROJECTED_COST * unprojected

    def read_by_layers(self, image_hidden_states: torch.Tensor, are_projected: bool = True) -> list[LayerImages]:
        """Return what each layer reads of `(images, 1 + patches, hidden)`: keys and values, for all but the last.

        Args:
            image_hidden_states: the images.
            are_projected: False to let every layer read hidden states; see [`_UnprojectedAttention`].
        """
        if not are_projected:
            return [image_hidden_states] * len(self.layers)
        read: list[LayerImages] = []
        for layer in self.layers[:-1]:
            keys, values = layer.image_keys_values(image_hidden_states).chunk(2, dim=-1)
            read.append((layer.split_heads(keys), layer.split_heads(values)))
        return [*read, image_hidden_states]

    def match_logits(
        self,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: list[LayerImages],
        text_index: torch.Tensor,
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the logits of pairs; call this without gradient, on an accelerator under `forward_context`.

        Args:
            text_hidden_states: output of the text-only layers, `(texts, length, hidden)`.
            attention_mask: `(texts, length)`, 1 for tokens, 0 for padding; None without padding.
            images: result of `read_by_layers`.
            text_index: text of each pair, `(pairs,)`.
            image_index: image of each pair, `(pairs,)`.

        Returns:
            Logits `(pairs, 2)`; class 1 is "match".
        """
        implementation = cast(str, self.model.config.text_config._attn_implementation)
        mask = visibility_mask(attention_mask, text_hidden_states.dtype, implementation)
        first, last = self.layers[0], self.layers[-1]
        states = first.read_text(text_hidden_states, mask)
        if first is last:
            states = states[:, :1]
        queries = first.image_queries(states).index_select(0, text_index)
        states = first.read_images(states.index_select(0, text_index), queries, images[0], image_index)
        if first is last:
            return self.model.match_head(states[:, 0].to(self.model.dtype))
        if attention_mask is not None:
            attention_mask = attention_mask.index_select(0, text_index)
        if mask is not None:
            mask = mask.index_select(0, text_index)
        for layer, seen in zip(self.layers[1:-1], images[1:-1], strict=True):
            states = layer.read_text(states, mask)
            states = layer.read_images(states, layer.image_queries(states), seen, image_index)
        states = last.read_text_for_first(states, attention_mask)
        states = last.read_images(states, last.image_queries(states), images[-1], image_index)
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


class _UnprojectedAttention:
    """Attention that reads states without projecting them.

    The key projection is applied to the queries instead, and the value projection to the weighted means: fewer multiply-adds
    where few queries read states that nothing else reads. The bias of the keys adds a constant to all scores of a query, which
    the softmax cancels.

    Args:
        attention: a `BertSelfAttention`, whose keys and values are projections of the states.
        dtype: dtype of the products.
    """

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        heads = (attention.num_attention_heads, attention.attention_head_size)
        key, value = (linear.weight.detach().unflatten(0, heads) for linear in (attention.key, attention.value))
        self.key, self.value, self.scaling = key.to(dtype), value.to(dtype).transpose(1, 2), attention.scaling
        self.value_bias = attention.value.bias.detach().to(dtype)

    def __call__(self, queries: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the contexts `(batch, queries, width)` of projected queries `(batch, queries, width)`.

        Args:
            queries: what attends, projected.
            states: what it attends to, `(batch, length, any width)`.
            mask: `(batch, length)`, 1 for tokens, 0 for padding; None without padding.
        """
        states = states.to(self.key.dtype)
        batch, num_queries, width = queries.shape
        heads, _, states_width = self.key.shape
        of_heads = (queries * self.scaling).reshape(batch * num_queries, heads, -1).unbind(1)
        wide = states.new_empty(batch * num_queries, heads, states_width)
        for query, key, out in zip(of_heads, self.key, wide.unbind(1), strict=True):
            torch.mm(query, key, out=out)
        scores = (wide.view(batch, -1, states_width) @ states.transpose(1, 2)).float()
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -torch.inf)
        means = torch.bmm(scores.softmax(dim=-1).to(states.dtype), states, out=wide.view(batch, -1, states_width))
        contexts = states.new_empty(batch * num_queries, heads, width // heads)
        for mean, value, out in zip(means.view(wide.shape).unbind(1), self.value, contexts.unbind(1), strict=True):
            torch.mm(mean, value, out=out)
        return contexts.view(queries.shape) + self.value_bias


class _PackedLayer(PackedTextLayer):
    """An `MRAFusionLayer` in eval mode, with projections of the same input merged into one product."""

    def __init__(self, layer: MRAFusionLayer, dtype: torch.dtype, is_last: bool) -> None:
        super().__init__(layer, dtype)
        self.crossattention, cross = layer.crossattention, layer.crossattention.self
        self.image_output = PackedLinear([layer.crossattention.output.dense], dtype)
        self.image_norm = PackedNorm(layer.crossattention.output.LayerNorm, self.norm_dtype)
        self.image_queries = PackedLinear([cross.query], dtype)
        self.unprojected_images = _UnprojectedAttention(cross, dtype)
        if is_last:
            self.text_queries = PackedLinear([layer.attention.self.query], dtype)
            self.unprojected_text = _UnprojectedAttention(layer.attention.self, dtype)
        else:
            self.image_keys_values = PackedLinear([cross.key, cross.value], dtype)

    def read_text_for_first(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Apply self-attention to the first of the states `(batch, length, width)`; return `(batch, 1, width)`."""
        first = states[:, :1]
        context = self.unprojected_text(self.text_queries(first), states, attention_mask)
        return self.text_norm(self.text_output.added_to(first, context))

    def read_images(
        self, states: torch.Tensor, queries: torch.Tensor, images: LayerImages, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Apply cross-attention to the image of each pair, and the feed-forward part, to `(pairs, length, width)` states.

        Args:
            states: the states.
            queries: `image_queries` of the states.
            images: what the layer reads.
            image_index: image of each pair, `(pairs,)`.
        """
        step = PAIRS_PER_GATHER if queries.device.type == "cpu" else len(queries)
        contexts = [
            self._attend(some, images, index)
            for some, index in zip(queries.split(step), image_index.split(step), strict=True)
        ]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return self.feed_forward(self.image_norm(self.image_output.added_to(states, context)))

    def _attend(self, queries: torch.Tensor, images: LayerImages, image_index: torch.Tensor) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            return self.unprojected_images(queries, images.index_select(0, image_index))
        keys, values = (states.index_select(0, image_index) for states in images)
        return mix_values(self.crossattention, queries, keys, values, None)
