"""Batches of MRA: kinds of text, chunks, rows of processes and of fusion passes, and packing.

Three spaces of rows exist, and an index or tensor is named after its own:

- own rows, `(batch,)`: the images and texts of this process;
- gathered rows, `(world size * batch,)`: those of all processes, one process after the other;
- pairs, `(pairs,)`: rows of a fusion pass, each of which names a text and an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils.import_utils import is_tracing


PairValues = TypeVar("PairValues", torch.Tensor, Sequence[int])


# ---------------------------------------------------------------- kinds of text


@dataclass(frozen=True)
class TextArguments:
    """Names of one kind of text among the arguments of `MRAForPreTraining.forward`."""

    input_ids: str
    attention_mask: str
    identity_ids: str | None = None


TEXT_ARGUMENTS = {
    "caption": TextArguments("input_ids", "attention_mask", "identity_ids"),
    "augmented": TextArguments("augmented_input_ids", "augmented_attention_mask", "identity_ids"),
    "phrase": TextArguments("phrase_input_ids", "phrase_attention_mask", "phrase_ids"),
    "masked": TextArguments("mlm_input_ids", "attention_mask"),
}


@dataclass(frozen=True)
class TextLengths:
    """Lengths of a batch's texts, known to the host without asking the device.

    With them the layers skip padding, which changes only time and memory. A length that is absent is unknown.

    Args:
        caption, augmented, phrase: tokens of each row's text.
        masked: leading positions of each masked caption that hold its tokens and labels.
        max_masked: the most labels that a row may hold. Tokens are predicted at this many positions of each row.
    """

    caption: Sequence[int] | None = None
    augmented: Sequence[int] | None = None
    phrase: Sequence[int] | None = None
    masked: Sequence[int] | None = None
    max_masked: int | None = None


@dataclass
class TextBatch:
    """One kind of text of a batch, and what a training step computes from it.

    Args:
        kind: `caption`, `augmented`, `phrase` or `masked`.
        input_ids: `(batch, length)`.
        attention_mask: `(batch, length)`, 1 = token.
        lengths: positions of each row to read, where the host knows them.
        identity_ids: `(batch,)`; rows that share one are not negatives of each other.
        labels: `(batch, length)` of masked captions, -100 where nothing is masked.
        max_masked: the most labels of a row of masked captions.

    Attributes:
        hidden_states: `(batch, length, text hidden_size)` of the text-only layers.
        embeds: `(batch, projection_dim)`, L2-normalised.
        pairs: pairs to match.
        rows: rows of the fusion pass.
        fused: `(pairs, positions, text hidden_size)`, the result of the fusion pass.
    """

    kind: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: Sequence[int] | None = None
    identity_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    max_masked: int | None = None
    hidden_states: torch.Tensor = field(init=False)
    embeds: torch.Tensor = field(init=False)
    pairs: "MatchingPairs" = field(init=False)
    rows: "TextRows" = field(init=False)
    fused: torch.Tensor = field(init=False)

    @property
    def names(self) -> TextArguments:
        """Return the names of the arguments that hold the text, for messages."""
        return TEXT_ARGUMENTS[self.kind]

    def counts(self, with_padding: bool = False) -> list[int]:
        """Return how many positions of each row to read: its tokens where the host knows them, or all."""
        rows, length = self.input_ids.shape
        return [length] * rows if with_padding or self.lengths is None else list(self.lengths)


def read_text(
    kind: str,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    lengths: TextLengths,
    identity_ids: torch.Tensor | None = None,
) -> TextBatch | None:
    """Return one kind of text, or `None` where it was not passed.

    Raises:
        ValueError: if its tokens were passed without their mask, or the mask without them.
    """
    names = TEXT_ARGUMENTS[kind]
    if (input_ids is None) != (attention_mask is None):
        raise ValueError(f"`{names.input_ids}` and `{names.attention_mask}` go together: pass both or neither")
    if input_ids is None or attention_mask is None:
        return None
    return TextBatch(kind, input_ids, attention_mask, getattr(lengths, kind), identity_ids)


def read_masked_text(
    input_ids: torch.Tensor | None, labels: torch.Tensor | None, attention_mask: torch.Tensor, lengths: TextLengths
) -> TextBatch | None:
    """Return the masked captions, or `None` where they were not passed; their mask is that of the captions.

    Raises:
        ValueError: if they were passed without labels, or labels without them.
    """
    if (input_ids is None) != (labels is None):
        raise ValueError("`mlm_input_ids` and `labels` go together: pass both or neither")
    if input_ids is None:
        return None
    return TextBatch("masked", input_ids, attention_mask, lengths.masked, labels=labels, max_masked=lengths.max_masked)


@dataclass
class ImageTokens:
    """Tokens of the images of a batch, those of their regions included, and which texts see them.

    Args:
        tokens: `(batch, tokens, vision hidden_size)`.
        seen_by_phrase: `(batch, tokens)`, 1 = visible to the phrase of the image's region; all tokens are visible to
            every text when absent.
        seen_by_others: `(batch, tokens)`, 1 = visible to every other kind of text; goes with `seen_by_phrase`.
    """

    tokens: torch.Tensor
    seen_by_phrase: torch.Tensor | None = None
    seen_by_others: torch.Tensor | None = None

    def gathered(self) -> "ImageTokens":
        """Return the tokens of every process."""
        masks = (self.seen_by_phrase, self.seen_by_others)
        masks = (None if mask is None else gather_constant(mask) for mask in masks)
        return ImageTokens(gather_features(self.tokens), *masks)

    def mask_of(self, texts: Sequence[TextBatch]) -> torch.Tensor | None:
        """Return `(pairs, tokens)`, 1 = visible, for the fusion rows of the texts, one kind after the other."""
        phrase, others = self.seen_by_phrase, self.seen_by_others
        if phrase is None or others is None:
            return None
        masks = [phrase if text.kind == "phrase" else others for text in texts]
        return torch.cat([mask[text.rows.image_index] for mask, text in zip(masks, texts, strict=True)])


# ---------------------------------------------------------------- chunks


TEXTS_PER_IMAGE = 8  # as many texts or pairs take less memory than one image (docs/performance.md)


def run_in_chunks(
    function: Callable[..., torch.Tensor],
    images: int | None,
    *inputs: torch.Tensor | Sequence[int],
    per_image: int = 1,
) -> torch.Tensor:
    """Run a function on a few rows at a time, and again in the backward pass, so that only its result is kept.

    Result and gradients are those of one call on all rows, up to the order of sums; dropout draws the same numbers again
    in the backward pass. Without gradients the function is called once.

    Args:
        function: maps some rows of the inputs to a tensor `(rows, ...)`; no row may depend on another.
        images: size of a chunk of images; one call, whose activations are kept, when `None`.
        inputs: of as many rows each. At least one is a tensor on the device that the function runs on, where random states
            are restored.
        per_image: rows of a chunk for each of its images.
    """
    if images is None or not torch.is_grad_enabled():
        return function(*inputs)
    size = images * per_image
    chunks = ([rows[start : start + size] for rows in inputs] for start in range(0, len(inputs[0]), size))
    return torch.cat([checkpoint(_run_uncached, function, *chunk, use_reentrant=False) for chunk in chunks])


def _run_uncached(function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """Run a function without autocast's cache of weights, so that each pass over a chunk casts the same ones.

    With the cache only the first chunk would, and selective checkpointing inside the others counts on the same operations in
    the backward pass.
    """
    is_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return function(*inputs)
    finally:
        torch.set_autocast_cache_enabled(is_enabled)


# ---------------------------------------------------------------- own and gathered rows


class _GatherWithGradient(torch.autograd.Function):
    """All-gather along the batch whose backward pass sums the gradients of every process."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor) -> torch.Tensor:
        ctx.batch_size = features.shape[0]
        return gather_constant(features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.batch_size, ctx.batch_size)


