"""
Losses of MRA as pure functions (soft-target contrastive loss, choice of hard negatives, masked-language loss), the rows
that texts and images become on their way to them, and the checks of what the models are given.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.utils import can_return_tuple


# ---------------------------------------------------------------- texts, pairs and rows


@dataclass
class TextBatch:
    """
    One kind of text of a batch.

    Args:
        input_ids, attention_mask: `(batch, max_text_length)`.
        lengths: tokens of each, or of what has to be read of it, where the host knows them.
        identity_ids: `(batch,)`; rows that share one are no negatives of each other.
    """

    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    lengths: Sequence[int] | None = None
    identity_ids: torch.Tensor | None = None

    def counts(self, with_padding: bool = False) -> list[int]:
        """Positions of each row to read: its tokens, where the host knows them, or all."""
        rows, length = self.input_ids.shape
        return [length] * rows if with_padding or self.lengths is None else list(self.lengths)


@dataclass
class MatchingPairs:
    """
    Pairs to match: each text with its image, with a negative image, and each image with a negative text.

    Args:
        texts, images: `(3 * batch,)` rows.
        labels: `(3 * batch,)`; 1 = match, -100 where there was no negative to draw.
    """

    texts: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor

    knows_drawn_texts: ClassVar[bool] = True  # on the host, where that is the device: asking another would wait for it

    def lengths(self, of_texts: Sequence[int]) -> list[int]:
        """Tokens of the text of each pair, or the most there may be."""
        size = len(self.texts) // 3
        drawn = [max(of_texts)] * size
        if self.knows_drawn_texts and self.texts.device.type == "cpu":
            drawn = [of_texts[text] for text in self.texts[2 * size :].tolist()]
        return [*of_texts, *of_texts, *drawn]


@dataclass
class FusionRows:
    """
    Pairs of text and image on their way through the fusion layers.

    Args:
        texts, images: `(pairs,)` rows of all texts and images there are.
        lengths: tokens of each pair's text, or the most there may be.
        positions: `(pairs, n)` text positions whose result is read.
        counts: how many of the n of each pair.
        labels: `(pairs,)` or `(pairs, n)`, for the loss.
    """

    texts: torch.Tensor
    images: torch.Tensor
    lengths: list[int]
    positions: torch.Tensor
    counts: list[int]
    labels: torch.Tensor


def matching_rows(texts: TextBatch, text_rows: torch.Tensor, pairs: MatchingPairs, is_local: bool) -> FusionRows:
    """
    Rows of which [CLS] is read.

    Args:
        texts: of this process.
        text_rows: `(texts,)`, where those among which the pairs chose stand among all.
        pairs: what was drawn.
        is_local: whether they were drawn among this process's texts, whose lengths it knows.
    """
    count = len(pairs.texts)
    first = torch.zeros(count, 1, dtype=torch.long, device=pairs.texts.device)
    lengths = pairs.lengths(texts.counts()) if is_local else [texts.input_ids.shape[1]] * count
    return FusionRows(text_rows[pairs.texts], pairs.images, lengths, first, [1] * count, pairs.labels)


def masked_rows(
    texts: TextBatch, text_rows: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, max_masked: int | None
) -> FusionRows:
    """
    Rows of which masked tokens are read.

    Args:
        texts: masked captions.
        text_rows, images: `(batch,)`, where they and their images stand among all.
        labels: `(batch, max_text_length)`, -100 where nothing is masked.
        max_masked: the most labels of a row; every position is read when absent.
    """
    lengths = texts.counts()
    labels = labels[:, : max(lengths)]
    # Labelled positions first, then the others in order: those behind a text's end come last and are not counted.
    positions = (labels != -100).int().argsort(dim=1, descending=True, stable=True)[:, :max_masked]
    counts = [min(positions.shape[1], length) for length in lengths]
    return FusionRows(text_rows, images, lengths, positions, counts, labels.gather(1, positions))


def join_rows(parts: Sequence[FusionRows]) -> dict[str, torch.Tensor | list[int]]:
    """Arguments of `MRAModel.fuse` for several kinds of rows in one pass, in order."""
    width = max(rows.positions.shape[1] for rows in parts)
    padded = [F.pad(rows.positions, (0, width - rows.positions.shape[1])) for rows in parts]
    return {
        "text_index": torch.cat([rows.texts for rows in parts]),
        "image_index": torch.cat([rows.images for rows in parts]),
        "positions": torch.cat(padded),
        "pair_lengths": [length for rows in parts for length in rows.lengths],
        "position_counts": [count for rows in parts for count in rows.counts],
    }


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
    """
    Raise the first problem there is; the device is asked once for all of them.

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
    """
    Refuse what a `forward` does not take; `None` and `False` ask for nothing.

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
    """
    Give a `forward` the keywords that the models of transformers share, and refuse all others.

    `return_dict=False`, in the call or in the configuration, returns a tuple. `output_attentions` and
    `output_hidden_states`, `inputs_embeds` and token types other than 0 are refused (see [`refuse_keywords`]).
    """
    known = list(inspect.signature(forward).parameters)

    @can_return_tuple
    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        shared = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        refuse_keywords(f"{type(self).__name__}.forward", self.config, shared, known)
        return forward(self, *args, **kwargs)

    return call


def check_texts(
    config: PreTrainedConfig, texts: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
) -> list[Problem]:
    """
    Check tokens and masks before an embedding or an attention fails on them.

    Args:
        config: of the text layers.
        texts: by prefix of their names, `input_ids` and `attention_mask`, `(texts, length)` each.

    Returns:
        What may be wrong with their values, for [`raise_first`].

    Raises:
        ValueError: naming the argument whose shape or type is wrong, what came and what was expected.
    """
    if is_traced():
        return []
    problems: list[Problem] = []
    for prefix, (input_ids, attention_mask) in texts.items():
        ids, mask = f"`{prefix}input_ids`", f"`{prefix}attention_mask`"
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
    text_index: torch.Tensor | None,
    image_index: torch.Tensor | None,
    positions: torch.Tensor | None = None,
    read_values: bool = True,
) -> None:
    """
    Check that texts, images and their masks fit together in the fusion layers.

    Args:
        images: hidden states or keys, `(images, ..., image tokens, width)`.
        read_values: look at the values of the indices too, which waits for the device.

    The other arguments are those of `MRAModel.fuse`.

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
    texts_of_pairs = text_hidden_states if text_index is None else text_index
    images_of_pairs = images if image_index is None else image_index
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
    limits = {"text_index": (text_index, len(text_hidden_states)), "image_index": (image_index, len(images))}
    limits["positions"] = positions, text_hidden_states.shape[1]
    if read_values:
        raise_first([_outside(f"`{k}`", index, size) for k, (index, size) in limits.items() if index is not None])


