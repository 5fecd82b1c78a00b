"""Arguments that name one of a few things, or a part, or are one; those that count; and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from numbers import Integral
from typing import TypeVar

Builder = TypeVar("Builder", bound=Callable)


def pick(argument: str, choice: str | Builder, known: Mapping[str, Builder], hint: str) -> Builder:
    """What builds a part: looked up by name, or the class or function that was given.

    Args:
        argument: the argument's name, for the message.
        choice: its value.
        known: builders by name.
        hint: the message's last sentence, a remedy.

    Raises:
        ValueError: for a name that isn't known.

    Example:
        >>> pick("number", "whole", {"whole": int}, hint="Use 'whole'.")
        <class 'int'>
    """
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(
            f"{argument} must be one of {sorted(known)}, a class or a function, got {choice!r}. {hint}"
        )
    return known[choice]


def name_of(choice: object) -> object:
    """A function's name, with the arguments that a partial one is given; other values as they are.

    Example:
        >>> name_of(partial(max, default=3.0)), name_of(0.5)
        ('max(default=3.0)', 0.5)
    """
    if isinstance(choice, partial):
        given = [*map(repr, choice.args), *(f"{k}={v!r}" for k, v in choice.keywords.items())]
        return f"{name_of(choice.func)}({', '.join(given)})"
    return getattr(choice, "__qualname__", type(choice).__name__) if callable(choice) else choice


def check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError for what isn't among the choices; the first of them is the usual one.

    Raises:
        ValueError: for another value.

    Example:
        >>> check_choice("side", "left", ("right", "left"))
    """
    if value not in choices:
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}. "
            f"Use {choices[0]!r} where in doubt."
        )


def check_counts(remedy: str, **counts: int) -> None:
    """Raise ValueError for counts below 1 and what is no integer, by name.

    Args:
        remedy: the message's last sentence.
        counts: values by the arguments' names.

    Raises:
        ValueError: for the first such.

    Example:
        >>> check_counts("Use 4, as published.", num_critics=2)
    """
    for name, value in counts.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}. {remedy}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}. {remedy}")


def check_positive(remedy: str, **numbers: float) -> None:
    """Refuse numbers that aren't positive and finite, by name; see :func:`check_counts`.

    Raises:
        ValueError: for the first such.

    Example:
        >>> check_positive("Use 1 where in doubt.", temperature=0.5)
    """
    for name, value in numbers.items():
        if value <= 0 or not isfinite(value):
            finite = "" if isfinite(value) else " and finite"
            raise ValueError(f"{name} must be positive{finite}, got {value}. {remedy}")


def check_fractions(remedy: str, **numbers: float) -> None:
    """Raise ValueError for numbers outside of [0, 1], by name; see :func:`check_counts`.

    Example:
        >>> check_fractions("Use 0.5 where in doubt.", alpha=0.5)
    """
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}. {remedy}")
