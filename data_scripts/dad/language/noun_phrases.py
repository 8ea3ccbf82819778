"""Noun phrases of a caption and what each speaks of, by the parts of speech and the word list of a parsed caption."""

from dataclasses import dataclass

from data_scripts.dad.language.parsed_caption import ParsedCaption
from data_scripts.dad.language.word_list import load_vocabulary


KINDS = (*load_vocabulary().raw["further_nouns"], "other")


@dataclass(frozen=True)
class NounPhrase:
    """A phrase of a caption.

    Attributes:
        text: as it stands in the caption, spaces evened out.
        start, end: characters of the caption.
        head: its last noun in lower case, which says what it is.
        kind: `person`, `hair`, `hat`, `upper`, `lower`, `full`, `shoes`, `bag`, `accessory`, `body`, `outfit` or `other`.
        modifiers: words that say more of the head.
    """

    text: str
    start: int
    end: int
    head: str
    kind: str
    modifiers: int


def find_noun_phrases(caption: str) -> list[NounPhrase]:
    """Find the things that a caption names, in its order, each wording once.

    A phrase is a determiner, modifiers and nouns: "a black and white striped shirt", "red running shoes". What a phrase
    is made of, its pattern and how hair is worn belong to it: "a pair of blue jeans", "a shirt with white stripes", "brown
    hair in a ponytail". None are a bare adjective, a pronoun, a word for the picture itself ("a photo of", "in the
    background"), what the caption says is not there ("no bag"), and parts of the body that only tell where something is
    ("over one shoulder"). Words that no list knows count as nouns.
    """
    parsed = ParsedCaption(caption)
    phrases, seen, place = [], set(), 0
    while place < len(parsed.words):
        end = _end_of_phrase(parsed, place)
        if end is None:
            place += 1
            continue
        phrase = _make_phrase(parsed, place, end)
        place, first = end, place
        if phrase is None or _is_absent(parsed, first) or _is_place(parsed, first, phrase):
            continue
        if phrase.text.lower() not in seen:
            seen.add(phrase.text.lower())
            phrases.append(phrase)
    return phrases


def specificity(phrase: NounPhrase) -> tuple[int, int]:
    """Return how much a phrase says, larger for more: a known garment over an "outfit" and over the person, then its modifiers."""
    ranks = {"person": 0, "outfit": 1, "other": 2, "body": 2}
    return ranks.get(phrase.kind, 3), phrase.modifiers


def _end_of_phrase(parsed: ParsedCaption, start: int) -> int | None:
    """Return the end of the phrase that begins at a token, None where none does."""
    tags, place, end = parsed.tags, start + (parsed.tags[start] == "D"), None
    while place < len(tags):
        if tags[place] == "N":
            end = place + 1
        elif tags[place] == "J" and (end is None or (tags[place - 1] == "N" and _noun_follows(parsed, place))):
            pass  # a modifier, or a noun that modifies: "sport running shoes"
        elif end is not None or not _joins_modifiers(parsed, place):
            break
        place += 1
    return None if end is None else _with_complement(parsed, end)


def _noun_follows(parsed: ParsedCaption, place: int) -> bool:
    while place < len(parsed.tags) and parsed.tags[place] == "J":
        place += 1
    return place < len(parsed.tags) and parsed.tags[place] == "N"


def _joins_modifiers(parsed: ParsedCaption, place: int) -> bool:
    """Return whether an "and" or comma joins modifiers of one noun: "black and white shoes", "short, dark hair"."""
    joins = parsed.words[place] in ("and", "&", ",") and parsed.tags[place - 1] == "J"
    return joins and _noun_follows(parsed, place + 1)


def _with_complement(parsed: ParsedCaption, end: int) -> int:
    """Take in "of blue jeans" after "a pair", "with white stripes" after a garment, "tied in a ponytail" after hair."""
    words, known = parsed.words, parsed.vocabulary
    head, place, kind = words[end - 1], end, known.kinds.get(words[end - 1])
    if kind == "hair":
        while parsed.word(place) in known.words("hair_held"):
            place += 1
        inner = _end_of_phrase(parsed, place) if end < place < len(words) else None
        return inner if inner is not None and known.kinds.get(words[inner - 1]) == "hair" else end
    if place + 1 < len(words) and words[place] in ("of", "with"):
        inner = _end_of_phrase(parsed, place + 1)
        if inner is not None and words[place] == "of" and head in known.words("made_of"):
            return inner
        if inner is not None and kind in known.words("patterned") and words[inner - 1] in known.words("patterned_by"):
            return inner
    return end


def _is_absent(parsed: ParsedCaption, start: int) -> bool:
    """Return whether a phrase names what is not there: "no bag", "without a hat"."""
    absent = parsed.vocabulary.words("absent_words")
    return parsed.word(start) in absent or parsed.word(start - 1) in absent


def _is_place(parsed: ParsedCaption, start: int, phrase: NounPhrase) -> bool:
    """Return whether a part of the body only locates: "over one shoulder"; not so "with a bald head"."""
    if phrase.kind != "body" or start == 0 or parsed.tags[start - 1] != "P":
        return False
    return parsed.words[start - 1] != "with" or phrase.modifiers == 0


def _make_phrase(parsed: ParsedCaption, start: int, end: int) -> NounPhrase | None:
    words, tags, known, last = parsed.words, parsed.tags, parsed.vocabulary, end
    for place in range(start, end):  # the head stands behind "a pair of" and before every other complement
        if tags[place] not in "DJNC" and words[place] != ",":
            last = end if words[place] == "of" else place
            break
    head = words[last - 1]
    if head in known.words("placeless") or head in known.words("made_of"):
        return None
    modifiers = sum(tag in "JN" for tag in tags[start:end]) - 1
    text = " ".join(parsed.slice(start, end).split())
    kind = known.kinds.get(head, "other")
    return NounPhrase(text, parsed.spans[start][0], parsed.spans[end - 1][1], head, kind, modifiers)
