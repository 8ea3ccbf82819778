"""Score fusion: one ranking from the matching scores of the top k and the similarities of the whole gallery."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import torch


SCORE_FUSIONS = ("single", "published", "posterior")

# Default fusion if none is named or chosen on data: that of the published results.
DEFAULT_SCORE_FUSION = "published"

# Weight of the scaled similarity in the published evaluation.
SIMILARITY_WEIGHT = 0.002

# Value of the rows that a process does not own in the published evaluation.
UNOWNED_SCORE = 1000.0

# Processes in the published evaluation command, the likely source of the published results.
PUBLISHED_WORLD_SIZE = 4

ROWS_PER_CHUNK = 1024


def fuse_scores(
    similarity: "torch.Tensor",
    top_indices: "torch.Tensor",
    match_scores: "torch.Tensor",
    method: str = DEFAULT_SCORE_FUSION,
    world_size: int = PUBLISHED_WORLD_SIZE,
    similarity_weight: float = SIMILARITY_WEIGHT,
    temperature: float | None = None,
    match_weight: float = 1.0,
) -> "torch.Tensor":
    """Fuse the matching scores of each query's top k with the similarities of the whole gallery.

    `single` is the formula as written: for each view, unmatched entries get the smallest matching score of their row, the
    whole matrix is min-max scaled to 0..1, the views are averaged, and `similarity_weight` times the min-max-scaled similarity
    is added.

    `published` is the sum over `world_size` evaluation processes in the published code, regardless of the actual number of
    processes. There the queries are cut into slices of `queries // world_size + 1`, and each process scales a matrix in which
    the rows of the others are still 1000. With s the matching score, m the smallest one of the slice and z the scaled
    similarity, a row of the sum is (world_size - 1) + (s - m) / (1000 - m) + world_size * weight * z: on 4 processes nearly
    s / 1000 + 0.008 z, so the similarity counts far more relative to the matching score than in `single`. A process without
    rows divides 0 by 0 in the published code; here it adds a constant, which does not affect the ranking.

    `posterior` is ours, see [`posterior_scores`]. Both terms are logarithms of likelihoods: the contrastive loss makes
    exp(similarity / temperature) the odds of a pair among the gallery, and the matching head, trained on negatives drawn in
    proportion to that, estimates how much likelier a pair is than such a draw. The weight of a perfect head is 1; a briefly
    trained head is overconfident and needs a smaller weight, chosen on validation.

    Args:
        similarity: `(queries, gallery)`.
        top_indices: matched gallery entries, `(queries, k)`.
        match_scores: their matching logits, `(views, queries, k)`, with one view or an image and its mirror image; for
            "posterior" the log-odds, class 1 minus class 0.
        method: "single", "published" or "posterior".
        world_size: number of processes that "published" sums over.
        similarity_weight: weight of the scaled similarity in "single" and "published".
        temperature: learned temperature of the contrastive loss, for "posterior".
        match_weight: weight of the matching log-odds in "posterior".

    Returns:
        Scores `(queries, gallery)` float32, larger is better.

    Raises:
        ValueError: if the method is unknown, shapes disagree, a similarity or matching score is not finite, the weight is
            negative, or "posterior" has no temperature above 0.
    """
    import torch  # only here: a search in a gallery uses `posterior_scores` without

    if method not in SCORE_FUSIONS:
        raise ValueError(f"score_fusion must be one of {', '.join(SCORE_FUSIONS)}, got {method!r}")
    num_queries, num_images = similarity.shape
    if match_scores.ndim != 3 or match_scores.shape[1:] != top_indices.shape or len(top_indices) != num_queries:
        raise ValueError(
            f"match_scores must be (views, {num_queries}, k) and top_indices ({num_queries}, k), "
            f"got {tuple(match_scores.shape)} and {tuple(top_indices.shape)}"
        )
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not (math.isfinite(match_weight) and match_weight >= 0):
        raise ValueError(f"match_weight must be finite and at least 0, got {match_weight}")
    require_finite(
        similarity[None].float().cpu(), lambda query, image: f"query {query} and image {image}", "similarity"
    )
    require_finite(
        match_scores.float().cpu(), lambda query, rank: f"query {query} and image {int(top_indices[query, rank])}"
    )
    if method == "posterior":
        if temperature is None or not 0 < temperature < math.inf:
            raise ValueError(f'"posterior" needs the learned temperature, a finite number above 0, got {temperature}')
        fused = posterior_scores(
            similarity.float().cpu().numpy(),
            top_indices.cpu().numpy(),
            match_scores.float().cpu().numpy(),
            temperature,
            match_weight,
        )
        return torch.from_numpy(fused).to(similarity.device)
    if method == "single":
        world_size = 1
    match_scores = match_scores.float()
    sim_low, sim_high = similarity.min(), similarity.max()
    slice_size = num_queries // world_size + 1

    fused = torch.empty(num_queries, num_images, dtype=torch.float32, device=similarity.device)
    for owner, first in enumerate(range(0, num_queries, slice_size)):
        last = min(num_queries, first + slice_size)
        owned = match_scores[:, first:last]
        lows = owned.amin(dim=(1, 2))
        # Only a process that owns every row has no 1000 in its matrix.
        highs = owned.amax(dim=(1, 2)) if last - first == num_queries else torch.full_like(lows, UNOWNED_SCORE)
        for start in range(first, last, ROWS_PER_CHUNK):
            rows = slice(start, min(last, start + ROWS_PER_CHUNK))
            scaled = torch.zeros(rows.stop - start, num_images, dtype=torch.float32, device=similarity.device)
            for view, low, high in zip(match_scores, lows, highs, strict=True):
                matrix = view[rows].amin(dim=1, keepdim=True).repeat(1, num_images)
                matrix.scatter_(1, top_indices[rows], view[rows])
                scaled += _min_max(matrix, low, high) / len(match_scores)
            weighted = similarity_weight * _min_max(similarity[rows].float(), sim_low, sim_high)
            # Summed process by process in order, to round float32 as in the published code.
            total = torch.zeros_like(scaled)
            for process in range(world_size):
                total += (scaled if process == owner else 1.0) + weighted
            fused[rows] = total
    return fused


def posterior_scores(
    similarity: np.ndarray, top_indices: np.ndarray, log_odds: np.ndarray, temperature: float, match_weight: float
) -> np.ndarray:
    """Compute similarity / temperature + match_weight * matching log-odds averaged over the views.

    Unmatched entries get the smallest log-odds of their row.

    Args:
        similarity: `(queries, gallery)` float32.
        top_indices: matched gallery entries, `(queries, k)`.
        log_odds: their matching log-odds, `(views, queries, k)` float32.
        temperature: learned temperature of the contrastive loss.
        match_weight: weight of the matching log-odds.

    Returns:
        Scores `(queries, gallery)` float32, larger is better.
    """
    log_similarity, weighted = similarity / temperature, match_weight * log_odds.mean(axis=0)
    fused = log_similarity + weighted.min(axis=1, keepdims=True)
    np.put_along_axis(fused, top_indices, np.take_along_axis(log_similarity, top_indices, 1) + weighted, 1)
    return fused


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Return the probabilities of log-odds, in float64 so that small ones keep their digits."""
    return 0.5 + 0.5 * np.tanh(0.5 * log_odds.astype(np.float64))


