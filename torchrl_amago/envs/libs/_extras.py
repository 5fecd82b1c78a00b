"""Packages of extras, imported where they are used, and the names that they know."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType


def import_extra(name: str, extra: str = "jax") -> ModuleType:
    """Import a module of an extra; raise ImportError with the command to install it."""
    with needs_extra(name.partition(".")[0], extra):
        return importlib.import_module(name)


@contextlib.contextmanager
def needs_extra(package: str, extra: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn an ImportError, or one of the given errors, into one with the command to install."""
    try:
        yield
    except (ImportError, *errors) as error:
        remedy = f'Install the extra: pip install "torchrl-amago[{extra}]"'
        raise ImportError(f"{package} must be installed ({error}). {remedy}.") from error


def check_known(argument: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of many, with those that are near it."""
    if value not in known:
        near = difflib.get_close_matches(value, known) or known[:3]
        raise ValueError(f"{argument} must be one of {len(known)} like {near}, got {value!r}.")
