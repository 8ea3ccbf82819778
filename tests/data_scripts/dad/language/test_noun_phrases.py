import json

import pytest

from data_scripts.dad.language.noun_phrases import find_noun_phrases, specificity
from data_scripts.dad.language.word_list import load_vocabulary
from data_scripts.make_sample import SampleConfig, make_sample


def texts(caption: str) -> list[str]:
    return [phrase.text for phrase in find_noun_phrases(caption)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "a man wearing a black shirt and red shoes",
            ["a man", "a black shirt", "red shoes"],
        ),  # the row that MRA's README shows
        (
            "A woman wearing a hoodie and jeans walking down a sidewalk.",
            ["A woman", "a hoodie", "jeans", "a sidewalk"],
        ),
        (
            "A man wearing a black shirt, a pair of blue jeans and a pair of white shoes.",
            ["A man", "a black shirt", "a pair of blue jeans", "a pair of white shoes"],
        ),
        (
            "The lady has short, dark hair and black and white sneakers",
            ["The lady", "short, dark hair", "black and white sneakers"],
        ),
        ("a white and red striped short-sleeved shirt", ["a white and red striped short-sleeved shirt"]),
        ("a girl in a red top on top of blue shorts", ["a girl", "a red top", "blue shorts"]),
        ("a blue jumper with yellow polka dots, gray slacks", ["a blue jumper with yellow polka dots", "gray slacks"]),
        ("a blue jumper with gray slacks", ["a blue jumper", "gray slacks"]),
        ("red running shoes of a man running", ["red running shoes", "a man"]),
        ("a dress shirt under a suit", ["a dress shirt", "a suit"]),
        ("black hair tied back in a ponytail and a cap", ["black hair tied back in a ponytail", "a cap"]),
        ("he walks with a bag over his right shoulder", ["a bag"]),
        ("a man with a bald head carrying no bag, without a hat", ["a man", "a bald head"]),
        ("a photo of a boy in front of a building in the background", ["a boy", "a building"]),
        ("there is a man that is walking with a suitcase", ["a man", "a suitcase"]),
        ("a shirt, a shirt and A Shirt", ["a shirt"]),
        (
            "an asian man with black-rimmed glasses, tattered gloves",
            ["an asian man", "black-rimmed glasses", "tattered gloves"],
        ),
        ("a zorblat in plimsolls", ["a zorblat", "plimsolls"]),  # unknown words count as nouns
        ("a café, a man’s hat and a 2-piece suit", ["a café", "a man’s hat", "a 2-piece suit"]),
        ("a shirt with numbers, a tank over jeans", ["a shirt with numbers", "a tank", "jeans"]),
        ("he is tall and very slim", []),
        ("", []),
        ("... , the the", []),
    ],
)
def test_phrases(caption, expected):
    assert texts(caption) == expected


def test_place_and_head():
    caption = "A man in  a black and\nwhite jacket with a red logo"
    man, jacket = find_noun_phrases(caption)
    assert caption[man.start : man.end] == "A man"
    assert jacket.text == "a black and white jacket with a red logo"
    assert caption[jacket.start : jacket.end].split() == jacket.text.split()
    assert (man.head, man.kind, jacket.head, jacket.kind) == ("man", "person", "jacket", "upper")


@pytest.mark.parametrize(
    ("phrase", "kind"),
    [
        ("a young lady", "person"),
        ("long red hair", "hair"),
        ("a baseball cap", "hat"),
        ("a denim jacket", "upper"),
        ("a pair of dress pants", "lower"),
        ("a floral dress", "full"),
        ("ankle boots", "shoes"),
        ("a messenger bag", "bag"),
        ("a red umbrella", "accessory"),
        ("dark clothes", "outfit"),
        ("a parked car", "other"),
        ("a pale face", "body"),
        ("two pedestrians", "person"),
        ("a black suit", "full"),
        ("a sundress", "full"),
        ("a winter coat", "upper"),
    ],
)
def test_kind(phrase, kind):
    (found,) = find_noun_phrases(phrase)
    assert (found.text, found.kind) == (phrase, kind) and kind in (*load_vocabulary().raw["further_nouns"], "other")


def test_specificity_prefers_the_garment_and_then_the_fuller_phrase():
    man, outfit, jacket, black_jacket = (
        find_noun_phrases(text)[0]
        for text in ("a tall young man", "a long black outfit", "a jacket", "a black jacket")
    )
    assert specificity(man) < specificity(outfit) < specificity(jacket) < specificity(black_jacket)


def test_phrases_of_the_sample_set_are_found(tmp_path):
    """The sample set's generator words its phrases by rules of its own; nearly all must be found in its captions."""
    make_sample(tmp_path / "sample", SampleConfig(sda_pairs=300, train_ids=1, val_ids=1, test_ids=1), num_proc=1)
    rows = json.loads((tmp_path / "sample" / "sda" / "sda_0_5000.json").read_text())
    expected = [(row["caption"], phrase) for row in rows for phrase in row["phrases"]]
    found = [phrase in texts(caption) for caption, phrase in expected]
    assert len(expected) > 1000 and sum(found) > 0.98 * len(expected)


def test_every_word_is_listed_once():
    """What the typed phrases know is known to the noun phrases, too."""
    raw = load_vocabulary().raw
    names = {
        name
        for nouns in raw["nouns"].values()
        for noun, entry in nouns.items()
        for name in (noun, *entry.get("also", ()))
    }
    names |= {*raw["persons"]["men"], *raw["persons"]["women"], *raw["persons"]["neutral"]}
    further = [word for words in raw["further_nouns"].values() for word in words]
    assert not names & set(further) and len(further) == len(set(further))
    modifiers = {word for words in raw["modifiers"].values() for word in words} | {
        *raw["colours"],
        *raw["hair_colours"],
    }
    assert not modifiers & set(raw["further_modifiers"])
    assert {name for name in names if " " not in name} <= load_vocabulary().kinds.keys()