def is_distributed() -> bool:
    """Return whether several processes share the batch."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_features(features: torch.Tensor, gradient: str = "exact") -> torch.Tensor:
    """Gather the features of every process along the batch; every process must hold the same number of rows.

    Args:
        features: own rows, `(batch, ...)`.
        gradient: `exact` gives, once the gradients of the processes are averaged, the gradient of the loss over the
            whole batch; `published` keeps only each process's own slice, 1 / world size of it.

    Returns:
        `(world size * batch, ...)`; the input itself in a single process.
    """
    if not is_distributed():
        return features
    if gradient == "exact":
        return _GatherWithGradient.apply(features)
    gathered = gather_constant(features.detach())
    start = dist.get_rank() * features.shape[0]
    return torch.cat([gathered[:start], features, gathered[start + features.shape[0] :]])


def gather_constant(tensor: torch.Tensor) -> torch.Tensor:
    """Gather what needs no gradient, such as identities and masks: `(batch, ...)` to `(world size * batch, ...)`."""
    if not is_distributed():
        return tensor
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((dist.get_world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered


def own_rows(gathered: torch.Tensor) -> torch.Tensor:
    """Take this process's own rows `(batch, ...)` out of gathered rows `(world size * batch, ...)`."""
    return gathered.chunk(dist.get_world_size())[dist.get_rank()] if is_distributed() else gathered


