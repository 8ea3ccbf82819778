"""Recipes: YAML files of arguments, written by hand or saved by a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


# First and last line of a recipe saved by a run, to detect truncation: it must hold every argument.
RECIPE_START = "# Every argument of a run, as resolved."
RECIPE_END = "# End of the arguments."


_UNICODE_BREAKS = set("\x85\u2028\u2029")

# Raised by PyYAML, besides its own errors, for values like `!!int x`, `2026-13-01` and very deep nesting.
UNREADABLE_YAML = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


class _NoKeyTwice(yaml.constructor.BaseConstructor):
    """YAML constructor that refuses duplicate keys, of which YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class RecipeValues(_NoKeyTwice, yaml.SafeLoader):
    """YAML loader with typed values."""


class RecipeText(_NoKeyTwice, yaml.BaseLoader):
    """YAML loader that reads every value as text."""


class _RecipeDumper(yaml.SafeDumper):
    """YAML dumper that escapes the line breaks of Unicode, which YAML would read as spaces."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _UNICODE_BREAKS & set(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_RecipeDumper.add_representer(str, _represent_text)


def read_mapping(path: str | Path, loader: type = RecipeValues) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; a file of comments is an empty mapping.

    Args:
        path: the file.
        loader: loader class, which decides how values are read.

    Raises:
        ValueError: if the file is missing, empty, not YAML or not a mapping, has a duplicate key, or is a truncated recipe
            of a run.
    """
    if not Path(path).is_file():
        raise ValueError(f"`config`: no recipe at {str(path)!r}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        first = text.split("\n", 1)[0]
        is_saved = first == RECIPE_START or (first == text and RECIPE_START.startswith(text))
        if text and is_saved and RECIPE_END not in text:
            raise ValueError(f"{path}: truncated, its last line is not {RECIPE_END!r}; use the recipe of a checkpoint")
        recipe = _load_yaml(text, loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML in UTF-8 ({' '.join(str(error).split())})") from None
    if not text:
        raise ValueError(f"{path}: the file is empty, expected a mapping of arguments to values")
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a mapping of arguments to values, got a {type(recipe).__name__}")
    return recipe


def _load_yaml(text: str, loader: Any) -> Any:
    try:
        return yaml.load(text, loader)
    except UNREADABLE_YAML as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def format_recipe(recipe: Mapping[str, Any]) -> str:
    """Return a resolved recipe as YAML, with the first and last line that mark it as complete."""
    text = yaml.dump(dict(recipe), Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)
    return f"{RECIPE_START}\n{text}{RECIPE_END}\n"
