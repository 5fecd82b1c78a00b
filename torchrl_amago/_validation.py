"""Validation of arguments: named choices, builders, counts and ranges of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf, isfinite
from numbers import Integral
from typing import TypeVar

Builder = TypeVar("Builder", bound=Callable)


def pick(
    argument: str, choice: str | Builder, known: Mapping[str, Builder], remedy: str = ""
) -> Builder:
    """Return a part's builder: looked up by name, or the class or function that was given.

    The remedy is the last sentence of the ValueError for an unknown name, as in all checks below.
    """
    is_known = not isinstance(choice, str) or choice in known
    _require(is_known, argument, f"one of {sorted(known)}, a class or a function", choice, remedy)
    return known[choice] if isinstance(choice, str) else choice


def name_of(choice: object) -> object:
    """Return a function's name, with the arguments of a partial one; other values as they are."""
    if isinstance(choice, partial):
        given = [*map(repr, choice.args), *(f"{k}={v!r}" for k, v in choice.keywords.items())]
        return f"{name_of(choice.func)}({', '.join(given)})"
    return getattr(choice, "__qualname__", type(choice).__name__) if callable(choice) else choice


def check_choice(argument: str, value: object, choices: Sequence[object], remedy: str = "") -> None:
    """Raise ValueError if the value is none of the choices."""
    _require(value in choices, argument, f"one of {', '.join(map(repr, choices))}", value, remedy)


def check_counts(remedy: str = "", **counts: int) -> None:
    """Raise ValueError for the first count that isn't an integer of at least 1."""
    for name, value in counts.items():
        is_integer = isinstance(value, Integral)
        rule = "at least 1" if is_integer else "an integer of at least 1"
        _require(is_integer and value >= 1, name, rule, value, remedy)


def check_positive(remedy: str = "", **numbers: float) -> None:
    """Raise ValueError for the first number that isn't positive and finite."""
    for name, value in numbers.items():
        rule = "positive" if isfinite(value) else "positive and finite"
        _require(value > 0 and isfinite(value), name, rule, value, remedy)


def check_not_negative(remedy: str = "", **numbers: float) -> None:
    """Raise ValueError for the first number that isn't finite and at least 0."""
    for name, value in numbers.items():
        _require(0 <= value < inf, name, "finite and at least 0", value, remedy)


def check_fractions(remedy: str = "", **numbers: float) -> None:
    """Raise ValueError for the first number outside of [0, 1]."""
    for name, value in numbers.items():
        _require(0 <= value <= 1, name, "in [0, 1]", value, remedy)


def _require(holds: bool, name: str, rule: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}. {remedy}".rstrip())