def match_scores(logits: "torch.Tensor", log_odds: bool) -> "torch.Tensor":
    """Reduce `(..., 2)` logits of the matching head to the logit of "match", or to its log-odds."""
    no, yes = logits.unbind(dim=-1)
    return yes - no if log_odds else yes


def require_finite(scores: Any, name_pair: Callable[[int, int], str], what: str = "matching score") -> None:
    """Check that no score is NaN or infinite, since one such pair affects the scale or order of all others.

    Args:
        scores: `(views, texts, images)`, optionally with further dimensions; an array or a tensor on the CPU.
        name_pair: describes the text and the image of a pair from their indices in `scores`.
        what: name of the scores, for the message.

    Raises:
        ValueError: if one is not finite; the message names the first such pair.
    """
    scores = np.asarray(scores)
    finite = np.isfinite(scores)
    if finite.all():
        return
    first = np.argwhere(~finite)[0]
    view, text, image = first[:3].tolist()
    value = scores[tuple(first)].item()
    of_view = " (mirrored)" if view else ""
    raise ValueError(
        f"the {what} of {name_pair(text, image)}{of_view} is {value}, as are "
        f"{int((~finite).sum()) - 1} more: a ranking needs finite numbers; compute in float32 instead of float16, and check "
        "the weights for NaN or infinite values"
    )


def fusion_name(score_fusion: str, match_weight: float | None = None) -> str:
    """Return the name of a fusion in tables and files: its method, and its weight if it has one."""
    return f"{score_fusion} {match_weight:g}" if score_fusion == "posterior" else score_fusion


def _min_max(values: "torch.Tensor", low: "torch.Tensor", high: "torch.Tensor") -> "torch.Tensor":
    """Scale values from low..high to 0..1; equal values become 0."""
    return (values - low) / (high - low) if high > low else values.new_zeros(values.shape)