# ---------------------------------------------------------------- pairs and rows of a fusion pass


@dataclass
class MatchingPairs:
    """Pairs to match: each text with its image, each text with a negative image, each image with a negative text.

    Args:
        text_rows: `(3 * batch,)`, own or gathered rows, whichever the negatives were drawn from.
        image_rows: `(3 * batch,)`, rows of the same space.
        labels: `(3 * batch,)`; 1 = match, 0 = no match, -100 where no negative could be drawn.
    """

    text_rows: torch.Tensor
    image_rows: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def join(
        cls,
        rows: torch.Tensor,
        negative_images: torch.Tensor,
        has_image: torch.Tensor,
        negative_texts: torch.Tensor,
        has_text: torch.Tensor,
    ) -> "MatchingPairs":
        """Join matched and negative pairs.

        Args:
            rows: `(batch,)`, rows of this process's texts and images.
            negative_images: `(batch,)`, an image for each text.
            has_image: `(batch,)`, whether there was one to draw.
            negative_texts: `(batch,)`, a text for each image.
            has_text: `(batch,)`, whether there was one to draw.
        """
        labels = torch.cat([torch.ones_like(rows), (~has_image).long() * -100, (~has_text).long() * -100])
        texts, images = torch.cat([rows, rows, negative_texts]), torch.cat([rows, negative_images, rows])
        return cls(texts, images, labels)

    def lengths(self, of_texts: Sequence[int]) -> list[int]:
        """Return the tokens of each pair's text, or an upper bound.

        The drawn texts are looked up only if they are on the host: asking another device would wait for it.
        """
        size = len(self.text_rows) // 3
        drawn = [max(of_texts)] * size
        if self.text_rows.device.type == "cpu" and has_values(self.text_rows):
            drawn = [of_texts[text] for text in self.text_rows[2 * size :].tolist()]
        return [*of_texts, *of_texts, *drawn]


@dataclass
class TextRows:
    """Rows of one kind of text in a fusion pass; see [`FusionRows`]."""

    text_index: torch.Tensor
    image_index: torch.Tensor
    positions: torch.Tensor
    pair_lengths: Sequence[int]
    position_counts: Sequence[int]


@dataclass
class FusionRows:
    """Pairs of text and image on their way through the fusion layers.

    Lengths and counts are plain numbers, known without asking the device: linear layers skip the positions behind them,
    where the result is 0.

    Args:
        text_index: `(pairs,)`, text of each pair; text i belongs to pair i when absent.
        image_index: `(pairs,)`, image of each pair; image i belongs to pair i when absent.
        positions: `(pairs, n)`, text positions to return, the only ones that the last layer computes; all when absent.
        text_lengths: tokens of each text.
        pair_lengths: tokens of each pair's text; those of `text_lengths` where `text_index` is absent.
        position_counts: how many of the n positions of each pair to compute, from the first on.
    """

    text_index: torch.Tensor | None = None
    image_index: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    text_lengths: Sequence[int] | None = None
    pair_lengths: Sequence[int] | None = None
    position_counts: Sequence[int] | None = None

    @property
    def has_lengths(self) -> bool:
        """Return whether the host knows lengths; the values of the indices are then not checked."""
        return self.text_lengths is not None or self.pair_lengths is not None

    def paired(self, pairs: slice) -> "FusionRows":
        """Return some of the pairs for texts that are paired already: text i of them belongs to pair i."""

        def take(values: PairValues | None) -> PairValues | None:
            return None if values is None else values[pairs]

        return FusionRows(
            image_index=take(self.image_index),
            positions=take(self.positions),
            text_lengths=take(self.pair_lengths),
            position_counts=take(self.position_counts),
        )

    def longest(self, length: int) -> int:
        """Return how many of `length` positions hold a token of at least one text."""
        return max([*(self.text_lengths or ()), *(self.pair_lengths or ())]) if self.has_lengths else length


