"""Fast matching scores of (text, image) pairs for inference, without repeated or unused computations."""

import contextlib
from dataclasses import dataclass
from typing import Any, cast

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

KeysValues = tuple[torch.Tensor, torch.Tensor]


class PairMatcher:
    """The fusion layers and the matching head of a model, optimised for many pairs.

    Computes the scores of `MRAModel.match_logits` with fewer multiply-adds than a training step:

    - keys and values of an image are computed once, and for the last layer not at all (see below);
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
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, dtype or parameter.dtype
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
        batches = cut_by_length(texts.lengths[pair_texts], batch_size)
        num_views = image_hidden_states.shape[1]
        scores = torch.empty(num_views, len(pair_texts), 2)
        with self._context():
            for view in range(num_views):
                images = self.project_images(image_hidden_states[:, view].to(self.device, self.dtype))
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
                        images: ImageStates = images,
                    ) -> torch.Tensor:
                        return self.match_logits(texts, mask, images, text_index, image_index)

                    of_pairs = {"text_index": text_index, "image_index": pair_images[pairs]}
                    of_pairs = {name: index.to(self.device) for name, index in of_pairs.items()}
                    scores[view, pairs] = without_lone_row(logits, **of_pairs).float().cpu()
        return scores

    def _context(self) -> contextlib.AbstractContextManager:
        """Packed layers compute in their own dtype; PyTorch's autocast does not know their products."""
        return torch.no_grad() if self.device.type == "cpu" else forward_context(self.model, self.dtype)

    def project_images(self, image_hidden_states: torch.Tensor) -> "ImageStates":
        """Project `(images, 1 + patches, hidden)` to the keys and values of each layer but the last."""
        keys_values = []
        for layer in self.layers[:-1]:
            projected = layer.image_keys_values(image_hidden_states)
            keys_values.append(tuple(layer.split_heads(states) for states in projected.chunk(2, dim=-1)))
        return ImageStates(keys_values, image_hidden_states)

    def match_logits(
        self,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: "ImageStates",
        text_index: torch.Tensor,
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the logits of pairs; call this without gradient, on an accelerator under `forward_context`.

        Args:
            text_hidden_states: output of the text-only layers, `(texts, length, hidden)`.
            attention_mask: `(texts, length)`, 1 for tokens, 0 for padding; None without padding.
            images: result of `project_images`.
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
            states = last.read_image_for_first(
                states[:, :1].index_select(0, text_index), images.hidden_states, image_index
            )
            return self.model.match_head(states[:, 0].to(self.model.dtype))
        queries = first.image_queries(states).index_select(0, text_index)
        states = first.read_images(states.index_select(0, text_index), queries, images.keys_values[0], image_index)
        if attention_mask is not None:
            attention_mask = attention_mask.index_select(0, text_index)
        if mask is not None:
            mask = mask.index_select(0, text_index)
        for layer, keys_values in zip(self.layers[1:-1], images.keys_values[1:], strict=True):
            states = layer.read_text(states, mask)
            states = layer.read_images(states, layer.image_queries(states), keys_values, image_index)
        states = last.read_text_for_first(states, attention_mask)
        states = last.read_image_for_first(states, images.hidden_states, image_index)
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


@dataclass(frozen=True)
class ImageStates:
    """Images as the fusion layers read them.

    Attributes:
        keys_values: keys and values `(images, heads, tokens, head width)` of each layer but the last.
        hidden_states: `(images, tokens, hidden)`, for the last layer.
    """

    keys_values: list[KeysValues]
    hidden_states: torch.Tensor


@dataclass(frozen=True)
class _OneQuery:
    """Attention of a single query for each row, which reads states without projecting them.

    Attributes:
        query: projection of the query.
        key: weights of the keys, `(heads, head width, width)`.
        value: weights of the values, of the same shape.
        value_bias: bias of the values, `(heads * head width,)`. That of the keys adds a constant to all scores of a head,
            which the softmax cancels.
        scaling: factor on the scores.
    """

    query: PackedLinear
    key: torch.Tensor
    value: torch.Tensor
    value_bias: torch.Tensor
    scaling: float

    @classmethod
    def of(cls, attention: Any, dtype: torch.dtype) -> "_OneQuery":
        """Take the weights of a `BertSelfAttention`."""
        heads = (attention.num_attention_heads, attention.attention_head_size)
        key, value = (
            linear.weight.detach().to(dtype).unflatten(0, heads) for linear in (attention.key, attention.value)
        )
        bias = attention.value.bias.detach().to(dtype)
        return cls(PackedLinear([attention.query], dtype), key, value, bias, attention.scaling)

    def read(self, first: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the context `(batch, width)` of the queries `(batch, width)` over states `(batch, length, any width)`.

        Args:
            first: the queries before their projection.
            states: what they attend to.
            mask: `(batch, length)`, 1 for tokens, 0 for padding; None without padding.
        """
        states = states.to(self.value.dtype)
        heads, head_size, _ = self.key.shape
        queries = self.query(first).unflatten(-1, (heads, head_size)).transpose(0, 1)  # heads, batch, width of a head
        queries = (queries @ self.key).transpose(0, 1)  # batch, heads, width of the states
        scores = (queries @ states.transpose(1, 2)).float() * self.scaling  # batch, heads, length
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -torch.inf)
        means = scores.softmax(dim=-1).to(states.dtype) @ states
        return (means.transpose(0, 1) @ self.value.transpose(1, 2)).transpose(0, 1).flatten(1) + self.value_bias


class _PackedLayer(PackedTextLayer):
    """An `MRAFusionLayer` in eval mode, with projections of the same input merged into one product."""

    def __init__(self, layer: MRAFusionLayer, dtype: torch.dtype, is_last: bool) -> None:
        super().__init__(layer, dtype)
        self.crossattention, cross = layer.crossattention, layer.crossattention.self
        self.image_output = PackedLinear([layer.crossattention.output.dense], dtype)
        self.image_norm = PackedNorm(layer.crossattention.output.LayerNorm, self.norm_dtype)
        if is_last:
            self.first_to_text, self.first_to_image = (
                _OneQuery.of(layer.attention.self, dtype),
                _OneQuery.of(cross, dtype),
            )
        else:
            self.image_queries = PackedLinear([cross.query], dtype)
            self.image_keys_values = PackedLinear([cross.key, cross.value], dtype)

    def read_text_for_first(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Apply self-attention to the first of the states `(batch, length, width)`; return `(batch, 1, width)`."""
        context = self.first_to_text.read(states[:, 0], states, attention_mask)
        return self.text_norm(self.text_output(context)[:, None] + states[:, :1])

    def read_image_for_first(
        self, states: torch.Tensor, image_hidden_states: torch.Tensor, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Apply cross-attention to the image of each pair, and the feed-forward part, to `(pairs, 1, width)` states."""
        first = states[:, 0]
        step = _pairs_per_gather(states)
        contexts = [
            self.first_to_image.read(some, image_hidden_states.index_select(0, images))
            for some, images in zip(first.split(step), image_index.split(step), strict=True)
        ]
        return self.feed_forward(self.image_norm(self.image_output(torch.cat(contexts))[:, None] + states))

    def read_images(
        self, states: torch.Tensor, queries: torch.Tensor, keys_values: KeysValues, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Apply cross-attention to the image of each pair, and the feed-forward part, to `(pairs, length, width)` states."""
        step = _pairs_per_gather(queries)
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
        return self.feed_forward(self.image_norm(self.image_output.added_to(states, context)))


def _pairs_per_gather(states: torch.Tensor) -> int:
    return PAIRS_PER_GATHER if states.device.type == "cpu" else len(states)
