"""Changes to the text of a caption that keep spaces, capitals and articles correct."""

import re

from data_scripts.dad.language.parsed_caption import ParsedCaption


_VOWEL = re.compile(r"^(?:[aeio]|u(?!ni|se|su|ti|k)|hour|honest|x-ray)", re.IGNORECASE)
_CONSONANT = re.compile(r"^(?:one|once|eu|ewe|uni|use)", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(an?)(\s+)([^\W\d_][\w-]*)", re.IGNORECASE)


def fix_articles(text: str) -> str:
    """Replace `a` and `an` by the one that the next word takes."""

    def fix(match: re.Match[str]) -> str:
        article, space, word = match.groups()
        vowel = _VOWEL.match(word) and not _CONSONANT.match(word)
        right = "an" if vowel else "a"
        if article.lower() == right:
            return match.group()
        return (right.capitalize() if article[0].isupper() else right) + space + word

    return _ARTICLE.sub(fix, text)


def match_case(word: str, model: str) -> str:
    """Return a word, capitalised if its model is."""
    return word.capitalize() if model[:1].isupper() else word


def replace_words(caption: ParsedCaption, start: int, stop: int, words: str) -> str:
    """Return the text with tokens `start` to `stop` replaced; a capital at the start of a sentence stays."""
    old = caption.slice(start, stop)
    new = words[:1].upper() + words[1:] if old[:1].isupper() and start in _sentence_starts(caption) else words
    return caption.text[: caption.spans[start][0]] + new + caption.text[caption.spans[stop - 1][1] :]


def insert_before(caption: ParsedCaption, place: int, word: str) -> str:
    """Return the text with a word inserted before a token."""
    where = caption.spans[place][0]
    rest = caption.text[where:]
    if place in _sentence_starts(caption) and rest[:1].isupper():
        word, rest = word.capitalize(), rest[0].lower() + rest[1:]
    return f"{caption.text[:where]}{word} {rest}"


def cut_words(caption: ParsedCaption, start: int, stop: int) -> str:
    """Return the text without tokens `start` to `stop` and the space after them."""
    rest = caption.text[caption.spans[stop][0] :]
    if start in _sentence_starts(caption) and caption.slice(start, stop)[:1].isupper():
        rest = rest[:1].upper() + rest[1:]
    return caption.text[: caption.spans[start][0]] + rest


def replace_tokens(caption: ParsedCaption, words: list[str | None]) -> str:
    """Return the text with tokens replaced: None keeps a token, an empty word drops it and the space before it."""
    pieces, end = [], 0
    for (start, stop), word in zip(caption.spans, words, strict=True):
        pieces.append("" if word == "" else caption.text[end:start])
        pieces.append(caption.text[start:stop] if word is None else word)
        end = stop
    return "".join(pieces) + caption.text[end:]


def _sentence_starts(caption: ParsedCaption) -> set[int]:
    return {0} | {index + 1 for index, word in enumerate(caption.words) if word in ".!?"}
