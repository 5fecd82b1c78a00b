"""Values that a loss needs of critics: of stored actions, and averaged over a policy's actions.

Critics that list the values of all actions give exact averages; critics that take the action as an
input are asked about samples. Both answer the same questions here, so that the loss is one.

Legend: M steps, C critics, G discounts, A action size, K samples; `*` is what one raw prediction of
the value codec looks like: nothing, or its bins.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from torchrl_amago.modules.value_codec import ValueCodec
from torchrl_amago.objectives.functional import expected_value

ValueSpace = Literal["raw", "normalized", "value"]

#: `(state [M, D], actions [K, M, G, A] or None, frozen) -> raw predictions`
AskCritics = Callable[..., Tensor]


class PolicyValue(abc.ABC):
    """V(s) of every critic and discount: the average of Q(s, a) over the policy's actions."""

    @abc.abstractmethod
    def to(self, space: ValueSpace) -> Tensor:
        """`[M, C, G]`: raw predictions, the codec's normalised values, or values in reward units."""


def to_space(codec: ValueCodec, prediction: Tensor, space: ValueSpace) -> Tensor:
    """Raw predictions `[..., G, *]` as numbers `[..., G]`; of bins, `raw` is the value too."""
    if space == "normalized":
        return codec.normalized(prediction)
    return prediction if space == "raw" and not codec.event_shape else codec.decode(prediction)


class CriticAnswers(abc.ABC):
    """Calls of one kind of critics.

    Args:
        codec: turns raw predictions into numbers.
        ask: runs the critics.
    """

    def __init__(self, codec: ValueCodec, ask: AskCritics) -> None:
        self.codec, self.ask = codec, ask

    @abc.abstractmethod
    def online(
        self, state_MD: Tensor, action_MA: Tensor, policy: Distribution, differentiable: bool
    ) -> tuple[Tensor, PolicyValue]:
        """Values of stored actions, and of the policy's.

        Args:
            state_MD: states, with gradient.
            action_MA: stored actions, as critics are shown them.
            policy: `[M, G]` distributions of action vectors.
            differentiable: let gradients flow from the policy's value to the policy.

        Returns:
            Raw predictions `[M, C, G, *]` with gradient to critics and states; the policy's value,
            whose gradient goes to the policy alone.
        """

    @abc.abstractmethod
    def of_policy(self, state_MD: Tensor, policy: Distribution) -> PolicyValue:
        """The policy's value, as above, whose gradients nobody asks for."""


class ListedActions(CriticAnswers):
    """Critics `state -> [M, C, G, A, *]`: one pass, and exact averages."""

    def online(
        self, state_MD: Tensor, action_MA: Tensor, policy: Distribution, differentiable: bool
    ) -> tuple[Tensor, PolicyValue]:
        listed = self.ask(state_MD)
        probs = policy.probs if differentiable else policy.probs.detach()
        return self._of_action(listed, action_MA), _Average(self.codec, listed.detach(), probs)

    def of_policy(self, state_MD: Tensor, policy: Distribution) -> PolicyValue:
        return _Average(self.codec, self.ask(state_MD), policy.probs)

    def _of_action(self, listed: Tensor, action_MA: Tensor) -> Tensor:
        if not self.codec.event_shape:
            return expected_value(listed, action_MA.unsqueeze(-2))
        # Predictions of classes can't be mixed: a softened action counts as the hard one.
        index = action_MA.argmax(-1).view(*action_MA.shape[:-1], 1, 1, 1, 1)
        return listed.gather(-2, index.expand(*listed.shape[:-2], 1, listed.shape[-1])).squeeze(-2)


class ActionInput(CriticAnswers):
    """Critics `(state, action) -> [K, M, C, G, *]`: averages over samples of the policy.

    Args:
        codec: turns raw predictions into numbers.
        ask: runs the critics.
        num_samples: K.
    """

    def __init__(self, codec: ValueCodec, ask: AskCritics, num_samples: int) -> None:
        super().__init__(codec, ask)
        self.num_samples = num_samples

    def online(
        self, state_MD: Tensor, action_MA: Tensor, policy: Distribution, differentiable: bool
    ) -> tuple[Tensor, PolicyValue]:
        stored = self.ask(state_MD, action_MA.unsqueeze(-2))
        if not differentiable:
            return stored, self.of_policy(state_MD, policy)
        sample_KMGA = policy.rsample((self.num_samples,))
        of_policy = self.ask(state_MD.detach(), sample_KMGA, frozen=True)
        return stored, _Mean(self.codec, of_policy)

    def of_policy(self, state_MD: Tensor, policy: Distribution) -> PolicyValue:
        return _MeanInParts(self.codec, self.ask, state_MD, policy.sample((self.num_samples,)))


class _Average(PolicyValue):
    """Over listed actions, by their probabilities `[M, G, A]`."""

    def __init__(self, codec: ValueCodec, prediction: Tensor, probs_MGA: Tensor) -> None:
        self.codec, self.probs_MGA = codec, probs_MGA
        # Bins are read once, whatever will be asked for; they are most of the work.
        self.prediction = codec.decode(prediction) if codec.event_shape else prediction

    def to(self, space: ValueSpace) -> Tensor:
        average_MCG = expected_value(self.prediction, self.probs_MGA)
        if not self.codec.event_shape:
            # Scalars' spaces are affine in the prediction: average first, it is less work.
            return to_space(self.codec, average_MCG, space)
        return self.codec.normalize(average_MCG) if space == "normalized" else average_MCG


class _Mean(PolicyValue):
    """Over samples, the first dimension of predictions `[K, M, C, G, *]`."""

    def __init__(self, codec: ValueCodec, prediction: Tensor) -> None:
        self.codec, self.prediction = codec, prediction

    def to(self, space: ValueSpace) -> Tensor:
        return to_space(self.codec, self.prediction, space).mean(0)


class _MeanInParts(PolicyValue):
    """Over samples `[K, M, G, A]`, without gradient.

    Bins are many numbers for one: on a CPU they are read a part of the steps at a time, while they are
    in its caches, and never stand in memory all at once.
    """

    ROWS = 2048

    def __init__(
        self, codec: ValueCodec, ask: AskCritics, state_MD: Tensor, sample_KMGA: Tensor
    ) -> None:
        self.codec, self.ask = codec, ask
        self.state_MD, self.sample_KMGA = state_MD.detach(), sample_KMGA

    def to(self, space: ValueSpace) -> Tensor:
        with torch.no_grad():  # a decorator would stop torch.compile
            if not self._is_cut():
                return self._value(self.state_MD, self.sample_KMGA, space)
            K, _, G, _ = self.sample_KMGA.shape
            steps = max(1, self.ROWS // (K * G))
            parts = zip(self.state_MD.split(steps), self.sample_KMGA.split(steps, 1), strict=True)
            return torch.cat([self._value(*part, space) for part in parts])

    def _is_cut(self) -> bool:
        return (
            bool(self.codec.event_shape)
            and self.sample_KMGA.ndim == 4  # steps in one row
            and self.state_MD.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )

    def _value(self, state_MD: Tensor, sample_KMGA: Tensor, space: ValueSpace) -> Tensor:
        return to_space(self.codec, self.ask(state_MD, sample_KMGA), space).mean(0)
