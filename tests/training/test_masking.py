"""Masking: statistics of the published masker over 20,000 captions, hand-made oracles, and arguments."""

import json
from pathlib import Path

import numpy as np
import pytest

from mra.training.masking import IGNORED_LABEL, TokenMasker, keyed_uniform
from tests.helpers.training import make_tokenizer


STATISTICS = json.loads((Path(__file__).parents[1] / "reference" / "masking_stats.json").read_text())
LENGTHS = {"len_20_45": (20, 45), "len_8_20": (8, 20), "len_56_full": (56, 56)}
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103
FIRST_PIECE, VOCABULARY = 24694, 30522


class WideTokenizer:
    """The vocabulary of the vectors: 30,522 entries, pieces from 24694 on."""

    mask_token_id = MASK
    all_special_ids = (PAD, UNK, CLS, SEP, MASK)

    def get_vocab(self):
        return {("##" if index >= FIRST_PIECE else "") + f"t{index}": index for index in range(VOCABULARY)}


def make_captions(count, low, high, rng, length=56):
    """Captions of `low` to `high` tokens, [CLS] and [SEP] among them, 15% of the others pieces."""
    ends = rng.integers(low, high + 1, count)
    words = rng.integers(1000, FIRST_PIECE, (count, length))
    ids = np.where(rng.random((count, length)) < 0.15, rng.integers(FIRST_PIECE, VOCABULARY, words.shape), words)
    ids[:, 1] = words[:, 1]
    ids[:, 0] = CLS
    ids[np.arange(count), ends - 1] = SEP
    ids[np.arange(length) >= ends[:, None]] = PAD
    return ids


def caption_counts(ids, masked, labels):
    """What the vectors count, for each caption: a dict of `(captions,)`, and the positions `(captions, length)`."""
    chosen = labels != IGNORED_LABEL
    to_mask, kept = chosen & (masked == MASK), chosen & (masked == ids)
    counts = {
        "on_pad": (chosen & (ids == PAD)).sum(1),
        "on_sep": (chosen & (ids == SEP)).sum(1),
        "on_text": (chosen & (ids >= 1000)).sum(1),
        "to_mask": to_mask.sum(1),
        "keep": kept.sum(1),
        "rand": (chosen & ~to_mask & ~kept).sum(1),
    }
    word = np.cumsum(ids < FIRST_PIECE, axis=1) - 1
    sizes, hits = np.zeros((2, *ids.shape), dtype=int)
    rows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    np.add.at(sizes, (rows, word), 1)
    np.add.at(hits, (rows, word), chosen)
    split = sizes > 1
    counts["ww_words"] = split.sum(1)
    counts["ww_full"] = (split & (hits == sizes)).sum(1)
    counts["ww_none"] = (split & (hits == 0)).sum(1)
    counts["ww_partial"] = (split & (hits > 0) & (hits < sizes)).sum(1)
    return counts, chosen


def deviations(name, masker, captions=20_000, seed=0):
    """Standard errors between our statistics and the vectors: of each count, and of each position."""
    reference = STATISTICS[name]
    rng = np.random.default_rng(seed)
    ids = make_captions(captions, *LENGTHS[name], rng)
    masked, labels = masker(ids, rng.integers(0, 2**63, captions))
    counts, chosen = caption_counts(ids, masked, labels)
    share = 1 / captions + 1 / reference["N"]
    scores = {
        key: (value.mean() - reference[key] / reference["N"]) / np.sqrt(max(value.var(), 1e-12) * share)
        for key, value in counts.items()
    }
    rates = chosen.mean(0)
    positions = (rates - np.array(reference["pos_hist"]) / reference["N"])[1:]
    variance = np.maximum(rates * (1 - rates), 1 / captions)[1:]
    return scores, positions / np.sqrt(variance * share), chosen


@pytest.mark.parametrize("name", LENGTHS)
def test_fidelity_masking_statistics(name):
    scores, positions, chosen = deviations(name, TokenMasker(WideTokenizer(), mask_padding=True))
    assert (chosen.sum(1) == 10).all() and not chosen[:, 0].any()
    assert max(map(abs, scores.values())) < 4, scores
    assert np.abs(positions).max() < 4
    # 55 squared standard errors; neighbours go together, so their sum deviates by about 12.
    assert np.square(positions).sum() < 55 + 4 * 12


@pytest.mark.parametrize(
    "options",
    [
        {"whole_words": False},
        {"skipgram_probability": 0.0},
        {"skipgram_probability": 0.4},
        {"skipgram_max_length": 2},
        {"skipgram_max_length": 4},
        {"max_masked": 9},
        {"mask_padding": False},
    ],
    ids=str,
)
def test_statistics_tell_other_maskers_apart(options):
    masker = TokenMasker(WideTokenizer(), **{"mask_padding": True, **options})
    scores, positions, _ = deviations("len_20_45", masker)
    assert max(map(abs, scores.values())) > 4 or np.square(positions).sum() > 55 + 4 * 12


