"""One system of arguments for every command: recipes, command lines, errors and help."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mra.common.arguments import option, parse_arguments, read_arguments, require, resolved_recipe
from mra.common.recipes import format_recipe


ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Search:
    """What to search for."""

    texts: list[str] = option([], "Sentences.", positional=True)
    top: int = option(10, "Hits, 40% of which are shown.")
    weight: float = option(1e-4, "A number.")
    limit: float | None = option(None, "A number or none.")
    size: list[int] | None = option(None, "Height and width.")
    fields: list[str] = option([], "Names.")
    phrase: list[str] = option([], "Repeatable.", repeated=True)
    precision: Literal["no", "fp16"] | None = option(None, "A choice.")
    condition: Literal["none", "white"] = option("white", "A choice that holds none.")
    name: str | None = option(None, "Text.")
    json: bool = option(False, "A switch.")
    no_check: bool = option(False, "A switch whose name begins like one that is turned off.")
    flip: bool = option(True, "A switch that is on.")
    settings: dict | str | None = option(None, "A mapping.")

    def __post_init__(self):
        require(self.top > 0, "top", "at least 1", self.top)


@dataclass
class Place:
    """Where to search."""

    gallery: str = option(help="Path.")


def read(*argv, recipe=None, tmp_path=None):
    if recipe is None:
        return read_arguments([Search], argv)[0]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    return read_arguments([Search], argv, path)[0]


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (("--top", "3"), "top", 3),
        (("--top=3", "--top=4"), "top", 4),
        (("--weight", "1e-3"), "weight", 1e-3),
        (("--weight", "2"), "weight", 2.0),
        (("--weight", "-2.5"), "weight", -2.5),
        (("--limit", "none"), "limit", None),
        (("--limit=none",), "limit", None),
        (("--limit", "3"), "limit", 3.0),
        (("--size", "4", "2"), "size", [4, 2]),
        (("--size", "[4, 2]"), "size", [4, 2]),
        (("--size", "none"), "size", None),
        (("--fields", "a,b", "no", "3"), "fields", ["a,b", "no", "3"]),
        (("--fields",), "fields", []),
        (("--phrase", "a", "--phrase", "b"), "phrase", ["a", "b"]),
        (("--precision", "no"), "precision", "no"),
        (("--precision", "none"), "precision", None),
        (("--condition", "none"), "condition", "none"),
        (("--name", "none"), "name", None),
        (("--name", "3"), "name", "3"),
        (("--name", "--seed 1"), "name", "--seed 1"),
        (("--name=--seed",), "name", "--seed"),
        (("--name", "no"), "name", "no"),
        (("--name", "#1"), "name", "#1"),
        (("--name", "null"), "name", None),
        (("--name", "[a]"), "name", "[a]"),
        (("--name", 'camera == "c3"'), "name", 'camera == "c3"'),
        (("--json",), "json", True),
        (("--json", "false"), "json", False),
        (("--json=True",), "json", True),
        (("--flip", "no"), "flip", False),
        (("--no_flip",), "flip", False),
        (("--no_check",), "no_check", True),
        (("--no-flip",), "flip", False),
        (("--settings", '{"a": {"b": 1}}'), "settings", {"a": {"b": 1}}),
        (("--settings", "file.json"), "settings", "file.json"),
        (("--json", "a man"), "texts", ["a man"]),
        (("a man", "--json", "a woman"), "texts", ["a man", "a woman"]),
        (("--", "--top"), "texts", ["--top"]),
    ],
)
def test_values_on_the_command_line(argv, name, value):
    got = getattr(read(*argv), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "recipe, name, value",
    [
        ("weight: 1e-4", "weight", 1e-4),
        ("weight: 2", "weight", 2.0),
        ("limit: 1e-4", "limit", 1e-4),
        ("limit: null", "limit", None),
        ("precision: no", "precision", "no"),
        ("json: no", "json", False),
        ("size: [4, 2]", "size", [4, 2]),
        ("fields: [1, b]", "fields", ["1", "b"]),
        ("name: 3", "name", "3"),
        ("name: 0123", "name", "0123"),
        ("name: no", "name", "no"),
        ("name: 2026-01-31", "name", "2026-01-31"),
        ("name: none", "name", "none"),
        ("settings: {a: {b: 1}}", "settings", {"a": {"b": 1}}),
        ("# nothing", "top", 10),
    ],
)
def test_values_in_a_recipe(tmp_path, recipe, name, value):
    got = getattr(read(recipe=recipe, tmp_path=tmp_path), name)
    assert got == value and type(got) is type(value)


def test_the_command_line_wins_wherever_the_recipe_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("top: 3\nlimit: 2.5\n")
    for argv in (["--config", str(path), "--limit", "none"], ["--limit", "none", f"--config={path}"]):
        (search,) = parse_arguments([Search], argv=argv)
        assert (search.top, search.limit) == (3, None)


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--tpo", "3"), "unknown argument '--tpo'; did you mean '--top'?"),
        (("--to", "3"), "unknown argument '--to'; did you mean '--top'?"),
        (("--zzz=3",), "unknown argument '--zzz'; see --help for the known ones"),
        (("extra", "--tpo", "3"), "unknown argument '--tpo'; did you mean '--top'?"),
        (("--top", "null"), "`--top` must be of type int, got 'null'"),
        (("--top", "none"), "`--top` must be of type int, got 'none'"),
        (("--top", "1.5"), "`--top` must be of type int, got '1.5'"),
        (("--top",), "`--top` needs a value"),
        (("--top", "0"), "`top` must be at least 1, got 0: set it with --top"),
        (("--limit", "much"), "`--limit` must be a finite number, got 'much'"),
        (("--limit", "inf"), "`--limit` must be a finite number, got 'inf'"),
        (("--limit", "nan"), "`--limit` must be a finite number, got 'nan'"),
        (("--limit=-.inf",), "`limit` must be a finite number, got -inf: set it with --limit"),
        (("--weight", "1e999"), "`weight` must be a finite number, got inf: set it with --weight"),
        (("--size", "4", "x"), """`--size` must be a list, each item of type int, got '4 x'"""),
        (("--precision", "fp8"), "`--precision` must be one of no, fp16, got 'fp8'"),
        (("--json=maybe",), "`--json` must be true or false, got 'maybe'"),
        (("--no_json=true",), "`--no_json` takes no value, got 'true'"),
    ],
)
def test_a_wrong_option_ends_in_one_sentence(capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([Search], prog="search", argv=argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"search: error: {words}\n"


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("tpo: 3", "recipe.yaml: unknown key 'tpo'; did you mean 'top'?"),
        ("top: 1.5", "recipe.yaml: `top` must be of type int, got 1.5"),
        ("top: true", "recipe.yaml: `top` must be of type int, got True"),
        ("size: 128", "recipe.yaml: `size` must be a list, each item of type int, got 128"),
        ("precision: fp8", "recipe.yaml: `precision` must be one of no, fp16, got 'fp8'"),
        ("json: 1", "recipe.yaml: `json` must be true or false, got 1"),
        ("weight: fast", "recipe.yaml: `weight` must be a finite number, got 'fast'"),
        ("weight: .nan", "`weight` must be a finite number, got nan: set it with --weight (recipe "),
        ("limit: -.inf", "`limit` must be a finite number, got -inf: set it with --limit (recipe "),
        ("weight: null", "recipe.yaml: `weight` must be a finite number, got null"),
        ("name: [a]", "recipe.yaml: `name` must be of type str, got ['a']"),
        ("- a", "recipe.yaml: a recipe is a mapping of arguments to values, got a list"),
        ("top: 1\ntop: 2", "recipe.yaml: not readable as YAML in UTF-8 (the key 'top' is given twice"),
        ("a: [", "recipe.yaml: not readable as YAML in UTF-8"),
        ("", "recipe.yaml: the file is empty, expected a mapping of arguments to values"),
    ],
)
def test_a_wrong_recipe_names_file_and_key(tmp_path, recipe, words):
    with pytest.raises(ValueError) as error:
        read(recipe=recipe, tmp_path=tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_may_give_a_list_of_texts_one_text(tmp_path):
    for text in ("a b", "no", "1", "[a b]"):
        assert read(recipe=f"fields: {text}", tmp_path=tmp_path).fields == [text.strip("[]")]


@pytest.mark.parametrize("text", ["!!int ''", "!!int x", "!!float ''"])
def test_a_value_that_yaml_fails_on(tmp_path, text):
    """PyYAML raises an IndexError or a ValueError of its own for these."""
    with pytest.raises(ValueError, match=r"is not readable as YAML|must be of type int"):
        read(f"--top={text}")
    with pytest.raises(ValueError, match=r"recipe\.yaml: "):
        read(recipe=f"top: {text}", tmp_path=tmp_path)


def test_required_options(capsys):
    for argv, code in (([], 2), (["--gallery", "g.db"], None)):
        if code is None:
            assert parse_arguments([Place], argv=argv, config=False)[0].gallery == "g.db"
            continue
        with pytest.raises(SystemExit) as stopped:
            parse_arguments([Place], prog="search", argv=argv, config=False)
        assert stopped.value.code == code
        assert capsys.readouterr().err == "search: error: --gallery: required, but not given\n"


def test_sections(tmp_path, capsys):
    themes = {"place": Place, "search": Search}
    path = tmp_path / "recipe.yaml"
    path.write_text("place: {gallery: g.db}\nsearch:\n")
    place, search = read_arguments(themes, ["--search.top", "3", "--search.size", "4", "2", "--search.json"], path)
    assert place == Place("g.db") and search == Search(top=3, size=[4, 2], json=True)
    for recipe, words in (
        ("plaec: {}", "unknown section 'plaec'; did you mean 'place'?"),
        ("search: 3", "section 'search' must be a mapping of arguments, got 3"),
        ("search: {topp: 3}", "section 'search': unknown key 'topp'; did you mean 'top'?"),
        ("search: {top: x}", "`search.top` must be of type int, got 'x'"),
    ):
        path.write_text(recipe)
        with pytest.raises(ValueError) as error:
            read_arguments(themes, ["--place.gallery", "g.db"], path)
        assert str(error.value).startswith(str(path)) and words in str(error.value)
    with pytest.raises(SystemExit):
        parse_arguments(themes, prog="p", argv=["--search.tpo", "1"])
    assert "unknown argument '--search.tpo'; did you mean '--search.top'?" in capsys.readouterr().err


def test_a_saved_recipe_reads_back_and_one_cut_short_is_refused(tmp_path):
    search = read("--name", "ä", "--size", "4", "2", "--weight", "3e-5", "--precision", "no")
    path = tmp_path / "recipe.yaml"
    path.write_text(format_recipe(resolved_recipe(search)))
    assert dataclasses.asdict(read_arguments([Search], config=path)[0]) == dataclasses.asdict(search)
    whole = path.read_text()
    for length in (len(whole) // 2, 10):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            read_arguments([Search], config=path)


def test_a_saved_recipe_keeps_text_as_text(tmp_path):
    """YAML reads the line breaks of Unicode as spaces, and jsonargparse a text of digits as a number."""
    search = read("--name", "a\x85b\u2028c", "--fields", "a\x85b", "\x9f", "人😀")
    assert (search.name, search.fields) == ("a\x85b\u2028c", ["a\x85b", "\x9f", "人😀"])
    search.settings = {"a": "1", "b": {"c": "no", "d": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(format_recipe(resolved_recipe(search)))
    assert read_arguments([Search], config=path) == (search,)


def test_a_value_of_a_recipe_that_is_not_allowed_names_the_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"`top` must be at least 1, got 0.* \(recipe .*recipe\.yaml\)$"):
        read(recipe="top: 0", tmp_path=tmp_path)


def test_help_shows_each_option_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments({"place": Place, "search": Search}, prog="p", description="Searches.", argv=["--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert stopped.value.code == 0 and "Searches." in words
    assert "place: Where to search." in words and "search: What to search for." in words
    assert words.count("--search.top TOP Hits, 40% of which are shown. (default: 10)") == 1
    assert "--search.precision {no,fp16} A choice." in words and "--search.flip [true|false]" in words
    assert "(default: true)" in words and "None" not in words and "print_config" not in words


@pytest.mark.parametrize("script", ["train_pretrain", "train_finetune", "convert_checkpoint", "data_scripts.dad.run"])
def test_help_and_typos_are_answered_before_slow_imports(script):
    """Loading torch takes seconds of CPU, all the rest two tenths of one."""
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print({'torch', 'numpy', 'transformers'} & sys.modules.keys()))\n"
        f"runpy.run_module({script!r}, run_name='__main__', alter_sys=True)"
    )
    for word, code in (("--help", 0), ("--oputput", 2)):
        run = subprocess.run([sys.executable, "-c", program, word], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == code and run.stdout.endswith("set()\n"), run.stderr
