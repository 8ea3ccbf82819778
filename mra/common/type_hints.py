"""Types of arguments: what they take, in words, and values as YAML gives them."""

import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def plain_type(hint: Any) -> Any:
    """Return the type of an argument without None."""
    return Union[tuple(each for each in union_members(hint) if each is not NoneType)]  # noqa: UP007 (of a tuple)


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the types that a union allows, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_optional(hint: Any) -> bool:
    """Return whether an argument may be None."""
    return NoneType in union_members(hint)


def is_list(hint: Any) -> bool:
    """Return whether an argument holds several values."""
    return get_origin(plain_type(hint)) is list


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values of a `Literal`, of which other types have none."""
    plain = plain_type(hint)
    return get_args(plain) if get_origin(plain) is Literal else ()


def as_written(value: Any, text: Any, hint: Any) -> Any:
    """Return a value of a recipe as its author wrote it where the argument is text, which YAML takes for something else.

    Args:
        value: as YAML reads it, where `no` is false and 0123 is 83.
        text: as it is written.
        hint: type of the argument.
    """
    if is_list(hint) and isinstance(value, list) and isinstance(text, list):
        return [as_written(*pair, get_args(plain_type(hint))[0]) for pair in zip(value, text, strict=True)]
    if value is None or not isinstance(text, str):
        return value
    if plain_type(hint) is str or text in choices_of(hint):
        return text
    return as_number(value) if plain_type(hint) is float and isinstance(value, str) else value


def as_number(text: str) -> str:
    """Return `inf` and `nan`, as Python writes them, as YAML does."""
    return re.sub(r"^([-+]?)(inf|nan)$", r"\1.\2", text)


def expected_words(hint: Any) -> str:
    """Return what an argument takes, in words."""
    if choices := choices_of(hint):
        return f"one of {', '.join(map(str, choices))}"
    if hint is bool:
        return "true or false"
    plain = plain_type(hint)
    if get_origin(plain) is list:
        return f"a list, each item {expected_words(get_args(plain)[0])}"
    if len(options := union_members(plain)) > 1:
        return " or ".join(map(expected_words, options))
    return f"of type {getattr(plain, '__name__', plain)}"
