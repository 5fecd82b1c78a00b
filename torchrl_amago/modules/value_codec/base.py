"""The interface between values in reward units and what critics predict."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn


class ValueCodec(nn.Module, abc.ABC):
    """Interface between values in reward units and what critics predict.

    A critic predicts one entry of :attr:`event_shape` per value: ``()`` where it is a number,
    ``(Bins,)`` where it is the logits of a classification. Shapes below write ``*event`` for it.

    Example:
        >>> class Plain(ValueCodec):
        ...     def update(self, target, mask): pass
        ...     def encode(self, target): return target
        ...     def decode(self, prediction): return prediction
        ...     def normalize(self, value): return value
        ...     def loss(self, prediction, target):
        ...         return (prediction - target.unsqueeze(-2)).square()
        >>> Plain().loss(torch.zeros(1, 1, 2, 1), torch.full((1, 1, 1), 3.0)).flatten()
        tensor([9., 9.])
        >>> Plain().event_shape
        torch.Size([])
    """

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one raw prediction."""
        return torch.Size()

    def initial_bias(self) -> Tensor | None:
        """First bias of the critics' last layer, ``[*event]``; None leaves it as it was drawn."""
        return None

    def initial_slope(self) -> Tensor | None:
        """First joint variation of the outputs for a value, ``[*event]``; None: each by itself."""
        return None

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of targets as the statistics have them, ``[G]`` or ``[]``."""
        return torch.zeros(()), torch.ones(())

    @property
    def settings(self) -> dict[str, Any]:
        """Options that change the codec's function but no shape, as JSON values."""
        return {"kind": type(self).__name__}

    def reset_parameters(self) -> None:
        """Start the statistics anew, if there are any."""
        return

    @abc.abstractmethod
    def update(self, target: Tensor, mask: Tensor) -> None:
        """Take a batch of targets ``[..., G]`` into the statistics, where mask ``[..., 1]`` is True."""

    @abc.abstractmethod
    def encode(self, target: Tensor) -> Tensor:
        """Turn targets in reward units ``[..., G]`` into labels ``[..., G, *event]``."""

    @abc.abstractmethod
    def decode(self, prediction: Tensor) -> Tensor:
        """Turn raw predictions ``[..., G, *event]`` into values in reward units ``[..., G]``."""

    @abc.abstractmethod
    def normalize(self, value: Tensor) -> Tensor:
        """Turn values in reward units ``[..., G]`` into values of a scale that does not drift."""

    def normalized(self, prediction: Tensor) -> Tensor:
        """Raw predictions ``[..., G, *event]`` as such values ``[..., G]``."""
        return self.normalize(self.decode(prediction))

    @abc.abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Loss of each prediction ``[..., C, G, *event]`` for a target ``[..., G]``: ``[..., C, G]``.

        Unreduced, and without gradient to the target.
        """
