"""Easy data augmentation of captions (Wei and Zou 2019): synonyms, insertions, swaps and deletions of words."""

import os
import random
import re
import warnings
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # a circular import otherwise
    from mra.training.arguments import FinetuneDataArguments


OPERATIONS = ("synonym_replacement", "random_insertion", "random_swap", "random_deletion")
WORDNET_OPERATIONS = ("synonym_replacement", "random_insertion")
PARTS_OF_SPEECH = ("adj", "adv", "noun", "verb")

# Words without attributes of a person: they are not replaced and their synonyms are not inserted.
FUNCTION_WORDS = frozenset(
    """
    a about above after again all also am an and any are as at be because been being below between both but by can did
    do does doing down during each few for from further had has have having he her here hers him his how i if in into
    is it its just me more most my no nor not now of off on once only or other our out over own same she should so
    some such than that the their them then there these they this those through to too under until up very was we were
    what when where which while who whom why will with you your
    """.split()  # noqa: SIM905
)

# The stop words of Wei and Zou's EDA, which are the 127 of the Snowball English list.
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very s t can will just don should now
    """.split()  # noqa: SIM905
)

_APOSTROPHES = re.compile(r"['’]")
_WORD = re.compile(r"[a-z]+")
_NOT_LETTERS = re.compile(r"[^a-z ]")
_INSERTION_DRAWS = 9  # the published code stops at the tenth draw, before looking up synonyms
_SWAP_DRAWS = 3  # and at the fourth draw of a second position


def split_words(text: str) -> list[str]:
    """Split text into lower-case runs of a-z, as the published augmentation does; digits are dropped."""
    return _WORD.findall(_APOSTROPHES.sub("", text.lower()))


class WordNetSynonyms:
    """Synonyms from WordNet through nltk; every process opens the database itself.

    Args:
        keep_numerals: keep synonyms without letters (`2` for "two") as the empty text left after cleaning.

    Raises:
        ValueError: if nltk does not find WordNet, or it is damaged.
    """

    def __init__(self, keep_numerals: bool = False) -> None:
        self.keep_numerals = keep_numerals
        self._root = _find_wordnet()
        self._process = None
        self._reader = None
        self._synonyms = {}
        _check_wordnet(self._root)  # on a damaged file nltk raises various errors or none
        self._open()

    def __call__(self, word: str) -> list[str]:
        """Return the words and short phrases that share a meaning with the word, in WordNet's order."""
        if word not in self._synonyms:
            lemmas = (lemma.name() for synset in self._open().synsets(word) for lemma in synset.lemmas())
            phrases = dict.fromkeys(_phrase(lemma) for lemma in lemmas)
            self._synonyms[word] = [other for other in phrases if other != word and (other or self.keep_numerals)]
        return self._synonyms[word]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_process": None, "_reader": None}

    def _open(self) -> Any:
        # A forked worker must not share the position in the parent's open files.
        if self._process != os.getpid():
            self._reader = _open_wordnet(self._root)
            self._process = os.getpid()
        return self._reader


