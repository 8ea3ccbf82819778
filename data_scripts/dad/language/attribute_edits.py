"""Edits of what a caption says about a person, one attribute at a time, that keep it an English sentence."""

import random
from collections.abc import Callable, Sequence

from data_scripts.dad.language.caption_text import (
    cut_words,
    fix_articles,
    insert_before,
    match_case,
    replace_tokens,
    replace_words,
)
from data_scripts.dad.language.parsed_caption import ParsedCaption, Phrase
from data_scripts.dad.language.word_list import Vocabulary


Edit = dict[str, str]
Change = tuple[str, Edit]  # the changed text, and what was changed

_SAYING = ("is", "are", "was", "were", "that", "which")
_ENDS = (",", ".", ";", ":", "!", "?", "", ")")


def gender_of(caption: ParsedCaption) -> str | None:
    """Return `man` or `woman` where the caption names one of the two and not the other, else None."""
    persons = caption.vocabulary.raw["persons"]
    men = any(word in (*persons["men"], "he", "his", "him") for word in caption.words)
    women = any(word in (*persons["women"], "she", "her") for word in caption.words)
    return None if men == women else "man" if men else "woman"


class AttributeEditor:
    """Editor of captions that draws one change at a time.

    Args:
        vocabulary: from [`~data_scripts.dad.language.word_list.load_vocabulary`].
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.raw = vocabulary.raw

    def edit(self, text: str, strength: float, rng: random.Random) -> tuple[str, list[Edit]]:
        """Change attributes of a caption.

        Args:
            text: the caption.
            strength: share of its phrases to change, at least one phrase.
            rng: source of every choice.

        Returns:
            The changed text and the changes in order, each with `operation`, `attribute`, `before` and `after`. A text
            without a phrase that the vocabulary knows is returned unchanged.
        """
        phrases = len(ParsedCaption(text, self.vocabulary).phrases)
        wanted = max(1, round(strength * phrases)) if phrases else 0
        edits: list[Edit] = []
        touched: set[int] = set()
        for _ in range(4 * wanted):
            if len(edits) == wanted:
                break
            change = self._draw_change(ParsedCaption(text, self.vocabulary), touched, rng)
            if change is not None:
                text, edit = change
                text = fix_articles(text)
                edits.append(edit)
        return text, edits

    def _draw_change(self, caption: ParsedCaption, touched: set[int], rng: random.Random) -> Change | None:
        """Apply one operation to a phrase that is not changed yet; return None where it does not apply."""
        free = [index for index in range(len(caption.phrases)) if index not in touched]
        operation = rng.choices(("replace", "insert", "delete", "swap"), (6, 2, 1, 1))[0]
        if operation == "swap":
            return self._swap_colours(caption, free, touched, rng)
        if operation == "insert" and rng.random() < 0.25:
            return self._add_thing(caption, touched, rng)
        if operation == "delete" and rng.random() < 0.25:
            return self._drop_sentence(caption, touched, rng)
        if not free:
            return None
        index = rng.choice(free)
        phrase = caption.phrases[index]
        changes: list[Callable[[ParsedCaption, Phrase, random.Random], Change | None]] = {
            "replace": [self._recolour, self._recolour, self._rename, self._remodify],
            "insert": [self._insert_colour, self._insert_modifier],
            "delete": [self._delete_modifier],
        }[operation]
        if phrase.noun.category == "person" and operation == "replace":
            changes = [self._change_gender, self._remodify]
        change = rng.choice(changes)(caption, phrase, rng)
        if change is not None:
            touched.add(index)
        return change

    # ---------------------------------------------------------------- replace

    def _recolour(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random) -> Change | None:
        units = phrase.having("colour")
        if not units:
            return None
        unit = rng.choice(units)
        before = caption.slice(unit.start, unit.stop)
        known = {caption.slice(other.start, other.stop).lower() for other in units}
        known |= set(caption.words[phrase.stop : phrase.stop + 4])  # no white print on white
        after = self._draw_colour(caption, phrase, rng, known)
        return replace_words(caption, unit.start, unit.stop, after), _log("replace", "colour", phrase, before, after)

    def _draw_colour(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random, known: set[str]) -> str:
        hair = phrase.noun.category == "hair"
        weights = self.raw["hair_colours" if hair else "colours"]
        same = {"gray": "grey", "blonde": "blond", "navy": "navy blue"}
        known = known | {same.get(colour, colour) for colour in known}
        last = {colour.split()[-1] for colour in known}
        choices = {colour: weight for colour, weight in weights.items() if weight and colour.split()[-1] not in last}
        if hair and set(self.raw["not_grey"]) & set(caption.words):
            choices.pop("grey", None)
        allowed = self._colours_of(phrase)
        if allowed:  # if the caption names all of them, any other colour will do
            choices = {colour: weight for colour, weight in choices.items() if colour in allowed} or choices
        return rng.choices(list(choices), list(choices.values()))[0]

    def _colours_of(self, phrase: Phrase) -> Sequence[str]:
        """Return the colours that a garment of this kind or cloth comes in; empty for all."""
        return self.raw["nouns"]["lower"]["jeans"]["colours"] if phrase.having("denim") else phrase.noun.colours

    def _rename(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random) -> Change | None:
        noun = phrase.noun
        if noun.keep or not self._stands_free(caption, phrase) or self._is_fixed(caption, phrase):
            return None
        used = {other.noun.kind for other in caption.phrases}
        others = [other for other in self.vocabulary.names(noun.category) if other.kind not in used]
        others = [other for other in others if other.plural == noun.plural and other.only == noun.only]
        colours = {caption.slice(unit.start, unit.stop).lower() for unit in phrase.having("colour")}
        others = [other for other in others if not other.colours or colours <= set(other.colours)]
        if not others:
            return None
        other = rng.choice(others)
        kept = [unit for unit in phrase.modifiers if unit.name in other.takes]
        colours = [unit for unit in kept if unit.name == "colour"]
        words = []
        for unit in kept:
            if unit.name == "colour":
                if unit is colours[0]:  # "black and white", with the word that joins them
                    words.append(caption.slice(unit.start, colours[-1].stop))
            else:
                words.append(caption.slice(unit.start, unit.stop))
        after = " ".join([*words, other.name])
        before = caption.slice(phrase.start, phrase.stop)
        text = replace_words(caption, phrase.start, phrase.stop, after)
        return text, _log("replace", "noun", phrase, before, after)

    def _remodify(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random) -> Change | None:
        units = [unit for unit in phrase.modifiers if unit.name in self.raw["drawn"]]
        if not units or self._is_fixed(caption, phrase):
            return None
        unit = rng.choice(units)
        before = caption.slice(unit.start, unit.stop)
        choices = [word for word in self.raw["drawn"][unit.name] if word != before.lower()]
        if unit.name == "age":
            if phrase.noun.kind not in self.raw["persons"]["adults"]:
                return None
            choices = [word for word in choices if word != "young" or not self._has_grey_hair(caption)]
        if unit.name == "length" and before.lower() not in ("long", "short"):
            return None
        after = rng.choice(choices)
        return replace_words(caption, unit.start, unit.stop, after), _log("replace", unit.name, phrase, before, after)

    def _change_gender(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random) -> Change | None:
        persons, gender = self.raw["persons"], gender_of(caption)
        forbidden = {"man": self.raw["only_man"], "woman": self.raw["only_woman"]}
        several = any(word in (*persons["many"], *self.raw["more_than_one"]) for word in caption.words)
        if gender is None or several or any(word in forbidden[gender] for word in caption.words):
            return None
        if any(other.noun.only == gender for other in caption.phrases):
            return None
        names = {**persons["counterparts"], "guy": "woman", "gent": "lady"}
        if gender == "woman":
            names = {there: here for here, there in persons["counterparts"].items()}
        words = []
        for index, word in enumerate(caption.words):
            new = names.get(word) or self._other_pronoun(caption, index, gender)
            words.append(match_case(new, caption.slice(index, index + 1)) if new else None)
        text = replace_tokens(caption, words)
        before, after = caption.slice(phrase.noun_start, phrase.stop), names.get(phrase.noun.name)
        return (text, _log("replace", "gender", phrase, before, after)) if after else None

    def _other_pronoun(self, caption: ParsedCaption, index: int, gender: str) -> str | None:
        word, pronouns = caption.words[index], self.raw["pronouns"]
        if gender == "man":
            return "her" if word == "his" else pronouns.get(word)
        if word == "her":  # possessive before a noun phrase, otherwise the object
            following = caption.word(index + 1)
            return "him" if following in _ENDS or following in self.raw["after"] else "his"
        return {"hers": "his", **{there: here for here, there in pronouns.items()}}.get(word)

    # ---------------------------------------------------------------- insert

    def _insert_colour(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random) -> Change | None:
        noun = phrase.noun
        if "colour" not in noun.takes or phrase.having("colour") or not self._takes_words(caption, phrase):
            return None
        if noun.category == "hair" and self._is_fixed(caption, phrase):
            return None  # black hair in a ponytail
        return self._insert(caption, phrase, "colour", self._draw_colour(caption, phrase, rng, set()))

    def _insert_modifier(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random) -> Change | None:
        open_classes = [name for name in self.raw["drawn"] if name in phrase.noun.takes and not phrase.having(name)]
        if phrase.noun.category not in self.raw["put_length_before"]:
            open_classes = [name for name in open_classes if name != "length"]  # "short trousers" are shorts
        if phrase.noun.category == "person" and phrase.noun.kind not in self.raw["persons"]["adults"]:
            return None
        if not open_classes or not self._takes_words(caption, phrase) or self._is_fixed(caption, phrase):
            return None
        name = rng.choice(open_classes)
        if name == "pattern" and self._has_pattern(caption, phrase):
            return None
        word = rng.choice(self.raw["drawn"][name])
        if word == "young" and self._has_grey_hair(caption):
            return None
        return self._insert(caption, phrase, name, word)

    def _has_pattern(self, caption: ParsedCaption, phrase: Phrase) -> bool:
        """Return whether its cloth takes no pattern, or a pattern follows the noun: "a blouse with polka dots"."""
        behind = caption.words[phrase.stop : phrase.stop + 5]
        cloth = any(unit.name in ("denim", "leather") for unit in phrase.modifiers)
        return cloth or any(word in self.raw["patterned_by"] for word in behind)

    def _has_grey_hair(self, caption: ParsedCaption) -> bool:
        hair = [phrase for phrase in caption.phrases if phrase.noun.category == "hair"]
        words = [caption.words[unit.start : unit.stop] for phrase in hair for unit in phrase.having("colour")]
        return any(word in ("grey", "gray", "white", "silver") for unit in words for word in unit)

    def _insert(self, caption: ParsedCaption, phrase: Phrase, name: str, word: str) -> Change:
        """Put a word before the noun, in the place that English gives its class."""
        order = self.vocabulary.order
        later = [unit.start for unit in phrase.modifiers if order.index(unit.name) > order.index(name)]
        place = min(later, default=phrase.noun_start)
        text = insert_before(caption, place, word)
        return text, _log("insert", name, phrase, "", word)

    def _add_thing(self, caption: ParsedCaption, touched: set[int], rng: random.Random) -> Change | None:
        present = {phrase.noun.category for phrase in caption.phrases}
        open_categories = [category for category in self.raw["additions"] if category not in present]
        if any(phrase in caption.text.lower() for phrase in self.raw["absent"]) or not open_categories:
            return None
        category = rng.choice(open_categories)
        fixed = set(self.raw["fixed_by"].get(category, ())) & set(caption.words)
        needed = self.raw["only_with"].get(category)
        if fixed or (needed and needed not in present) or ("luggage" in present and category == "bag"):
            return None
        weights = self.raw["colours"]
        colour = rng.choices(list(weights), list(weights.values()))[0]
        what = rng.choice(self.raw["additions"][category]).format(colour=colour)
        text = caption.text.rstrip()
        if text.endswith((".", "!")):
            pronoun = {"man": "He", "woman": "She", None: "The person"}[gender_of(caption)]
            added = f" {pronoun} is {what}."
        else:
            added = f", {what}"
        touched.update((len(caption.phrases), len(caption.phrases) + 1))  # the added phrases are not changed again
        return text + added, {"operation": "insert", "attribute": category, "before": "", "after": what}

    # ---------------------------------------------------------------- delete and swap

    def _delete_modifier(self, caption: ParsedCaption, phrase: Phrase, rng: random.Random) -> Change | None:
        units = [
            unit for unit in phrase.modifiers if unit.name not in ("denim", "length") or len(phrase.modifiers) > 1
        ]
        if not units or (phrase.noun.category == "hair" and len(phrase.modifiers) == 1):
            return None  # "with hair" says nothing
        name = rng.choice(units).name
        chosen = phrase.having(name) if name == "colour" else [unit for unit in units if unit.name == name][:1]
        chosen = [unit for unit in chosen if unit is not phrase.said]
        start, stop = chosen[0].start, chosen[-1].stop
        before = caption.slice(start, stop)
        return cut_words(caption, start, stop), _log("delete", name, phrase, before, "")

    def _drop_sentence(self, caption: ParsedCaption, touched: set[int], rng: random.Random) -> Change | None:
        starts = [0] + [index + 1 for index, word in enumerate(caption.words) if word in ".!?"]
        sentences = [caption.sentence(start) for start in starts if start < len(caption.words)]
        if len(sentences) < 2:
            return None
        start, stop = rng.choice(sentences[1:])  # the first says who it is
        inside = [n for n, phrase in enumerate(caption.phrases) if start <= phrase.start < stop]
        worn = [n for n, phrase in enumerate(caption.phrases) if phrase.noun.category != "person"]
        if set(worn) <= set(inside):
            return None  # "The man faces away." describes nothing
        if touched & set(range(min(inside, default=len(caption.phrases)), len(caption.phrases))):
            return None  # the numbers of changed phrases would shift
        before = caption.slice(start, stop)
        text = (caption.text[: caption.spans[start][0]].rstrip() + caption.text[caption.spans[stop - 1][1] :]).strip()
        return text, {"operation": "delete", "attribute": "sentence", "before": before, "after": ""}

    def _swap_colours(
        self, caption: ParsedCaption, free: list[int], touched: set[int], rng: random.Random
    ) -> Change | None:
        found = [index for index in free if len(caption.phrases[index].having("colour")) == 1]
        found = [index for index in found if caption.phrases[index].noun.category != "hair"]
        if len(found) < 2:
            return None
        first, second = sorted(rng.sample(found, 2))
        units = [caption.phrases[index].having("colour")[0] for index in (first, second)]
        colours = [caption.slice(unit.start, unit.stop) for unit in units]
        if colours[0].lower() == colours[1].lower():
            return None
        words: list[str | None] = [None] * len(caption.words)
        for unit, colour in zip(units, reversed(colours), strict=True):
            words[unit.start] = colour
            words[unit.start + 1 : unit.stop] = [""] * (unit.stop - unit.start - 1)
        allowed = [self._colours_of(caption.phrases[index]) for index in (first, second)]
        if any(there and colour.lower() not in there for there, colour in zip(allowed, colours[::-1], strict=True)):
            return None
        touched.update((first, second))
        names = " and ".join(caption.phrases[index].noun.name for index in (first, second))
        before, after = ", ".join(colours), ", ".join(colours[::-1])
        edit = {"operation": "swap", "attribute": f"colour of {names}", "before": before, "after": after}
        return replace_tokens(caption, words), edit

    # ---------------------------------------------------------------- what may be changed

    def _stands_free(self, caption: ParsedCaption, phrase: Phrase) -> bool:
        """Return whether no unknown word belongs to the phrase ("football shirt", "shirt collar")."""
        before, after = caption.word(phrase.start - 1), caption.word(phrase.stop)
        return before in (*self.raw["before"], *_ENDS) and after in (*self.raw["after"], *_ENDS)

    def _takes_words(self, caption: ParsedCaption, phrase: Phrase) -> bool:
        """Return whether a word may be put before the noun: not where the caption goes on to describe it."""
        return self._stands_free(caption, phrase) and caption.word(phrase.stop) not in _SAYING

    def _is_fixed(self, caption: ParsedCaption, phrase: Phrase) -> bool:
        """Return whether the sentence says something that fits only this kind of thing."""
        start, stop = caption.sentence(phrase.noun_start)
        words = set(caption.words[start : phrase.noun_start] + caption.words[phrase.stop : stop])
        return bool(words & set(self.raw["fixed_by"].get(phrase.noun.category, ())))


def _log(operation: str, attribute: str, phrase: Phrase, before: str, after: str) -> Edit:
    return {
        "operation": operation,
        "attribute": f"{attribute} of {phrase.noun.name}",
        "before": before,
        "after": after,
    }
