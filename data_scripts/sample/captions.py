"""Captions of the sample set, as people would describe an image, and the phrase of each box."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_scripts.sample.people import OPEN_GARMENTS, Person, Scene


MIN_WORDS, MAX_WORDS = 12, 40
MIN_FACTS = 6
DROP_NOUN = 0.12
DROP_COLOUR = 0.04
COARSE = 0.12

SUBJECTS = {
    "man": (("man", 10), ("male", 3), ("guy", 2), ("gentleman", 2), ("young man", 2)),
    "woman": (("woman", 10), ("lady", 4), ("female", 3), ("young woman", 2)),
}
PRONOUNS = {"man": "he", "woman": "she"}
# noun: (exact names, [(coarse name, what it may be)])
UPPER = {
    "t-shirt": (("t-shirt", "t-shirt", "tee", "short-sleeved shirt", "short-sleeved top"), ["top"]),
    "shirt": (("shirt", "shirt", "button-up shirt", "collared shirt", "long-sleeved shirt"), ["top"]),
    "sweater": (("sweater", "sweater", "pullover", "jumper"), ["top"]),
    "hoodie": (("hoodie", "hoodie", "hooded sweatshirt", "hooded sweater"), ["sweatshirt", "top"]),
    "jacket": (("jacket", "jacket", "short jacket", "open jacket"), []),
    "coat": (("coat", "long coat", "overcoat", "long open coat"), []),
    "dress": (("dress", "dress", "short-sleeved dress", "knee-length dress"), []),
}
LOWER = {
    "trousers": (("trousers", "pants", "long trousers", "slacks"), ["bottoms"]),
    "jeans": (("jeans", "jeans", "denim jeans", "denim pants"), ["trousers", "pants"]),
    "shorts": (("shorts", "shorts", "short pants"), []),
    "skirt": (("skirt", "short skirt", "knee-length skirt"), []),
    "long skirt": (("long skirt", "ankle-length skirt", "full-length skirt"), ["skirt"]),
}
SHOES = {
    "sneakers": (("sneakers", "sneakers", "trainers", "running shoes", "sports shoes"), ["shoes"]),
    "leather shoes": (("leather shoes", "dress shoes"), ["shoes"]),
    "boots": (("boots", "boots", "ankle boots"), []),
    "sandals": (("sandals", "open sandals"), []),
}
BAGS = {
    "backpack": (("backpack", "backpack", "rucksack"), ["bag"]),
    "handbag": (("handbag", "handbag", "purse"), ["bag"]),
    "shoulder bag": (("shoulder bag", "shoulder bag", "crossbody bag", "messenger bag"), ["bag"]),
    "suitcase": (("suitcase", "suitcase", "rolling suitcase", "trolley case"), ["luggage case"]),
}
HATS = {
    "cap": (("cap", "cap", "baseball cap"), ["hat"]),
    "beanie": (("beanie", "knit hat", "woolen hat"), ["hat"]),
    "sun hat": (("sun hat", "wide-brimmed hat"), ["hat"]),
}
# Garments that a coarse name may stand for.
NAME_MEANS = {
    "top": {"t-shirt", "shirt", "sweater", "hoodie"},
    "sweatshirt": {"hoodie", "sweater"},
    "pants": {"trousers", "jeans"},
    "trousers": {"trousers", "jeans"},
    "bottoms": {"trousers", "jeans"},
    "skirt": {"skirt", "long skirt"},
    "shoes": {"sneakers", "leather shoes"},
    "bag": {"backpack", "handbag", "shoulder bag"},
    "hat": {"cap", "beanie", "sun hat"},
}
COLOUR_NAMES = {
    "gray": ("gray", "grey"),
    "beige": ("beige", "beige", "tan", "cream"),
    "light blue": ("light blue", "pale blue"),
}
HAIR_NAMES = {"blond": ("blond", "blonde"), "gray": ("gray", "grey"), "red": ("red", "ginger")}
PATTERN_WORDS = {
    "checked": ("checked", "plaid", "checkered"),
    "striped": ("striped",),
    "dotted": ("dotted", "polka dot"),
}


@dataclass
class Caption:
    """A caption and its content.

    `phrases` holds the noun phrase of each mentioned part; `facts` maps attributes to the values that the caption allows.
    """

    text: str = ""
    phrases: dict[str, str] = field(default_factory=dict)
    facts: dict[str, set] = field(default_factory=dict)


def _describe(colour: str, name: str) -> str:
    """Insert a colour (with its space, or empty) in English word order: a long green coat, a green knit hat."""
    first, _, rest = name.partition(" ")
    if rest and (first in ("long", "short", "open") or first.endswith("-length")):
        if rest.startswith("open "):
            first, rest = f"{first} open", rest.removeprefix("open ")
        return f"{first} {colour}{rest}"
    return f"{colour}{name}"


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class _Writer:
    """Writer of one caption of one image: chooses what to mention and in which words."""

    def __init__(self, person: Person, scene: Scene, rng: random.Random) -> None:
        self.person, self.scene, self.rng = person, scene, rng
        self.caption = Caption()

    def _name(self, table: Mapping[str, Sequence[str]], kind: str, attribute: str) -> str:
        exact, coarse = table[kind]
        if coarse and self.rng.random() < COARSE:
            name = self.rng.choice(coarse)
        else:
            name = self.rng.choice(exact)
        self.caption.facts[attribute] = NAME_MEANS.get(name, {kind})
        return name

    def _colour(
        self,
        colour: str | None,
        attribute: str,
        names: Mapping[str, Sequence[str]] = COLOUR_NAMES,
        certain: bool = False,
    ) -> str:
        assert colour is not None, f"{attribute} of a part that is not there"
        if not certain and self.rng.random() < DROP_COLOUR:
            return ""
        self.caption.facts[attribute] = {colour}
        return self.rng.choice(names.get(colour, (colour,))) + " "

    def subject(self) -> tuple[str, str]:
        """Return the bare subject and its pronoun."""
        if self.rng.random() < 0.05:
            return self.rng.choice(("person", "pedestrian")), "the person"
        gender = self.person.gender
        self.caption.facts["gender"] = {gender}
        names, weights = zip(*SUBJECTS[gender], strict=True)
        return self.rng.choices(names, weights)[0], PRONOUNS[gender]

    def upper(self) -> str:
        """Describe the upper garment, its pattern if visible, and the garment under an open one."""
        person, rng, facts = self.person, self.rng, self.caption.facts
        pattern = "plain" if person.pattern == "logo" and self.scene.view != "front" else person.pattern
        name = self._name(UPPER, person.upper, "upper")
        if pattern in ("plain", "logo"):
            colour = self._colour(person.upper_colour, "upper_colour")
            plain = ""
            if pattern == "plain" and person.upper not in OPEN_GARMENTS and rng.random() < 0.15:
                plain, facts["pattern"] = rng.choice(("plain ", "solid ")), {"plain", "logo"}
            phrase = _article(_describe(plain + colour, name))
            if pattern == "logo" and rng.random() > DROP_NOUN:
                facts["pattern"] = {"logo"}
                second = self._colour(person.pattern_colour, "pattern_colour")
                mark = rng.choice(("logo", "print", "design"))
                phrase += f" with {_article(second + mark)} on the {rng.choice(('chest', 'front'))}"
        else:
            phrase = self._patterned(pattern, name)
        if person.inner_colour and self.scene.view != "back" and rng.random() > 2 * DROP_NOUN:
            under = self._colour(person.inner_colour, "inner_colour", certain=True)
            inner = rng.choice(("shirt", "t-shirt", "top"))
            self.caption.phrases["upper"] = phrase
            return f"{phrase} {rng.choice(('over', 'on top of'))} {_article(under + inner)}"
        self.caption.phrases["upper"] = phrase
        return phrase

    def _patterned(self, pattern: str, name: str) -> str:
        person, rng, facts = self.person, self.rng, self.caption.facts
        facts["pattern"] = {pattern}
        if rng.random() < 0.1:
            colour = self._colour(person.upper_colour, "upper_colour")
            return _article(_describe(f"{colour}{rng.choice(PATTERN_WORDS[pattern])} ", name))
        first = self._colour(person.upper_colour, "upper_colour", certain=True).strip()
        second = self._colour(person.pattern_colour, "pattern_colour", certain=True).strip()
        if rng.random() < 0.65 and pattern != "dotted":
            return _article(f"{first} and {second} {rng.choice(PATTERN_WORDS[pattern])} {name}")
        marks = {"striped": ("stripes",), "checked": ("checks",), "dotted": ("dots", "polka dots")}
        return _article(f"{first} {name} with {second} {rng.choice(marks[pattern])}")

    def lower(self) -> str | None:
        """Describe the lower garment."""
        person = self.person
        if person.lower is None or self.rng.random() < DROP_NOUN / 3:
            return None
        name = self._name(LOWER, person.lower, "lower")
        phrase = _describe(self._colour(person.lower_colour, "lower_colour"), name)
        if "skirt" in name:
            phrase = _article(phrase)
        elif self.rng.random() < 0.15:
            phrase = f"a pair of {phrase}"
        self.caption.phrases["lower"] = phrase
        return phrase

    def shoes(self) -> str | None:
        """Describe the shoes if they are visible."""
        if not self.scene.shoes_visible or self.rng.random() < DROP_NOUN:
            return None
        name = self._name(SHOES, self.person.shoes, "shoes")
        phrase = _describe(self._colour(self.person.shoe_colour, "shoe_colour"), name)
        if self.rng.random() < 0.12:
            phrase = f"a pair of {phrase}"
        self.caption.phrases["shoes"] = phrase
        return phrase

    def hat(self) -> str | None:
        """Describe the hat."""
        if self.person.hat is None or self.rng.random() < DROP_NOUN:
            return None
        name = self._name(HATS, self.person.hat, "hat")
        phrase = _article(self._colour(self.person.hat_colour, "hat_colour") + name)
        self.caption.phrases["hat"] = phrase
        return phrase

    def hair(self) -> str | None:
        """Describe the visible hair: only what a hat leaves visible, and no ponytail from the front."""
        person, rng, facts = self.person, self.rng, self.caption.facts
        hidden = person.hat and person.hair in ("short", "bald")
        if hidden or rng.random() < DROP_NOUN:
            return None
        if person.hair == "bald":
            facts["hair"] = {"bald"}
            phrase = rng.choice(("a bald head", "a shaved head"))
        elif person.hair == "ponytail":
            colour = self._colour(person.hair_colour, "hair_colour", HAIR_NAMES, certain=True)
            if self.scene.view == "front":
                facts["hair"] = {"ponytail", "short"}
                phrase = f"{colour}hair"
            else:
                facts["hair"] = {"ponytail"}
                phrase = rng.choice(
                    (f"a {colour}ponytail", f"{colour}hair in a ponytail", f"{colour}hair tied in a ponytail")
                )
        else:
            length = "" if rng.random() < 0.08 else f"{person.hair} "
            colour = self._colour(person.hair_colour, "hair_colour", HAIR_NAMES, certain=not length)
            if length:
                facts["hair"] = {person.hair} | ({"ponytail"} if person.hair == "short" else set())
            phrase = f"{length}{colour}hair"
        self.caption.phrases["hair"] = phrase
        return phrase

    def bag(self) -> str | None:
        """Describe the bag, or sometimes its absence."""
        person, rng = self.person, self.rng
        if person.bag is None:
            if rng.random() < 0.18:
                self.caption.facts["bag"] = {None}
                return "no bag"
            return None
        if rng.random() < DROP_NOUN:
            return None
        name = self._name(BAGS, person.bag, "bag")
        phrase = _article(self._colour(person.bag_colour, "bag_colour") + name)
        self.caption.phrases["bag"] = phrase
        return phrase


def _join(items: Sequence[str | None]) -> str:
    *items, last = [item for item in items if item] or [""]
    return f"{', '.join(items)} and {last}" if items else last


def _carrying(person: Person, scene: Scene, phrase: str, rng: random.Random) -> str:
    if phrase == "no bag":
        return rng.choice(("carrying no bag", f"{'walking' if scene.walking else 'standing'} without a bag"))
    verbs = {
        "backpack": ("wearing {} on the back", "carrying {} on the back", "carrying {}"),
        "handbag": ("holding {}", "carrying {} in one hand", "carrying {}"),
        "shoulder bag": ("carrying {}", "wearing {} across the body", "carrying {} over one shoulder"),
        "suitcase": ("pulling {}", "dragging {} along", "pulling {} with one hand"),
    }
    if rng.random() < 0.3:
        return f"carrying {phrase}" if person.bag != "suitcase" else f"pulling {phrase}"
    return rng.choice(verbs[str(person.bag)]).format(phrase)


def _street_sentences(person: Person, scene: Scene, parts: dict, rng: random.Random) -> str:
    """Write a caption in the style of annotators of surveillance images: one to three sentences."""
    noun, pronoun = parts["subject"]
    he, his = pronoun.capitalize(), {"he": "his", "she": "her"}.get(pronoun, "the")
    upper, lower, shoes, hat, hair = (parts[part] for part in ("upper", "lower", "shoes", "hat", "hair"))
    carrying = _carrying(person, scene, parts["bag"], rng) if parts["bag"] else None
    carries = f"{he} is {carrying}." if carrying else None
    a, the = f"A {noun}", rng.choice((f"The {noun}", f"This {noun}"))
    with_hair = f" with {hair}" if hair else ""
    style = rng.randrange(6)
    sentences: list[str | None]
    if style == 0:
        sentences = [f"{a}{with_hair} wearing {_join([hat, upper, lower, shoes])}.", carries]
    elif style == 1:
        head = _join([f"has {hair}" if hair else None, f"wears {hat}" if hat else None])
        with_shoes = f" with {shoes}" if shoes else ""
        sentences = [
            f"{the} is wearing {_join([upper, lower])}{with_shoes}.",
            f"{he} {head}." if head else None,
            carries,
        ]
    elif style == 2:
        dressed = f"dressed in {_join([upper, lower, hat])}."
        sentences = [f"{the} has {hair}.", f"{he} is {dressed}"] if hair else [f"{the} is {dressed}"]
        last = _join([f"has on {shoes}" if shoes else None, f"is {carrying}" if carrying else None])
        sentences.append(f"{he} {last}." if last else None)
    elif style == 3:
        doing = carrying or ("walking" if scene.walking else "standing")
        sentences = [f"Wearing {_join([upper, lower, shoes])}, the {noun}{with_hair} is {doing}."]
        sentences.append(f"{he} also wears {hat}." if hat else None)
    elif style == 4:
        start = f"{a} is {carrying} and wears" if carrying else f"{a} in"
        along = f", along with {_join([hat, shoes])}" if hat or shoes else ""
        sentences = [f"{start} {_join([upper, lower])}{along}.", f"{he} has {hair}." if hair else None]
    else:
        paired = f" paired with {lower}" if lower else ""
        worn = [hat, upper] if rng.random() < 0.5 else [upper, hat]
        last = _join([f"{shoes} on {his} feet" if shoes else None, hair])
        doing = f", {carrying}" if carrying else ""
        sentences = [f"{the} wears {_join(worn)}{paired}.", f"{he} has {last}{doing}." if last else carries]
    return " ".join(filter(None, sentences))


def _prompt_sentence(person: Person, scene: Scene, parts: dict, rng: random.Random) -> str:
    """Write a caption like the prompts of the pretraining set: one lower-case sentence without a full stop."""
    noun, _ = parts["subject"]
    hair, carrying = parts["hair"], _carrying(person, scene, parts["bag"], rng) if parts["bag"] else None
    worn = [parts["hat"], parts["upper"], parts["lower"], parts["shoes"]]
    if rng.random() < 0.3:
        worn = [parts["upper"], parts["lower"], parts["shoes"], parts["hat"]]
    start = rng.choice((f"a {noun}", f"a {noun}", f"a photo of a {noun}", f"a full body picture of a {noun}"))
    with_hair = f" with {hair}" if hair else ""
    if rng.random() < 0.6:
        text = f"{start}{with_hair} wearing {_join(worn)}"
        return text + (f", {carrying}" if carrying else "")
    text = f"{start} in {_join(worn)}" + with_hair
    return text + (f" {carrying}" if carrying else "")


def write_caption(person: Person, scene: Scene, rng: random.Random, style: str = "street") -> Caption:
    """Write a caption of one image.

    Args:
        person: who is in it.
        scene: how the image is taken; hidden parts are not mentioned.
        rng: source of the random choice of words.
        style: `street` for one to three sentences, `prompt` for one lower-case clause.

    Returns:
        A caption of 12 to 40 words with at least six facts.
    """
    for _ in range(1000):
        writer = _Writer(person, scene, rng)
        parts = {
            "subject": writer.subject(),
            "upper": writer.upper(),
            "lower": writer.lower(),
            "shoes": writer.shoes(),
        }
        parts |= {"hat": writer.hat(), "hair": writer.hair(), "bag": writer.bag()}
        caption = writer.caption
        build = _prompt_sentence if style == "prompt" else _street_sentences
        caption.text = build(person, scene, parts, rng)
        words = len(caption.text.split())
        if len(caption.facts) >= MIN_FACTS and MIN_WORDS <= words <= MAX_WORDS:
            caption.phrases = {"person": f"a {parts['subject'][0]}", **caption.phrases}
            return caption
    raise RuntimeError(f"no caption of {MIN_WORDS} to {MAX_WORDS} words found for {person} in {scene}")


def write_two_captions(person: Person, scene: Scene, rng: random.Random) -> list[Caption]:
    """Write two different captions of one image, as by two annotators."""
    first = write_caption(person, scene, rng)
    second = first
    while second.text == first.text:
        second = write_caption(person, scene, rng)
    return [first, second]