class CaptionAugmenter:
    """Augmenter that applies one random operation of easy data augmentation (`eda_style: content_words`).

    Function words are not replaced and their synonyms are not inserted. An inserted word is any synonym of its source, at any
    position. [`PublishedCaptionAugmenter`] follows the published code.

    Args:
        probability: probability of changing a caption at all.
        operations: operations to choose from: `synonym_replacement`, `random_insertion` (both need WordNet), `random_swap`,
            `random_deletion`.
        synonym_strength: share of the words to replace, at least one.
        insertion_strength: number of words to insert, relative to the caption's length, at least one.
        swap_strength: number of swaps, relative to the caption's length, at least one.
        deletion_probability: probability of dropping each word; one word always stays.

    Raises:
        ValueError: if an operation is unknown, a number is out of range, or WordNet is needed and not installed.
    """

    def __init__(
        self,
        probability: float = 0.5,
        operations: tuple[str, ...] = OPERATIONS,
        synonym_strength: float = 0.1,
        insertion_strength: float = 0.1,
        swap_strength: float = 0.1,
        deletion_probability: float = 0.1,
    ) -> None:
        unknown = sorted(set(operations) - set(OPERATIONS))
        if unknown or not operations:
            raise ValueError(
                f"`operations` must be some of {', '.join(OPERATIONS)}, got {', '.join(unknown) or 'none'}"
            )
        self.probability = probability
        self.operations = tuple(operations)
        self.synonym_strength = synonym_strength
        self.insertion_strength = insertion_strength
        self.swap_strength = swap_strength
        self.deletion_probability = deletion_probability
        for name, value in vars(self).items():
            if name != "operations" and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {value}")
        needs_wordnet = bool(set(operations) & set(WORDNET_OPERATIONS))
        self._synonyms: Callable[[str], list[str]] = self._open_synonyms() if needs_wordnet else lambda _: []

    def __call__(self, caption: str, rng: random.Random) -> str:
        """Augment one caption.

        Args:
            caption: any text, cleaned but not truncated.
            rng: source of every random choice.

        Returns:
            Letters a-z and single spaces after one operation; the unchanged caption if `probability` skips it, or if it has
            no such letter before or after the operation.
        """
        if rng.random() >= self.probability:
            return caption
        words = split_words(caption)
        if not words:
            return caption
        changed = getattr(self, f"_{rng.choice(self.operations)}")(words, rng)
        return " ".join(split_words(" ".join(changed))) or caption

    def _open_synonyms(self) -> WordNetSynonyms:
        return WordNetSynonyms()

    def _synonym_replacement(self, words: list[str], rng: random.Random) -> list[str]:
        candidates = _content_words(words)
        rng.shuffle(candidates)
        found = islice(filter(self._synonyms, candidates), _count(self.synonym_strength, words))
        replacements = {word: rng.choice(self._synonyms(word)) for word in found}
        return [replacements.get(word, word) for word in words]

    def _random_insertion(self, words: list[str], rng: random.Random) -> list[str]:
        sources, result = [word for word in _content_words(words) if self._synonyms(word)], list(words)
        if sources:
            for _ in range(_count(self.insertion_strength, words)):
                synonym = rng.choice(self._synonyms(rng.choice(sources)))
                result.insert(rng.randint(0, len(result)), synonym)
        return result

    def _random_swap(self, words: list[str], rng: random.Random) -> list[str]:
        words = list(words)
        if len(words) > 1:
            for _ in range(_count(self.swap_strength, words)):
                first, second = rng.sample(range(len(words)), 2)
                words[first], words[second] = words[second], words[first]
        return words

    def _random_deletion(self, words: list[str], rng: random.Random) -> list[str]:
        return [word for word in words if rng.random() >= self.deletion_probability] or [rng.choice(words)]


class PublishedCaptionAugmenter(CaptionAugmenter):
    """Augmenter that follows the published code (`eda_style: published`), which calls EDA with strengths of 0.1.

    Source: `eda_call` of the reference file `published_configs.json`, and for other details the code of Wei and Zou: the stop
    words, numeral synonyms that become empty, and the last draw, which has no effect. The published code takes the first
    synonym of a Python set, an order that changes between runs; here it is WordNet's first.

    With `probability` 1 every caption is changed by one of the four operations.
    """

    def _open_synonyms(self) -> WordNetSynonyms:
        return WordNetSynonyms(keep_numerals=True)

    def _synonym_replacement(self, words: list[str], rng: random.Random) -> list[str]:
        candidates = [word for word in dict.fromkeys(words) if word not in STOP_WORDS]
        rng.shuffle(candidates)
        left = _count(self.synonym_strength, words)
        for word in candidates:
            synonyms = self._synonyms(word)
            if synonyms:
                synonym = rng.choice(synonyms)
                words = [synonym if other == word else other for other in words]
                left -= 1
            if left == 0:
                break
        return words

    def _random_insertion(self, words: list[str], rng: random.Random) -> list[str]:
        result = list(words)
        for _ in range(_count(self.insertion_strength, words)):
            for _ in range(_INSERTION_DRAWS):
                synonyms = self._synonyms(rng.choice(result))
                if synonyms:
                    result.insert(rng.randrange(len(result)), synonyms[0])  # never after the last word
                    break
        return result

    def _random_swap(self, words: list[str], rng: random.Random) -> list[str]:
        words = list(words)
        for _ in range(_count(self.swap_strength, words)):
            first = rng.randrange(len(words))
            for _ in range(_SWAP_DRAWS):
                second = rng.randrange(len(words))
                if second != first:
                    words[first], words[second] = words[second], words[first]
                    break
        return words


