"""Batching of MRA: kinds of text, rows of processes and of fusion passes, packing, checks of what the models are given.

Three spaces of rows exist, and an index or tensor is named after its own:

- own rows, `(batch,)`: the images and texts of this process;
- gathered rows, `(world size * batch,)`: those of all processes, one process after the other;
- pairs, `(pairs,)`: rows of a fusion pass, each of which names a text and an image.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import can_return_tuple


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
    """Lengths of a batch's texts that the host knows without asking the device.

    The layers then skip the padding, which changes nothing but time and memory. What is absent counts as unknown.

    Args:
        caption, augmented, phrase: tokens of each row's text.
        masked: how many leading positions of each masked caption hold its tokens and its labels.
        max_masked: the most labels that a row may hold. Masked tokens are predicted at so many positions of each row.
    """

    caption: Sequence[int] | None = None
    augmented: Sequence[int] | None = None
    phrase: Sequence[int] | None = None
    masked: Sequence[int] | None = None
    max_masked: int | None = None


@dataclass
class TextBatch:
    """One kind of text of a batch and what a training step computes from it.

    Args:
        kind: `caption`, `augmented`, `phrase` or `masked`.
        input_ids, attention_mask: `(batch, length)`; no `input_ids` where the kind was not passed.
        identity_ids: `(batch,)`; rows that share one are not negatives of each other.
        lengths: positions of each row to read, where the host knows them.
        labels: `(batch, length)` of masked captions, -100 where nothing is masked.
        max_masked: the most labels of a row of masked captions.
        hidden_states: `(batch, length, text hidden_size)` of the text-only layers.
        embeds: `(batch, projection_dim)`, L2-normalised.
        pairs: pairs to match.
        rows: the rows of the fusion pass.
        fused: `(pairs, positions, text hidden_size)`, the result of the fusion pass.
    """

    kind: str
    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    identity_ids: torch.Tensor | None = None
    lengths: Sequence[int] | None = None
    labels: torch.Tensor | None = None
    max_masked: int | None = None
    hidden_states: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    pairs: "MatchingPairs | None" = None
    rows: "FusionRows | None" = None
    fused: torch.Tensor | None = None

    @property
    def is_given(self) -> bool:
        """Return whether texts of this kind were passed."""
        return self.input_ids is not None

    @property
    def names(self) -> TextArguments:
        """Return the names of the arguments that hold it, for messages."""
        return TEXT_ARGUMENTS[self.kind]

    def counts(self, with_padding: bool = False) -> list[int]:
        """Return the positions of each row to read: its tokens where the host knows them, or all."""
        rows, length = self.input_ids.shape
        return [length] * rows if with_padding or self.lengths is None else list(self.lengths)


@dataclass
class ImageTokens:
    """Tokens of the images of a batch, with those of their regions, and who sees which of them.

    Args:
        tokens: `(batch, tokens, vision hidden_size)`.
        seen_by_phrase, seen_by_others: `(batch, tokens)`, 1 = visible to the phrase of the image's region, and to every
            other kind of text; everything is visible when absent.
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
        """Return `(pairs, tokens)`, 1 = visible, of the texts' fusion rows one kind after the other."""
        if self.seen_by_phrase is None:
            return None
        masks = [self.seen_by_phrase if text.kind == "phrase" else self.seen_by_others for text in texts]
        return torch.cat([mask[text.rows.image_index] for mask, text in zip(masks, texts, strict=True)])


# ---------------------------------------------------------------- own and gathered rows


class _GatherWithGradient(torch.autograd.Function):
    """All-gather along the batch whose backward sums the gradients of every process."""

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
    """Gather the features of every process along the batch; every process must hold as many rows.

    Args:
        features: own rows, `(batch, ...)`.
        gradient: `exact` gives, once the processes' gradients are averaged, the gradient of the loss over the whole
            batch; `published` keeps each process's own slice alone, 1 / world size of it.

    Returns:
        `(world size * batch, ...)`; the input itself where there is one process.
    """
    if not is_distributed():
        return features
    if gradient == "exact":
        return _GatherWithGradient.apply(features)
    gathered = gather_constant(features.detach())
    start = dist.get_rank() * features.shape[0]
    return torch.cat([gathered[:start], features, gathered[start + features.shape[0] :]])


