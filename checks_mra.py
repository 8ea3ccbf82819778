"""Checks of what the MRA models are given: keywords, tokens and masks, pairs, and the batches of training.

Shapes and types are checked at once. Checks of values are collected as problems and raised together, so that a call asks
the device once.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing


try:
    from .batching_mra import TEXT_ARGUMENTS, FusionRows, TextArguments, TextBatch, has_values
    from .configuration_mra import MRAConfig, MRATextConfig
except ImportError:  # run from the repository root
    if __package__:
        raise
    from batching_mra import TEXT_ARGUMENTS, FusionRows, TextArguments, TextBatch, has_values
    from configuration_mra import MRAConfig, MRATextConfig


Problem = tuple[
    Callable[[], torch.Tensor], Callable[[], str]
]  # finds a boolean scalar; says what is wrong if it is true


def raise_first(problems: Sequence[Problem]) -> None:
    """Raise the first problem that is found; the device is asked once for all of them.

    Tensors whose values cannot be read have no problems (see [`has_values`]).

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


# ---------------------------------------------------------------- keywords


def forward_method(forward: Callable) -> Callable:
    """Give a `forward` the keywords that the models of transformers share, and refuse all others.

    `return_dict=False`, in the call or in the configuration, returns a tuple. `output_attentions`, `output_hidden_states`,
    `inputs_embeds` and token types other than 0 are refused (see [`refuse_keywords`]).
    """
    known = list(inspect.signature(forward).parameters)

    @can_return_tuple
    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        refuse_keywords(f"{type(self).__name__}.forward", self.config, shared, known)
        return forward(self, *args, **kwargs)

    return call


