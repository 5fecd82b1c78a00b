"""The interface between values in reward units and what critics predict."""

from __future__ import annotations

import abc
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_amago.modules._settings import Configurable

ValueSpace = Literal["raw", "normalized", "value"]


class ValueCodec(Configurable, nn.Module, abc.ABC):
    """Base of codecs.

    A critic predicts one entry of :attr:`event_shape`, ``*event`` below, per value: ``()`` for a
    number, ``(Bins,)`` for the logits of a classification. Averages over actions or samples are
    made of :meth:`raw_value`, one number for each prediction; :meth:`to_space` turns an average
    into a normalised value or one in reward units.

    Example:
        >>> class Plain(ValueCodec):
        ...     def update(self, target, mask): pass
        ...     def encode(self, target): return target
        ...     def decode(self, prediction): return prediction
        ...     def normalize(self, value): return value
        ...     def loss(self, prediction, target):
        ...         return (prediction - target.unsqueeze(-2)).square()
        >>> Plain().loss(torch.zeros(1, 1), torch.tensor([3.0]))
        tensor([[9.]])
    """

    follows_rewards = False  # True: :meth:`update` gets targets of all rewards to the slice's end
    all_reduce = staticmethod(lambda *sums: sums)  # over data-parallel ranks, see Ranks.attach

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one raw prediction."""
        return torch.Size()

    def initial_bias(self) -> Tensor | None:
        """Return the first bias of the critics' last layer, ``[*event]``; None: as drawn."""
        return None

    def initial_slope(self) -> Tensor | None:
        """Return the first joint slope of a value's outputs, ``[*event]``; None: independent."""
        return None

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the targets' running mean and standard deviation, ``[G]`` or ``[]``."""
        return torch.zeros(()), torch.ones(())

    def absorb_scale(self, critic: nn.Module, *params: TensorDictBase) -> None:
        """Move a change of scale into the last layers of a critic's weights, if the codec has one.

        Called before each training pass, with the critic's online and target weights.
        """
        return

    def reset_parameters(self) -> None:
        """Reset the statistics, if there are any."""
        return

    @abc.abstractmethod
    def update(self, target: Tensor, mask: Tensor) -> None:
        """Move the statistics towards real targets ``[..., G]`` in reward units.

        The mask is bool ``[..., 1]``; entries under False may be anything, NaN too. Sums of
        targets go through ``self.all_reduce``.
        """

    @abc.abstractmethod
    def encode(self, target: Tensor) -> Tensor:
        """Turn targets in reward units ``[..., G]`` into labels ``[..., G, *event]``."""

    @abc.abstractmethod
    def decode(self, prediction: Tensor) -> Tensor:
        """Turn raw predictions ``[..., G, *event]`` into values in reward units ``[..., G]``."""

    @abc.abstractmethod
    def normalize(self, value: Tensor) -> Tensor:
        """Turn values in reward units ``[..., G]`` into values on a scale that does not drift."""

    def normalized(self, prediction: Tensor) -> Tensor:
        """Turn raw predictions ``[..., G, *event]`` into normalised values ``[..., G]``."""
        return self.normalize(self.decode(prediction))

    def raw_value(self, prediction: Tensor) -> Tensor:
        """Reduce raw predictions ``[..., *event]`` to one number each, ``[...]``."""
        return self.decode(prediction) if self.event_shape else prediction

    def to_space(self, raw_value: Tensor, space: ValueSpace) -> Tensor:
        """Turn raw values ``[..., G]``, or averages of them, into another space ``[..., G]``."""
        if space == "normalized":
            return self.normalize(raw_value) if self.event_shape else self.normalized(raw_value)
        is_value = space == "raw" or self.event_shape
        return raw_value if is_value else self.decode(raw_value)

    @abc.abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare predictions ``[..., C, G, *event]`` with targets ``[..., G]``: ``[..., C, G]``.

        Unreduced, and without gradient to the target.
        """