def check_training_batch(
    config: PreTrainedConfig,
    pixel_values: torch.Tensor,
    texts: Mapping[str, TextBatch],
    labels: torch.Tensor | None,
    region_attention_mask: torch.Tensor | None,
    max_masked: int | None,
) -> None:
    """
    Check the arguments of `MRAForPreTraining.forward` against the model and each other.

    Args:
        config: of the model.
        texts: by kind, what was passed of it.

    The other arguments are those of the method.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    caption, masked, phrase, augmented = (texts[kind] for kind in ("", "mlm_", "region_", "augmented_"))
    together = (
        ("phrase_input_ids", phrase.input_ids, "region_attention_mask", region_attention_mask),
        ("phrase_input_ids", phrase.input_ids, "phrase_attention_mask", phrase.attention_mask),
        ("augmented_input_ids", augmented.input_ids, "augmented_attention_mask", augmented.attention_mask),
        ("input_ids", caption.input_ids, "attention_mask", caption.attention_mask),
        ("mlm_input_ids", masked.input_ids, "labels", labels),
    )
    for first, one, second, other in together:
        if (one is None) != (other is None):
            raise ValueError(f"`{first}` and `{second}` go together: pass both or neither")
    if is_traced():
        return
    names = {"": "", "augmented_": "augmented_", "phrase_": "region_"}  # prefix of the arguments: kind of text
    kinds = {prefix: texts[kind] for prefix, kind in names.items() if texts[kind].input_ids is not None}
    problems = check_texts(config.text_config, {k: (text.input_ids, text.attention_mask) for k, text in kinds.items()})
    for prefix, text in kinds.items():
        _check_rows(prefix, text, len(pixel_values))
    if labels is not None:
        shape = tuple(caption.input_ids.shape)
        for name, tensor in {"mlm_input_ids": masked.input_ids, "labels": labels}.items():
            _check_integers(f"`{name}`", tensor, shape)
        _check_rows("mlm_", masked, shape[0])
        words = config.text_config.vocab_size
        problems.append(_unknown_words("`mlm_input_ids`", masked.input_ids, words))
        problems.append(_unknown_words("`labels`", labels.where(labels != -100, 0), words))
        if max_masked is not None:
            message = f"`labels` must hold at most `max_masked`, {max_masked}, tokens a row"
            problems.append((lambda: ((labels != -100).sum(dim=1) > max_masked).any(), lambda: message))
    if region_attention_mask is not None:
        problems += _check_regions(config, region_attention_mask, len(pixel_values))
    raise_first(problems)


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


def _check_rows(prefix: str, text: TextBatch, rows: int) -> None:
    """Check that a kind of text has as many rows as there are images, and lengths that fit it."""
    if len(text.input_ids) != rows:
        raise ValueError(
            f"`{prefix}input_ids` and `pixel_values` must have as many rows, got {len(text.input_ids)} and {rows}"
        )
    length = text.input_ids.shape[1]
    of_lengths = f"`{prefix or 'caption_'}lengths`"
    if text.lengths is not None and (
        len(text.lengths) != rows or not 1 <= min(text.lengths) <= max(text.lengths) <= length
    ):
        raise ValueError(f"{of_lengths} must hold {rows} numbers from 1 to {length}, got {list(text.lengths)}")
    if text.identity_ids is not None and tuple(text.identity_ids.shape) != (rows,):
        name = "phrase_ids" if prefix == "phrase_" else "identity_ids"
        raise ValueError(f"`{name}` must be of shape (batch,), ({rows},), got {tuple(text.identity_ids.shape)}")


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


# ---------------------------------------------------------------- losses


class _GatherWithGradient(torch.autograd.Function):
    """All-gather along the batch whose backward sums the gradients of every process."""

    @staticmethod
    def forward(ctx, features):
        ctx.batch_size = features.shape[0]
        return gather_constant(features)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.batch_size, ctx.batch_size)


def is_distributed() -> bool:
    """Whether several processes share the batch."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_features(features: torch.Tensor, gradient: str = "exact") -> torch.Tensor:
    """
    Gathers the features of every process along the batch; every process must hold as many rows.

    Args:
        features: `(batch, ...)`.
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
    """Gathers what needs no gradient, as identities and masks, `(batch, ...)` to `(world size * batch, ...)`."""
    if not is_distributed():
        return tensor
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((dist.get_world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered


def own_rows(gathered: torch.Tensor) -> torch.Tensor:
    """Takes this process's `(batch, ...)` out of `(world size * batch, ...)`."""
    return gathered.chunk(dist.get_world_size())[dist.get_rank()] if is_distributed() else gathered