def gather_constant(tensor: torch.Tensor) -> torch.Tensor:
    """Gather what needs no gradient, as identities and masks: own rows `(batch, ...)` to `(world size * batch, ...)`."""
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
    """Pairs to match: each own text with its image, then with a negative image, then each own image with a negative text.

    Args:
        text_rows, image_rows: `(3 * batch,)`, own or gathered rows, whichever the negatives were drawn among.
        labels: `(3 * batch,)`; 1 = match, -100 where there was no negative to draw.
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
            rows: `(batch,)`, where this process's texts and images are.
            negative_images: `(batch,)`, an image for each text.
            has_image: `(batch,)`, whether there was one to draw.
            negative_texts: `(batch,)`, a text for each image.
            has_text: `(batch,)`, whether there was one to draw.
        """
        labels = torch.cat([torch.ones_like(rows), (~has_image).long() * -100, (~has_text).long() * -100])
        texts, images = torch.cat([rows, rows, negative_texts]), torch.cat([rows, negative_images, rows])
        return cls(texts, images, labels)

    def lengths(self, of_texts: Sequence[int]) -> list[int]:
        """Return the tokens of each pair's text, or the most there may be.

        Which texts were drawn is read where the host holds the draw: asking another device would wait for it.
        """
        size = len(self.text_rows) // 3
        drawn = [max(of_texts)] * size
        if self.text_rows.device.type == "cpu" and has_values(self.text_rows):
            drawn = [of_texts[text] for text in self.text_rows[2 * size :].tolist()]
        return [*of_texts, *of_texts, *drawn]


@dataclass
class FusionRows:
    """Pairs of text and image on their way through the fusion layers.

    Lengths and counts are plain numbers, known without asking the device: linear layers then skip what lies behind them, and
    the result is 0 there.

    Args:
        text_index, image_index: `(pairs,)`, text and image of each pair; row i with row i when absent.
        positions: `(pairs, n)`, text positions to return; all when absent. The last layer computes no others.
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

    def longest(self, length: int) -> int:
        """Return how many of `length` positions hold a token of some text."""
        return max(*(self.text_lengths or ()), *(self.pair_lengths or ())) if self.has_lengths else length


def matching_rows(text: TextBatch, text_index: torch.Tensor, is_local: bool) -> FusionRows:
    """Return the rows of the pairs to match, of which [CLS] is read.

    Args:
        text: with its pairs.
        text_index: where the texts among which the pairs were drawn are in the pass.
        is_local: whether these are this process's texts, whose lengths it knows.
    """
    pairs, count = text.pairs, len(text.pairs.text_rows)
    first = torch.zeros(count, 1, dtype=torch.long, device=pairs.text_rows.device)
    lengths = pairs.lengths(text.counts()) if is_local else [text.input_ids.shape[1]] * count
    return FusionRows(
        text_index[pairs.text_rows], pairs.image_rows, first, pair_lengths=lengths, position_counts=[1] * count
    )


def masked_rows(text: TextBatch, text_index: torch.Tensor, image_index: torch.Tensor) -> FusionRows:
    """Return the rows of masked captions and their own images, of which masked tokens are read.

    Args:
        text: masked captions.
        text_index: `(batch,)`, where they are in the pass.
        image_index: `(batch,)`, where their images are.
    """
    lengths = text.counts()
    labels = text.labels[:, : max(lengths)]
    # Labelled positions first, then the others in order: those behind a text's end come last and are not counted.
    positions = (labels != -100).int().argsort(dim=1, descending=True, stable=True)[:, : text.max_masked]
    counts = [min(positions.shape[1], length) for length in lengths]
    return FusionRows(text_index, image_index, positions, pair_lengths=lengths, position_counts=counts)


def place_rows(texts: Sequence[TextBatch], num_images: int) -> FusionRows:
    """Give each kind of text its rows of one fusion pass, and return the rows of the pass.

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


