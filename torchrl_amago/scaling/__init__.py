"""Several processes, machines and devices for one run (docs/scaling.md)."""

from torchrl_amago.scaling.ranks import Ranks

__all__ = ["Ranks"]
