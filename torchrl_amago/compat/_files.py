"""Reader of AMAGO's weight files, which unpickles nothing but tensors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

Source = str | Path | Mapping[str, Tensor]

# Prefixes that distributed training and torch.compile put before every name.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


def read_amago_weights(source: Source) -> dict[str, Tensor]:
    """Return the weights of an AMAGO 3.x agent by AMAGO's names, on the CPU.

    Args:
        source: a state dict, or one of the files that AMAGO writes under ``<run>/ckpts``:
            ``policy_weights/policy_epoch_<n>.pt``, ``latest/policy.pt``, or
            ``training_states/<run>_epoch_<n>/model.safetensors``.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: for a safetensors file without the package.
        ValueError: if it is damaged, or holds anything but tensors by name.

    Example:
        >>> _ = torch.save({"actor.out.bias": torch.zeros(2)}, "policy.pt")
        >>> read_amago_weights("policy.pt")
        {'actor.out.bias': tensor([0., 0.])}
    """
    weights = source if isinstance(source, Mapping) else _read(Path(source))
    others = [n for n, v in weights.items() if not (isinstance(n, str) and isinstance(v, Tensor))]
    if others:
        raise ValueError(
            f"AMAGO's weights are tensors by name, but the entries {others[:5]} are not. Give the "
            "agent's state dict, agent.state_dict()."
        )
    return {_WRAPPERS.sub("", name): value for name, value in weights.items()}


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            install = "pip install 'torchrl-amago[amago]'"
            raise ImportError(f"{path.name} needs the package safetensors: {install}") from error
        return load_file(path)
    with path.open("rb") as file:
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, TypeError) as error:
            # torch's own message advises weights_only=False, which runs code of the file.
            raise ValueError(
                f"{path} must be a whole file of torch.save with a dict of tensors and nothing "
                "else. Save the state dict alone: torch.save(agent.state_dict(), path)."
            ) from error
