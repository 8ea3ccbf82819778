"""Prompts: seeded, logged, English, and plausible."""

import random
import re
from collections import Counter

import nltk
import pytest

from data_scripts.dad import augment_captions
from data_scripts.dad.augment_captions import PromptMaker, make_rows
from data_scripts.dad.language.attribute_edits import AttributeEditor, gender_of
from data_scripts.dad.language.caption_text import fix_articles
from data_scripts.dad.language.parsed_caption import ParsedCaption
from data_scripts.dad.language.word_list import load_vocabulary
from data_scripts.dad.sections import AugmentSection
from data_scripts.dad.stage_folders import WorkFolder, read_stage_rows
from tests.helpers.dad import make_config, tree, write_sources


VOCABULARY = load_vocabulary()
CAPTIONS = [
    "The man is wearing a black jacket over a white collared shirt with a striped tie. He is carrying a black briefcase "
    "in his right hand and his hair is short and black.",
    "A woman with long black hair in a ponytail is wearing a red dress, white high heels and she carries a brown purse.",
    "The girl is wearing light blue jeans, a orange hoodie and grey and white sneakers. She looks at her phone.",
    "This pedestrian wears a pair of khaki shorts, a green t-shirt with white lettering and flip flops. He holds an umbrella.",
    "An Asian male with short dark hair, a navy blue polo shirt, dark pants and black shoes is walking.",
    "a young lady with blonde hair, wearing a yellow tank top, a short denim skirt, and black boots",
    "The bald man with a beard is dressed in a plaid long sleeved shirt and tan slacks, with a large back pack.",
    "Her shirt is white and her shorts are blue; she wears sandals on her feet and no bag.",
]


def prompts(caption, number=0, seed=0, **changes):
    return PromptMaker(AugmentSection(**changes), seed)(caption, number)


def found(caption):
    return [
        (phrase.noun.name, [caption.slice(unit.start, unit.stop) for unit in phrase.modifiers])
        for phrase in caption.phrases
    ]


def test_phrases_are_found_with_what_belongs_to_them():
    caption = ParsedCaption(CAPTIONS[2], VOCABULARY)
    assert found(caption) == [
        ("girl", []),
        ("jeans", ["light blue"]),
        ("hoodie", ["orange"]),
        ("sneakers", ["grey", "white"]),
    ]
    said = ParsedCaption(
        "His shirt is dark blue and the dress shirt on top of it has short sleeves", VOCABULARY
    ).phrases
    assert [phrase.noun.name for phrase in said] == ["shirt", "dress shirt"] and said[0].said is not None


@pytest.mark.parametrize("number, caption", list(enumerate(CAPTIONS)))
def test_a_caption_gives_twenty_different_prompts_itself_first(number, caption):
    made = prompts(caption, number)
    texts = [text for text, _ in made]
    assert len(set(texts)) == 20 and made[0] == (caption, [])
    for text, edits in made[1:]:
        assert edits and all(edit.keys() == {"operation", "attribute", "before", "after"} for edit in edits)
        assert {edit["operation"] for edit in edits} <= {"replace", "insert", "delete", "swap"}
        assert "  " not in text and not re.search(r" [,.;]|\ba [aeio]\w|\ban [bcdfgjklmnpqrstvwxyz]", text), text
        assert text[0].isupper() == caption[0].isupper()


@pytest.mark.parametrize("number, caption", list(enumerate(CAPTIONS)))
def test_no_word_changes_without_an_edit(number, caption):
    """The caption, less what the log says went out, plus what it says came in, has the words of the prompt."""
    persons = VOCABULARY.raw["persons"]["counterparts"].items()
    follow = {"a", "an", "he", "she", "his", "her", "him", "hers", "is", *(word for pair in persons for word in pair)}

    def count(*texts):
        words = (word for text in texts for word in re.findall(r"[\w-]+", text.lower()))
        return Counter(word for word in words if word not in follow)

    for seed in range(10):
        for text, edits in prompts(caption, number, seed)[1:]:
            came, went = (count(*(edit[side] for edit in edits)) for side in ("after", "before"))
            added = count("the person") if "The person" in text and "person" not in caption else Counter()
            assert count(text) + went == count(caption) + came + added, (caption, text, edits)
            genders = [gender_of(ParsedCaption(each, VOCABULARY)) for each in (caption, text)]
            assert (
                genders[0] == genders[1]
                or any(edit["attribute"].startswith("gender") for edit in edits)
                or None in genders
            )


def test_nothing_implausible_is_put_in():
    """Cases that were once wrong in prompts read one by one."""
    texts = every_prompt("The old lady with white hair wears a blouse with black polka dots and a blue jean jacket.")
    assert not any("young" in text and "white hair" in text for text in texts)
    patterns = "|".join(VOCABULARY.raw["drawn"]["pattern"])
    assert not any(re.search(f"({patterns}) blouse", text) for text in texts)
    jeans = VOCABULARY.raw["nouns"]["lower"]["jeans"]["colours"]
    colours = {match for text in texts for match in re.findall(r"and an? ([\w ]*?) ?jean jacket", text)}
    assert len(colours) > 3 and colours <= {
        "",
        *jeans,
        *(f"{length} {colour}" for length in ("long", "short") for colour in jeans),
    }
    texts = every_prompt("The man faces the wall. He wears black trousers and a grey coat.")
    assert all(re.search("trousers|pants|jeans|shorts|coat", text) for text in texts)
    assert not any("short black trousers" in text or "short trousers" in text for text in texts)


