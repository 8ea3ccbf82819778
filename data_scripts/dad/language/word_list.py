"""Word list of what captions of pedestrians mention, from the files in `vocabulary/`."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


_FOLDER = Path(__file__).parent / "vocabulary"
ATTRIBUTES_FILE = _FOLDER / "attributes.yaml"  # what is worn, carried and seen, and how it may be changed
PHRASES_FILE = _FOLDER / "phrases.yaml"  # the other parts of noun phrases


@dataclass(frozen=True)
class Noun:
    """A noun of the word list.

    Attributes:
        name: as written in a caption.
        kind: first name of the thing.
        category: nouns of one category may replace each other.
        takes: classes of words that may precede it.
        plural: whether it is a plural, or takes no article.
        only: the gender that it implies, or None.
        keep: whether it is never replaced.
        colours: colours that are drawn for it; empty for all.
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
    """The word list, indexed by words as written in a caption.

    Attributes:
        raw: contents of the files.
        nouns: words -> noun.
        modifiers: words -> classes.
        colours: words of each colour.
        order: the classes in their order before a noun.
        persons: words for a person.
        kinds: word -> kind, for every known noun of one word.
        single_modifiers: modifiers of one word, colours included.
        lists: name -> words, of the lists in the files and in their `grammar`.
        longest: number of words in the longest name.
    """

    raw: dict[str, Any]
    nouns: dict[tuple[str, ...], Noun]
    modifiers: dict[tuple[str, ...], tuple[str, ...]]
    colours: frozenset[tuple[str, ...]]
    order: tuple[str, ...]
    persons: frozenset[str]
    kinds: dict[str, str]
    single_modifiers: frozenset[str]
    lists: dict[str, frozenset[str]]
    longest: int = 3

    def names(self, category: str) -> list[Noun]:
        """Return the first names of a category that may replace each other."""
        nouns = [noun for noun in self.nouns.values() if noun.category == category and noun.name == noun.kind]
        return [noun for noun in nouns if not noun.keep]

    def words(self, name: str) -> frozenset[str]:
        """Return a list of the files, or of their `grammar`, as a set."""
        return self.lists[name]


@functools.cache
def load_vocabulary() -> Vocabulary:
    """Return the word list, read once."""
    raw: dict[str, Any] = {}
    for path in (ATTRIBUTES_FILE, PHRASES_FILE):
        raw |= yaml.safe_load(path.read_text(encoding="utf-8"))
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
    kinds = {word: kind for kind, words in raw["further_nouns"].items() for word in words}
    kinds |= dict.fromkeys(known, "person")
    for category, entries in raw["nouns"].items():
        for kind, entry in entries.items():
            names = (kind, *entry.get("also", ()))
            kinds |= {name: entry.get("kind", raw["kinds"][category]) for name in names if " " not in name}
    single = {words[0] for words in modifiers if len(words) == 1}
    single |= {*raw["colours"], *raw["hair_colours"], *raw["shaded_by"], *raw["further_modifiers"]}
    lists = {name: frozenset(words) for name, words in (raw | raw["grammar"]).items() if isinstance(words, list)}
    order = tuple(raw["modifiers"])
    return Vocabulary(raw, nouns, modifiers, frozenset(colours), order, known, kinds, frozenset(single), lists)
