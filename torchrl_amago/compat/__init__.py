"""Weights of AMAGO 3.x agents, loaded into our modules."""

from torchrl_amago.compat._files import read_amago_weights
from torchrl_amago.compat._load import WeightReport, load_amago_weights

__all__ = ["WeightReport", "load_amago_weights", "read_amago_weights"]