def refuse_keywords(method: str, config: PreTrainedConfig, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keywords that a `forward` does not take; `None` and `False` ask for nothing.

    Args:
        method: its name, for the message.
        config: of the model.
        given: keywords that the signature does not have.
        known: names that it has.

    Raises:
        TypeError: if a keyword is unknown.
        ValueError: if transformers knows the keyword and this model does not support it, in the call or in the
            configuration.
    """
    for option in ("output_attentions", "output_hidden_states"):
        if given.get(option, getattr(config, option, False)):
            raise ValueError(
                f"`{option}` is not supported by {method}: leave it out of the call and of the configuration; the last "
                "hidden states are `image_hidden_states` and `text_hidden_states` of MRAModel"
            )
    if given.get("inputs_embeds") is not None:
        raise ValueError(f"`inputs_embeds` is not supported by {method}: pass `input_ids`")
    token_types = given.get("token_type_ids")
    if token_types is not None:
        message = "`token_type_ids` must be 0, since a text of MRA is one segment: leave them out"
        raise_first([(lambda: (token_types != 0).any(), lambda: message)])
    shared = ("output_attentions", "output_hidden_states", "inputs_embeds", "token_type_ids")
    for name in given:
        if name not in shared:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known[1:])}"
            raise TypeError(f"{method} got an unexpected keyword argument `{name}`: {hint}")


# ---------------------------------------------------------------- texts and pairs


def check_tokens(
    config: MRATextConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    names: TextArguments = TEXT_ARGUMENTS["caption"],
) -> list[Problem]:
    """Check tokens and their mask before an embedding or an attention fails on them.

    Args:
        config: of the text layers.
        input_ids: `(texts, length)`.
        attention_mask: `(texts, length)`.
        names: of the arguments, for the message.

    Returns:
        Checks of their values, for [`raise_first`].

    Raises:
        ValueError: if a shape or type is wrong.
    """
    if is_tracing():
        return []
    ids, mask = f"`{names.input_ids}`", f"`{names.attention_mask}`"
    _check_integers(ids, input_ids, ("texts", "length"))
    longest = config.max_position_embeddings
    if input_ids.shape[1] > longest:
        raise ValueError(
            f"{ids} must hold at most {longest} tokens a text (`text_config.max_position_embeddings`), got "
            f"{input_ids.shape[1]}: cut texts with the model's MRAProcessor"
        )
    problems = [_unknown_words(ids, input_ids, config.vocab_size)]
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
    images: torch.Tensor,
    image_attention_mask: torch.Tensor | None,
    rows: FusionRows,
) -> None:
    """Check that texts, images and their masks fit together in the fusion layers.

    The values of indices are not checked where the rows have lengths: reading them would wait for the device.

    Args:
        text_hidden_states: `(texts, length, width)`.
        attention_mask: `(texts, length)`.
        images: hidden states or keys, `(images, ..., image tokens, width)`.
        image_attention_mask: `(pairs, image tokens)`.
        rows: the pairs.

    Raises:
        ValueError: if a shape or an index does not fit.
    """
    if is_tracing():
        return
    if attention_mask is not None and attention_mask.shape != text_hidden_states.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have the shape of the texts, {tuple(text_hidden_states.shape[:2])}, got "
            f"{tuple(attention_mask.shape)}"
        )
    num_texts = len(text_hidden_states if rows.text_index is None else rows.text_index)
    num_images = len(images if rows.image_index is None else rows.image_index)
    if num_texts != num_images:
        raise ValueError(
            f"{num_texts} texts cannot be paired with {num_images} images, row by row: pass as many, or `text_index` and "
            "`image_index` of each pair"
        )
    expected = (num_texts, images.shape[-2])
    if image_attention_mask is not None and tuple(image_attention_mask.shape) != expected:
        raise ValueError(
            f"`image_attention_mask` must be of shape (pairs, image tokens), {expected}, got "
            f"{tuple(image_attention_mask.shape)}"
        )
    if not rows.has_lengths:
        sizes = {"text_index": len(text_hidden_states), "image_index": len(images)}
        sizes["positions"] = text_hidden_states.shape[1]
        given = {name: index for name in sizes if (index := getattr(rows, name)) is not None}
        raise_first([_outside(f"`{name}`", index, sizes[name]) for name, index in given.items()])


# ---------------------------------------------------------------- batches of training


def check_training_batch(
    config: MRAConfig,
    pixel_values: torch.Tensor,
    texts: Sequence[TextBatch],
    region_attention_mask: torch.Tensor | None,
) -> None:
    """Check the arguments of `MRAForPreTraining.forward` against the model and each other.

    Args:
        config: of the model.
        pixel_values: `(batch, 3, height, width)`.
        texts: the kinds that were passed.
        region_attention_mask: `(batch, 1 + patches)`.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    if any(text.kind == "phrase" for text in texts) != (region_attention_mask is not None):
        raise ValueError("`phrase_input_ids` and `region_attention_mask` go together: pass both or neither")
    if is_tracing():
        return
    if any(text.attention_mask is None for text in texts):  # passed although its type forbids it
        raise ValueError("`attention_mask` must be given with `input_ids`, got None")
    problems: list[Problem] = []
    for text in sorted(texts, key=lambda text: list(TEXT_ARGUMENTS).index(text.kind)):  # captions first
        if text.kind == "masked":
            problems += _check_masked(config.text_config, text)
        else:
            problems += check_tokens(config.text_config, text.input_ids, text.attention_mask, text.names)
        _check_rows(text, len(pixel_values))
    if region_attention_mask is not None:
        problems += _check_regions(config, region_attention_mask, len(pixel_values))
    raise_first(problems)


def _check_masked(config: MRATextConfig, text: TextBatch) -> list[Problem]:
    """Check masked captions and their labels against the captions' mask; return the checks of their values."""
    assert text.labels is not None, "masked captions have labels"
    shape, labels, limit = tuple(text.attention_mask.shape), text.labels, text.max_masked
    _check_integers("`mlm_input_ids`", text.input_ids, shape)
    _check_integers("`labels`", labels, shape)
    problems = [
        _unknown_words("`mlm_input_ids`", text.input_ids, config.vocab_size),
        _unknown_words("`labels`", labels.where(labels != -100, 0), config.vocab_size),
    ]
    if limit is not None:
        message = f"`labels` must hold at most `lengths.max_masked`, {limit}, tokens a row"
        problems.append((lambda: ((labels != -100).sum(dim=1) > limit).any(), lambda: message))
    return problems


def _check_regions(config: MRAConfig, mask: torch.Tensor, rows: int) -> list[Problem]:
    """Check the shape of a region mask; return the checks of its values."""
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
            f"`lengths.{text.kind}` must hold {rows} numbers from 1 to {length}, got {list(lengths)}: pass the tokens of "
            "each row"
        )
    if text.identity_ids is not None and tuple(text.identity_ids.shape) != (rows,):
        raise ValueError(
            f"`{text.names.identity_ids}` must be of shape (batch,), ({rows},), got {tuple(text.identity_ids.shape)}"
        )


# ---------------------------------------------------------------- one tensor


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
            f"{name} must be 1 at the first position of every text, where [CLS] stands, got 0 in row {row}: the text is "
            "empty or padded on the left"
        )

    return lambda: (mask[:, 0] == 0).any(), explain
