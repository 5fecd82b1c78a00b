"""Constructor arguments, checked and kept as plain values that files hold and runs compare."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import torch

from torchrl_amago._validation import check_counts

# Arguments that count from 1 in every class. Some numbers of layers may be 0: they aren't here.
_COUNTS = frozenset({
    "action_size", "context_length", "d_conv", "d_ff", "d_model", "d_state", "embedding_size",
    "expand", "feature_size", "goal_size", "hidden_size", "image_features", "in_features",
    "input_size", "length", "max_positions", "max_streams", "num_actions", "num_blocks",
    "num_critics", "num_discounts", "num_goals", "num_heads", "num_members", "num_modes",
    "num_outputs", "num_params", "num_tokens", "num_values", "out_features", "output_size",
    "residual_size", "state_size", "vector_features", "window",
})  # fmt: skip
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Configurable:
    """Base of classes that remember their constructors' arguments, those of their bases included.

    Sizes and other counts are checked by name: a constructor raises ValueError for one that isn't
    an integer of at least 1.
    """

    #: Arguments that leave the function as it is: the way it is computed, or first weights.
    not_settings: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments and the class's name, JSON-able; attributes set anew count as they are now."""
        settings = {"type": type(self).__name__}
        for name, value in vars(self).get("_arguments", {}).items():
            if name not in self.not_settings:
                now = vars(self).get(name)
                settings[name] = plain(now if isinstance(now, bool | int | float | str) else value)
        return settings


def _remembering(init: Callable) -> Callable:
    signature = inspect.signature(init)
    own = [n for n, p in list(signature.parameters.items())[1:] if p.kind not in _VARIABLE]

    @functools.wraps(init)
    def wrapped(self: Configurable, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            return init(self, *args, **kwargs)  # Python's own message says more
        bound.apply_defaults()
        named = {name: bound.arguments[name] for name in own}
        given = {n: x for n, x in named.items() if not isinstance(x, Sequence | None)}
        counts = {name: x for name, x in given.items() if name in _COUNTS}
        check_counts(f"See {type(self).__name__}'s arguments.", **counts)
        init(self, *args, **kwargs)
        # The constructors of bases ran inside of this one.
        vars(self)["_arguments"] = {**vars(self).get("_arguments", {}), **plain(named)}

    return wrapped


def plain(value: object) -> Any:
    """Return the value as JSON can hold it, equal to itself after reading; non-data by its name."""
    match value:
        case None | bool() | int() | str():
            return value
        case Integral():  # numpy's
            return int(value)
        case Real():
            return float(value) if math.isfinite(value) else str(float(value))
        case torch.dtype():
            return str(value)
        case Configurable():
            return value.settings
        case Mapping():
            names = (".".join(map(str, k)) if isinstance(k, tuple) else str(k) for k in value)
            return dict(zip(names, map(plain, value.values()), strict=True))
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **plain(fields)}
    return getattr(value, "__name__", type(value).__name__)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under one dotted name each."""
    flat = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
