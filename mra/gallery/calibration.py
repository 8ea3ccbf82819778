"""Calibration of the matching probability: false alarms and misses on a labelled split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from mra.gallery.types import Calibration
from mra.retrieval.encoders import Encoder, match_nearest
from mra.retrieval.evaluation import read_captions
from mra.retrieval.metrics import retrieval_metrics
from mra.retrieval.reranking import similarity_matrix, top_k
from mra.retrieval.retrieval_choice import MATCH_WEIGHTS, choice_score
from mra.retrieval.score_fusion import fuse_scores


if TYPE_CHECKING:
    from mra.common.tables import Table


CURVE_POINTS = 201


@dataclass
class SplitScores:
    """Scores of the queries of a split with their nearest images.

    Attributes:
        similarity: `(queries, images)`.
        top_indices: `(queries, k)`, nearest first.
        log_odds: `(views, queries, k)`.
        is_own: `(queries, k)`, whether an image shows the query's person.
        query_ids: identities `(queries,)`.
        gallery_ids: identities `(images,)`.
    """

    similarity: torch.Tensor
    top_indices: torch.Tensor
    log_odds: torch.Tensor
    is_own: torch.Tensor
    query_ids: torch.Tensor
    gallery_ids: torch.Tensor


def score_split(
    encoder: Encoder, dataset: "Table", rerank: int, views: int = 2, token_dtype: str = "float32"
) -> SplitScores:
    """Match every caption of a split with its nearest images, in the views and the precision of a gallery.

    The number of images exceeds `rerank` by the largest number of images of a person, so that `rerank` images remain without
    the query's person.

    Raises:
        ValueError: if the dataset is not as for `evaluate_retrieval`, it shows only one person, or `rerank` is below 1.
    """
    if rerank < 1:
        raise ValueError(f"rerank must be at least 1 for calibration, got {rerank}")
    captions, query_rows, gallery_ids = read_captions(dataset)
    query_ids = gallery_ids[query_rows]
    most_of_one = int(gallery_ids.unique(return_counts=True)[1].max())
    if most_of_one == len(gallery_ids):
        raise ValueError("dataset shows only one person, expected at least two: use a split with more people")
    images, texts = encoder.encode_images(cast(Sequence, dataset)), encoder.encode_texts(captions)
    tokens = torch.as_tensor(images.hidden_states)[:, :views].to(getattr(torch, token_dtype))
    images = replace(cast(Any, images), hidden_states=tokens)
    similarity = similarity_matrix(torch.as_tensor(texts.embeds), torch.as_tensor(images.embeds))
    top_indices = top_k(similarity, min(rerank + most_of_one, len(gallery_ids)))
    log_odds = match_nearest(encoder, texts, images, top_indices)
    is_own = gallery_ids[top_indices] == query_ids[:, None]
    return SplitScores(similarity, top_indices, log_odds, is_own, query_ids, gallery_ids)


def choose_match_weight(scores: SplitScores, temperature: float, rerank: int) -> float:
    """Return the weight of `MATCH_WEIGHTS` whose fused ranking has the best `choice_score`, as in evaluation."""

    def score(weight: float) -> float:
        fused = fuse_scores(
            scores.similarity,
            scores.top_indices[:, :rerank],
            scores.log_odds[..., :rerank],
            "posterior",
            temperature=temperature,
            match_weight=weight,
        )
        return choice_score(retrieval_metrics(fused, scores.query_ids, scores.gallery_ids))

    return max(MATCH_WEIGHTS, key=score)


def threshold_curve(
    scores: SplitScores, temperature: float, match_weight: float, rerank: int
) -> list[tuple[float, float, float]]:
    """Measure false alarms and misses at thresholds from 0 to 1.

    A false alarm: without the images of the query's person, the first hit of the ranking reaches the threshold. A miss: the
    first image of the query's person in the ranking does not reach it, or none is among the `rerank` nearest.

    Returns:
        (threshold, share of false alarms, share of misses) in ascending order of the threshold.
    """
    probabilities = scores.log_odds.sigmoid().mean(dim=0)
    similarity = scores.similarity.gather(1, scores.top_indices)
    fused = similarity / temperature + match_weight * scores.log_odds.mean(dim=0)

    def of_first(allowed: torch.Tensor) -> torch.Tensor:
        """Return the probability of the first allowed hit of each query, -1 if there is none."""
        first = fused.where(allowed, -torch.inf).argmax(dim=1, keepdim=True)
        return probabilities.gather(1, first)[:, 0].where(allowed.any(dim=1), -1.0)

    others = ~scores.is_own
    absent = of_first(others & (others.cumsum(dim=1) <= rerank))
    present = of_first(scores.is_own & (torch.arange(scores.is_own.shape[1]) < rerank))
    thresholds = torch.linspace(0, 1, CURVE_POINTS)
    alarms = (absent[None] >= thresholds[:, None]).double().mean(dim=1)
    misses = (present[None] < thresholds[:, None]).double().mean(dim=1)
    rows = torch.stack([thresholds.double(), alarms, misses], dim=1)
    return [tuple(round(value, 6) for value in row) for row in rows.tolist()]


def calibrate(
    encoder: Encoder,
    dataset: "Table",
    rerank: int,
    max_false_alarms: float | None = None,
    name: str = "",
    views: int = 2,
    token_dtype: str = "float32",
) -> Calibration:
    """Choose a threshold and a weight of the matching score, and measure its bound; see `Gallery.calibrate`.

    Raises:
        ValueError: as for `score_split`, or if `max_false_alarms` is not a share.
    """
    if max_false_alarms is not None and not 0 <= max_false_alarms < 1:
        raise ValueError(f"max_false_alarms must be at least 0 and below 1, got {max_false_alarms}")
    scores = score_split(encoder, dataset, rerank, views, token_dtype)
    match_weight = choose_match_weight(scores, encoder.temperature, rerank)
    curve = threshold_curve(scores, encoder.temperature, match_weight, rerank)
    if max_false_alarms is None:
        chosen = min(curve, key=lambda point: point[1] + point[2])
    else:
        accepted = [point for point in curve if point[1] <= max_false_alarms]
        chosen = accepted[0] if accepted else curve[-1]
    return Calibration(
        threshold=chosen[0],
        false_alarms=chosen[1],
        misses=chosen[2],
        match_weight=match_weight,
        rerank=rerank,
        queries=len(scores.query_ids),
        split=name,
        curve=curve,
        largest_log_odds=scores.log_odds.mean(dim=0).max().item(),
    )
