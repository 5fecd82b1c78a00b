"""Weights of AMAGO 3.x agents, read into our modules.

``files`` reads them, ``weights`` translates names and layouts, ``kinds`` tells modules apart and
measures them, ``describe`` says how to build the policy they fit, ``plan`` finds a place for every weight,
``load`` fills it.
"""

from torchrl_amago.compat.describe import AMAGODescription, describe_amago_weights
from torchrl_amago.compat.files import read_amago_weights
from torchrl_amago.compat.kinds import PartDescription
from torchrl_amago.compat.load import LoadReport, load_amago_weights

__all__ = [
    "AMAGODescription",
    "LoadReport",
    "PartDescription",
    "describe_amago_weights",
    "load_amago_weights",
    "read_amago_weights",
]