def contrastive_targets(
    identity_ids: torch.Tensor, label_smoothing: float = 0.0, row_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Row-normalised identity-equality matrix, smoothed when `0 < label_smoothing < 1` (reference notes, "ITC").

    Args:
        identity_ids: `(batch,)` integers.
        label_smoothing: share spread evenly over the batch.
        row_ids: `(rows,)`, identities of the rows to give; all when absent.

    Returns:
        `(rows, batch)` float targets, each row summing to 1.
    """
    row_ids = identity_ids if row_ids is None else row_ids
    same = (row_ids[:, None] == identity_ids[None, :]).float()
    targets = same / same.sum(dim=1, keepdim=True)
    if 0 < label_smoothing < 1:
        targets = (1 - label_smoothing) * targets + label_smoothing / len(identity_ids)
    return targets


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    identity_ids: torch.Tensor,
    temperature: torch.Tensor,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    Mean of the image-to-text and text-to-image cross-entropies against soft identity targets.

    Args:
        image_embeds: `(batch, width)`, L2-normalised.
        text_embeds: `(batch, width)`, L2-normalised; row i belongs to row i of the images.
        identity_ids: `(batch,)`; rows that share an identity are positives of each other.
        temperature: scalar divisor of the similarities.
        label_smoothing: see [`contrastive_targets`].
        chunk_size: rows of the similarity matrix that exist at a time, computed again in the backward pass. The memory
            then grows with the batch, not with its square, and the result stays the same.

    Returns:
        Scalar.
    """
    if chunk_size is None:
        similarity = image_embeds @ text_embeds.t() / temperature
        targets = contrastive_targets(identity_ids, label_smoothing)
        return (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2

    def row_losses(rows, columns, row_ids, temperature):
        targets = contrastive_targets(identity_ids, label_smoothing, row_ids)
        return F.cross_entropy(rows @ columns.t() / temperature, targets, reduction="sum")

    total = 0.0
    for rows, columns in ((image_embeds, text_embeds), (text_embeds, image_embeds)):
        for some, row_ids in zip(rows.split(chunk_size), identity_ids.split(chunk_size), strict=True):
            total = total + checkpoint(row_losses, some, columns, row_ids, temperature, use_reentrant=False)
    return total / (2 * len(identity_ids))


@torch.no_grad()
def choose_hard_negatives(
    similarity: torch.Tensor, identity_ids: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws one column of another identity for each row, with probability softmax(similarity) + 1e-5.

    Args:
        similarity: `(batch, batch)`, already divided by the temperature.
        identity_ids: `(batch,)` of rows and columns alike.
        generator: makes the draw repeatable; it may live on another device.

    Returns:
        `(batch,)` column indices, and `(batch,)` booleans that are false where a row has no other identity to draw
        from (its index then means nothing).
    """
    same = identity_ids[:, None] == identity_ids[None, :]
    weights = (F.softmax(similarity.float(), dim=1) + 1e-5).masked_fill(same, 0.0)
    exists = ~same.all(dim=1)
    # A row without weights, or of a diverged model, must not fail in the draw: the loss itself tells what is wrong.
    drawable = exists[:, None] & weights.isfinite()
    weights = torch.where(drawable, weights, torch.ones_like(weights))
    if generator is not None:
        weights = weights.to(generator.device)
    negatives = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return negatives.to(similarity.device), exists


def matching_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the match / no match decision; class 1 is "match".

    Args:
        logits: `(pairs, 2)`.
        labels: `(pairs,)` of 0, 1, or -100 for pairs that do not count.

    Returns:
        Scalar mean over the pairs that count.
    """
    return F.cross_entropy(logits.float(), labels)


def masked_language_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy over the masked tokens; 0 if there are none.

    Args:
        logits: `(tokens, vocabulary)`.
        labels: `(tokens,)` token ids, -100 where nothing is masked.

    Returns:
        Scalar mean over the labels that count.
    """
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)
