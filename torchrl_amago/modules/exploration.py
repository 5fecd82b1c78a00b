"""Exploration noise that fades over training and within each trial, per environment.

Legend: P parts of an action, A length of the action vector.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.nn.probabilistic import InteractionType, interaction_type
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago._validation import check_counts, check_not_negative, check_positive
from torchrl_amago.action_space import ActionSpace, join_parts, one_hot_parts, split_parts
from torchrl_amago.modules._settings import Configurable
from torchrl_amago.modules.distributions import _noise as noise


class BilevelExploration(Configurable, TensorDictModuleBase, abc.ABC):
    """Base of exploration noise: one schedule over training, one within the trial.

    With ``p`` the used fraction of ``anneal_frames`` and ``q`` the used fraction of ``horizon``,
    both clamped to [0, 1] (AMAGO, arXiv 2310.09971, Figure 13):

        start = lerp(start_of_trial[0], start_of_trial[1], p)
        end   = lerp(end_of_trial[0], end_of_trial[1], p)
        epsilon = scale * lerp(start, end, q ** power)

    ``scale`` is drawn from U[0, 1) for each environment at the start of each of its trials. Actions
    change only under ``ExplorationType.RANDOM``, and not while ``enabled`` is False; call
    :meth:`step` with the number of frames collected.

    Args:
        horizon: length of a trial in steps.
        anneal_frames: environment steps, all environments together, over which noise fades.
        start_of_trial: epsilon at a trial's first step, at the start and the end of training;
            ``end_of_trial`` at its last.
        power: ``horizon / n`` confines the change from start to end to about the last n steps.
        randomize: draw ``scale``; False keeps it at 1.
        action_key: entry to change; ``time_key`` and ``init_key`` are read, see
            :mod:`~torchrl_amago.keys`.
        scale_key: private entry that carries ``scale``, ``[*B, 1]``; written, and read if present.

    Example:
        >>> class Shift(BilevelExploration):
        ...     def explore(self, action, epsilon, tensordict): return action + epsilon
        >>> shift = Shift(horizon=45, anneal_frames=1000)
        >>> shift.step(1000)
        >>> shift.epsilon(torch.tensor([0, 45]))
        tensor([0.0500, 0.0100])
    """

    def __init__(
        self,
        horizon: int,
        anneal_frames: int = 1_000_000,
        *,
        start_of_trial: tuple[float, float] = (1.0, 0.05),
        end_of_trial: tuple[float, float] = (0.8, 0.01),
        power: float = 1.0,
        randomize: bool = True,
        action_key: NestedKey = keys.ACTION,
        time_key: NestedKey = keys.TIME_IDX,
        init_key: NestedKey = keys.IS_INIT,
        scale_key: NestedKey = keys.EPSILON_SCALE,
    ) -> None:
        super().__init__()
        check_positive(horizon=horizon, anneal_frames=anneal_frames, power=power)
        for start, end in zip(start_of_trial, end_of_trial, strict=True):
            check_not_negative(start_of_trial=start, end_of_trial=end)
        self.horizon, self.anneal_frames = horizon, anneal_frames
        self.start_of_trial, self.end_of_trial = start_of_trial, end_of_trial
        self.power, self.randomize = power, randomize
        self.action_key, self.time_key, self.init_key = action_key, time_key, init_key
        self.scale_key, self.enabled = scale_key, True
        self.in_keys = [action_key, time_key, init_key]
        self.out_keys = [action_key, scale_key]
        self.register_buffer("frames", torch.zeros((), dtype=torch.int64))

    @abc.abstractmethod
    def explore(self, action: Tensor, epsilon: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Add noise of size epsilon ``[*B, 1]`` to stored actions ``[*B, ...]``, on a step."""

    def step(self, frames: int = 1) -> None:
        """Count ``frames`` more environment steps."""
        self.frames += frames

    def epsilon(self, time_idx: Tensor) -> Tensor:
        """Compute epsilon at these steps of a trial, without ``scale``; ``time_idx``'s shape."""
        trained = (self.frames / self.anneal_frames).clamp(max=1.0)
        (start, late_start), (end, late_end) = self.start_of_trial, self.end_of_trial
        start, end = start + trained * (late_start - start), end + trained * (late_end - end)
        used_up = (time_idx / self.horizon).clamp(0.0, 1.0)
        return start + (end - start) * used_up**self.power

    @property
    def keyword_keys(self) -> list[NestedKey]:
        """Entries that may be given as keywords: the inputs and the scale of a trial under way."""
        return [*self.in_keys, self.scale_key]

    @dispatch(source="keyword_keys")
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add noise to the step's actions, and carry ``scale`` to the next step."""
        time_idx = tensordict.get(self.time_key)
        scale = tensordict.get(self.scale_key, None)
        if scale is None or not self.randomize:
            scale = torch.ones_like(time_idx, dtype=torch.float32)
        if not self.enabled or interaction_type() is not InteractionType.RANDOM:
            return tensordict.set(self.scale_key, scale)
        if self.randomize:
            is_init = tensordict.get(self.init_key)
            scale = torch.where(is_init, torch.rand_like(scale), scale)
        action = tensordict.get(self.action_key)
        noisy = self.explore(action, scale * self.epsilon(time_idx), tensordict)
        return tensordict.set(self.action_key, noisy).set(self.scale_key, scale)


