"""Typed phrases of a caption (what is worn, carried and seen of a person), found by the vocabulary's rules."""

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


VOCABULARY_FILE = Path(__file__).parent / "vocabulary" / "attributes.yaml"
_TOKEN = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*|\d+|[^\w\s]|_")


@dataclass(frozen=True)
class Noun:
    """
    A name of the vocabulary.

    Attributes:
        name: as it stands in a caption; `kind` is its first name.
        category: nouns of one category may stand for each other.
        takes: classes of words that may stand before it.
        plural: whether it is a plural, or takes no article.
        only: the gender that it implies, or None.
        keep: whether it is left as it is.
        colours: that are drawn for it; all where empty.
    """

    name: str
    kind: str
    category: str
    takes: tuple[str, ...]
    plural: bool
    only: str | None
    keep: bool
    colours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary file, indexed by the words as they stand in a caption."""

    raw: dict[str, Any]
    nouns: dict[tuple[str, ...], Noun]
    modifiers: dict[tuple[str, ...], tuple[str, ...]]  # words -> classes
    colours: frozenset[tuple[str, ...]]
    order: tuple[str, ...]
    persons: frozenset[str]
    longest: int = 3

    def names(self, category: str) -> list[Noun]:
        """The first names of a category that may be put in place of each other."""
        nouns = [noun for noun in self.nouns.values() if noun.category == category and noun.name == noun.kind]
        return [noun for noun in nouns if not noun.keep]


@functools.cache
def load_vocabulary(path: Path = VOCABULARY_FILE) -> Vocabulary:
    """Reads the vocabulary once."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    nouns, modifiers = {}, {}
    for category, entries in raw["nouns"].items():
        for kind, entry in entries.items():
            for name in (kind, *entry.get("also", ())):
                nouns[tuple(name.split())] = Noun(
                    name,
                    kind,
                    category,
                    tuple(entry["takes"]),
                    entry.get("plural", False),
                    entry.get("only"),
                    entry.get("keep", False),
                    tuple(entry.get("colours", ())),
                )
    for name, words in raw["modifiers"].items():
        for word in words:
            key = tuple(word.split())
            modifiers[key] = (*modifiers.get(key, ()), name)
    shaded = {(shade, *colour.split()) for shade in raw["shades"] for colour in raw["colours"]}
    colours = {tuple(colour.split()) for colour in (*raw["colours"], *raw["hair_colours"])} | shaded
    colours |= {(*colour, word) for colour in colours for word in raw["shaded_by"] if len(colour) < 3}
    persons = raw["persons"]
    known = frozenset({*persons["men"], *persons["women"], *persons["neutral"]})
    return Vocabulary(raw, nouns, modifiers, frozenset(colours), tuple(raw["modifiers"]), known)


@dataclass
class Modifier:
    """One unit before a noun (or a colour said of it): a class and its tokens `start` to `stop`."""

    name: str
    start: int
    stop: int


@dataclass
class Phrase:
    """
    A noun with what stands before it.

    Attributes:
        noun: of the vocabulary; for a person, made up.
        start: first token, the determiner left out.
        noun_start: first token of the noun.
        stop: token behind the noun.
        modifiers: in the order of the text.
        said: a colour said of the noun behind it (`his shirt is white`).
    """

    noun: Noun
    start: int
    noun_start: int
    stop: int
    modifiers: list[Modifier] = field(default_factory=list)
    said: Modifier | None = None

    def having(self, name: str) -> list[Modifier]:
        """Its modifiers of a class."""
        found = [modifier for modifier in self.modifiers if modifier.name == name]
        return found + ([self.said] if self.said is not None and self.said.name == name else [])


class Caption:
    """
    A caption's tokens, with the text between them kept, and its typed phrases.

    Args:
        text: of the caption.
        vocabulary: to find phrases by.
    """

    def __init__(self, text: str, vocabulary: Vocabulary):
        self.text, self.vocabulary = text, vocabulary
        matches = list(_TOKEN.finditer(text))
        self.spans = [match.span() for match in matches]
        self.words = [match.group().lower() for match in matches]
        self.phrases = self._find_phrases()

    def slice(self, start: int, stop: int) -> str:
        """The text of some tokens."""
        return self.text[self.spans[start][0] : self.spans[stop - 1][1]] if start < stop else ""

    def word(self, index: int) -> str:
        """A token in lower case; empty outside the caption."""
        return self.words[index] if 0 <= index < len(self.words) else ""

    def sentence(self, index: int) -> tuple[int, int]:
        """Tokens, from and to, of the sentence that a token belongs to."""
        start, stop = index, index
        while start > 0 and self.words[start - 1] not in ".!?":
            start -= 1
        while stop < len(self.words) and self.words[stop] not in ".!?":
            stop += 1
        return start, min(stop + 1, len(self.words))

    def _find_phrases(self) -> list[Phrase]:
        phrases, index = [], 0
        while index < len(self.words):
            noun, length = self._noun_at(index)
            if noun is None:
                index += 1
                continue
            phrases.append(self._phrase(noun, index, index + length, phrases[-1].stop if phrases else 0))
            index += length
        return phrases

    def _noun_at(self, index: int) -> tuple[Noun | None, int]:
        for length in range(self.vocabulary.longest, 0, -1):
            noun = self.vocabulary.nouns.get(tuple(self.words[index : index + length]))
            if noun is None or index + length > len(self.words):
                continue
            if noun.name == "top" and (self.word(index + 1) in ("of", "half") or self.word(index - 1) in ("on", "at")):
                continue  # on top of
            return noun, length
        word = self.words[index]
        if word in self.vocabulary.persons and not (word in ("male", "female") and self._is_adjective(index)):
            return Noun(word, word, "person", ("age",), word in self.vocabulary.raw["persons"]["many"], None, True), 1
        return None, 0

    def _is_adjective(self, index: int) -> bool:
        return self.word(index + 1) in self.vocabulary.persons

    def _phrase(self, noun: Noun, start: int, stop: int, floor: int) -> Phrase:
        modifiers, first = [], start
        while True:
            joined = first - 1 if self.word(first - 1) in ("and", ",") and modifiers else first
            unit = self._unit_before(joined, floor, noun)
            if unit is None or (joined != first and not (unit.name == modifiers[0].name == "colour")):
                break
            modifiers.insert(0, unit)
            first = unit.start
        return Phrase(noun, first, start, stop, modifiers, self._said_behind(stop))

    def _unit_before(self, stop: int, floor: int, noun: Noun) -> Modifier | None:
        for length in range(min(self.vocabulary.longest, stop - floor), 0, -1):
            words = tuple(self.words[stop - length : stop])
            if "colour" in noun.takes and words in self.vocabulary.colours:
                return Modifier("colour", stop - length, stop)
            classes = [name for name in self.vocabulary.modifiers.get(words, ()) if name in noun.takes]
            if classes:
                return Modifier(classes[0], stop - length, stop)
        return None

    def _said_behind(self, stop: int) -> Modifier | None:
        start = stop + (self.word(stop) in ("that", "which"))
        if self.word(start) not in ("is", "are", "was", "were"):
            return None
        for length in range(self.vocabulary.longest, 0, -1):
            words = tuple(self.words[start + 1 : start + 1 + length])
            if len(words) == length and words in self.vocabulary.colours:
                return Modifier("colour", start + 1, start + 1 + length)
        return None