@pytest.mark.parametrize(("low", "high"), [(20, 45), (3, 8)])
def test_own_tokens_only(low, high):
    masker = TokenMasker(WideTokenizer())
    rng = np.random.default_rng(1)
    ids = make_captions(4000, low, high, rng)
    masked, labels = masker(ids, rng.integers(0, 2**63, len(ids)))
    chosen, own = labels != IGNORED_LABEL, ids >= 1000
    assert not (chosen & ~own).any()
    assert (masked[~chosen] == ids[~chosen]).all() and (labels[chosen] == ids[chosen]).all()
    expected = [min(10, max(1, round(0.25 * int(tokens)))) for tokens in own.sum(1)]
    assert chosen.sum(1).tolist() == expected
    total = chosen.sum()
    to_mask, at_random = chosen & (masked == MASK), chosen & (masked != MASK) & (masked != ids)
    for count, share in ((to_mask.sum(), 0.8), (at_random.sum(), 0.1)):
        assert abs(count - share * total) < 4 * np.sqrt(share * (1 - share) * total)
    assert not np.isin(masked[at_random], WideTokenizer.all_special_ids).any()


def test_words_stay_together():
    """A word of pieces is masked as a whole, or in a random part where it is longer than what is wanted."""
    masker = TokenMasker(WideTokenizer(), max_masked=56, probability=0.2)
    piece = FIRST_PIECE
    ids = np.array([[CLS, 2000, piece, piece, 2001, 2002, piece, 2003, 2004, 2005, SEP, PAD]]).repeat(2000, 0)
    _, labels = masker(ids, np.arange(2000))
    chosen = labels != IGNORED_LABEL
    assert (chosen.sum(1) == 2).all()
    assert len(np.unique(chosen[chosen[:, 1:4].sum(1) == 2], axis=0)) == 3  # cut to any two of the three pieces
    alone = TokenMasker(WideTokenizer(), probability=0.2, skipgram_probability=0.0)
    ids = np.array([[CLS, 2001, piece, 2002, piece, 2003, piece, 2004, piece, 2005, piece, SEP]]).repeat(2000, 0)
    _, labels = alone(ids, np.arange(2000))
    pairs = (labels != IGNORED_LABEL)[:, 1:11].reshape(2000, 5, 2)
    assert (pairs[..., 0] == pairs[..., 1]).all() and (pairs[..., 0].sum(1) == 1).all()
    assert (np.abs(pairs[..., 0].mean(0) - 0.2) < 4 * np.sqrt(0.16 / 2000)).all()


def test_rows_are_independent():
    masker = TokenMasker(WideTokenizer())
    rng = np.random.default_rng(2)
    ids, seeds = make_captions(32, 8, 45, rng), rng.integers(0, 2**63, 32)
    masked, labels = masker(ids, seeds)
    some = [7, 3, 30]
    masked_some, labels_some = masker(ids[some], seeds[some])
    assert (masked[some] == masked_some).all() and (labels[some] == labels_some).all()
    other, _ = masker(ids, seeds + 1)
    assert (other != masked).any()


def test_nothing_to_mask():
    ids = np.full((2, 8), PAD)
    ids[:, 0], ids[0, 1], ids[1, 1], ids[1, 2] = CLS, SEP, UNK, SEP
    masked, labels = TokenMasker(WideTokenizer())(ids, np.arange(2))
    assert (masked == ids).all() and (labels == IGNORED_LABEL).all()


def test_real_tokenizer():
    tokenizer = make_tokenizer()
    ids = tokenizer("a man wearings shirts", padding="max_length", max_length=12, return_tensors="np")["input_ids"]
    masked, labels = TokenMasker(tokenizer)(ids.repeat(500, 0), np.arange(500))
    chosen = labels != IGNORED_LABEL
    assert (chosen.sum(1) == 2).all() and chosen[:, 1:7].any(0).all() and not chosen[:, 7:].any()
    assert masked.dtype == labels.dtype == np.int64


def test_keyed_uniform():
    draws = keyed_uniform(np.arange(1000), 200)
    assert draws.shape == (1000, 200) and draws.min() >= 0 and draws.max() < 1
    histogram = np.histogram(draws, bins=50, range=(0, 1))[0]
    assert np.square(histogram - 4000).sum() / 4000 < 49 + 5 * np.sqrt(2 * 49)
    assert np.abs(np.corrcoef(draws[:, :20].T) - np.eye(20)).max() < 5 / np.sqrt(1000)
    # SplitMix64 started at 0 gives 0xE220A8397B1DCDAF first.
    assert keyed_uniform(np.array([0]), 1)[0, 0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


@pytest.mark.parametrize(
    ("option", "value"),
    [("probability", 1.2), ("skipgram_probability", -1), ("max_masked", 0), ("skipgram_max_length", 1)],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must"):
        TokenMasker(WideTokenizer(), **{option: value})


def test_tokenizer_without_mask_token():
    tokenizer = WideTokenizer()
    tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match="no mask token"):
        TokenMasker(tokenizer)
