"""Arguments of every command: dataclasses, filled from a YAML recipe and then the command line.

A command describes its arguments as dataclasses, one per theme:

    @dataclass
    class SearchArguments:
        '''What to search for.'''

        texts: list[str] = option([], "sentences to search for", positional=True)
        gallery: str = option(help="path ending in .db")  # no default: required
        top: int = option(10, "hits to show")
        json: bool = option(False, "print one JSON object per search")
        where: str | None = option(None, "filter on the metadata")

    (arguments,) = parse_arguments([SearchArguments], prog="mra search", description="Search a gallery.", config=False)

`parse_arguments` takes a sequence of dataclasses for options `--key value`, or a mapping for sections, `--section.key value`.
A dataclass with the class variable `theme_name` gets its own group in `--help`. Checks go in `__post_init__` and raise a
`ValueError` (see [`require`]), which ends the command with a one-line message and exit code 2.

A list takes several words; a switch is `--name`, `--name false` or `--no_name`; `none` clears an optional value.

This module, and the modules that hold the dataclasses, import neither torch nor transformers, so that `--help` is quick.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import jsonargparse

from mra.common.recipes import UNREADABLE_YAML, RecipeText, read_mapping
from mra.common.type_hints import as_written, choices_of, expected_words, is_finite, is_list, is_optional, plain_type


# Characters that JSON keeps in a text and YAML refuses, or reads as spaces.
_CONTROLS = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")
_SWITCHED = {"true": "true", "yes": "true", "1": "true", "false": "false", "no": "false", "0": "false"}

Themes = Sequence[type] | Mapping[str, type]


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    positional: bool = False,
    repeated: bool = False,
    **facts: Any,
) -> Any:
    """Return a dataclass field that is an option of a command.

    Args:
        default: value when the option is left out; a list is copied. Without a default the option is required.
        help: text for `--help`, which adds choices and default.
        positional: whether the value is given without a name. A `list` takes all remaining positional values.
        repeated: whether a `list` takes one value per occurrence of the option instead of several at once.
        facts: further entries of the field's metadata.
    """
    metadata = {"help": help, "positional": positional, "repeated": repeated, **facts}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------- command line


def parse_arguments(
    themes: Themes,
    *,
    prog: str | None = None,
    description: str | None = None,
    argv: Sequence[str] | None = None,
    config: bool = True,
    shown: Collection[str] | None = None,
) -> tuple[Any, ...]:
    """Read `--config recipe.yaml`, then the command line, which takes precedence; exit on a wrong argument.

    Args:
        themes: dataclasses whose fields are the options `--key value`, or section -> dataclass for `--section.key value`
            and a recipe of sections; the section "" stands for options without one.
        prog: name of the command, for `--help` and messages; None for the script's name.
        description: text shown by `--help`.
        argv: arguments; None for those of the process.
        config: whether the command has `--config`.
        shown: sections that `--help` lists; None for all.

    Returns:
        One instance of each dataclass, in order.

    Raises:
        SystemExit: with code 2 and a one-line message that names the argument, and the file if it comes from one.
    """
    reader = _Reader(themes, prog, description, config, shown)
    try:
        return reader.read(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        reader.stop(str(error))


def read_arguments(themes: Themes, argv: Sequence[str] = (), config: str | Path | None = None) -> tuple[Any, ...]:
    """Read a recipe and options as [`parse_arguments`] does, for use outside a command.

    Args:
        themes: dataclasses, as for [`parse_arguments`].
        argv: options that override the recipe.
        config: path of the recipe.

    Returns:
        One instance of each dataclass.

    Raises:
        ValueError: if the recipe or an option is wrong.
    """
    return _Reader(themes).read(argv, config)


@dataclasses.dataclass
class _Recipe:
    config: str | None = option(
        None, "YAML file that sets the options below; the command line overrides it", metavar="RECIPE.yaml"
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows each option once, with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        off = f", --no_{action.dest}" if action.default is True and "." not in action.dest else ""
        return f"{action.option_strings[0]} {action.metavar}{off}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, [], "", argparse.SUPPRESS):
            return action.help
        if isinstance(default, bool):
            default = str(default).lower()
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {str(default).replace('%', '%%')})"


class _Reader:
    """Reader of dataclass arguments through jsonargparse, with one-line error messages."""

    def __init__(
        self,
        themes: Themes,
        prog: str | None = None,
        description: str | None = None,
        config: bool = False,
        shown: Collection[str] | None = None,
    ) -> None:
        self.themes = list(themes.items()) if isinstance(themes, Mapping) else [("", theme) for theme in themes]
        self.sections = [section for section, _ in self.themes if section]
        self.has_config = config
        self.fields: dict[str, dataclasses.Field] = {}
        self.hints: dict[str, Any] = {}
        self.parser = jsonargparse.ArgumentParser(
            prog=prog,
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
        )
        if config:
            self._add_theme("", _Recipe)
        for section, theme in self.themes:
            self._add_theme(section, theme, hidden=shown is not None and section not in shown)
        positional = [name for name, item in self.fields.items() if _is_positional(item)]
        self.has_positional = bool(positional)
        words = ["%(prog)s", *(["[--config RECIPE.yaml]"] if config else []), "[--OPTION VALUE ...]"]
        words += [f"[{name.upper()} ...]" if is_list(self.hints[name]) else name.upper() for name in positional]
        self.parser.usage = " ".join(words)

    def read(self, argv: Sequence[str], config: str | Path | None = None) -> tuple[Any, ...]:
        """Return an instance of each dataclass.

        Raises:
            ValueError: if the recipe or an option is wrong.
        """
        options, rest = self._split(argv)
        if self.has_config and "config" in options:
            config = options["config"][0]
        recipe, mappings = self._read_recipe(config) if config is not None else (None, {})
        cleared = [name for name, given in options.items() if self._is_cleared(name, given)]
        words = [f"--{name}={self._to_yaml(name, options[name])}" for name in options if name not in cleared]
        try:
            values = self.parser.parse_args([*words, *rest], namespace=recipe)
        except argparse.ArgumentError as error:
            raise ValueError(self._explain(str(error), options)) from None
        except UNREADABLE_YAML as error:
            raise ValueError(
                f"an option has a value that is not readable as YAML ({type(error).__name__}: {error})"
            ) from error
        for name in cleared:
            values[name] = None
        for name in mappings.keys() - options.keys():  # jsonargparse parses their texts again, and '1' as a number
            values[name] = mappings[name]
        try:
            for name, hint in self.hints.items():
                require(is_finite(values[name]), name, expected_words(hint), values[name])
            return tuple(
                theme(**{item.name: values[_join(section, item.name)] for item in init_fields(theme)})
                for section, theme in self.themes
            )
        except ValueError as error:
            if recipe is None:
                raise
            raise ValueError(f"{error} (recipe {config})") from error

    def stop(self, message: str) -> NoReturn:
        """Exit with a one-line message and the exit code of wrong arguments."""
        sys.stderr.write(f"{self.parser.prog}: error: {message}\n")
        raise SystemExit(2)

    # -------- building the parser

    def _add_theme(self, section: str, theme: type, hidden: bool = False) -> None:
        title = section or getattr(theme, "theme_name", None)
        summary = (theme.__doc__ or "").strip().split("\n\n")[0]
        group = self.parser.add_argument_group(title, summary) if title and not hidden else self.parser
        hints = get_type_hints(theme)
        for item in init_fields(theme):
            key, hint = _join(section, item.name), hints[item.name]
            if item.default is None:  # `none` is accepted even if `__post_init__` then requires a value
                hint = hint | None
            self.fields[key], self.hints[key] = item, hint
            self._add_field(group, key, item, hint, hidden)

    def _add_field(self, group: Any, key: str, item: dataclasses.Field, hint: Any, hidden: bool) -> None:
        help = argparse.SUPPRESS if hidden else item.metadata.get("help", "").replace("%", "%%")
        settings: dict[str, Any] = {"help": help, "type": plain_type(hint)}
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        required = default is dataclasses.MISSING
        if _is_positional(item):
            if is_list(hint):
                settings |= {"type": get_args(plain_type(hint))[0], "nargs": "+" if required else "*"}
            elif not required:
                settings["nargs"] = "?"
            if not required:
                settings["default"] = default
            group.add_argument(key, metavar=item.metadata.get("metavar") or item.name.upper(), **settings)
            return
        settings |= {"required": True} if required else {"default": default}
        metavar = item.metadata.get("metavar") or _metavar(item, hint)
        group.add_argument(f"--{key}", metavar=metavar, **settings)

    # -------- the command line

    def _split(self, argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Return the words of the last occurrence of each known option, and the words that belong to no option."""
        options: dict[str, list[str]] = {}
        rest: list[str] = []
        words = list(argv)
        while words:
            text = words.pop(0)
            if text == "--":
                return options, [*rest, text, *words]
            spelt, equals, value = text.removeprefix("--").partition("=")
            name = self._find_option(spelt) if self._is_option(text) else None
            if name is None:
                rest.append(text)
                continue
            if name not in self.hints:  # --no_NAME
                if equals:
                    raise ValueError(f"`--{name}` takes no value, got {value!r}")
                options[_without_no(name)] = ["false"]
                continue
            hint, is_repeated = self.hints[name], _is_repeated(self.fields[name])
            given = [value] if equals else []
            most = len(words) if is_list(hint) and not is_repeated else 1
            while not equals and len(given) < most and words and not self._is_option(words[0]):
                if hint is bool and words[0].lower() not in _SWITCHED and self.has_positional:
                    break
                given.append(words.pop(0))
            if hint is bool and not given:
                given = ["true"]
            if not given and (is_repeated or not is_list(hint)):
                raise ValueError(f"`--{name}` needs a value")
            options[name] = [*options.get(name, []), *given] if is_repeated else given
        return options, rest

    def _is_option(self, word: str) -> bool:
        """Return whether a word is an option rather than a value that begins with `--`, like "--seed 1"."""
        if not word.startswith("--"):
            return False
        return " " not in word or self._find_option(word[2:].partition("=")[0]) is not None

    def _find_option(self, given: str) -> str | None:
        """Return the key of an option, or of the switch after `no_`; hyphens are accepted."""
        for name in (given, given.replace("-", "_")):
            if name in self.hints or self.hints.get(_without_no(name)) is bool:
                return name
        return None

    def _is_cleared(self, name: str, given: list[str]) -> bool:
        """Return whether the words of an option clear its value."""
        hint = self.hints[name]
        return given in (["none"], ["null"]) and is_optional(hint) and given[0] not in choices_of(hint)

    def _to_yaml(self, name: str, given: list[str]) -> str:
        """Return the words of an option as jsonargparse reads them."""
        hint = self.hints[name]
        if is_list(hint):
            if len(given) == 1 and given[0].startswith("[") and not _is_repeated(self.fields[name]):
                return given[0]
            return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(given, ensure_ascii=False))
        if hint is bool:
            return _SWITCHED.get(given[0].lower(), given[0])
        return given[0]

    def _explain(self, message: str, options: Mapping[str, list[str]]) -> str:
        """Rewrite an error message of jsonargparse in this project's wording."""
        found = re.match(r'Parser key "([^"]+)"', message)
        if found and found[1] in options:
            name = found[1]
            return f"`--{name}` must be {expected_words(self.hints[name])}, got {' '.join(options[name])!r}"
        if found := re.match(r"[Uu]nrecognized arguments: (\S+)", message):
            text = found[1].partition("=")[0]
            nearest = self._nearest(text.removeprefix("--").replace("-", "_"), sign="--")
            return f"unknown argument {text!r}{nearest}"
        if found := re.search(r"arguments are required: (.*)", message):
            names = found[1].split(", ")
            shown = [name if _is_positional(self.fields[name]) else f"--{name}" for name in names]
            return f"{', '.join(shown)}: required, but not given"
        return " ".join(message.split())

    def _nearest(self, name: str, section: str = "", sign: str = "") -> str:
        """Return the hint for an unknown name: the closest known one, after `sign`, or a pointer to --help."""
        prefix = f"{section}." if section else ""
        known = [key.removeprefix(prefix) for key in (*self.sections, *self.fields) if key.startswith(prefix)]
        close = difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {sign + close[0]!r}?" if close else "; see --help for the known ones"

    # -------- the recipe

    def _read_recipe(self, path: str | Path) -> tuple[jsonargparse.Namespace, dict[str, Any]]:
        """Return the values of a recipe as jsonargparse parses them, and its mappings as written."""
        values = dict(self._flatten(path, read_mapping(path), read_mapping(path, RecipeText)))
        mappings = copy.deepcopy({key: value for key, value in values.items() if isinstance(value, dict)})
        try:
            recipe = self.parser.parse_object(values, defaults=False)
        except argparse.ArgumentError:
            for key, value in values.items():
                try:
                    self.parser.parse_object({key: value}, defaults=False)
                except argparse.ArgumentError:
                    expected = expected_words(self.hints[key])
                    raise ValueError(f"{path}: `{key}` must be {expected}, got {value!r}") from None
            raise
        return recipe, mappings

    def _flatten(self, path: str | Path, recipe: dict[str, Any], written: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield each key and value of a recipe, the key with its section; `written` holds the values as text."""
        for name, value in recipe.items():
            text = written.get(str(name))
            if name in self.sections:
                if not isinstance(value, dict | None):
                    raise ValueError(f"{path}: section {name!r} must be a mapping of arguments, got {value!r}")
                texts = text if isinstance(text, dict) else {}
                for key, entry in (value or {}).items():
                    if _join(name, str(key)) not in self.fields:
                        nearest = self._nearest(str(key), name)
                        raise ValueError(f"{path}, section {name!r}: unknown key {key!r}{nearest}")
                    yield _join(name, key), self._check(path, _join(name, key), entry, texts.get(key))
            elif name in self.fields and name != "config":
                yield name, self._check(path, name, value, text)
            else:
                kind = "section" if self.sections else "key"
                raise ValueError(f"{path}: unknown {kind} {name!r}{self._nearest(str(name))}")

    def _check(self, path: str | Path, key: str, value: Any, text: Any) -> Any:
        """Return a recipe's value as written; refuse null, which jsonargparse accepts for any type."""
        hint = self.hints[key]
        if value is None and not is_optional(hint):
            raise ValueError(f"{path}: `{key}` must be {expected_words(hint)}, got null")
        if value is not None and isinstance(text, str) and plain_type(hint) == list[str]:
            value, text = [value], [text]  # one text, as on the command line
        return as_written(value, text, hint)


# ---------------------------------------------------------------- instances and fields


def resolved_recipe(*themes: Any) -> dict[str, Any]:
    """Return the value of every argument as a mapping that can be saved and read back as a recipe."""
    return {item.name: getattr(theme, item.name) for theme in themes for item in init_fields(theme)}


def require(holds: bool, name: str, expected: str, got: Any) -> None:
    """Check an argument.

    Raises:
        ValueError: if `holds` is false; the message names the argument, what was expected and what came.
    """
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, got {got!r}: set it with --{name}")


def init_fields(theme: Any) -> list[dataclasses.Field]:
    """Return the fields of a dataclass, or of an instance, that are arguments."""
    return [item for item in dataclasses.fields(theme) if item.init]


# ---------------------------------------------------------------- names


def _is_positional(item: dataclasses.Field) -> bool:
    return bool(item.metadata.get("positional"))


def _is_repeated(item: dataclasses.Field) -> bool:
    return bool(item.metadata.get("repeated"))


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _without_no(name: str) -> str:
    section, dot, key = name.rpartition(".")
    return f"{section}{dot}{key.removeprefix('no_')}"


def _metavar(item: dataclasses.Field, hint: Any) -> str | None:
    if hint is bool:
        return "[true|false]"
    if choices := choices_of(hint):
        return f"{{{','.join(map(str, choices))}}}"
    name = item.name.upper()
    if is_list(hint) and not _is_repeated(item):
        inner = choices_of(get_args(plain_type(hint))[0])
        name = f"{{{','.join(map(str, inner))}}}" if inner else name
        return f"{name} [{name} ...]"
    return name
