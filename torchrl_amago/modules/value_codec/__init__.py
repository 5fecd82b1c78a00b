"""Codecs between values in reward units and critics' predictions."""

from torchrl_amago.modules.value_codec.base import ValueCodec, ValueSpace
from torchrl_amago.modules.value_codec.bins import BinCodec, HLGauss, TwoHot
from torchrl_amago.modules.value_codec.popart import PopArt
from torchrl_amago.modules.value_codec.running_scale import RunningScale

__all__ = ["BinCodec", "HLGauss", "PopArt", "RunningScale", "TwoHot", "ValueCodec", "ValueSpace"]
