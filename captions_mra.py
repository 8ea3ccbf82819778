"""Preparation of captions for the tokenizer, without PyTorch."""

import re


CAPTION_STYLES = ("plain", "clean")
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def normalize_caption(caption: str, style: str = "plain", max_words: int | None = 56) -> str:
    """Prepare a caption for the tokenizer as the published code does.

    Args:
        caption: any text with at least one character.
        style: `plain` (SDA, CUHK-PEDES) keeps the text; `clean` (ICFG-PEDES, RSTPReid) lowers it and turns every run
            of characters other than a-z and 0-9 into one space.
        max_words: longer captions are cut after this many words; not at all with `None`.

    Returns:
        The caption; a cut one has single spaces between its words.

    Raises:
        ValueError: if the caption is empty or the style is unknown.
    """
    if style not in CAPTION_STYLES:
        raise ValueError(f"`style` must be one of {', '.join(CAPTION_STYLES)}, got {style!r}")
    if not caption:
        raise ValueError("`caption` is empty: every query and every training row needs at least one word")
    if style == "clean":
        caption = _NOT_ALPHANUMERIC.sub(" ", caption.lower())
    words = caption.split()
    return caption if max_words is None or len(words) <= max_words else " ".join(words[:max_words])


__all__ = ["CAPTION_STYLES", "normalize_caption"]
