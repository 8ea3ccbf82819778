"""Early stopping: the first hits of matching all, in order, with no more pairs, for any scores below the bound."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mra.retrieval.early_stopping import match_in_rounds
from mra.retrieval.score_fusion import fuse_scores
from tests.helpers.properties import examples


# Scores of the model of `make demo` on the sample set, with the bound of its validation split; see the file's metadata.
SAMPLE_SCORES = Path(__file__).with_name("sample_scores.safetensors")


class Drawn:
    """Similarities and log-odds of one query, some images unreadable; coarse steps make equal scores frequent."""

    def __init__(self, seed: int, count: int, views: int, steps: int, unreadable: float, decisive: bool) -> None:
        random = np.random.default_rng(seed)
        spread = 2.0 if decisive else 0.2
        self.similarity = -np.sort(-np.round(spread * random.random(count) * steps) / steps).astype(np.float32)
        self.log_odds = (np.round(4 * random.standard_normal((views, count)) * steps) / steps).astype(np.float32)
        self.readable = random.random(count) >= unreadable
        self.bound = float(self.log_odds.mean(axis=0).max())
        self.tried: list[range] = []

    def match(self, places: range) -> tuple[list[int], np.ndarray]:
        self.tried.append(places)
        kept = [place for place in places if self.readable[place]]
        return kept, self.log_odds[:, kept]

    def search(self, bound: float | None, size: int = 8, **settings) -> tuple[list[int], int]:
        """The order of all images, and how many were matched."""
        self.tried = []
        matched, log_odds = match_in_rounds(
            self.similarity, self.match, largest_log_odds=bound, round_size=size, **settings
        )
        assert log_odds.shape == (len(self.log_odds), len(matched))
        if not matched:
            return list(range(len(self.similarity))), 0
        fused = fuse_scores(
            torch.from_numpy(self.similarity)[None],
            torch.tensor(matched)[None],
            torch.from_numpy(log_odds)[:, None],
            "posterior",
            temperature=settings["temperature"],
            match_weight=settings["match_weight"],
        )
        return fused[0].argsort(descending=True, stable=True).tolist(), len(matched)


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 60),
    views=st.sampled_from([1, 2]),
    steps=st.sampled_from([2, 16, 10**6]),
    unreadable=st.sampled_from([0.0, 0.1, 1.0]),
    decisive=st.booleans(),
    top=st.integers(1, 30),
    rerank=st.integers(1, 70),
    weight=st.sampled_from([0.0, 0.05, 0.4, 1.0, 2.0]),
    above=st.sampled_from([0.0, 3.0]),
    size=st.sampled_from([1, 8, 64]),
)
@examples(300)
def test_first_hits_are_those_of_matching_all(
    seed, count, views, steps, unreadable, decisive, top, rerank, weight, above, size
):
    drawn = Drawn(seed, count, views, steps, unreadable, decisive)
    settings = {"top": top, "rerank": rerank, "temperature": 0.05, "match_weight": weight}
    expected, all_matched = drawn.search(None, **settings)
    assert drawn.tried == [range(min(rerank, count))]
    order, matched = drawn.search(drawn.bound + above, size, **settings)
    assert order[:top] == expected[:top]
    assert matched <= all_matched
    assert [place for places in drawn.tried for place in places] == list(range(drawn.tried[-1].stop))
    assert drawn.tried[-1].stop <= min(rerank, count)
    if matched < all_matched:
        assert matched >= top and all(drawn.readable[order[:top]])


@pytest.mark.parametrize(
    "bound, rounds",
    [(8.0, [16]), (16.0, [16, 24]), (16.5, [16, 24, 32]), (math.inf, [16, 24, 32, 40]), (None, [40])],
)
def test_rounds_end_once_the_next_image_cannot_pass(bound, rounds):
    """By hand: similarities fall by 1, so image n scores at most -n + bound; all log-odds are 0, so the 9th best is -8."""
    drawn = Drawn(0, 40, 1, 1, 0.0, True)
    drawn.similarity, drawn.log_odds = -np.arange(40, dtype=np.float32), np.zeros((1, 40), np.float32)
    order, matched = drawn.search(bound, top=9, rerank=40, temperature=1.0, match_weight=1.0)
    assert order == list(range(40))
    assert (matched, [places.stop for places in drawn.tried]) == (rounds[-1], rounds)


def test_an_unreadable_image_that_may_be_among_the_first_keeps_the_rounds_going():
    """Image 0 is unreadable and scores 0 + the lowest log-odds, which only the last image brings down from -1 to -9."""
    drawn = Drawn(0, 16, 1, 1, 0.0, True)
    drawn.similarity = -np.arange(16, dtype=np.float32) / 4
    drawn.log_odds = np.full((1, 16), -1, np.float32)
    drawn.log_odds[0, 15], drawn.readable[0] = -9, False
    settings = {"top": 1, "rerank": 16, "temperature": 1.0, "match_weight": 1.0}
    assert (
        drawn.search(-1.0, **settings) == drawn.search(None, **settings) and drawn.search(-1.0, **settings)[0][0] == 1
    )
    drawn.readable[0] = True
    assert drawn.search(-1.0, **settings)[1] == 8


def test_a_bound_that_a_match_exceeds_is_raised_to_it():
    """Image 7 is far above the bound, and so is image 8, which then is the second hit."""
    drawn = Drawn(0, 24, 1, 1, 0.0, True)
    drawn.similarity, drawn.log_odds = -np.arange(24, dtype=np.float32), np.zeros((1, 24), np.float32)
    drawn.log_odds[0, [7, 8]] = 9, 8.5
    order, matched = drawn.search(-5.0, top=2, rerank=24, temperature=1.0, match_weight=1.0)
    assert (order[:2], matched) == ([7, 8], 16)


@pytest.mark.parametrize("top, most_pairs", [(10, 30), (20, 55)])
def test_first_hits_on_the_sample_set_are_those_of_matching_all(top, most_pairs):
    with safe_open(SAMPLE_SCORES, "numpy") as file:
        facts, similarity, log_odds = file.metadata(), file.get_tensor("similarity"), file.get_tensor("log_odds")
    settings = {name: float(facts[name]) for name in ("temperature", "match_weight")} | {"top": top, "rerank": 128}
    pairs = 0
    for of_query, odds in zip(similarity, log_odds, strict=True):
        query = Drawn(0, 128, 1, 1, 0.0, True)
        query.similarity, query.log_odds = of_query, odds[None].astype(np.float32)
        order, matched = query.search(float(facts["largest_log_odds"]), **settings)
        assert order[:top] == query.search(None, **settings)[0][:top]
        pairs += matched
    assert pairs <= most_pairs * len(similarity)
