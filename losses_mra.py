"""
Losses of MRA as pure functions (soft-target contrastive loss, choice of hard negatives, masked-language loss), and the rows
that texts and images become on their way to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
