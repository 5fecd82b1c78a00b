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
from torchrl_amago.modules.distributions import _noise


class BilevelExploration(Configurable, TensorDictModuleBase, abc.ABC):
    """Base of exploration noise: one schedule over training, one within the trial.

    With ``p`` the used fraction of ``anneal_frames`` and ``q`` the used fraction of ``horizon``,
    both clamped to [0, 1] (AMAGO, arXiv 2310.09971, Figure 13):

        start = lerp(start_of_trial[0], start_of_trial[1], p)
        end   = lerp(end_of_trial[0], end_of_trial[1], p)
        epsilon = scale * lerp(start, end, q ** power)

    ``scale`` is ``u ** scale_power``, ``u`` drawn from U[0, 1) for each environment at the start of
    each of its trials. Noise is held over several steps if ``max_duration`` is above 1: undirected
    noise of one step rarely gets far (arXiv 2006.01782). Actions change only under
    ``ExplorationType.RANDOM``, and not while ``enabled`` is False; call :meth:`step` with the
    number of frames collected.

    Args:
        horizon: length of a trial in steps.
        anneal_frames: environment steps, all environments together, over which noise fades.
        start_of_trial: epsilon at a trial's first step, at the start and the end of training;
            ``end_of_trial`` at its last.
        power: ``horizon / n`` confines the change from start to end to about the last n steps.
        scale_power: 0 keeps ``scale`` at 1, 1 is published, with 3 half of the trials have little.
        max_duration: largest mean number of steps, at least 1, over which noise is held. Each trial
            draws its own, log-uniformly from 1 on; it is then redrawn with the same chance at each
            step. Epsilon stays the fraction of noisy actions.
        action_key: entry to change; ``time_key`` and ``init_key`` are read, see
            :mod:`~torchrl_amago.keys`.
        scale_key: private entry that carries ``scale``, ``[*B, 1]``; written, and read if present.
        noise_key: private entry that carries the chance to keep the noise, and the noise that is
            held, ``[*B, 1 + N]``; used if ``max_duration`` is above 1.

    Example:
        >>> class Shift(BilevelExploration):
        ...     def draw(self, action, batch): return torch.rand(*batch, 1)
        ...     def explore(self, action, epsilon, noise, tensordict): return action + epsilon
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
        scale_power: float = 1.0,
        max_duration: float = 1.0,
        action_key: NestedKey = keys.ACTION,
        time_key: NestedKey = keys.TIME_IDX,
        init_key: NestedKey = keys.IS_INIT,
        scale_key: NestedKey = keys.EPSILON_SCALE,
        noise_key: NestedKey = keys.NOISE,
    ) -> None:
        super().__init__()
        check_positive(horizon=horizon, anneal_frames=anneal_frames, power=power)
        check_not_negative(scale_power=scale_power)
        check_positive("Use 1 for new noise at each step.", max_duration=max_duration)
        for start, end in zip(start_of_trial, end_of_trial, strict=True):
            check_not_negative(start_of_trial=start, end_of_trial=end)
        self.horizon, self.anneal_frames = horizon, anneal_frames
        self.start_of_trial, self.end_of_trial = start_of_trial, end_of_trial
        self.power, self.scale_power, self.max_duration = power, scale_power, max(1.0, max_duration)
        self.action_key, self.time_key, self.init_key = action_key, time_key, init_key
        self.scale_key, self.noise_key, self.enabled = scale_key, noise_key, True
        self.in_keys = [action_key, time_key, init_key]
        self.out_keys = [action_key, scale_key] + [noise_key] * self.holds_noise
        self.register_buffer("frames", torch.zeros((), dtype=torch.int64))

    @property
    def holds_noise(self) -> bool:
        """True if noise may last longer than a step."""
        return self.max_duration > 1.0

    @abc.abstractmethod
    def draw(self, action: Tensor, batch: torch.Size) -> Tensor:
        """Draw the noise of a step for a batch ``[*B]``: ``[*B, N]``, float."""

    @abc.abstractmethod
    def explore(
        self, action: Tensor, epsilon: Tensor, noise: Tensor, tensordict: TensorDictBase
    ) -> Tensor:
        """Apply noise ``[*B, N]`` of size epsilon ``[*B, 1]`` to stored actions ``[*B, ...]``."""

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
        """Entries that may be given as keywords: the inputs, and what a trial under way carries."""
        return [*self.in_keys, *self.out_keys[1:]]

    @dispatch(source="keyword_keys")
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add noise to the step's actions, and carry what lasts to the next step."""
        time_idx, action = tensordict.get(self.time_key), tensordict.get(self.action_key)
        scale = tensordict.get(self.scale_key, None)
        if scale is None:
            scale = torch.ones_like(time_idx, dtype=torch.float32)
        if not self.enabled or interaction_type() is not InteractionType.RANDOM:
            if self.holds_noise and tensordict.get(self.noise_key, None) is None:
                fresh = self.draw(action, time_idx.shape[:-1])
                tensordict.set(self.noise_key, torch.cat([torch.zeros_like(scale), fresh], -1))
            return tensordict.set(self.scale_key, scale)
        is_init = tensordict.get(self.init_key)
        scale = torch.where(is_init, torch.rand_like(scale) ** self.scale_power, scale)
        noise = self._noise(action, is_init, tensordict)
        noisy = self.explore(action, scale * self.epsilon(time_idx), noise, tensordict)
        return tensordict.set(self.action_key, noisy).set(self.scale_key, scale)

    def _noise(self, action: Tensor, is_init: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Return the noise of this step, held or drawn; write it for the next one."""
        fresh = self.draw(action, is_init.shape[:-1])
        if not self.holds_noise:
            return fresh
        held = tensordict.get(self.noise_key, None)
        if held is None:
            held, is_init = torch.cat([fresh[..., :1], fresh], -1), torch.ones_like(is_init)
        duration = self.max_duration ** torch.rand_like(held[..., :1])
        keep = torch.where(is_init, 1.0 - 1.0 / duration, held[..., :1])
        is_held = ~is_init & (torch.rand_like(keep) < keep)
        noise = torch.where(is_held, held[..., 1:], fresh)
        tensordict.set(self.noise_key, torch.cat([keep, noise], -1))
        return noise


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
        >>> draws = torch.tensor([[0.5, 1.0]])  # action 1 where epsilon is above 0.5
        >>> noise.explore(torch.tensor([3]), torch.tensor([[0.0]]), draws, tensordict=None)
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

    def draw(self, action: Tensor, batch: torch.Size) -> Tensor:
        """Draw for each part a number below which epsilon changes it, and a choice ``[*B, 2 P]``.

        If there is a mask, the choice is a place in [0, 1) among those that will be allowed.
        """
        device = action.device
        number_BP = torch.rand(*batch, len(self.sizes), device=device)
        if self.mask_key is None:
            choices = [torch.randint(n, batch, device=device) for n in self.sizes]
            return torch.cat([number_BP, torch.stack(choices, -1)], -1)
        return torch.cat([number_BP, torch.rand_like(number_BP)], -1)

    def explore(
        self, action: Tensor, epsilon: Tensor, noise: Tensor, tensordict: TensorDictBase
    ) -> Tensor:
        number_BP, choice_BP = noise.chunk(2, -1)
        replaced_BP = number_BP < epsilon
        random_BP = self._allowed(choice_BP, tensordict).long()
        if self.one_hot:
            random_BP = one_hot_parts(random_BP, self.sizes)
            parts = zip(split_parts(replaced_BP, (1,) * len(self.sizes)), self.sizes, strict=True)
            replaced_BP = join_parts([part.expand(*part.shape[:-1], n) for part, n in parts])
        random = random_BP.reshape(action.shape).to(action.dtype)
        return torch.where(replaced_BP.reshape(action.shape), random, action)

    def _allowed(self, choice_BP: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Turn places in [0, 1) into choices, uniform over those that are allowed at this step."""
        if self.mask_key is None:
            return choice_BP
        allowed = split_parts(tensordict[self.mask_key], self.sizes)
        choices = []
        for allowed_BA, place_B1 in zip(allowed, choice_BP.split(1, -1), strict=True):
            count_BA = allowed_BA.cumsum(-1)
            rank_B1 = (place_B1 * count_BA[..., -1:]).floor()
            choices.append((count_BA <= rank_B1).sum(-1))
        return torch.stack(choices, -1)


class BilevelGaussian(BilevelExploration):
    """Gaussian noise for continuous actions: ``clip(action + epsilon * N(0, 1), -1, 1)``.

    Noise is independent, as in TD3 (arXiv 1802.09477), unless it is held. Arguments: see
    :class:`BilevelExploration`.

    Example:
        >>> noise, draws = BilevelGaussian(horizon=45), torch.zeros(1, 2)
        >>> noise.explore(torch.ones(1, 2), torch.tensor([[0.0]]), draws, tensordict=None)
        tensor([[1., 1.]])
    """

    def draw(self, action: Tensor, batch: torch.Size) -> Tensor:
        """Draw from N(0, 1), one number for each of the action's."""
        return _noise.standard_normal(action.shape, action).reshape(*batch, -1)

    def explore(
        self, action: Tensor, epsilon: Tensor, noise: Tensor, tensordict: TensorDictBase
    ) -> Tensor:
        change = (epsilon.to(action.dtype) * noise).reshape(action.shape)
        return (action + change).clamp(-1.0, 1.0)


def make_exploration(space: ActionSpace, horizon: int, **options: Any) -> BilevelExploration:
    """Build an action space's exploration: Gaussian for numbers, epsilon-greedy for choices."""
    if space.kind == "continuous":
        return BilevelGaussian(horizon, **options)
    if space.kind == "multi_binary":
        return BilevelEpsilonGreedy((2,) * space.size, horizon, **options)
    return BilevelEpsilonGreedy(space.sizes, horizon, one_hot=space.one_hot, **options)
