"""Masking: statistics of the published masker over 20,000 captions, hand-made oracles, and arguments."""

import json
from itertools import takewhile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mra.training import masking
from mra.training.masking import IGNORED_LABEL, TokenMasker, keyed_uniform
from tests.helpers.training import make_tokenizer


STATISTICS = json.loads((Path(__file__).parents[1] / "reference" / "masking_stats.json").read_text())
LENGTHS = {"len_20_45": (20, 45), "len_8_20": (8, 20), "len_56_full": (56, 56)}
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103
FIRST_PIECE, VOCABULARY = 24694, 30522


class SmallTokenizer:
    """Fourteen entries, pieces from 9 on, an unused number among them."""

    mask_token_id = 4
    all_special_ids = (0, 1, 2, 3, 4)

    def get_vocab(self):
        return {("##" if index >= 9 else "") + f"t{index}": index for index in (*range(8), *range(9, 15))}


def plain_masking(ids, draws, probability, max_masked, mask_padding, whole_words, skipgram_probability, longest):
    """One row as the class describes it, in loops."""
    order, skip, skip_length, keep, fate, replacement = draws
    special = SmallTokenizer.all_special_ids
    counted = [place for place, token in enumerate(ids) if mask_padding or token not in special]
    wanted = min(max(round(probability * len(counted)), 1), max_masked, len(counted))
    allowed = [place for place in counted if place > 0]
    chosen = set()
    for place in sorted(allowed, key=order.__getitem__):
        if place in chosen or len(chosen) >= wanted:
            continue
        tokens = 2 + int(skip_length[place] * (longest - 1)) if skip[place] < skipgram_probability else 1
        span = [*range(place, min(place + tokens, len(ids)))]
        if whole_words:
            before = takewhile(lambda other: ids[other + 1] >= 9, range(place - 1, -1, -1))
            after = takewhile(lambda other: ids[other] >= 9, range(span[-1] + 1, len(ids)))
            span = [*before, *span, *after]
        chosen.update(set(span) & set(allowed))
    known = [token for token in SmallTokenizer().get_vocab().values() if mask_padding or token not in special]
    masked, labels = list(ids), [-100] * len(ids)
    for place in sorted(chosen, key=keep.__getitem__)[:wanted]:
        labels[place] = ids[place]
        if fate[place] < 0.8:
            masked[place] = SmallTokenizer.mask_token_id
        elif fate[place] < 0.9:
            masked[place] = known[int(replacement[place] * len(known))]
    return masked, labels


JUST_BELOW = [float(np.nextafter(border, 0)) for border in (0.2, 0.5, 0.8, 0.9, 1)]
DRAWS = st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.9, *JUST_BELOW]) | st.floats(0, 1, exclude_max=True)


@given(
    ids=st.integers(1, 12).flatmap(
        lambda length: st.lists(
            st.lists(st.sampled_from([0, 1, 3, 5, 6, 7, *range(9, 15)]), min_size=length, max_size=length),
            min_size=1,
            max_size=3,
        )
    ),
    probability=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    max_masked=st.integers(1, 12),
    mask_padding=st.booleans(),
    whole_words=st.booleans(),
    skipgram_probability=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    longest=st.integers(2, 4),
    data=st.data(),
)
def test_masks_are_those_of_the_plain_loops(
    ids, probability, max_masked, mask_padding, whole_words, skipgram_probability, longest, data
):
    """Of any row, any options, and draws that lie exactly at a border."""
    ids = [[2, *row] for row in ids]
    batch, length = len(ids), len(ids[0])
    draws = np.array(data.draw(st.lists(DRAWS, min_size=6 * length * batch, max_size=6 * length * batch)))
    draws = draws.reshape(batch, 6, length)
    for kind in (0, 3):  # what orders must not be equal
        draws[:, kind] = np.array(data.draw(st.permutations(range(batch * length)))).reshape(batch, length)
        draws[:, kind] /= batch * length
    options = (probability, max_masked, mask_padding, whole_words, skipgram_probability, longest)
    masker = TokenMasker(SmallTokenizer(), *options)
    with mock.patch.object(masking, "keyed_uniform", return_value=draws.reshape(batch, -1)) as drawn:
        masked, labels = masker(np.array(ids), np.arange(batch))
    assert drawn.call_args.args[1] == 6 * length
    expected = [plain_masking(row, drawn, *options) for row, drawn in zip(ids, draws, strict=True)]
    assert (masked.tolist(), labels.tolist()) == ([row for row, _ in expected], [row for _, row in expected])


def test_unmasked_tokens_have_the_label_that_losses_ignore():
    logits, labels = torch.randn(1, 5), torch.tensor([IGNORED_LABEL])
    assert torch.nn.functional.cross_entropy(logits, labels, reduction="sum") == 0


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
    # SplitMix64 started at 0 gives 0xE220A8397B1DCDAF first (its authors' file splitmix64.c).
    assert keyed_uniform(np.array([0]), 1)[0, 0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def splitmix64(state, count):
    """The generator as its authors wrote it, in plain integers."""
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield ((z ^ (z >> 31)) >> 11) * 2.0**-53


@given(seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3), count=st.integers(1, 5))
def test_keyed_uniform_is_splitmix64(seeds, count):
    draws = keyed_uniform(np.array(seeds, dtype=np.uint64), count)
    assert draws.tolist() == [list(splitmix64(seed, count)) for seed in seeds]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("probability", 1.2),
        ("probability", -0.1),
        ("skipgram_probability", -1),
        ("skipgram_probability", 1.1),
        ("max_masked", 0),
        ("skipgram_max_length", 1),
    ],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must"):
        TokenMasker(WideTokenizer(), **{option: value})


def test_tokenizer_without_mask_token():
    tokenizer = WideTokenizer()
    tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match="no mask token"):
        TokenMasker(tokenizer)
