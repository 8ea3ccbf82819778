"""Noun phrases of a caption and what each one names, found by parts of speech and the word list."""

from dataclasses import dataclass

from data_scripts.dad.language.parsed_caption import ParsedCaption


@dataclass(frozen=True)
class NounPhrase:
    """A phrase of a caption.

    Attributes:
        text: as in the caption, with single spaces.
        start: its first character in the caption.
        end: the character after its last.
        head: its last noun in lower case, which names the thing.
        kind: `person`, `hair`, `hat`, `upper`, `lower`, `full`, `shoes`, `bag`, `accessory`, `body`, `outfit` or `other`.
        modifiers: number of words that describe the head.
    """

    text: str
    start: int
    end: int
    head: str
    kind: str
    modifiers: int


def find_noun_phrases(caption: str) -> list[NounPhrase]:
    """Find the things that a caption names, in order, each wording once.

    A phrase is a determiner, modifiers and nouns: "a black and white striped shirt", "red running shoes". It includes what
    the thing is made of, its pattern and how hair is worn: "a pair of blue jeans", "a shirt with white stripes", "brown
    hair in a ponytail". Left out are bare adjectives, pronouns, words for the picture itself ("a photo of", "in the
    background"), things that are absent ("no bag"), and parts of the body that only say where something is ("over one
    shoulder"). Words that are in no list count as nouns.
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
    """Return a key that grows with how specific a phrase is: a garment over an "outfit" and the person, then modifiers."""
    ranks = {"person": 0, "outfit": 1, "other": 2, "body": 2}
    return ranks.get(phrase.kind, 3), phrase.modifiers


def _end_of_phrase(parsed: ParsedCaption, start: int) -> int | None:
    """Return the end of the phrase that begins at a token, or None."""
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
    """Return whether "and" or a comma joins modifiers of one noun: "black and white shoes", "short, dark hair"."""
    joins = parsed.words[place] in ("and", "&", ",") and parsed.tags[place - 1] == "J"
    return joins and _noun_follows(parsed, place + 1)


def _with_complement(parsed: ParsedCaption, end: int) -> int:
    """Extend a phrase: "of blue jeans" after "a pair", "with white stripes" or, after hair, "tied in a ponytail"."""
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
    """Return whether a phrase names something absent: "no bag", "without a hat"."""
    absent = parsed.vocabulary.words("absent_words")
    return parsed.word(start) in absent or parsed.word(start - 1) in absent


def _is_place(parsed: ParsedCaption, start: int, phrase: NounPhrase) -> bool:
    """Return whether a part of the body only says where: "over one shoulder", but not "with a bald head"."""
    if phrase.kind != "body" or start == 0 or parsed.tags[start - 1] != "P":
        return False
    return parsed.words[start - 1] != "with" or phrase.modifiers == 0


def _make_phrase(parsed: ParsedCaption, start: int, end: int) -> NounPhrase | None:
    words, tags, known, last = parsed.words, parsed.tags, parsed.vocabulary, end
    for place in range(start, end):  # the head comes after "a pair of" and before every other complement
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
