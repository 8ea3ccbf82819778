"""Types of arguments: descriptions for messages, and values read from YAML."""

import math
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
    """Return the values of a `Literal`, empty for other types."""
    plain = plain_type(hint)
    return get_args(plain) if get_origin(plain) is Literal else ()


def as_written(value: Any, text: Any, hint: Any) -> Any:
    """Return a recipe's value; text arguments keep the written text where YAML would parse another type.

    Args:
        value: the value as read by YAML, which turns `no` into false and 0123 into 83.
        text: the value as written in the file.
        hint: type of the argument.
    """
    if is_list(hint) and isinstance(value, list) and isinstance(text, list):
        return [as_written(*pair, get_args(plain_type(hint))[0]) for pair in zip(value, text, strict=True)]
    if value is None or not isinstance(text, str):
        return value
    return text if plain_type(hint) is str or text in choices_of(hint) else value


def is_finite(value: Any) -> bool:
    """Return whether a value, or each item of a list, is no infinite number and not NaN."""
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def expected_words(hint: Any) -> str:
    """Describe the values that an argument takes."""
    if choices := choices_of(hint):
        return f"one of {', '.join(map(str, choices))}"
    if hint is bool:
        return "true or false"
    plain = plain_type(hint)
    if get_origin(plain) is list:
        return f"a list, each item {expected_words(get_args(plain)[0])}"
    if len(options := union_members(plain)) > 1:
        return " or ".join(map(expected_words, options))
    if plain is float:
        return "a finite number"
    return f"of type {getattr(plain, '__name__', plain)}"
