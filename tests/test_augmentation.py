"""Text augmentation: each operation against its definition, WordNet read by nltk from a small database."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import nltk
import pytest

from mra_training.augmentation import OPERATIONS, CaptionAugmenter, WordNetSynonyms, split_words


CAPTION = "A man's wearing a red t-shirt, 2 black shoes and a big backpack."
WORDS = ["a", "mans", "wearing", "a", "red", "t", "shirt", "black", "shoes", "and", "a", "big", "backpack"]
ROOT = Path(__file__).parents[1]

# Part of speech -> synsets: number of the lexicographer file and the words that share the meaning.
SYNSETS = {
    "noun": [("06", ["backpack", "back_pack", "knapsack", "packsack"]), ("06", ["shoe"]), ("06", ["trainer", "shoe"])],
    "verb": [("29", ["wear", "bear", "have_on"])],
    "adj": [("00", ["red", "reddish", "ruby-red"]), ("00", ["large", "big"])],
    "adv": [("02", ["quickly", "rapidly"])],
}
LEXNAMES = ["adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact"]
LEXNAMES += [f"noun.other{index}" for index in range(7, 29)] + ["verb.body"]
TYPES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
TYPE_NUMBERS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


def write_wordnet(folder):
    """Writes a database of a few synsets in the layout of WordNet 3.0 (wndb(5WN), lexnames(5WN))."""
    folder.mkdir(parents=True)
    header = "  1 WordNet 3.0 Copyright of a database made for a test.\n"
    for part, synsets in SYNSETS.items():
        data, index = header, {}
        for lexicographer, words in synsets:
            frames = "01 + 08 00 " if part == "verb" else ""
            offset = len(data)
            listed = " ".join(f"{word} 0" for word in words)
            data += f"{offset:08d} {lexicographer} {TYPES[part]} {len(words):02x} {listed} 000 {frames}| a meaning  \n"
            for word in words:
                index.setdefault(word, []).append(offset)
        lines = [
            f"{word} {TYPES[part]} {len(places)} 0 {len(places)} 0 {' '.join(f'{place:08d}' for place in places)}  \n"
            for word, places in sorted(index.items())
        ]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(header + "".join(lines))
        (folder / f"{part}.exc").write_text("worn wear\n" if part == "verb" else "")
    lines = [f"{index:02d}\t{name}\t{TYPE_NUMBERS[name.split('.')[0]]}\n" for index, name in enumerate(LEXNAMES)]
    (folder / "lexnames").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """A folder for `NLTK_DATA` with a small WordNet."""
    root = tmp_path_factory.mktemp("nltk_data")
    write_wordnet(root / "corpora" / "wordnet")
    return root


@pytest.fixture
def installed(wordnet, monkeypatch):
    """nltk finds the small WordNet and no other."""
    monkeypatch.setattr(nltk.data, "path", [str(wordnet)])
    return wordnet


def augment(operation, caption=CAPTION, seeds=200, **options):
    augmenter = CaptionAugmenter(probability=1.0, operations=(operation,), **options)
    return [augmenter(caption, random.Random(seed)).split() for seed in range(seeds)]


def test_split_words():
    assert split_words(CAPTION) == WORDS
    assert split_words("  12 ... 人 ") == []


def test_synonyms(installed):
    synonyms = WordNetSynonyms()
    assert synonyms("backpack") == ["back pack", "knapsack", "packsack"]
    assert synonyms("red") == ["reddish", "ruby red"]
    assert synonyms("shoes") == ["shoe", "trainer"]  # the plural is found through its base form
    assert synonyms("worn") == ["bear", "have on", "wear"]  # and the participle through the list of exceptions
    assert synonyms("quickly") == ["rapidly"] and synonyms("nowhere") == []


def test_synonym_replacement(installed):
    for words in augment("synonym_replacement", "a red backpack"):
        assert words[0] == "a"
        assert (words[1:] == ["red", *words[2:]]) != (words[-1] == "backpack")
    replaced = augment("synonym_replacement", "red red shoes", synonym_strength=1.0)
    assert {tuple(words) for words in replaced} == {
        (*red, *red, shoe) for red in (["reddish"], ["ruby", "red"]) for shoe in ("shoe", "trainer")
    }


def test_random_insertion(installed):
    inserted = {"reddish", "ruby", "red", "back", "pack", "knapsack", "packsack"}
    places = set()
    for words in augment("random_insertion", "a red backpack"):
        kept = iter(words)
        assert all(word in kept for word in ["a", "red", "backpack"])
        assert len(words) in (4, 5) and set(words) <= inserted | {"a", "backpack"}
        places.add(words.index("a"))
    assert {0, 1} <= places
    assert {len(words) for words in augment("random_insertion", "big big big", insertion_strength=1.0)} == {6}


def test_no_synonyms(installed):
    for operation in ("synonym_replacement", "random_insertion"):
        assert augment(operation, "is the a t", seeds=3) == [["is", "the", "a", "t"]] * 3


def test_random_swap():
    for words in augment("random_swap"):
        assert sorted(words) == sorted(WORDS)
        assert sum(a != b for a, b in zip(words, WORDS, strict=True)) in (0, 2)  # equal words may change places
    assert augment("random_swap", "red", seeds=3) == [["red"]] * 3
    assert augment("random_swap", "red shoe", seeds=3) == [["shoe", "red"]] * 3


def test_random_deletion():
    results = augment("random_deletion", seeds=2000)
    for words in results:
        kept = iter(WORDS)
        assert words and all(word in kept for word in words)
    dropped = 1 - sum(map(len, results)) / (2000 * len(WORDS))
    assert abs(dropped - 0.1) < 4 * (0.09 / (2000 * len(WORDS))) ** 0.5
    one = augment("random_deletion", "red shoe", deletion_probability=1.0)
    assert {tuple(words) for words in one} == {("red",), ("shoe",)}


def test_probability_and_operations(installed):
    augmenter = CaptionAugmenter()
    changed = sum(augmenter(CAPTION, random.Random(seed)) != CAPTION for seed in range(1000))
    assert abs(changed - 500) < 4 * 15.8
    always = CaptionAugmenter(probability=1.0, operations=("random_swap", "random_deletion"), deletion_probability=0)
    swapped = sum(always(CAPTION, random.Random(seed)).split() != WORDS for seed in range(1000))
    assert 350 < swapped < 550


def test_same_generator_same_caption(installed):
    augmenter = CaptionAugmenter()
    first, second = ([augmenter(CAPTION, random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == second and len(set(first)) > 10
    assert [pickle.loads(pickle.dumps(augmenter))(CAPTION, random.Random(seed)) for seed in range(50)] == first


@pytest.mark.parametrize("caption", ["...", "人物 3", "", " "])
def test_no_words_come_back_unchanged(caption):
    assert CaptionAugmenter(1.0, ("random_swap", "random_deletion"))(caption, random.Random(0)) == caption


def test_each_process_opens_wordnet(installed):
    """A forked child must not move the parent's place in the shared files."""
    synonyms = WordNetSynonyms()
    reader = synonyms._reader
    child = os.fork()
    if child == 0:
        fine = synonyms("red") == ["reddish", "ruby red"] and synonyms._reader is not reader
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert synonyms("red") == ["reddish", "ruby red"] and synonyms._reader is reader


def test_wordnet_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"`python -m nltk\.downloader wordnet`"):
        CaptionAugmenter()
    CaptionAugmenter(operations=("random_swap", "random_deletion"))


@pytest.mark.parametrize("missing", ["data.verb", "index.noun"])
def test_wordnet_incomplete(tmp_path, monkeypatch, missing):
    folder = write_wordnet(tmp_path / "corpora" / "wordnet")
    (folder / missing).unlink()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=f"incomplete.*{missing}"):
        CaptionAugmenter()


def test_nltk_data_variable(wordnet, tmp_path):
    """`NLTK_DATA` decides, as nltk documents."""
    code = "from mra_training.augmentation import WordNetSynonyms; print(WordNetSynonyms()('big'))"
    environment = {**os.environ, "NLTK_DATA": str(wordnet), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "['large']", result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ("random_swap", "backtranslation")}, "`operations` must be some of .*got backtranslation"),
        ({"operations": ()}, "got none"),
        ({"probability": 1.5, "operations": OPERATIONS[2:]}, "`probability` must"),
        ({"swap_strength": -1, "operations": OPERATIONS[2:]}, "`swap_strength` must"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionAugmenter(**options)
