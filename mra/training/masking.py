"""Masking of captions for the language-modelling loss: whole words and skip-grams, vectorised over the batch."""

import numpy as np
from transformers import PreTrainedTokenizerBase


IGNORED_LABEL = -100
REPLACED_BY_MASK = 0.8
REPLACED_AT_RANDOM = 0.1

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def keyed_uniform(seeds: np.ndarray, count: int) -> np.ndarray:
    """Draw numbers in [0, 1) that depend only on the row's seed (SplitMix64, Steele et al. 2014).

    Args:
        seeds: `(rows,)` integers.
        count: numbers per row.

    Returns:
        `(rows, count)` float64.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN_GAMMA
    state = seeds.astype(np.uint64)[:, None] + steps
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53


class TokenMasker:
    """Masking of tokens for BERT's masked-language loss, by whole words and sometimes skip-grams.

    A word is a token and the `##` pieces after it. Positions are tried in random order until enough tokens are masked; each
    position masks its word or, with `skipgram_probability`, the words of the next 2 to `skipgram_max_length` tokens. If the
    last choice is too long, a random part of all choices is kept, so a word may be partly masked. Of the chosen tokens 80%
    become [MASK], 10% a random token, and 10% stay.

    Args:
        tokenizer: a BERT tokenizer.
        probability: share of the tokens to mask.
        max_masked: most tokens to mask in a caption.
        mask_padding: True also counts and masks padding and [SEP], and draws replacements from the whole vocabulary, as
            published (always 10 of 56 positions, 39% of them padding at 20 to 45 tokens). False (default) never masks
            or inserts special tokens, [UNK] included; the share is of the caption's own tokens, at least one.
        whole_words: False masks single tokens without the rest of their words.
        skipgram_probability: probability of a skip-gram at each position tried.
        skipgram_max_length: longest skip-gram in tokens, at least 2.

    Raises:
        ValueError: if an argument is out of range or the tokenizer has no [MASK].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float = 0.25,
        max_masked: int = 10,
        mask_padding: bool = False,
        whole_words: bool = True,
        skipgram_probability: float = 0.2,
        skipgram_max_length: int = 3,
    ) -> None:
        for name, value in (("probability", probability), ("skipgram_probability", skipgram_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {value}")
        if max_masked < 1:
            raise ValueError(f"`max_masked` must be 1 or more, got {max_masked}")
        if skipgram_max_length < 2:
            raise ValueError(
                f"`skipgram_max_length` must be 2 or more, got {skipgram_max_length}; "
                "`skipgram_probability=0` turns skip-grams off"
            )
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; masking needs a BERT tokenizer")
        self.probability = probability
        self.max_masked = max_masked
        self.mask_padding = mask_padding
        self.whole_words = whole_words
        self.skipgram_probability = skipgram_probability
        self.skipgram_max_length = skipgram_max_length
        self.mask_token_id = tokenizer.mask_token_id

        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        self._is_piece = np.zeros(size, dtype=bool)
        self._is_piece[[index for token, index in vocabulary.items() if token.startswith("##")]] = True
        self._is_special = np.zeros(size, dtype=bool)
        self._is_special[list(tokenizer.all_special_ids)] = True
        known = np.sort(np.fromiter(vocabulary.values(), dtype=np.int64))
        self._replacements = known if mask_padding else known[~self._is_special[known]]

    def __call__(self, input_ids: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mask a batch; row i depends only on its ids and `seeds[i]`.

        Args:
            input_ids: `(batch, length)` integers, [CLS] at position 0.
            seeds: `(batch,)` integers.

        Returns:
            Masked ids and labels, both `(batch, length)` int64; labels are -100 for tokens that were not chosen.
        """
        batch, length = input_ids.shape
        draws = keyed_uniform(seeds, 6 * length).reshape(batch, 6, length).transpose(1, 0, 2)
        order, skip, skip_length, keep, fate, replacement = draws

        allowed = np.ones((batch, length), dtype=bool) if self.mask_padding else ~self._is_special[input_ids]
        wanted = self._wanted(allowed)
        allowed[:, 0] = False
        chosen = self._choose(input_ids, allowed, wanted, order, skip, skip_length)
        chosen &= _rank(np.where(chosen, keep, np.inf)) < wanted[:, None]

        masked = np.array(input_ids, dtype=np.int64)
        labels = np.where(chosen, masked, IGNORED_LABEL)
        replaced = chosen & (fate < REPLACED_BY_MASK + REPLACED_AT_RANDOM)
        at_random = replaced & (fate >= REPLACED_BY_MASK)
        masked[replaced] = self.mask_token_id
        picks = (replacement[at_random] * len(self._replacements)).astype(np.int64)
        masked[at_random] = self._replacements[picks]
        return masked, labels

    def _wanted(self, allowed: np.ndarray) -> np.ndarray:
        """Return the number of tokens to mask in each row, `(batch,)`; every position counts when padding does."""
        counts = allowed.sum(axis=1)
        share = np.maximum(np.rint(self.probability * counts), 1)
        return np.minimum(np.minimum(share, self.max_masked), counts).astype(np.int64)

    def _choose(
        self,
        input_ids: np.ndarray,
        allowed: np.ndarray,
        wanted: np.ndarray,
        order: np.ndarray,
        skip: np.ndarray,
        skip_length: np.ndarray,
    ) -> np.ndarray:
        """Choose whole spans in random order until every row has enough (or more): `(batch, length)` of bool."""
        batch, length = input_ids.shape
        positions = np.arange(length)
        lengths = 1 + np.where(
            skip < self.skipgram_probability, 1 + (skip_length * (self.skipgram_max_length - 1)).astype(np.int64), 0
        )
        starts, ends = np.broadcast_to(positions, (batch, length)), np.minimum(positions + lengths, length)
        if self.whole_words:
            is_piece = self._is_piece[input_ids]
            starts = np.maximum.accumulate(np.where(is_piece, 0, positions), axis=1)
            following = np.full((batch, length + 1), length)
            following[:, :length] = np.where(is_piece, length, positions)
            following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]  # next start of a word
            ends = np.take_along_axis(following, ends, axis=1)

        chosen = np.zeros((batch, length), dtype=bool)
        for _ in range(self.max_masked):  # every round adds a token to each unfinished row
            unfinished = chosen.sum(axis=1) < wanted
            if not unfinished.any():
                break
            position = np.where(allowed & ~chosen, order, np.inf).argmin(axis=1)[:, None]
            start, end = np.take_along_axis(starts, position, 1), np.take_along_axis(ends, position, 1)
            chosen |= (positions >= start) & (positions < end) & allowed & unfinished[:, None]
        return chosen


def _rank(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value in its row, 0 for the smallest."""
    return values.argsort(axis=1).argsort(axis=1)
