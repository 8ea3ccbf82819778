"""Checks of captions and embeddings, without PyTorch."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def require_words(texts: Sequence[Any], first: int = 0) -> None:
    """Check that captions can be tokenized.

    Args:
        texts: the captions.
        first: position of the first one, for messages.

    Raises:
        ValueError: if one is not a text, has no word or is not valid Unicode; the message gives its position.
    """
    for position, text in enumerate(texts, start=first):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"caption {position} must be a text with at least one word, got {text!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):  # tokenizers raises a TypeError
            raise ValueError(f"caption {position} must be valid Unicode, got {text!r}: remove the lone surrogates")


def require_finite_rows(embeds: Any, kind: str) -> None:
    """Check that no embedding holds NaN or infinity, which would spoil every ranking it is in.

    Args:
        embeds: `(rows, width)`, an array or a tensor on the CPU.
        kind: what a row encodes, for the message.

    Raises:
        ValueError: naming the first such row.
    """
    broken = np.flatnonzero(~np.isfinite(np.asarray(embeds)).all(axis=1))
    if len(broken):
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ValueError(
            f"the embedding of {kind} {broken[0]}{more}, counted from 0, is not finite: "
            "compute in float32 if this was float16, and look for weights that are not finite"
        )
