"""Base of codecs of numbers on a moving scale."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from torchrl_amago._validation import check_fractions, check_positive
from torchrl_amago.modules.value_codec.base import ValueCodec


class ScaledCodec(ValueCodec):
    """Base of codecs whose ``weight * prediction + bias`` is ``(value - mu) / sigma``.

    All of them but sigma are buffers ``[G]``, which subclasses reset, and move by averages with a
    step of `beta`; ``nu`` is the mean of targets to an even power.
    """

    power = 2  # of the moment `nu`

    def __init__(self, num_discounts: int, beta: float) -> None:
        super().__init__()
        check_positive("Use 0.01, or 5e-4 as published.", beta=beta)
        check_fractions("It is the step size of moving averages.", beta=beta)
        self.num_discounts, self.beta = num_discounts, beta
        for name in ("mu", "nu", "weight", "bias"):
            self.register_buffer(name, torch.empty(num_discounts))
        self.register_buffer("count", torch.empty(()))

    @property
    @abc.abstractmethod
    def sigma(self) -> Tensor:
        """Scale of targets, ``[G]``, within bounds."""

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        return self.mu, self.sigma

    def encode(self, target: Tensor) -> Tensor:
        return self.normalize(target)

    def normalize(self, value: Tensor) -> Tensor:
        """Return ``(value - mu) / sigma``."""
        return (value - self.mu) / self.sigma

    def normalized(self, prediction: Tensor) -> Tensor:
        """Return ``weight * prediction + bias``, the space in which :meth:`loss` compares."""
        return self.weight * prediction + self.bias

    @torch.no_grad()
    def update(self, target: Tensor, mask: Tensor) -> None:
        is_first, old_mu, old_sigma = self.count == 0, self.mu.clone(), self.sigma
        target_NG = torch.where(mask, target, 0.0).float().flatten(0, -2)
        sums = mask.sum(), target_NG.sum(0), target_NG.pow(self.power).sum(0)
        num_real, sum_G, power_sum_G = self.all_reduce(*sums)
        any_real, divisor = (num_real > 0).to(self.count.dtype), num_real.clamp_min(1)
        self.count += any_real
        step = any_real * self.beta / (1.0 - (1.0 - self.beta) ** self.count.clamp_min(1))
        # Not lerp_: its rounding differs from the two products of the recorded numbers.
        self.mu.mul_(1.0 - step).add_(step * (sum_G / divisor))
        self.nu.mul_(1.0 - step).add_(step * (power_sum_G / divisor))
        # Every prediction keeps its value on the new scale, unless critics know nothing yet.
        old_mu = torch.where(is_first, self.mu, old_mu)
        old_sigma, sigma = torch.where(is_first, self.sigma, old_sigma), self.sigma
        self.weight.mul_(old_sigma / sigma)
        self.bias.mul_(old_sigma).add_(old_mu - self.mu).div_(sigma)

    def decode(self, prediction: Tensor) -> Tensor:
        """Return ``sigma * normalized(prediction) + mu``."""
        return self.sigma * self.normalized(prediction) + self.mu

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return squared errors of normalised values, ``[..., C, G]``."""
        label = self.encode(target.detach()).unsqueeze(-2)
        return (self.normalized(prediction) - label).square()
