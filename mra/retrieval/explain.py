"""Explanation of a (text, image) pair: where in the image each word looks, and how well single phrases match."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from images_mra import read_picture
from layers_mra import MRAFusionLayer
from modeling_mra import MRAModel
from mra.common.command_line import try_file
from mra.common.drawing import PICTURE_SUFFIXES, save_picture
from mra.common.loading import load_model, load_processor
from mra.retrieval.arguments import ExplanationArguments
from mra.retrieval.encode import encode_images, encode_texts
from mra.retrieval.matching import match_pairs
from mra.retrieval.overlay import HeatmapTile, draw_tiles
from mra.retrieval.score_fusion import require_finite
from mra.retrieval.towers import forward_context, inner_model
from processing_mra import MRAProcessor


_NOTHING_SEEN = """
a an the this that these those some and or but with without of in on at to from by for as into over under up down he she it
they his her its their him them who which whose there is are was were be been being has have had wears wearing wore dressed
carries carrying walks walking standing while also very
"""
STOP_WORDS = frozenset(_NOTHING_SEEN.split())

LEAST_PEAK = 4  # times the even share

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class WordAttention:
    """Attention of one word of a caption to the image.

    Attributes:
        word: the word as in the caption, its word pieces joined.
        heatmap: share of each patch in the word's attention, `(rows, columns)` float32.
        global_share: share of image token 0, the mean of all patches, which has no position in the grid.
        is_stop_word: whether the word names nothing visible.
    """

    word: str
    heatmap: torch.Tensor
    global_share: float
    is_stop_word: bool


@dataclass(frozen=True)
class Explanation:
    """Attention of a caption's words to an image, and their matching probability.

    Attributes:
        text: the caption as passed to the tokenizer.
        match_probability: probability given by the matching head for this view of the image.
        words: words of the caption in order, without those past the model's longest text.
        sentence: mean heatmap of all words but stop words (of all words if there are no others), `(rows, columns)`.
    """

    text: str
    match_probability: float
    words: tuple[WordAttention, ...]
    sentence: torch.Tensor


@dataclass(frozen=True)
class PhraseScore:
    """A phrase and the matching probability that it describes the image."""

    phrase: str
    match_probability: float


def explain_pair(
    model: PreTrainedModel,
    processor: MRAProcessor,
    text: str,
    image: Image.Image | None = None,
    *,
    image_hidden_states: torch.Tensor | None = None,
    num_layers: int | None = None,
) -> Explanation:
    """Compute where in an image each word of a text looks.

    The heatmaps are the cross-attention of the last fusion layers, each weight multiplied by the norm of the vector it
    transfers (Kobayashi et al. 2020, arXiv 2004.10102), because idle heads attend to patches that contribute almost nothing,
    like background. They are averaged over heads, layers and the pieces of a word. They show what the layers read, not why
    they decide: treat them as a hint.

    Args:
        model: an MRAModel, or a model with one as `.mra`, in eval mode.
        processor: the model's MRAProcessor.
        text: the caption.
        image: an image of any size; or
        image_hidden_states: its hidden states, `(1 + patches, hidden)`, if already computed.
        num_layers: number of last fusion layers to average; None for half of them.

    Raises:
        ValueError: if the text has no word, not exactly one of `image` and `image_hidden_states` is given, the hidden states
            do not fit the model, or it has fewer fusion layers.
    """
    model = inner_model(model)
    if num_layers is None:
        num_layers = max(1, len(model.fusion_layers) // 2)
    if not 1 <= num_layers <= len(model.fusion_layers):
        raise ValueError(
            f"num_layers must be from 1 to {len(model.fusion_layers)}, the model's fusion layers, got {num_layers}"
        )
    texts = encode_texts(model, processor, [text], keep_hidden_states=True)
    tokens = _image_tokens(model, processor, image, image_hidden_states, flip=False)
    attention = cross_attention(model, *texts.padded(torch.tensor([0])), tokens[:, 0])
    read = (attention.weights * attention.norms[:, :, :, None])[-num_layers:, 0].mean(
        dim=(0, 1)
    )  # text tokens, 1 + patches
    shares = (read / read.sum(dim=-1, keepdim=True)).cpu()
    require_finite(shares[None], lambda token, patch: f"text token {token} and image token {patch}", "attention")
    grid = model.config.vision_config.grid_size
    caption = processor.normalize_caption(text)
    words = []
    for word, positions in word_positions(processor.tokenizer, caption, processor.max_text_length):
        share = shares[positions].mean(dim=0)
        words.append(WordAttention(word, share[1:].view(grid), share[0].item(), word.lower() in STOP_WORDS))
    if not words:
        raise ValueError(f"text must have a letter or digit known to the tokenizer, got {text!r}")
    shown = [word.heatmap for word in words if not word.is_stop_word] or [word.heatmap for word in words]
    require_finite(attention.logits[None, :, None].cpu(), lambda *_: "the text and the image")
    probability = attention.logits[0].softmax(dim=-1)[1].item()
    return Explanation(caption, probability, tuple(words), torch.stack(shown).mean(dim=0))


def phrase_scores(
    model: PreTrainedModel,
    processor: MRAProcessor,
    phrases: Sequence[str],
    image: Image.Image | None = None,
    *,
    image_hidden_states: torch.Tensor | None = None,
) -> list[PhraseScore]:
    """Score phrases like "black backpack" against an image, each separately.

    Args:
        model: an MRAModel, or a model with one as `.mra`, in eval mode.
        processor: the model's MRAProcessor.
        phrases: one or more.
        image: an image of any size, also used mirrored as in evaluation; or
        image_hidden_states: its hidden states, `(1 + patches, hidden)` or `(views, 1 + patches, hidden)`.

    Returns:
        The matching probability of each phrase in order, averaged over the views.

    Raises:
        ValueError: if there are no phrases, one is empty, or not exactly one of `image` and `image_hidden_states` is given.
    """
    model = inner_model(model)
    texts = encode_texts(model, processor, list(phrases), keep_hidden_states=True)
    tokens = _image_tokens(model, processor, image, image_hidden_states)
    rows = torch.arange(len(texts.lengths))
    log_odds = match_pairs(model, texts, tokens, rows, torch.zeros_like(rows), log_odds=True)
    require_finite(log_odds[..., None], lambda text, _: f"the phrase {phrases[text]!r} and the image")
    probabilities = log_odds.sigmoid().mean(dim=0).tolist()
    return [PhraseScore(phrase, probability) for phrase, probability in zip(phrases, probabilities, strict=True)]


@dataclass(frozen=True)
class CrossAttention:
    """Cross-attention of text tokens to images, all float32.

    Attributes:
        weights: `(fusion layers, pairs, heads, text tokens, 1 + patches)`, with sum 1 over the image tokens.
        norms: `(fusion layers, pairs, heads, 1 + patches)`, norm of the vector that each image token adds to a text token at
            weight 1: its value after the head's part of the output projection.
        logits: logits of the matching head, `(pairs, 2)`.
    """

    weights: torch.Tensor
    norms: torch.Tensor
    logits: torch.Tensor


def cross_attention(
    model: MRAModel, text_hidden_states: torch.Tensor, attention_mask: torch.Tensor, image_hidden_states: torch.Tensor
) -> CrossAttention:
    """Run the fusion layers and compute the cross-attention of each text token to the image.

    Weights are computed from queries and keys, because `sdpa` does not return them.

    Args:
        model: an MRAModel in eval mode.
        text_hidden_states: `(pairs, length, hidden)`.
        attention_mask: `(pairs, length)`, 1 for tokens, 0 for padding.
        image_hidden_states: `(pairs, 1 + patches, hidden)`.
    """
    queries: list[torch.Tensor] = []
    layers = cast(list[MRAFusionLayer], list(model.fusion_layers))
    blocks: list[Any] = [layer.crossattention for layer in layers]
    hooks = [block.self.query.register_forward_hook(lambda _, __, output: queries.append(output)) for block in blocks]
    states, mask = text_hidden_states.to(model.device, model.dtype), attention_mask.to(model.device)
    try:
        with forward_context(model, None):
            keys_values = model.get_image_keys_values(image_hidden_states.to(model.device, model.dtype))
            logits = model.match_head(model.fuse(states, mask, image_keys_values=keys_values)[:, 0])
    finally:
        for hook in hooks:
            hook.remove()
    weights, norms = [], []
    with torch.no_grad():
        for block, query, (keys, values) in zip(blocks, queries, keys_values, strict=True):
            size = block.self.attention_head_size
            heads = query.view(*mask.shape, -1, size).transpose(1, 2).float()
            weights.append((heads @ keys.float().transpose(-1, -2) * block.self.scaling).softmax(dim=-1))
            output = block.output.dense.weight.float().unflatten(1, (-1, size))  # hidden, heads, width of a head
            norms.append(torch.einsum("phtw,ohw->phto", values.float(), output).norm(dim=-1))
    return CrossAttention(torch.stack(weights), torch.stack(norms), logits.float())


def draw_explanation(image: Image.Image, explanation: Explanation, columns: int = 6) -> Image.Image:
    """Draw the image, and overlays of the whole text and every word; stop words are faint."""
    tiles = [HeatmapTile("image"), HeatmapTile("all words", scale_heatmap(explanation.sentence))]
    tiles += [HeatmapTile(word.word, scale_heatmap(word.heatmap), word.is_stop_word) for word in explanation.words]
    return draw_tiles(image, f"{explanation.match_probability:.1%} match: {explanation.text}", tiles, columns)


def scale_heatmap(heatmap: torch.Tensor) -> torch.Tensor:
    """Scale shares of patches to 0..1 for a picture.

    0 is an even share or less, 1 is the largest share or at least four even shares, so that a word with diffuse attention
    does not appear sharp.
    """
    even = 1 / heatmap.numel()
    return ((heatmap - even) / (max(heatmap.max().item(), LEAST_PEAK * even) - even)).clamp(min=0)


def word_positions(tokenizer: PreTrainedTokenizerBase, caption: str, max_length: int) -> list[tuple[str, list[int]]]:
    """Find the tokens of each word of a caption.

    Args:
        tokenizer: a fast tokenizer, like that of every MRAProcessor.
        caption: the text to tokenize.
        max_length: most tokens that the model reads.

    Returns:
        Words with a letter or digit ("t-shirt" is one word) and the positions of their tokens, without truncated words.
    """
    encoded = tokenizer(caption, truncation=True, max_length=max_length, return_offsets_mapping=True)
    special = set(tokenizer.all_special_ids) - {cast(int, tokenizer.unk_token_id)}
    spans = [
        (position, start, end)
        for position, ((start, end), token) in enumerate(
            zip(encoded["offset_mapping"], encoded["input_ids"], strict=True)
        )
        if token not in special
    ]
    words = []
    for match in _WORD.finditer(caption):
        positions = [position for position, start, end in spans if start < match.end() and end > match.start()]
        if positions:
            words.append((match.group(), positions))
    return words


def _image_tokens(
    model: PreTrainedModel,
    processor: MRAProcessor,
    image: Any,
    image_hidden_states: torch.Tensor | None,
    flip: bool = True,
) -> torch.Tensor:
    """Return hidden states `(1, views, 1 + patches, hidden)` of an image, or the given ones in that shape."""
    if (image is None) == (image_hidden_states is None):
        raise ValueError("pass exactly one of `image` and `image_hidden_states`")
    if image is not None:
        encoded = encode_images(model, processor, [image], flip=flip, keep_hidden_states=True)
        return cast(torch.Tensor, encoded.hidden_states)
    assert image_hidden_states is not None
    tokens = image_hidden_states.detach().cpu().float()
    vision = model.config.vision_config
    expected = (1 + vision.num_patches, vision.hidden_size)
    if tokens.ndim not in (2, 3) or tokens.shape[-2:] != expected:
        raise ValueError(
            f"image_hidden_states must be ({expected[0]}, {expected[1]}) or (views, {expected[0]}, {expected[1]}), "
            f"got {tuple(image_hidden_states.shape)}: they belong to another model"
        )
    return tokens.view(1, -1, *expected)


def explain(arguments: ExplanationArguments) -> None:
    """Draw and print the explanation of an image and a caption."""
    try_file(arguments.output, "--output", PICTURE_SUFFIXES)
    image = read_picture(arguments.image)
    model, processor = load_model(arguments.model), load_processor(arguments.model)
    explanation = explain_pair(model, processor, arguments.text, image, num_layers=arguments.num_layers)
    scores = phrase_scores(model, processor, arguments.phrases, image) if arguments.phrases else []
    save_picture(draw_explanation(image, explanation), Path(arguments.output))
    print(f"{explanation.match_probability:6.1%}  {explanation.text}")
    for score in scores:
        print(f"{score.match_probability:6.1%}  {score.phrase}")
    print(f"wrote {arguments.output}")
