"""Recipes and command lines: what is written is read back; any YAML gives equal arguments or a sentence with file and key."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mra.common.arguments import option, parse_arguments, read_arguments, require, resolved_recipe
from mra.common.recipes import format_recipe
from mra.training.arguments import OptimizationArguments, RunArguments
from tests.helpers.properties import examples


@dataclass
class Kinds:
    """One argument of each kind that the commands have."""

    count: int = option(10, "A whole number.")
    weight: float = option(1e-4, "A number.")
    limit: float | None = option(None, "A number or none.")
    depth: int | Literal["auto"] = option("auto", "A number or a word.")
    size: list[int] | None = option(None, "Numbers.")
    fields: list[str] = option([], "Texts.")
    phrase: list[str] = option([], "Texts, one at a time.", repeated=True)
    precision: Literal["no", "fp16"] | None = option(None, "A choice.")
    name: str = option("", "A text.")
    title: str | None = option(None, "A text or none.")
    json: bool = option(False, "A switch.")
    flip: bool = option(True, "A switch that is on.")
    settings: dict[str, Any] | str | None = option(None, "A mapping or a path.")

    def __post_init__(self):
        require(self.count > 0, "count", "at least 1", self.count)


TEXTS = [
    "",
    " ",
    "no",
    "null",
    "none",
    "~",
    "1",
    "0123",
    "1e3",
    "1_0",
    "2026-01-31",
    "2026-13-45",
    "=",
    "<<",
    "- a",
    "a: b",
    "#1",
    "[a]",
]
TEXTS += [
    "{a: 1}",
    "--count",
    "--",
    "-1",
    "'",
    '"',
    "\\",
    "a\nb",
    "\ttab",
    " lead",
    "trail ",
    "\x85",
    "\u2028",
    "\ufeff",
    "\x07",
    "😀",
    "!x",
    "&a",
]
TEXTS += [
    "*a",
    "%",
    "@",
    "`",
    "|",
    ">",
    "?",
    ":",
    "nan",
    ".inf",
    "0x10",
    "0o17",
    "190:20:30",
    "true",
    "y",
    "$HOME",
    "${name}",
    "~/a",
    "\xa0",
]
texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers(-(10**20), 10**20)
floats = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(st.none() | st.booleans() | numbers | floats | texts, lambda inner: st.lists(inner, max_size=2)
                     | st.dictionaries(texts, inner, max_size=2), max_leaves=4)  # fmt: skip
kinds = st.builds(
    Kinds,
    count=st.integers(1, 10**20),
    weight=floats,
    limit=st.none() | floats,
    depth=st.just("auto") | numbers,
    size=st.none() | st.lists(numbers, max_size=3),
    fields=st.lists(texts, max_size=3),
    phrase=st.lists(texts, max_size=3),
    precision=st.sampled_from([None, "no", "fp16"]),
    name=texts,
    title=st.none() | texts,
    json=st.booleans(),
    flip=st.booleans(),
    settings=st.none() | st.dictionaries(texts, plain, max_size=2) | st.sampled_from(["file.json", "folder/a b.json"]),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@examples(80)
@given(arguments=kinds)
def test_a_recipe_is_read_as_it_was_written(place, arguments):
    place.write_text(format_recipe(resolved_recipe(arguments)), encoding="utf-8")
    assert read_arguments([Kinds], config=place) == (arguments,)


@examples(30)
@given(
    rate=st.floats(1e-12, 1.0),
    steps=st.none() | st.integers(1, 10**9),
    folder=texts.filter(bool),
    seed=st.integers(0, 2**31),
)
def test_a_recipe_of_a_run_is_read_as_it_was_written(place, rate, steps, folder, seed):
    arguments = (
        RunArguments(output_dir=folder, max_train_steps=steps, seed=seed),
        OptimizationArguments(learning_rate=rate),
    )
    place.write_text(format_recipe(resolved_recipe(*arguments)), encoding="utf-8")
    assert read_arguments([RunArguments, OptimizationArguments], config=place) == arguments


def words_of(arguments: Kinds):
    """The command line of some arguments, as a shell hands it over."""
    for item in dataclasses.fields(arguments):
        value, key = getattr(arguments, item.name), f"--{item.name}"
        if item.name == "settings":
            continue
        if isinstance(value, list) and item.metadata["repeated"]:
            yield from (f"{key}={text}" for text in value)
        elif isinstance(value, list):
            yield from (key, *map(str, value))
        elif isinstance(value, bool):
            yield f"{key}={str(value).lower()}"
        else:
            yield f"{key}={'none' if value is None else value}"


def is_a_word(text: str, first: bool = False) -> bool:
    """Return whether a text can be a word of a list: not an option, a cleared value or a YAML list."""
    return not text.startswith("--") and not (first and (text.startswith("[") or text in ("none", "null")))


@examples(80)
@given(arguments=kinds)
def test_a_command_line_is_read_as_it_was_written(arguments):
    arguments.settings = None
    assume("--" not in (arguments.name, arguments.title))  # argparse drops the two hyphens alone
    if arguments.title in ("none", "null"):
        arguments.title = None
    arguments.fields = [text for text in arguments.fields if is_a_word(text, first=True)]
    assert read_arguments([Kinds], list(words_of(arguments))) == (arguments,)


NAMES = [item.name for item in dataclasses.fields(Kinds)]
VALUES = [
    "3",
    "1e-3",
    "nan",
    "=",
    "2026-13-45",
    "0x_",
    "0b",
    "[1, b]",
    "{a: {b: 1}}",
    "&a [*a]",
    "&a {b: *a}",
    "!!int ''",
    "!!int x",
]
VALUES += [
    "!!float x",
    "!!bool maybe",
    "!!timestamp x",
    "!!binary x",
    "!!set {a}",
    "!!omap [a]",
    "!!python/object:os.x",
    "!!null x",
]
VALUES += [
    "9" * 5000,
    "-" + "9" * 400,
    "[" * 2000,
    "[" * 900 + "]" * 900,
    "? [a]\n  : b",
    "{1: a}",
    "{[a]: b}",
    "{<<: 3}",
    "*x",
    "|\n   a",
    "'",
]
VALUES += [
    "\x07",
    "\t",
    "%",
    "@",
    "1:2:3",
    "190:20:30.15",
    "0o9",
    "1_",
    "_",
    "{null: 1}",
    "{true: 1}",
    ".inf",
    "-.inf",
    "'\\ud800'",
    '"\\ud800"',
]
lines = st.tuples(
    st.sampled_from([*NAMES, "nmae", "<<", "1", "null", "? a", "[a]", "é", "'a b'"]), st.sampled_from(VALUES) | texts
)
recipes = (
    st.lists(lines, max_size=3).map(lambda pairs: "\n".join(f"{name}: {value}" for name, value in pairs))
    | st.dictionaries(st.sampled_from(NAMES) | texts, plain, max_size=3).map(
        lambda recipe: yaml.safe_dump(recipe, allow_unicode=True)
    )
    | st.text(max_size=30)
)


@examples(150)
@given(recipe=recipes)
@example(recipe="name: 2026-13-45")
@example(recipe="count: !!int ''")
@example(recipe="count: " + "9" * 5000)
@example(recipe="count: 0")
@example(recipe="json: !!bool maybe")
@example(recipe="name: !!timestamp x")
@example(recipe="settings: " + "[" * 2000)
@example(recipe="settings: &a {b: *a}")
@example(recipe="weight: .nan")
@example(recipe="{}: 1")
def test_any_yaml_is_read_or_refused(place, recipe):
    place.write_text(recipe, encoding="utf-8", errors="surrogatepass")
    try:
        (arguments,) = read_arguments([Kinds], config=place)
    except ValueError as error:
        assert type(error) is ValueError and str(place) in str(error) and len(str(error).splitlines()) == 1, str(error)
        return
    place.write_text(format_recipe(resolved_recipe(arguments)), encoding="utf-8")
    assert read_arguments([Kinds], config=place) == (arguments,)


words = (
    st.sampled_from(
        [f"--{name}" for name in NAMES] + [f"--no_{name}" for name in NAMES] + ["--", "-x", "--x", "--=", "-"]
    )
    | texts
)
options = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | texts).map(lambda pair: f"--{pair[0]}={pair[1]}")


@examples(150)
@given(argv=st.lists(words | options, max_size=4))
@example(argv=["--count=" + "9" * 5000])
@example(argv=["--settings=" + "[" * 2000])
@example(argv=["--settings=&a {b: *a}"])
@example(argv=["--settings=2026-13-45"])
@example(argv=["--size=!!int ''"])
def test_any_command_line_is_read_or_refused(capsys, argv):
    try:
        parse_arguments([Kinds], prog="kinds", argv=argv, config=False)
    except SystemExit as stopped:
        said = capsys.readouterr().err
        assert stopped.code == 2 and said.startswith("kinds: error: ") and len(said.splitlines()) == 1, said