def matching_rows(text: TextBatch, text_index: torch.Tensor, is_local: bool) -> TextRows:
    """Build the rows of the pairs to match, scored from [CLS].

    Args:
        text: with its pairs.
        text_index: place in the pass of each text that the pairs were drawn from.
        is_local: whether these are this process's texts, whose lengths it knows.
    """
    pairs, count = text.pairs, len(text.pairs.text_rows)
    first = torch.zeros(count, 1, dtype=torch.long, device=pairs.text_rows.device)
    lengths = pairs.lengths(text.counts()) if is_local else [text.input_ids.shape[1]] * count
    return TextRows(text_index[pairs.text_rows], pairs.image_rows, first, lengths, [1] * count)


def masked_rows(text: TextBatch, text_index: torch.Tensor, image_index: torch.Tensor) -> TextRows:
    """Build the rows of masked captions with their own images, read at the masked tokens.

    Args:
        text: masked captions.
        text_index: `(batch,)`, their places in the pass.
        image_index: `(batch,)`, places of their images.
    """
    assert text.labels is not None, "masked captions have labels"
    lengths = text.counts()
    labels = text.labels[:, : max(lengths)]
    # Labelled positions first, then the others in order: those behind a text's end come last and are not counted.
    positions = (labels == -100).int().argsort(dim=1, stable=True)[:, : text.max_masked]
    counts = [min(positions.shape[1], length) for length in lengths]
    return TextRows(text_index, image_index, positions, lengths, counts)


def place_rows(texts: Sequence[TextBatch], num_images: int) -> FusionRows:
    """Set the rows of each kind of text in one fusion pass, and return the rows of the pass.

    The texts of the pass lie one process after the other, in each process one kind after the other.

    Args:
        texts: in the order of the pass, with `pairs` or, of masked captions, `labels`; their `rows` are set.
        num_images: images of the pass, of this process or of all.
    """
    size, device = len(texts[0].input_ids), texts[0].input_ids.device
    is_local = num_images == size  # lengths of other processes' texts are not known here
    image_rows = torch.arange(num_images, device=device)
    text_rows = torch.arange(len(texts) * num_images, device=device).view(-1, len(texts), size)
    for text, of_kind in zip(texts, text_rows.unbind(dim=1), strict=True):  # processes, batch
        rows = of_kind.flatten()
        if text.kind == "masked":
            text.rows = masked_rows(text, *(part if is_local else own_rows(part) for part in (rows, image_rows)))
        else:
            text.rows = matching_rows(text, rows, is_local)
    lengths = [length for text in texts for length in text.counts()] if is_local else None
    return join_rows([text.rows for text in texts], lengths)


def join_rows(parts: Sequence[TextRows], text_lengths: Sequence[int] | None) -> FusionRows:
    """Join the rows of several kinds of text into one pass, in order, their positions padded to the widest."""
    width = max(rows.positions.shape[1] for rows in parts)
    return FusionRows(
        text_index=torch.cat([rows.text_index for rows in parts]),
        image_index=torch.cat([rows.image_index for rows in parts]),
        positions=torch.cat([F.pad(rows.positions, (0, width - rows.positions.shape[1])) for rows in parts]),
        text_lengths=text_lengths,
        pair_lengths=[length for rows in parts for length in rows.pair_lengths],
        position_counts=[count for rows in parts for count in rows.position_counts],
    )


def fuse_in_chunks(
    fuse: Callable[..., torch.Tensor],
    images: int | None,
    states: torch.Tensor,
    attention_mask: torch.Tensor,
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]],
    image_mask: torch.Tensor | None,
    rows: FusionRows,
) -> torch.Tensor:
    """Fuse pairs of text and image a chunk at a time; see [`run_in_chunks`].

    Args:
        fuse: `MRAModel.fuse`.
        images: size of a chunk of images; that of pairs is a multiple of it.
        states: `(texts, length, text hidden_size)` of the text-only layers.
        attention_mask: `(texts, length)`, 1 = token.
        keys_values: of all images, which are projected once, from `MRAModel.get_image_keys_values`.
        image_mask: `(pairs, image tokens)`, 1 = visible; all when `None`.
        rows: of a training step, with indices, positions and lengths.

    Returns:
        `(pairs, n, text hidden_size)`, as `fuse` does.
    """

    def fuse_pairs(text_index: torch.Tensor, pairs: range) -> torch.Tensor:
        # The texts of a chunk are paired before the first layer, which would otherwise run on every text of the batch.
        chunk = slice(pairs.start, pairs.stop)
        mask = None if image_mask is None else image_mask[chunk]
        return fuse(states[text_index], attention_mask[text_index], None, mask, keys_values, rows.paired(chunk))

    assert rows.text_index is not None, "the rows of a training step have indices"
    pairs = range(len(rows.text_index))
    return run_in_chunks(fuse_pairs, images, rows.text_index, pairs, per_image=TEXTS_PER_IMAGE)


