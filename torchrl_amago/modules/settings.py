"""What a part was built with, as plain values that a file can hold and another run compare."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Configurable:
    """Base of what remembers its constructor's arguments, and those of its base classes' constructors.

    Subclasses have nothing to do for it.

    Example:
        >>> class Average(Configurable):
        ...     not_settings = frozenset({"chunk"})
        ...     def __init__(self, keep=0.9, chunk=64): ...
        >>> Average(keep=0.5).settings
        {'type': 'Average', 'keep': 0.5}
    """

    #: Arguments that leave the function as it is: how it is computed, or where weights start.
    not_settings: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments and the class's name, JSON-able; numbers that were set anew as they are now."""
        settings = {"type": type(self).__name__}
        for name, value in vars(self).get("_arguments", {}).items():
            if name not in self.not_settings:
                now = vars(self).get(name)
                settings[name] = plain(now if isinstance(now, bool | int | float | str) else value)
        return settings


def _remembering(init: Callable) -> Callable:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Configurable, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {
            name: plain(bound.arguments[name])
            for name, parameter in list(signature.parameters.items())[1:]
            if parameter.kind not in _VARIABLE
        }
        # The constructors of bases ran inside of this one.
        vars(self)["_arguments"] = {**vars(self).get("_arguments", {}), **given}

    return wrapped


def plain(value: object) -> Any:
    """A value as JSON can hold it, equal to itself after reading: what isn't data goes by its name.

    Example:
        >>> plain({("a", "b"): (1, float("inf")), "norm": torch.nn.Identity})
        {'a.b': [1, 'inf'], 'norm': 'Identity'}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Configurable):
        return value.settings
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **plain(fields)}
    if isinstance(value, Mapping):
        return {_name(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return getattr(value, "__name__", type(value).__name__)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under one dotted name each.

    Example:
        >>> flatten({"actor": {"hidden_size": 8}, "discounts": [0.9]})
        {'actor.hidden_size': 8, 'discounts': [0.9]}
    """
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _name(key: object) -> str:
    return ".".join(map(str, key)) if isinstance(key, tuple) else str(key)