def test_prompts_follow_from_seed_and_number_alone():
    maker = PromptMaker(AugmentSection(), 1)
    forwards = [maker(caption, number) for number, caption in enumerate(CAPTIONS)]
    backwards = [maker(CAPTIONS[number], number) for number in reversed(range(len(CAPTIONS)))]
    assert forwards == backwards[::-1]
    assert forwards[0] != PromptMaker(AugmentSection(), 2)(CAPTIONS[0], 0) != maker(CAPTIONS[0], 1)


def every_prompt(caption, count=200):
    return [text for seed in range(count // 19) for text, _ in prompts(caption, seed=seed)[1:]]


def test_pronouns_follow_the_gender():
    texts = every_prompt("The man looks at his phone. He wears a black coat, and a bag is beside him.")
    women = [text for text in texts if "woman" in text]
    assert women and not any(re.search(r"\b(man|he|his|him)\b", text, re.IGNORECASE) for text in women)
    assert any("looks at her phone" in text and "beside her" in text for text in women if "beside" in text)
    texts = every_prompt("A woman in a red coat looks at her phone. A dog is with her.")
    men = [text for text in texts if re.search(r"\b[Mm]an\b", text)]
    assert any("his phone" in text and "with him" in text for text in men)
    assert not any(re.search(r"\bs?her?\b", text) and "she" in text.lower() for text in men)


@pytest.mark.parametrize("number", [1, 5, 6])
def test_who_wears_a_dress_or_a_beard_keeps_the_gender(number):
    gender = gender_of(ParsedCaption(CAPTIONS[number], VOCABULARY))
    assert {gender_of(ParsedCaption(text, VOCABULARY)) for text in every_prompt(CAPTIONS[number])} == {gender}


def test_drawn_hair_has_the_colours_of_hair():
    texts = every_prompt("A young woman with black hair wearing a green coat and blue jeans.")
    colours = {match for text in texts for match in re.findall(r"with (?:long |short )?(.*?) ?hair", text)}
    assert len(colours) > 3 and colours <= {"black", "brown", "dark brown", "light brown", "blond", "dark", ""}
    jeans = {match for text in texts for match in re.findall(r"and ([\w ]*?) ?jeans", text)}
    assert jeans <= {"", *VOCABULARY.raw["nouns"]["lower"]["jeans"]["colours"]}


def test_jeans_of_all_their_colours_are_no_end():
    texts = every_prompt("A man in blue, black, grey and white jeans.")
    assert any("jeans" in text and "red" in text for text in texts)


def test_unknown_words_beside_a_noun_keep_it():
    texts = every_prompt("A man in a football shirt and a black shirt collar.")
    assert all("football shirt" in text for text in texts) and all("shirt collar" in text for text in texts)


def test_nothing_is_put_in_where_it_is_said_to_be_missing():
    assert not any(re.search("backpack|carrying|cap|hat", text) for text in every_prompt(CAPTIONS[7]))


def test_a_print_keeps_its_contrast():
    texts = every_prompt("A man in a green t-shirt with white lettering and a red cap.")
    assert not any("white t-shirt with white" in text for text in texts)


def test_strength_is_the_share_of_changed_phrases():
    caption = CAPTIONS[4]  # person, hair, shirt, pants and shoes
    for strength, most in ((0.2, 1), (0.5, 2), (1.0, 5)):
        counts = [len(edits) for _, edits in prompts(caption, strength=strength)[1:]]
        assert max(counts) == most, strength


@pytest.mark.parametrize(
    "text, right",
    [
        ("a orange hat and an red one", "an orange hat and a red one"),
        ("An umbrella, A umbrella", "An umbrella, An umbrella"),
        ("an uniform, a hour, a one-piece", "a uniform, an hour, a one-piece"),
    ],
)
def test_articles(text, right):
    assert fix_articles(text) == right


def test_a_caption_without_known_phrases_stays_alone():
    assert prompts("nothing to see here") == [("nothing to see here", [])]
    assert AttributeEditor(VOCABULARY).edit("", 0.5, random.Random(0)) == ("", [])


def test_eda_without_wordnet_says_what_to_do(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", ["/nowhere"])
    with pytest.raises(
        ValueError, match=r"nltk\.downloader wordnet.*`augment\.eda_operations`.*`--augment\.mode attributes`"
    ):
        PromptMaker(AugmentSection(mode="eda"), 0)


def test_eda_changes_words_at_the_given_strength():
    made = prompts(CAPTIONS[0], mode="eda", eda_operations=["random_swap", "random_deletion"], prompts_per_caption=6)
    words = sorted(re.findall("[a-z]+", CAPTIONS[0].lower()))
    assert len(made) == 6 and made[0][0] == CAPTIONS[0]
    for text, edits in made[1:]:
        assert edits[0]["operation"] == "eda" and set(text.split()) <= set(words)


def test_rows_name_their_source():
    maker = PromptMaker(AugmentSection(prompts_per_caption=3), 0)
    rows = list(make_rows([CAPTIONS[:2], CAPTIONS[2:3]], [7, 9], maker, None))
    assert [row["prompt_id"] for row in rows] == list(range(9))
    assert [row["source_row"] for row in rows] == [0] * 6 + [1] * 3
    assert {row["source_image_id"] for row in rows[:6]} == {7} and rows[6]["prompt"] == CAPTIONS[2]
    assert len(list(make_rows([CAPTIONS[:2]], [7], maker, 1))) == 3


def test_stage_is_whole_and_repeatable(tmp_path):
    write_sources(tmp_path)
    for work in ("a", "b"):
        augment_captions.run(make_config(tmp_path, work))
    folders = [WorkFolder(tmp_path / work) for work in ("a", "b")]
    assert tree(folders[0].folder("augment")) == tree(folders[1].folder("augment"))
    assert len(read_stage_rows(folders[0].prompts)) == 12
