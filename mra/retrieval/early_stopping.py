"""Early stopping of re-ranking: match images in rounds, until the best hits cannot change."""

from collections.abc import Callable

import numpy as np


# Matches a range of images: the positions of those that could be matched, and their log-odds `(views, images)` float32.
Match = Callable[[range], tuple[list[int], np.ndarray]]


def match_in_rounds(
    similarity: np.ndarray,
    match: Match,
    *,
    top: int,
    rerank: int,
    temperature: float,
    match_weight: float,
    largest_log_odds: float | None,
    round_size: int,
) -> tuple[list[int], np.ndarray]:
    """Match the most similar images in rounds until the first `top` of the "posterior" ranking are settled.

    They are the same, in the same order, as after matching all `rerank` images, if no log-odds left out (the mean over views)
    exceed B, the largest of `largest_log_odds` and of the images matched so far. Proof, with p the `top`-th best posterior of
    those when the rounds stop:

    1. An image after them scores at most next similarity / temperature + weight x B <= p, matched or with the lowest log-odds
       of the matched ones as in `fuse_scores`; of equal scores the earlier image comes first.
    2. An image among them that could not be matched scores below p, and more matches can only lower the lowest log-odds.
    3. So the first `top` are matched images in both rankings, each with the same score.

    Args:
        similarity: of the found images, most similar first, `(images,)` float32.
        match: matches a range of them.
        top: number of hits to settle.
        rerank: most images to match, counted from the first.
        temperature: learned temperature of the contrastive loss.
        match_weight: weight of the log-odds in the posterior, at least 0.
        largest_log_odds: bound of the log-odds, calibrated, not proved; None to match all `rerank` images in one round.
        round_size: images per round; the first round has at least `top`, because fewer cannot settle them.

    Returns:
        Positions of the matched images, ascending, and their log-odds `(views, matched)`.
    """
    rerank = min(rerank, len(similarity))
    scaled, weight = similarity / np.float32(temperature), np.float32(match_weight)
    end = rerank if largest_log_odds is None else min(rerank, -(-top // round_size) * round_size)
    matched, log_odds = match(range(end))
    while largest_log_odds is not None and end < rerank:
        means = log_odds.mean(axis=0)
        bound = max(np.float32(largest_log_odds), means.max(initial=-np.inf))
        if _is_settled(scaled, matched, weight * means, end, top, scaled[end:].max() + weight * bound):
            break
        more, their_log_odds = match(range(end, min(rerank, end + round_size)))
        end = min(rerank, end + round_size)
        matched, log_odds = matched + more, np.concatenate([log_odds, their_log_odds], axis=1)
    return matched, log_odds


def _is_settled(
    scaled: np.ndarray, matched: list[int], weighted: np.ndarray, end: int, top: int, of_rest: np.float32
) -> bool:
    """Return whether neither an image from `end` on nor one that could not be matched can be among the first `top`.

    Args:
        scaled: similarity / temperature, `(images,)`.
        matched: positions of the matched images, all below `end`.
        weighted: their weighted log-odds, `(matched,)`.
        end: number of images tried.
        top: number of hits.
        of_rest: largest possible score of the images from `end` on.
    """
    if len(matched) < top:
        return False
    last = np.partition(scaled[matched] + weighted, -top)[-top]
    failed = np.delete(scaled[:end], matched)
    return bool(last >= of_rest and (failed + weighted.min() < last).all())
