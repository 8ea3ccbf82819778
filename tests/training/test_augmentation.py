"""Text augmentation: each operation against its definition, WordNet read by nltk from a small database."""

import collections
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nltk
import pytest

from mra.training.augmentation import (
    AUGMENTERS,
    OPERATIONS,
    STOP_WORDS,
    CaptionAugmenter,
    PublishedCaptionAugmenter,
    WordNetSynonyms,
    create_augmenter,
    split_words,
)


CAPTION = "A man's wearing a red t-shirt, 2 black shoes and a big backpack."
WORDS = ["a", "mans", "wearing", "a", "red", "t", "shirt", "black", "shoes", "and", "a", "big", "backpack"]
ROOT = Path(__file__).parents[2]

# Part of speech -> synsets: number of the lexicographer file and the words that share the meaning.
SYNSETS = {
    "noun": [
        ("06", ["backpack", "back_pack", "knapsack", "packsack"]),
        ("06", ["shoe"]),
        ("06", ["trainer", "shoe"]),
        ("06", ["t", "tee"]),
    ],
    "verb": [("29", ["wear", "bear", "have_on"])],
    "adj": [("00", ["red", "reddish", "ruby-red"]), ("00", ["large", "big"]), ("00", ["two", "2", "ii", "T.V."])],
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
            f"{word} {TYPES[part]} {len(places)} 2 @ ~ {len(places)} 0 {' '.join(f'{place:08d}' for place in places)}  \n"
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
    assert synonyms("worn") == ["wear", "bear", "have on"]  # and the participle through the list of exceptions
    assert synonyms("quickly") == ["rapidly"] and synonyms("nowhere") == []
    assert synonyms("two") == ["ii", "tv"] and WordNetSynonyms(keep_numerals=True)("two") == ["", "ii", "tv"]


def test_synonym_replacement(installed):
    for words in augment("synonym_replacement", "a red backpack"):
        assert words[0] == "a"
        assert (words[1:] == ["red", *words[2:]]) != (words[-1] == "backpack")
    texts = {" ".join(words) for words in augment("synonym_replacement", "a red backpack")}
    assert texts == {
        "a reddish backpack",
        "a ruby red backpack",
        "a red back pack",
        "a red knapsack",
        "a red packsack",
    }
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


def test_each_word_is_as_likely_to_be_replaced(installed):
    """Not the first one of the alphabet, nor of the caption; of five words with synonyms two are replaced."""
    words = ["shoes", "red", "quickly", "big", "backpack"]
    counts = collections.Counter()
    for text in augment("synonym_replacement", " ".join(words), seeds=1000, synonym_strength=0.4):
        left = " ".join(text).replace("ruby red", "").split()
        replaced = [word for word in words if word not in left]
        assert len(replaced) == 2
        counts.update(replaced)
    assert all(abs(counts[word] - 400) < 5 * 15.5 for word in words), counts


def test_augmented_captions_are_the_same_on_every_machine(installed):
    """Fixed values: a checkpoint must go on with the same texts, whatever order the sets of a process have."""
    augmenters = [CaptionAugmenter(1.0, (operation,), 0.4, 0.4) for operation in OPERATIONS[:2]]
    texts = [augmenter("big red shoes a backpack", random.Random(seed)) for seed in (7, 8) for augmenter in augmenters]
    assert texts == [
        "large red shoes a packsack",
        "shoe big red shoes knapsack a backpack",
        "big reddish shoe a backpack",
        "big back pack red shoes a backpack large",
    ]


class FixedDraws(random.Random):
    """A generator whose numbers in [0, 1) are all the same."""

    def __init__(self, value):
        super().__init__(0)
        self.value = value

    def random(self):
        return self.value


def test_a_draw_at_the_border_leaves_the_caption_and_its_words():
    """A probability of p is that of a draw below p."""
    options = {"operations": ("random_deletion",), "deletion_probability": 0.25}
    for probability, draw, expected in (
        (0.5, 0.5, "2 red shoes"),
        (0.5, 0.25, "red shoes"),
        (0.0, 0.0, "2 red shoes"),
    ):
        assert CaptionAugmenter(probability, **options)("2 red shoes", FixedDraws(draw)) == expected


def test_augmenter_of_a_recipe(installed):
    args = {"eda_style": "published", "eda_probability": 0.9, "eda_operations": ["random_swap"]}
    args |= {"eda_synonym_strength": 0.2, "eda_insertion_strength": 0.3, "eda_swap_strength": 0.4}
    augmenter = create_augmenter(SimpleNamespace(**args, eda_deletion_probability=0.5))
    assert type(augmenter) is PublishedCaptionAugmenter and augmenter.operations == ("random_swap",)
    numbers = (augmenter.probability, augmenter.synonym_strength, augmenter.insertion_strength)
    assert (*numbers, augmenter.swap_strength, augmenter.deletion_probability) == (0.9, 0.2, 0.3, 0.4, 0.5)


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


# The published augmentation, against the facts in `eda_call` of the reference file `published_configs.json`.


def published(operation, caption, seeds=4000, **options):
    """How often each text comes out."""
    augmenter = PublishedCaptionAugmenter(probability=1.0, operations=(operation,), **options)
    return collections.Counter(augmenter(caption, random.Random(seed)) for seed in range(seeds))


def oracle(operation, caption, synonyms, rng):
    """One text made from the facts as they are written."""
    words = split_words(caption)
    number = max(1, int(0.1 * len(words)))
    if operation == "synonym_replacement":
        candidates = sorted(word for word in set(words) if word not in STOP_WORDS and synonyms(word))
        for chosen in rng.sample(candidates, min(number, len(candidates))):
            synonym = rng.choice(synonyms(chosen))
            words = [synonym if word == chosen else word for word in words]
    elif operation == "random_insertion":
        for _ in range(number):
            found = [synonyms(rng.choice(words)) for _ in range(9)]  # of ten draws the last comes to nothing
            place = rng.randint(0, len(words) - 1)
            words[place:place] = [listed[0] for listed in found if listed][:1]
    elif operation == "random_swap":
        for _ in range(number):
            i, j = rng.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
    else:
        words = [word for word in words if rng.uniform(0, 1) > 0.1] or [rng.choice(words)]
    return " ".join(split_words(" ".join(words)))


def assert_same_distribution(ours, expected):
    """Every count within 4.5 deviations of the difference of two Poisson counts."""
    for text in ours | expected:
        assert abs(ours[text] - expected[text]) <= 4.5 * (ours[text] + expected[text]) ** 0.5 + 1, text


SHORT = "A man's RED backpack, 2 shoes and two red bags"
LONG = "the man has worn a big red t-shirt; two shoes, the backpack is red, the shoes and the big shirt are red too"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("caption", [SHORT, LONG], ids=["9 words", "24 words"])
def test_published_operations_against_the_facts(installed, operation, caption):
    synonyms = WordNetSynonyms(keep_numerals=True)
    ours = published(operation, caption)
    expected = collections.Counter(oracle(operation, caption, synonyms, random.Random(-seed)) for seed in range(4000))
    assert_same_distribution(ours, expected)
    for features in (
        lambda text: [len(text.split())],
        lambda text: set(text.split()),
        lambda text: enumerate(text.split()),
        lambda text: zip(text.split(), text.split()[1:], strict=False),
    ):
        seen, wanted = (
            collections.Counter(feature for text in texts.elements() for feature in features(text))
            for texts in (ours, expected)
        )
        assert_same_distribution(seen, wanted)


def test_published_replacement_of_every_occurrence(installed):
    texts = published("synonym_replacement", "red shoes on red shoes", seeds=300)
    assert set(texts) == {f"{red} shoes on {red} shoes" for red in ("reddish", "ruby red")} | {
        f"red {shoe} on red {shoe}" for shoe in ("shoe", "trainer")
    }
    assert set(published("synonym_replacement", "the red", seeds=300)) == {"the reddish", "the ruby red"}
    assert set(published("synonym_replacement", "two bags", seeds=300)) == {
        "bags",
        "ii bags",
        "tv bags",
    }  # `2` vanishes


def test_published_insertion_of_the_first_synonym(installed):
    assert set(published("random_insertion", "big red", seeds=300)) == {
        "large big red", "big large red", "reddish big red", "big reddish red"
    }  # fmt: skip
    assert set(published("random_insertion", "red", seeds=20)) == {"reddish red"}
    # One word of ten has synonyms: nine draws find it with chance 1 - 0.9 ** 9.
    texts = published("random_insertion", "x x x x red x x x x x")
    assert abs(texts["x x x x red x x x x x"] / 4000 - 0.9**9) < 4 * (0.24 / 4000) ** 0.5


def test_published_swap_and_deletion_of_few_words():
    assert (
        set(published("random_swap", "red", seeds=20)) == set(published("random_deletion", "red", seeds=20)) == {"red"}
    )
    swapped = published("random_swap", "red shoe")
    assert abs(swapped["red shoe"] / 4000 - 1 / 8) < 4 * (0.11 / 4000) ** 0.5  # three draws of a second place
    kept = published("random_deletion", "red shoe", deletion_probability=1.0)
    assert set(kept) == {"red", "shoe"} and abs(kept["red"] - 2000) < 4 * 32


def test_published_operations_are_equally_likely(installed):
    """One text an operation, in random order, of which the first is taken: each is the first with chance 1/4."""
    augmenter = PublishedCaptionAugmenter(probability=1.0, deletion_probability=1.0)
    kinds = collections.Counter()
    for seed in range(4000):
        words = augmenter("red zip zap", random.Random(seed)).split()
        if sorted(words) == ["red", "zap", "zip"]:
            kinds["swap"] += 1
        elif len(words) == 1:
            kinds["deletion"] += 1
        else:
            kinds["replacement" if "red" not in words or words == ["ruby", "red", "zip", "zap"] else "insertion"] += 1
    # "ruby red zip zap" is a replacement; an insertion is of "reddish" alone, and fails with chance (2/3) ** 9.
    assert all(abs(kinds[kind] - 1000) < 4 * 27 + 27 for kind in ("swap", "deletion", "replacement", "insertion")), (
        kinds
    )


@pytest.mark.parametrize("style", AUGMENTERS)
def test_text_of_an_augmented_caption(installed, style):
    caption = "  A MAN'S  t-shirt,\t2 red\nshoes (size 9½) – Adidas® & ’90s BIG bag!  人"
    clean = "a mans t shirt red shoes size adidas s big bag"
    augmenter = AUGMENTERS[style](probability=1.0)
    for seed in range(300):
        text = augmenter(caption, random.Random(seed))
        assert text == " ".join(split_words(text)) and text
    unchanged = AUGMENTERS[style](1.0, ("random_deletion",), deletion_probability=0.0)(caption, random.Random(0))
    assert unchanged == clean
    assert augmenter("2 人", random.Random(0)) == "2 人"


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


def test_wordnet_as_it_is_downloaded(wordnet, tmp_path, monkeypatch):
    """nltk leaves it in an archive; without tables for other languages it warns of their absence."""
    (tmp_path / "corpora").mkdir()
    shutil.make_archive(str(tmp_path / "corpora" / "wordnet"), "zip", wordnet / "corpora", "wordnet")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert WordNetSynonyms()("big") == ["large"]


@pytest.mark.parametrize("missing", ["data.verb", "index.noun", "verb.exc", "lexnames"])
def test_wordnet_incomplete(tmp_path, monkeypatch, missing):
    folder = write_wordnet(tmp_path / "corpora" / "wordnet")
    (folder / missing).unlink()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=f"incomplete.*{missing}"):
        CaptionAugmenter()


