"""Codecs between values and critics' predictions: encode a target, compare, read it back.

A codec turns TD targets into what critics predict and back: ``encode(target) -> label``,
``loss(prediction, target)``, ``decode(prediction) -> value``, ``update(target, mask)``. Whatever it
keeps are buffers, so they travel with checkpoints, devices and weight synchronisation.

``base`` holds the interface, ``popart`` the scalar codec, ``bins`` those that classify.
"""

from torchrl_amago.modules.value_codec.base import ValueCodec
from torchrl_amago.modules.value_codec.bins import BinCodec, HLGauss, TwoHot
from torchrl_amago.modules.value_codec.popart import PopArt

__all__ = ["BinCodec", "HLGauss", "PopArt", "TwoHot", "ValueCodec"]
