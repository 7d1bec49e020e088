"""Converts and checks the values that a user gives, on the command line or in Python.

Each function takes a value and the name that the user gave it by, such as `--chunk-tokens` or `chunk_tokens`. It
returns the converted value, or raises one UsageError that names it.
"""

from __future__ import annotations

import json
import numbers
import operator
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from headinfer.errors import UsageError
from headinfer.utils.units import parse_bytes, parse_tokens

__all__ = [
    "byte_count",
    "check_text",
    "choice",
    "json_object",
    "optional",
    "path_text",
    "real_number",
    "shown",
    "token_count",
    "whole_number",
]

T = TypeVar("T")

_MOST = 2**63 - 1
_MOST_TOKENS = 2**40 - 1


def whole_number(value: Any, name: str, *, low: int = 1, high: int = _MOST) -> int:
    """Return a whole number.

    Args:
        value: an integer of Python, numpy or torch, a float without a fraction, or a decimal text.
        name: the name of the value, for the message.
        low: the smallest number that is allowed.
        high: the largest number that is allowed.

    Raises:
        UsageError: the value is something else, or out of range.
    """
    number = _integer(value)
    if number is None:
        raise UsageError(f"{name} is {shown(value)}: it must be a whole number")
    _check_range(number, name, low, high)
    return number


def token_count(value: Any, name: str, *, low: int = 1) -> int:
    """Return a number of tokens: a value as for whole_number(), or a text such as 4K or 1M.

    Raises:
        UsageError: the value is something else, or out of range.
    """
    return _with_unit(value, name, low, _MOST_TOKENS, parse_tokens, "a whole number, or a text such as 4K")


def byte_count(value: Any, name: str, *, low: int = 1) -> int:
    """Return a size in bytes: a value as for whole_number(), or a text such as 256MiB.

    Raises:
        UsageError: the value is something else, or out of range.
    """
    return _with_unit(value, name, low, _MOST, parse_bytes, "a whole number of bytes, or a text such as 256MiB")


def real_number(value: Any, name: str, *, low: float, high: float, allows_zero: bool = False) -> float:
    """Return a number in a range.

    Args:
        value: a number, or a decimal text.
        name: the name of the value, for the message.
        low: the smallest number that is allowed.
        high: the largest number that is allowed.
        allows_zero: whether 0 is allowed beside this range.

    Raises:
        UsageError: the value is something else, not finite, or out of range.
    """
    try:
        number = float(value) if isinstance(value, (numbers.Real, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise UsageError(f"{name} is {shown(value)}: it must be a number")
    if (allows_zero and number == 0) or low <= number <= high:
        return number
    allowed = f"{low:g} to {high:g}"
    raise UsageError(f"{name} is {number:g}: it must be {'0, or ' if allows_zero else 'a number '}from {allowed}")


def choice(value: Any, name: str, choices: Sequence[str]) -> str:
    """Return a text that must be one of several.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name} is {shown(value)}: it must be one of {', '.join(choices)}")
    return value


def path_text(value: Any, name: str) -> str:
    """Return a path as text.

    Raises:
        UsageError: the value is neither a text nor a path, or it is empty.
    """
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise UsageError(f"{name} is {shown(value)}: it must be a path, as a text or a pathlib.Path")
    if not path or "\0" in path:
        raise UsageError(f"{name} is {shown(path)}: name a path")
    return path


def json_object(value: Any, name: str) -> dict[str, Any]:
    """Return a mapping as a dictionary that JSON can hold.

    Raises:
        UsageError: the value is something else, or holds something that JSON cannot hold.
    """
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} is {shown(value)}: it must be a dictionary for JSON")
    try:
        json.dumps(dict(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} cannot be written as JSON ({error}): give numbers, texts, lists and dicts") from error
    return dict(value)


def check_text(text: str, name: str) -> str:
    """Return a text that UTF-8 can encode.

    Raises:
        UsageError: it cannot. A command line that is not UTF-8 gives such a text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: write it in UTF-8, or read it from a file") from error
    return text


def optional(convert: Callable[[Any, str], T]) -> Callable[[Any, str], T | None]:
    """Return a function that converts a value as `convert` does, and leaves None as it is."""
    return lambda value, name: None if value is None else convert(value, name)


def shown(value: Any) -> str:
    """Return a short text of a value for a message."""
    return value if isinstance(value, str) and re.fullmatch(r"[-+\w.]{1,24}", value) else reprlib.repr(value)


def _with_unit(value: Any, name: str, low: int, high: int, parse: Callable[[str], int], what: str) -> int:
    """Return a number that a text may give with a unit."""
    number = _integer(value)
    if number is None and isinstance(value, str):
        try:
            number = parse(value)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    if number is None:
        raise UsageError(f"{name} is {shown(value)}: it must be {what}")
    _check_range(number, name, low, high)
    return number


def _integer(value: Any) -> int | None:
    """Return a value as an integer; None if it is none."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith(("bool", "bool_")):
        return None
    try:
        if isinstance(value, str):
            return int(value)
        if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
            real = float(value)
            return int(real) if real.is_integer() else None
        return operator.index(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last one for several elements
        return None


def _check_range(number: int, name: str, low: int, high: int) -> None:
    if low <= number <= high:
        return
    figure = str(number) if number.bit_length() <= 128 else f"a number of {number.bit_length():,} bits"
    if number > high:
        needed = f"be at most {high:,}"
    elif low == 1:
        needed = "be a positive number"
    else:
        needed = "not be negative" if low == 0 else f"be at least {low:,}"
    raise UsageError(f"{name} is {figure}: it must {needed}")