def join_rows(parts: Sequence[FusionRows], text_lengths: Sequence[int] | None = None) -> FusionRows:
    """Return several rows as those of one pass, in order, their positions padded to the widest."""
    width = max(rows.positions.shape[1] for rows in parts)
    return FusionRows(
        text_index=torch.cat([rows.text_index for rows in parts]),
        image_index=torch.cat([rows.image_index for rows in parts]),
        positions=torch.cat([F.pad(rows.positions, (0, width - rows.positions.shape[1])) for rows in parts]),
        text_lengths=text_lengths,
        pair_lengths=[length for rows in parts for length in rows.pair_lengths],
        position_counts=[count for rows in parts for count in rows.position_counts],
    )


# ---------------------------------------------------------------- packing


class Packing:
    """Rows of padded sequences side by side, so that linear layers do not run on padding.

    Args:
        rows: sequences.
        length: positions of each.
        device: of the states.
        lengths: positions of each row that count, from the first on, known without asking the device; all when absent.
            Packing and unpacking are then mere views.
    """

    def __init__(self, rows: int, length: int, device: torch.device, lengths: Sequence[int] | None = None) -> None:
        self.shape, self.device = (rows, length), device
        self.lengths = None if lengths is None or min(lengths) == length else np.asarray(lengths)
        self.index = None
        if self.lengths is not None:
            index = np.flatnonzero(np.arange(length) < self.lengths[:, None])
            self.index = torch.from_numpy(index).to(device, non_blocking=True)

    def starts(self) -> torch.Tensor:
        """Return where each row begins among the tokens, `(rows,)`."""
        rows, length = self.shape
        starts = np.arange(rows) * length if self.lengths is None else self.lengths.cumsum() - self.lengths
        return torch.from_numpy(starts).to(self.device, non_blocking=True)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Take what counts, `(tokens, ...)`, out of `(rows, length, ...)`."""
        states = states.flatten(0, 1)
        return states if self.index is None else states.index_select(0, self.index)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Put `(tokens, width)` back to where they were in `(rows, length, width)`; elsewhere is 0."""
        rows, length = self.shape
        if self.index is not None:
            states = states.new_zeros(rows * length, states.shape[1]).index_copy(0, self.index, states)
        return states.view(rows, length, -1)


@dataclass
class LayerRoute:
    """How the rows of a fusion pass go through one layer.

    Args:
        packing: where the packed tokens belong, `(texts, length)`.
        image_index: `(pairs,)` image of each pair; row i with row i when absent.
        text_index: `(pairs,)` text of each pair, where the texts attend to themselves before they are paired.
        pair_packing: of the pairs' texts, goes with `text_index`.
        positions: `(queries,)` packed tokens at which the output is computed; everywhere when absent.
        position_packing: where these belong, `(texts, n)`.
    """

    packing: Packing
    image_index: torch.Tensor | None = None
    text_index: torch.Tensor | None = None
    pair_packing: Packing | None = None
    positions: torch.Tensor | None = None
    position_packing: Packing | None = None


def plan_routes(
    rows: FusionRows, texts: int, length: int, device: torch.device, num_layers: int
) -> tuple[list[LayerRoute], Packing]:
    """Return the route through each fusion layer, and where the result of the last belongs.

    The first layer pairs the texts, the last computes no position but those that are read.

    Args:
        rows: of the pass. Their texts must be paired already where one layer is all there is.
        texts: rows of the text hidden states.
        length: positions of each.
        device: of the states.
        num_layers: fusion layers.
    """
    packing = pair_packing = Packing(texts, length, device, rows.text_lengths)
    if rows.text_index is not None:
        pair_packing = Packing(len(rows.text_index), length, device, rows.pair_lengths)
    routes = [LayerRoute(packing if index == 0 else pair_packing, rows.image_index) for index in range(num_layers)]
    if rows.text_index is not None:
        routes[0].text_index, routes[0].pair_packing = rows.text_index, pair_packing
    if rows.positions is None:
        return routes, pair_packing
    position_packing = Packing(*rows.positions.shape, device, rows.position_counts)
    routes[-1].positions = position_packing.pack(rows.positions + pair_packing.starts()[:, None])
    routes[-1].position_packing = position_packing
    return routes, position_packing


