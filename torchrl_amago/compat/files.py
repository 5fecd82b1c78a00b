"""AMAGO's files of weights, read without unpickling anything but tensors."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

Source = str | Path | Mapping[str, Tensor]

# What distributed training and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def read_amago_weights(source: Source) -> dict[str, Tensor]:
    """Weights of an AMAGO 3.x agent by their names there, on the CPU.

    Args:
        source: a state dict, which is taken as it is, or one of the files that AMAGO writes under
            ``<run>/ckpts``: ``policy_weights/policy_epoch_<n>.pt``, ``latest/policy.pt``, or
            ``training_states/<run>_epoch_<n>/model.safetensors``.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: for a safetensors file without the package; the message names the extra.
        ValueError: if it holds anything but tensors by name.

    Example:
        >>> _ = torch.save({"actor.out.bias": torch.zeros(2)}, "policy.pt")
        >>> read_amago_weights("policy.pt")
        {'actor.out.bias': tensor([0., 0.])}
    """
    weights = source if isinstance(source, Mapping) else _read(Path(source))
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise ValueError(
            f"AMAGO's weights are tensors by name, got {_content(weights)}. Give the state dict of the "
            "agent, agent.state_dict()."
        )
    weights = dict(weights)
    while wrapper := _common_wrapper(weights):
        weights = {name.removeprefix(wrapper): value for name, value in weights.items()}
    return weights


def _common_wrapper(names: Collection[str]) -> str | None:
    wrappers = (w for w in _WRAPPERS if names and all(name.startswith(w) for name in names))
    return next(wrappers, None)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}. AMAGO writes policy_weights/policy_epoch_<n>.pt, latest/policy.pt "
            "and training_states/<run>_epoch_<n>/model.safetensors into <run>/ckpts."
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} must be a file of torch.save that holds tensors and nothing else: anything else "
            "could run code, and isn't read. Save the agent's state dict alone: "
            "torch.save(agent.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole file of torch.save ({error}). Copy it again."
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{path.name} needs the package safetensors, which is not installed. Install it with: "
            "pip install 'torchrl-amago[amago]'"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Copy it again, or give the .pt file."
        ) from error


def _content(weights: object) -> str:
    if not isinstance(weights, Mapping):
        return f"a {type(weights).__name__}"
    others = [str(n) for n, v in weights.items() if not isinstance(v, Tensor)]
    return f"a dict with {', '.join(others[:5]) or 'names that are no strings'}"