def test_nltk_data_variable(wordnet, tmp_path):
    """`NLTK_DATA` decides, as nltk documents."""
    code = "from mra.training.augmentation import WordNetSynonyms; print(WordNetSynonyms()('big'))"
    environment = {**os.environ, "NLTK_DATA": str(wordnet), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "['large']", result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ("random_swap", "backtranslation")}, "`operations` must be some of .*got backtranslation"),
        ({"operations": ("zip", "swap", "add", "cut", "random_swap")}, "got add, cut, swap, zip$"),
        ({"operations": ()}, "got none"),
        ({"probability": 1.5, "operations": OPERATIONS[2:]}, "`probability` must"),
        ({"swap_strength": -1, "operations": OPERATIONS[2:]}, "`swap_strength` must"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionAugmenter(**options)


@pytest.mark.parametrize("name", ["data.noun", "index.noun", "data.adj", "index.verb"])
@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty"])
def test_damaged_wordnet_is_refused_before_training(tmp_path, monkeypatch, name, damage):
    path = write_wordnet(tmp_path / "corpora" / "wordnet") / name
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    content = path.read_bytes()
    damaged = {"cut": content[:-3], "zeroed": content[:-12] + bytes(12), "empty": b""}[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"WordNet in .* is (damaged|incomplete).*nltk.downloader"):
        WordNetSynonyms()


@pytest.mark.parametrize("line", [b"a\n", b"a n 1\n", b"a n 1 x 1 0 00000123\n"])
def test_a_damaged_line_of_an_index_is_found(tmp_path, monkeypatch, line):
    path = write_wordnet(tmp_path / "corpora" / "wordnet") / "index.noun"
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(
        ValueError, match=r"WordNet in .* is damaged: 1 synsets are not in both of index.noun and data.noun"
    ):
        WordNetSynonyms()
