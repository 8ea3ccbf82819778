"""A parsed caption: its tokens, their parts of speech, and what a person wears, carries and looks like."""

import functools
import re
from dataclasses import dataclass, field

from data_scripts.dad.language.word_list import Noun, Vocabulary, load_vocabulary


_TOKEN = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]|_")


@dataclass
class Modifier:
    """One unit before a noun, or a colour stated after it: its class and its tokens `start` to `stop`."""

    name: str
    start: int
    stop: int


@dataclass
class Phrase:
    """A noun and what describes it.

    Attributes:
        noun: of the vocabulary; for a person, built on the fly.
        start: first token, without the determiner.
        noun_start: first token of the noun.
        stop: token after the noun.
        modifiers: units before the noun, in the order of the text.
        said: a colour stated after the noun ("his shirt is white").
    """

    noun: Noun
    start: int
    noun_start: int
    stop: int
    modifiers: list[Modifier] = field(default_factory=list)
    said: Modifier | None = None

    def having(self, name: str) -> list[Modifier]:
        """Return the modifiers of a class."""
        found = [modifier for modifier in self.modifiers if modifier.name == name]
        return found + ([self.said] if self.said is not None and self.said.name == name else [])


class ParsedCaption:
    """Tokens of a caption, the text between them, and its phrases.

    Args:
        text: the caption.
        vocabulary: the word list; None for the project's.
    """

    def __init__(self, text: str, vocabulary: Vocabulary | None = None) -> None:
        self.text, self.vocabulary = text, vocabulary or load_vocabulary()
        matches = list(_TOKEN.finditer(text))
        self.spans = [match.span() for match in matches]
        self.words = [match.group().lower().replace("’", "'") for match in matches]

    def slice(self, start: int, stop: int) -> str:
        """Return the text of tokens `start` to `stop`."""
        return self.text[self.spans[start][0] : self.spans[stop - 1][1]] if start < stop else ""

    def word(self, index: int) -> str:
        """Return a token in lower case; empty outside the caption."""
        return self.words[index] if 0 <= index < len(self.words) else ""

    def sentence(self, index: int) -> tuple[int, int]:
        """Return the first token of the sentence around a token, and the token after its last."""
        start, stop = index, index
        while start > 0 and self.words[start - 1] not in ".!?":
            start -= 1
        while stop < len(self.words) and self.words[stop] not in ".!?":
            stop += 1
        return start, min(stop + 1, len(self.words))

    @functools.cached_property
    def phrases(self) -> list[Phrase]:
        """Return the nouns of the word list with what describes each."""
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

    @functools.cached_property
    def tags(self) -> list[str]:
        """Return the part of speech of each token.

        D is a determiner, J a modifier, N a noun, C "and", P a preposition and X what ends a phrase.
        """
        tags: list[str] = []
        for index, word in enumerate(self.words):
            tags.append(self._tag_word(word, tags[-1] if tags else "X", self.word(index + 1)))
        for start in range(len(tags) - 2):
            if " ".join(self.words[start : start + 3]) in self.vocabulary.words("phrasal"):
                tags[start : start + 3] = "PPP"
        return tags

    def _tag_word(self, word: str, before: str, following: str) -> str:
        known = self.vocabulary
        if not word[0].isalnum():
            return "C" if word == "&" else "X"
        if word == "and":
            return "C"
        if word in known.words("determiners") and not (word == "that" and before == "N"):
            return "D"
        if word in known.words("prepositions"):
            return "P"
        if word in known.words("conjunctions") or word in known.words("pronouns"):
            return "X"
        if word in known.words("plain_nouns"):
            return "N"
        inside, is_modifier = before in "DJC", word in known.single_modifiers
        is_noun = word in known.kinds or word in known.words("placeless")
        if word in known.words("verbs") and not (inside and (is_modifier or word in known.kinds)):
            return "X"
        if word in known.words("adverbs"):
            return "X"
        if is_modifier or word.endswith(tuple(known.raw["modifier_endings"])) or word.isdecimal():
            return "N" if is_noun and not self._continues(following) else "J"
        if is_noun or word in known.words("patterned_by") or word in known.words("made_of"):
            return "N"
        if word.endswith("ly"):
            return "J" if inside or self._continues(following) else "X"
        if word.endswith("ing"):
            return "J" if inside and self._continues(following) else "X"
        if word.endswith("ed") and len(word) > 4:
            return "J" if self._continues(following) else "X"
        return "N"

    def _continues(self, following: str) -> bool:
        """Return whether the following word can belong to the same phrase."""
        if not following or not following[0].isalnum():
            return False
        if following in self.vocabulary.single_modifiers:
            return True
        ending = ("determiners", "prepositions", "conjunctions", "pronouns", "verbs", "adverbs")
        return not any(following in self.vocabulary.words(name) for name in ending)