class BilevelEpsilonGreedy(BilevelExploration):
    """Epsilon-greedy exploration for discrete actions of one or several parts, and for bits.

    Each part is replaced by a uniformly random choice with probability epsilon, independently.

    Args:
        num_actions: number of actions, or a sequence of each part's (2 for each bit).
        one_hot: actions are stored as (concatenated) one-hots, ``[*B, A]``.
        mask_key: allowed choices, bool ``[*B, A]``, the parts side by side; None if all are always.
        schedule: other arguments, see :class:`BilevelExploration`.

    Example:
        >>> noise = BilevelEpsilonGreedy(5, horizon=45)
        >>> noise.explore(torch.tensor([3]), epsilon=torch.tensor([[0.0]]), tensordict=None)
        tensor([3])
    """

    def __init__(
        self,
        num_actions: int | Sequence[int],
        horizon: int,
        anneal_frames: int = 1_000_000,
        *,
        one_hot: bool = False,
        mask_key: NestedKey | None = None,
        **schedule: Any,
    ) -> None:
        super().__init__(horizon, anneal_frames, **schedule)
        self.sizes = tuple(num_actions) if isinstance(num_actions, Sequence) else (num_actions,)
        for size in self.sizes or (0,):
            check_counts("Every part has choices.", num_actions=size)
        self.one_hot, self.mask_key = one_hot, mask_key
        if mask_key is not None:
            self.in_keys = [*self.in_keys, mask_key]

    def explore(self, action: Tensor, epsilon: Tensor, tensordict: TensorDictBase) -> Tensor:
        batch = epsilon.shape[:-1]
        replaced_BP = torch.rand(*batch, len(self.sizes), device=epsilon.device) < epsilon
        if self.mask_key is None:
            random = [torch.randint(n, batch, device=action.device) for n in self.sizes]
        else:
            allowed = split_parts(tensordict[self.mask_key].float(), self.sizes)
            random = [noise.categorical(part, torch.Size()) for part in allowed]
        random_BP = torch.stack(random, -1)
        if self.one_hot:
            random_BP = one_hot_parts(random_BP, self.sizes)
            parts = zip(split_parts(replaced_BP, (1,) * len(self.sizes)), self.sizes, strict=True)
            replaced_BP = join_parts([part.expand(*batch, n) for part, n in parts])
        random = random_BP.reshape(action.shape).to(action.dtype)
        return torch.where(replaced_BP.reshape(action.shape), random, action)


class BilevelGaussian(BilevelExploration):
    """Gaussian noise for continuous actions: ``clip(action + epsilon * N(0, 1), -1, 1)``.

    Noise is independent, as in TD3 (arXiv 1802.09477). Arguments: see :class:`BilevelExploration`.

    Example:
        >>> noise = BilevelGaussian(horizon=45)
        >>> noise.explore(torch.ones(1, 2), epsilon=torch.tensor([[0.0]]), tensordict=None)
        tensor([[1., 1.]])
    """

    def explore(self, action: Tensor, epsilon: Tensor, tensordict: TensorDictBase) -> Tensor:
        epsilon = epsilon.reshape(*epsilon.shape[:-1], *[1] * (action.ndim + 1 - epsilon.ndim))
        noisy = action + epsilon.to(action.dtype) * noise.standard_normal(action.shape, action)
        return noisy.clamp(-1.0, 1.0)


def make_exploration(space: ActionSpace, horizon: int, **options: Any) -> BilevelExploration:
    """Build an action space's exploration: Gaussian for numbers, epsilon-greedy for choices."""
    if space.kind == "continuous":
        return BilevelGaussian(horizon, **options)
    if space.kind == "multi_binary":
        return BilevelEpsilonGreedy((2,) * space.size, horizon, **options)
    return BilevelEpsilonGreedy(space.sizes, horizon, one_hot=space.one_hot, **options)