# ---------------------------------------------------------------- checks of inputs


Problem = tuple[Callable[[], torch.Tensor], Callable[[], str]]  # a boolean scalar, and the sentence where it is true


def is_traced() -> bool:
    """Return whether the call is being compiled, exported or captured: checks would become a part of the graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def has_values(tensor: torch.Tensor) -> bool:
    """Return whether the values may be looked at: fake and meta tensors have none, a traced call knows none."""
    return not is_traced() and type(tensor) is torch.Tensor and not tensor.is_meta


def raise_first(problems: Sequence[Problem]) -> None:
    """Raise the first problem there is; the device is asked once for all of them.

    Tensors without values have no problems (see [`has_values`]).

    Raises:
        ValueError: with the problem's sentence.
    """
    flags = [(find(), explain) for find, explain in problems]
    flags = [(flag, explain) for flag, explain in flags if has_values(flag)]
    if flags:
        found = torch.stack([flag for flag, _ in flags]).tolist()
        for is_found, (_, explain) in zip(found, flags, strict=True):
            if is_found:
                raise ValueError(explain())


def refuse_keywords(method: str, config: PreTrainedConfig, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse what a `forward` does not take; `None` and `False` ask for nothing.

    Args:
        method: its name, for the message.
        config: of the model.
        given: keywords that the signature does not have.
        known: names that it has.

    Raises:
        TypeError: if a keyword is unknown.
        ValueError: if it is one of transformers' that this model does not support, here or in the configuration.
    """
    for option in ("output_attentions", "output_hidden_states"):
        if given.get(option, getattr(config, option, False)):
            raise ValueError(
                f"`{option}` is not supported by {method}: leave it out of the call and of the configuration; the last hidden "
                "states are `image_hidden_states` and `text_hidden_states` of MRAModel"
            )
    if given.get("inputs_embeds") is not None:
        raise ValueError(f"`inputs_embeds` is not supported by {method}: pass `input_ids`")
    token_types = given.get("token_type_ids")
    if token_types is not None:
        message = "`token_type_ids` must be 0: a text of MRA is one segment; leave them out"
        raise_first([(lambda: (token_types != 0).any(), lambda: message)])
    shared = ("output_attentions", "output_hidden_states", "inputs_embeds", "token_type_ids")
    for name in given:
        if name not in shared:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known[1:])}"
            raise TypeError(f"{method} got an unexpected keyword argument `{name}`: {hint}")


def forward_method(forward: Callable) -> Callable:
    """Give a `forward` the keywords that the models of transformers share, and refuse all others.

    `return_dict=False`, in the call or in the configuration, returns a tuple. `output_attentions` and
    `output_hidden_states`, `inputs_embeds` and token types other than 0 are refused (see [`refuse_keywords`]).
    """
    known = list(inspect.signature(forward).parameters)

    @can_return_tuple
    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        refuse_keywords(f"{type(self).__name__}.forward", self.config, shared, known)
        return forward(self, *args, **kwargs)

    return call


def check_texts(config: PreTrainedConfig, texts: Sequence[TextBatch]) -> list[Problem]:
    """Check tokens and masks before an embedding or an attention fails on them.

    Args:
        config: of the text layers.
        texts: of any kind but `masked`, whose mask is that of the caption.

    Returns:
        What may be wrong with their values, for [`raise_first`].

    Raises:
        ValueError: naming the argument whose shape or type is wrong, what came and what was expected.
    """
    if is_traced():
        return []
    problems: list[Problem] = []
    for text in texts:
        input_ids, attention_mask = text.input_ids, text.attention_mask
        ids, mask = f"`{text.names.input_ids}`", f"`{text.names.attention_mask}`"
        _check_integers(ids, input_ids, ("texts", "length"))
        longest = config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"{ids} must hold at most {longest} tokens a text (`text_config.max_position_embeddings`), got "
                f"{input_ids.shape[1]}: cut texts with the model's MRAProcessor"
            )
        problems.append(_unknown_words(ids, input_ids, config.vocab_size))
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"{mask} must have the shape of {ids}, {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
                )
            problems += [_not_a_mask(mask, attention_mask), _no_first_token(mask, attention_mask)]
    return problems


