"""Values as classification: critics predict a distribution over bins, targets become soft labels.

The bins are equally spaced in symlog space by default: fine around zero, coarse where returns are
large, so that one range suits tasks whose returns differ by orders of magnitude.

Legend: C critics, G discounts, N bins.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrl.modules import functional as F
from torchrl.objectives import two_hot_encode

from torchrl_amago._validation import check_counts, check_positive
from torchrl_amago.modules.value_codec._scaled import ScaledCodec
from torchrl_amago.modules.value_codec.base import ValueCodec, ValueSpace
from torchrl_amago.modules.value_codec.popart import PopArt
from torchrl_amago.modules.value_codec.running_scale import RunningScale


class BinCodec(ValueCodec):
    """Base of codecs that classify; a subclass writes the labels (``encode``).

        loss(p, x) = - sum_n label(x)_n log softmax(p)_n
        decode(p)  = symexp(sum_n softmax(p)_n bins_n)

    The mean is taken in the space of the bins and then inverted, as in the public AMAGO code. A
    target outside of the range gets the label of the range's end; ``num_outside`` counts them, and
    the first ones cause a warning. :meth:`normalize` uses the statistics of a :class:`PopArt`.

    Args:
        num_discounts: G.
        num_bins: N, at least 2.
        min_return: lowest value of the range, in reward units times the loss's ``reward_scale``;
            ``max_return`` is the highest.
        symlog: space the bins equally in symlog space; False in reward units, for a narrow range.
        init_value: value that critics predict before training, in the range; None: as drawn.
        init_slope: order the last layer's first weights: each logit is one random number of the
            critic times its bin's place, from ``-init_slope`` to ``init_slope``. It makes critics
            distinguish actions sooner (``docs/value_codecs.md``); 10 is a good value.
        relative: count the range from the running mean of the sums of discounted rewards to the
            slice's end, in units of their root mean square, so that it fits rewards of any size.
        popart: statistics of targets behind :meth:`normalize`; default ``PopArt(num_discounts)``,
            ``RunningScale(num_discounts, power=2)`` if `relative`.

    Raises:
        ValueError: if the range is too narrow for so many bins, or a number out of its range.
    """

    not_settings = frozenset({"init_value", "init_slope"})  # only of critics' first weights
    # Standard deviation of `initial_bias`, in bins; the public AMAGO code's.
    INITIAL_SIGMA = 4.0
    # Looking at a counter makes the CPU wait for a GPU: seldom enough to cost nothing.
    UPDATES_PER_CHECK = 100

    def __init__(
        self,
        num_discounts: int,
        *,
        num_bins: int = 128,
        min_return: float = -100_000.0,
        max_return: float = 100_000.0,
        symlog: bool = True,
        init_value: float | None = None,
        init_slope: float | None = None,
        relative: bool = False,
        popart: ScaledCodec | None = None,
    ) -> None:
        super().__init__()
        check_counts(num_bins=num_bins)
        if init_value is not None and not min_return <= init_value <= max_return:
            raise ValueError(
                f"init_value must be in [min_return={min_return}, max_return={max_return}], got "
                f"{init_value}. Widen the range, or leave it None."
            )
        if init_slope is not None:
            check_positive("Use None for weights without order.", init_slope=init_slope)
        self.symlog, self.init_value, self.init_slope = symlog, init_value, init_slope
        self.relative = self.follows_rewards = relative
        default = partial(RunningScale, power=2) if relative else PopArt
        self.popart = popart or default(num_discounts)
        self.num_discounts = self.popart.num_discounts
        low, high = self._symlog(torch.tensor([min_return, max_return]))
        bins = torch.linspace(low, high, num_bins)
        if num_bins < 2 or not (bins.diff() > 0).all():
            raise ValueError(
                "min_return and max_return must be finite and leave room for two or more different "
                f"bins in float32, got {num_bins} bins in [{min_return}, {max_return}]."
            )
        self.register_buffer("bins", bins)
        self.register_buffer("num_outside", torch.zeros((), dtype=torch.int64))
        self._num_updates, self._has_warned = 0, False

    @property
    def event_shape(self) -> torch.Size:
        return self.bins.shape

    @property
    def bin_width(self) -> Tensor:
        """Distance of neighbouring bins, in symlog space if ``symlog``."""
        return self.bins[1] - self.bins[0]

    def initial_bias(self) -> Tensor | None:
        """Return logits ``[Bins]`` of a normal distribution around ``init_value``, or None."""
        if self.init_value is None:
            return None
        centre = self._symlog(torch.full_like(self.bins[0], self.init_value))
        return -0.5 * ((self.bins - centre) / (self.INITIAL_SIGMA * self.bin_width)).square()

    def initial_slope(self) -> Tensor | None:
        """Return each bin's place ``[Bins]``, from ``-init_slope`` to ``init_slope``, or None."""
        if self.init_slope is None:
            return None
        return self.init_slope * torch.linspace(-1.0, 1.0, len(self.bins), device=self.bins.device)

    def reset_parameters(self) -> None:
        self.popart.reset_parameters()
        self.num_outside.zero_()
        self._num_updates, self._has_warned = 0, False

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        return self.popart.mean_and_scale()

    @torch.no_grad()
    def update(self, target: Tensor, mask: Tensor) -> None:
        """Move the statistics, see :meth:`ValueCodec.update`; count targets out of range."""
        self.popart.update(target, mask)
        value = self._to_bin_space(target)
        # A return that is exactly the highest possible is inside, whatever rounding says.
        slack = 1e-3 * self.bin_width
        outside = (value < self.bins[0] - slack) | (value > self.bins[-1] + slack)
        self.num_outside += self.all_reduce((outside & mask).sum())[0]
        # A relative range follows the targets by itself.
        if not self.relative and not torch.compiler.is_compiling():
            self._warn_of_targets_outside()

    def decode(self, prediction: Tensor) -> Tensor:
        return self.to_space(self.raw_value(prediction), "value")

    def to_space(self, raw_value: Tensor, space: ValueSpace) -> Tensor:
        if not self.relative:
            return super().to_space(raw_value, space)
        mean_G, scale_G = self.mean_and_scale()
        return scale_G * raw_value + mean_G if space == "value" else raw_value

    def raw_value(self, prediction: Tensor) -> Tensor:
        """Return the mean bin in units of the range: ``[..., Bins] -> [...]``, at least float32."""
        dtype = _dtype(prediction)
        # Autocast would round the product to bfloat16, which knows two or three digits of a value.
        with torch.autocast(prediction.device.type, enabled=False):
            mean = prediction.softmax(-1, dtype=dtype) @ self.bins.to(dtype)
        return F.symexp(mean) if self.symlog else mean

    def normalize(self, value: Tensor) -> Tensor:
        return self.popart.normalize(value)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy with the label, ``[..., C, G]``."""
        log_prob_CGN = self._log_probs(prediction, target)
        label_1GN = self.encode(target.detach()).unsqueeze(-3)
        return -(label_1GN * log_prob_CGN).sum(-1)

    def _log_probs(self, prediction: Tensor, target: Tensor) -> Tensor:
        fitting = prediction.shape[:-3] + prediction.shape[-2:-1]
        if target.shape != fitting or prediction.shape[-1:] != self.bins.shape:
            raise ValueError(
                f"the loss compares predictions [..., C, G, {len(self.bins)}] with targets "
                f"[..., G], got {tuple(prediction.shape)} and {tuple(target.shape)}. Use "
                "make_critic(policy, value_codec=codec)."
            )
        return prediction.log_softmax(-1, dtype=_dtype(prediction))

    def _to_bin_space(self, value: Tensor) -> Tensor:
        return self._symlog(self.popart.normalize(value) if self.relative else value)

    def _symlog(self, value: Tensor) -> Tensor:
        value = value.to(_dtype(value))
        return F.symlog(value) if self.symlog else value

    def _warn_of_targets_outside(self) -> None:
        is_due = self._num_updates % self.UPDATES_PER_CHECK == 0
        self._num_updates += 1
        if self._has_warned or not is_due or not self.num_outside:
            return
        self._has_warned = True
        ends = self.bins[[0, -1]]
        low, high = (F.symexp(ends) if self.symlog else ends).tolist()
        warnings.warn(
            f"{self.num_outside} TD targets so far lie outside of [{low:g}, {high:g}]. Widen "
            "min_return and max_return, which bound returns times the loss's reward_scale.",
            stacklevel=4,  # the caller of `update`, which no_grad wraps
        )


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class TwoHot(BinCodec):
    """Classification with two-hot labels (arXiv 2301.04104; AMAGO-2, arXiv 2411.11188).

    A target's label is on the two bins around it, and the label's mean is the target. Arguments:
    see :class:`BinCodec`.

    Example:
        >>> codec = TwoHot(1, num_bins=5, min_return=-2.0, max_return=2.0, symlog=False)
        >>> codec.encode(torch.tensor([0.25]))
        tensor([[0.0000, 0.0000, 0.7500, 0.2500, 0.0000]])
    """

    def encode(self, target: Tensor) -> Tensor:
        """Return the weights of the two bins around each target, ``[..., G] -> [..., G, Bins]``."""
        return two_hot_encode(self._to_bin_space(target), self.bins)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        log_prob_CGN = self._log_probs(prediction, target)
        # The product with dense labels would read and write every bin for the two that count.
        value_G = self._to_bin_space(target.detach())
        bins_N = self.bins.to(value_G.dtype)
        # Searching inner bins only keeps the index valid, for a NaN too.
        below_G = torch.bucketize(value_G, bins_N[1:-1], right=True)
        low_G, high_G = bins_N[below_G], bins_N[below_G + 1]
        weight_G = ((value_G - low_G) / (high_G - low_G)).clamp(0.0, 1.0)
        index_1G2 = torch.stack([below_G, below_G + 1], -1).unsqueeze(-3)
        weight_1G2 = torch.stack([1.0 - weight_G, weight_G], -1).unsqueeze(-3)
        log_prob_CG2 = log_prob_CGN.gather(-1, index_1G2.expand(*log_prob_CGN.shape[:-1], 2))
        return -(weight_1G2 * log_prob_CG2).sum(-1)


class HLGauss(BinCodec):
    """Classification with histograms of normal distributions as labels (arXiv 2403.03950).

    A target's label is the mass of a normal distribution around it in each bin, renormalised. The
    label's mean is the target up to 1e-5 of a bin; closer than four ``sigma`` to the range's ends
    it lies further inside, by 0.8 ``sigma`` at most.

    Args:
        sigma: standard deviation of the distribution, in bins; 0.75 is the published one. Smaller
            ones put the mean off by up to ``exp(-2 (pi sigma)^2) / pi`` bins.
        options: other arguments, see :class:`BinCodec`.

    Example:
        >>> codec = HLGauss(1, num_bins=5, min_return=-2.0, max_return=2.0, symlog=False)
        >>> codec.encode(torch.tensor([0.0])).round(decimals=3)
        tensor([[0.0220, 0.2300, 0.4950, 0.2300, 0.0220]])
    """

    def __init__(self, num_discounts: int, *, sigma: float = 0.75, **options: Any) -> None:
        super().__init__(num_discounts, **options)
        check_positive("Use 0.75, as published.", sigma=sigma)
        self.sigma = sigma

    def encode(self, target: Tensor) -> Tensor:
        """Return the mass of every bin, ``[..., G] -> [..., G, Bins]``."""
        # Far outside of the range no bin would have any mass.
        value_G = self._to_bin_space(target).clamp(self.bins[0], self.bins[-1])
        edges_N = torch.cat([self.bins, self.bins[-1:] + self.bin_width]) - 0.5 * self.bin_width
        z_GN = (edges_N - value_G.unsqueeze(-1)) / (self.sigma * self.bin_width)
        mass_GN = torch.special.ndtr(z_GN).diff(dim=-1)
        return mass_GN / mass_GN.sum(-1, keepdim=True)