AUGMENTERS = {"content_words": CaptionAugmenter, "published": PublishedCaptionAugmenter}  # by `eda_style`


def create_augmenter(args: "FinetuneDataArguments") -> CaptionAugmenter:
    """Build the augmenter that a recipe describes.

    Args:
        args: a `FinetuneDataArguments`.

    Raises:
        ValueError: as [`CaptionAugmenter`].
    """
    return AUGMENTERS[args.eda_style](
        probability=args.eda_probability,
        operations=args.eda_operations,
        synonym_strength=args.eda_synonym_strength,
        insertion_strength=args.eda_insertion_strength,
        swap_strength=args.eda_swap_strength,
        deletion_probability=args.eda_deletion_probability,
    )


def _phrase(lemma: str) -> str:
    """Convert a WordNet lemma to letters and spaces; a numeral becomes empty."""
    return " ".join(_NOT_LETTERS.sub("", re.sub(r"[_-]", " ", lemma.lower())).split())


def _content_words(words: list[str]) -> list[str]:
    return sorted(word for word in set(words) - FUNCTION_WORDS if len(word) > 1)


def _count(strength: float, words: list[str]) -> int:
    return max(1, int(strength * len(words)))


def _find_wordnet() -> Any:
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            return nltk.data.find(name)
        except LookupError:
            continue
    raise ValueError(
        "synonyms need WordNet, which nltk cannot find in "
        f"{', '.join(map(str, nltk.data.path)) or 'any folder'}; install it with `python -m nltk.downloader wordnet` "
        f"(`NLTK_DATA` names another folder), or leave {' and '.join(WORDNET_OPERATIONS)} out of `operations`"
    )


def _open_wordnet(root: Any) -> Any:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class EnglishWordNet(WordNetCorpusReader):
        """Reader without the tables for other languages, which take most of the opening time."""

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The multilingual functions are not available")
            return EnglishWordNet(root, None)
    except (LookupError, OSError) as error:
        raise _incomplete(root, error) from error


def _check_wordnet(root: Any) -> None:
    """Check that index and data files of every part of speech name the same synsets, to detect damaged files."""
    for part_of_speech in PARTS_OF_SPEECH:
        index, data = f"index.{part_of_speech}", f"data.{part_of_speech}"
        listed, stored, position = set(), set(), 0
        for line in _read_lines(root, index):
            if line.startswith(b" "):  # the licence
                continue
            words = line.split()
            # lemma, part, number of synsets, number of pointers and as many, two counts, and the offsets (wndb(5WN))
            is_whole = len(words) > 3 and words[3].isdigit() and line.endswith(b"\n")
            listed.update(words[6 + int(words[3]) :] if is_whole else [line])
        for line in _read_lines(root, data):
            if line[:8] == b"%08d" % position and line.endswith(b"\n"):
                stored.add(line[:8])
            position += len(line)
        if listed != stored:
            raise ValueError(
                f"WordNet in {root} is damaged: {len(listed ^ stored):,} synsets are not in both of {index} and {data}; "
                "install it again with `python -m nltk.downloader --force wordnet`"
            )


def _read_lines(root: Any, name: str) -> list[bytes]:
    try:
        with root.join(name).open() as file:
            return file.read().splitlines(keepends=True)
    except OSError as error:
        raise _incomplete(root, error) from error


def _incomplete(root: Any, error: Exception) -> ValueError:
    return ValueError(
        f"WordNet in {root} is incomplete ({error}); install it again with `python -m nltk.downloader wordnet`"
    )