def check_pairing(
    text_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    images: torch.Tensor | None,
    image_attention_mask: torch.Tensor | None,
    rows: FusionRows,
) -> None:
    """Check that texts, images and their masks fit together in the fusion layers.

    The values of indices are not checked where the rows have lengths: looking at them would wait for the device.

    Args:
        text_hidden_states: `(texts, length, width)`.
        attention_mask: `(texts, length)`.
        images: hidden states or keys, `(images, ..., image tokens, width)`.
        image_attention_mask: `(pairs, image tokens)`.
        rows: the pairs.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    if images is None:
        raise ValueError("`image_hidden_states` or `image_keys_values` must be given, got neither")
    if is_traced():
        return
    if attention_mask is not None and attention_mask.shape != text_hidden_states.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have the shape of the texts, {tuple(text_hidden_states.shape[:2])}, got "
            f"{tuple(attention_mask.shape)}"
        )
    texts_of_pairs = text_hidden_states if rows.text_index is None else rows.text_index
    images_of_pairs = images if rows.image_index is None else rows.image_index
    if len(texts_of_pairs) != len(images_of_pairs):
        raise ValueError(
            f"{len(texts_of_pairs)} texts cannot be paired with {len(images_of_pairs)} images, row by row: pass as many, or "
            "`text_index` and `image_index` of each pair"
        )
    expected = (len(texts_of_pairs), images.shape[-2])
    if image_attention_mask is not None and tuple(image_attention_mask.shape) != expected:
        raise ValueError(
            f"`image_attention_mask` must be of shape (pairs, image tokens), {expected}, got "
            f"{tuple(image_attention_mask.shape)}"
        )
    if not rows.has_lengths:
        sizes = {"text_index": len(text_hidden_states), "image_index": len(images)}
        sizes["positions"] = text_hidden_states.shape[1]
        given = {name: getattr(rows, name) for name in sizes if getattr(rows, name) is not None}
        raise_first([_outside(f"`{name}`", index, sizes[name]) for name, index in given.items()])


def check_training_batch(
    config: PreTrainedConfig,
    pixel_values: torch.Tensor,
    texts: Sequence[TextBatch],
    region_attention_mask: torch.Tensor | None,
) -> None:
    """Check the arguments of `MRAForPreTraining.forward` against the model and each other.

    Args:
        config: of the model.
        pixel_values: `(batch, 3, height, width)`.
        texts: each kind, passed or not.
        region_attention_mask: `(batch, 1 + patches)`.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    _check_companions(texts, region_attention_mask)
    if is_traced():
        return
    given = [text for text in texts if text.is_given]
    problems = check_texts(config.text_config, [text for text in given if text.kind != "masked"])
    for text in given:
        if text.kind == "masked":
            problems += _check_masked(config.text_config, text)
        _check_rows(text, len(pixel_values))
    if region_attention_mask is not None:
        problems += _check_regions(config, region_attention_mask, len(pixel_values))
    raise_first(problems)


def _check_companions(texts: Sequence[TextBatch], region_attention_mask: torch.Tensor | None) -> None:
    """Check that arguments that go together were passed together."""
    for text in texts:
        companions = {text.names.attention_mask: text.attention_mask}
        if text.kind == "phrase":
            companions = {"region_attention_mask": region_attention_mask, **companions}
        if text.kind == "masked":  # its mask is the caption's
            companions = {"labels": text.labels}
        for name, companion in companions.items():
            if text.is_given != (companion is not None):
                raise ValueError(f"`{text.names.input_ids}` and `{name}` go together: pass both or neither")