def has_values(tensor: torch.Tensor) -> bool:
    """Return whether the values may be read: not those of fake and meta tensors, nor any in a traced call."""
    return not is_tracing() and type(tensor) is torch.Tensor and not tensor.is_meta


# ---------------------------------------------------------------- packing


class Packing:
    """Layout of padded sequences side by side, so that linear layers do not run on padding.

    Args:
        shape: sequences, and positions of each.
        device: of the states.
        lengths: leading positions of each sequence to keep, known without asking the device; all when absent. Packing
            and unpacking are then views.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, lengths: Sequence[int] | None = None) -> None:
        self.shape, self.device = tuple(shape), device
        length = self.shape[1]
        self.lengths = None if lengths is None or min(lengths) == length else np.asarray(lengths)
        self.index = None
        if self.lengths is not None:
            index = np.flatnonzero(np.arange(length) < self.lengths[:, None])
            self.index = torch.from_numpy(index).to(device, non_blocking=True)

    def starts(self) -> torch.Tensor:
        """Return the place of each sequence's first token among the packed tokens, `(rows,)`."""
        rows, length = self.shape
        starts = np.arange(rows) * length if self.lengths is None else self.lengths.cumsum() - self.lengths
        return torch.from_numpy(starts).to(self.device, non_blocking=True)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Take the tokens to keep, `(tokens, ...)`, out of `(rows, length, ...)`."""
        states = states.flatten(0, 1)
        return states if self.index is None else states.index_select(0, self.index)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Put `(tokens, width)` back into their places in `(rows, length, width)`, which is 0 elsewhere."""
        rows, length = self.shape
        if self.index is not None:
            states = states.new_zeros(rows * length, states.shape[1]).index_copy(0, self.index, states)
        return states.view(rows, length, -1)


@dataclass
class LayerRoute:
    """Route of the rows of a fusion pass through one layer.

    Args:
        packing: layout of the packed tokens, `(texts, length)`.
        image_index: `(pairs,)` image of each pair; image i belongs to pair i when absent.
        pairing: `(pairs,)` text of each pair and the layout of the pairs' texts, where the texts attend to themselves
            before they are paired.
        reading: `(queries,)` packed tokens to compute and their layout, `(texts, n)`; all tokens when absent.
    """

    packing: Packing
    image_index: torch.Tensor | None = None
    pairing: tuple[torch.Tensor, Packing] | None = None
    reading: tuple[torch.Tensor, Packing] | None = None


def plan_routes(
    rows: FusionRows, shape: Sequence[int], device: torch.device, num_layers: int
) -> tuple[list[LayerRoute], Packing]:
    """Plan the route through each fusion layer.

    The first layer pairs the texts, the last computes only the positions that are read.

    Args:
        rows: of the pass; with a single layer, their texts must be paired already.
        shape: texts, and positions of each.
        device: of the states.
        num_layers: fusion layers.

    Returns:
        The routes, and the layout of the result of the last layer.
    """
    packing = pair_packing = Packing(shape, device, rows.text_lengths)
    if rows.text_index is not None:
        pair_packing = Packing((len(rows.text_index), shape[1]), device, rows.pair_lengths)
    routes = [LayerRoute(packing if index == 0 else pair_packing, rows.image_index) for index in range(num_layers)]
    if rows.text_index is not None:
        routes[0].pairing = rows.text_index, pair_packing
    if rows.positions is None:
        return routes, pair_packing
    position_packing = Packing(rows.positions.shape, device, rows.position_counts)
    places = position_packing.pack(rows.positions + pair_packing.starts()[:, None])
    routes[-1].reading = places, position_packing
    return routes, position_packing
