"""Losses of MRA as pure functions: contrastive, matching and masked-language loss, and the draw of hard negatives."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def contrastive_targets(
    identity_ids: torch.Tensor, label_smoothing: float = 0.0, row_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the row-normalised matrix of equal identities, smoothed if `0 < label_smoothing < 1` (reference notes, "ITC").

    Args:
        identity_ids: `(batch,)` integers.
        label_smoothing: share that is spread evenly over the batch.
        row_ids: `(rows,)`, identities of the rows to return; all rows when absent.

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
    """Return the mean of the image-to-text and text-to-image cross-entropies against soft identity targets.

    Args:
        image_embeds: `(batch, width)`, L2-normalised.
        text_embeds: `(batch, width)`, L2-normalised; row i belongs to row i of the images.
        identity_ids: `(batch,)`; rows that share an identity are positives of each other.
        temperature: scalar divisor of the similarities.
        label_smoothing: see [`contrastive_targets`].
        chunk_size: rows of the similarity matrix to hold at a time; they are computed again in the backward pass. Memory
            then grows with the batch, not with its square, and the result is the same. The whole matrix when absent.

    Returns:
        Scalar.
    """
    if chunk_size is None:
        similarity = image_embeds @ text_embeds.t() / temperature
        targets = contrastive_targets(identity_ids, label_smoothing)
        return (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.t(), targets)) / 2

    def row_losses(
        rows: torch.Tensor, columns: torch.Tensor, row_ids: torch.Tensor, temperature: torch.Tensor
    ) -> torch.Tensor:
        targets = contrastive_targets(identity_ids, label_smoothing, row_ids)
        return F.cross_entropy(rows @ columns.t() / temperature, targets, reduction="sum")

    total = image_embeds.new_zeros(())
    for rows, columns in ((image_embeds, text_embeds), (text_embeds, image_embeds)):
        for some, row_ids in zip(rows.split(chunk_size), identity_ids.split(chunk_size), strict=True):
            total = total + checkpoint(row_losses, some, columns, row_ids, temperature, use_reentrant=False)
    return total / (2 * len(identity_ids))


@torch.no_grad()
def choose_hard_negatives(
    similarity: torch.Tensor, identity_ids: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one column of another identity for each row, with probability softmax(similarity) + 1e-5.

    Args:
        similarity: `(batch, batch)`, already divided by the temperature.
        identity_ids: `(batch,)` of both rows and columns.
        generator: makes the draw repeatable; it may be on another device.

    Returns:
        `(batch,)` column indices, and `(batch,)` booleans that are false where a row has no other identity to draw
        from, so that its index is meaningless.
    """
    same = identity_ids[:, None] == identity_ids[None, :]
    weights = (F.softmax(similarity.float(), dim=1) + 1e-5).masked_fill(same, 0.0)
    exists = ~same.all(dim=1)
    # A row without weights must not fail in the draw, nor one of a diverged model, whose contrastive loss is NaN.
    drawable = exists[:, None] & weights.isfinite()
    weights = torch.where(drawable, weights, torch.ones_like(weights))
    if generator is not None:
        weights = weights.to(generator.device)
    negatives = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return negatives.to(similarity.device), exists


def matching_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the decision between match and no match; class 1 is "match".

    Args:
        logits: `(pairs, 2)`.
        labels: `(pairs,)` of 0, 1, or -100 for pairs that do not count.

    Returns:
        Scalar mean over the pairs that count.
    """
    return F.cross_entropy(logits.float(), labels)


def masked_language_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy over the masked tokens; 0 if there are none.

    Args:
        logits: `(tokens, vocabulary)`.
        labels: `(tokens,)` token ids, -100 where nothing is masked.

    Returns:
        Scalar mean over the labels that count.
    """
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def weighted_sum(terms: Mapping[str, tuple[float, torch.Tensor | None]]) -> torch.Tensor:
    """Return the weighted sum of the terms of the objective.

    Args:
        terms: name -> weight and scalar term; a term that is `None` does not count.

    Returns:
        Scalar.
    """
    return cast(torch.Tensor, sum(weight * term for weight, term in terms.values() if term is not None))