def _check_masked(config: PreTrainedConfig, text: TextBatch) -> list[Problem]:
    """Check masked captions and their labels against the captions' mask; return what may be wrong with their values."""
    shape, labels = tuple(text.attention_mask.shape), text.labels
    _check_integers("`mlm_input_ids`", text.input_ids, shape)
    _check_integers("`labels`", labels, shape)
    problems = [
        _unknown_words("`mlm_input_ids`", text.input_ids, config.vocab_size),
        _unknown_words("`labels`", labels.where(labels != -100, 0), config.vocab_size),
    ]
    limit = text.max_masked
    if limit is not None:
        message = f"`labels` must hold at most `lengths.max_masked`, {limit}, tokens a row"
        problems.append((lambda: ((labels != -100).sum(dim=1) > limit).any(), lambda: message))
    return problems


def _check_regions(config: PreTrainedConfig, mask: torch.Tensor, rows: int) -> list[Problem]:
    expected = rows, 1 + config.vision_config.num_patches
    if tuple(mask.shape) != expected:
        grid = " x ".join(map(str, config.vision_config.grid_size))
        raise ValueError(
            f"`region_attention_mask` must be of shape (batch, 1 + patches), {expected}, for the model's grid of {grid} "
            f"patches, got {tuple(mask.shape)}"
        )
    message = "`region_attention_mask` must mark at least one patch of every image"
    empty = (lambda: (mask[:, 1:] == 0).all(dim=1).any(), lambda: message)
    return [_not_a_mask("`region_attention_mask`", mask), empty]


def _check_rows(text: TextBatch, rows: int) -> None:
    """Check that a kind of text has as many rows as there are images, and lengths that fit it."""
    if len(text.input_ids) != rows:
        raise ValueError(
            f"`{text.names.input_ids}` and `pixel_values` must have as many rows, got {len(text.input_ids)} and {rows}"
        )
    length, lengths = text.input_ids.shape[1], text.lengths
    if lengths is not None and (len(lengths) != rows or not 1 <= min(lengths) <= max(lengths) <= length):
        raise ValueError(
            f"`lengths.{text.kind}` must hold {rows} numbers from 1 to {length}, got {list(lengths)}: pass the tokens of each "
            "row"
        )
    if text.identity_ids is not None and tuple(text.identity_ids.shape) != (rows,):
        raise ValueError(
            f"`{text.names.identity_ids}` must be of shape (batch,), ({rows},), got {tuple(text.identity_ids.shape)}"
        )


def _check_integers(name: str, tensor: torch.Tensor, shape: tuple[int | str, ...]) -> None:
    fits = len(tensor.shape) == len(shape) and all(
        size > 0 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not fits or not is_integer:
        described = ", ".join(map(str, shape))
        raise ValueError(
            f"{name} must be integers of shape ({described}), got {tensor.dtype} of {tuple(tensor.shape)}"
        )


def _outside(name: str, values: torch.Tensor, size: int, hint: str = "") -> Problem:
    return (
        lambda: ((values < 0) | (values >= size)).any(),
        lambda: f"{name} must be from 0 to {size - 1}, got {values.min().item()} to {values.max().item()}{hint}",
    )


def _unknown_words(name: str, input_ids: torch.Tensor, words: int) -> Problem:
    hint = ": use the tokenizer that the model was trained with, or `resize_token_embeddings` after adding tokens"
    return _outside(name, input_ids, words, hint)


def _not_a_mask(name: str, mask: torch.Tensor) -> Problem:
    return (
        lambda: ((mask != 0) & (mask != 1)).any(),
        lambda: f"{name} must hold 1 where visible and 0 elsewhere, got {mask.min().item()} to {mask.max().item()}",
    )


def _no_first_token(name: str, mask: torch.Tensor) -> Problem:
    def explain() -> str:
        row = (mask[:, 0] == 0).nonzero()[0].item()
        return (
            f"{name} must be 1 at the first position of every text, where [CLS] stands, got 0 in row {row}: the text is empty "
            "or padded on the left"
        )

    return lambda: (mask[:, 0] == 0).any(), explain
