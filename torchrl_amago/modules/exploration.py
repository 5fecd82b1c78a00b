"""Exploration noise that fades over training and within each trial, per environment."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.nn.probabilistic import InteractionType, interaction_type
from torch import Tensor, nn

from torchrl_amago import keys


class BilevelEpsilonGreedy(TensorDictModuleBase):
    """Epsilon-greedy exploration with a schedule over training and one within the trial.

    With ``p`` the share of ``anneal_frames`` used up and ``q`` the share of ``horizon`` used up,
    both clamped to [0, 1] (AMAGO, arXiv 2310.09971, Figure 13):

        start = lerp(start_of_trial[0], start_of_trial[1], p)
        end   = lerp(end_of_trial[0], end_of_trial[1], p)
        epsilon = scale * lerp(start, end, q ** power)

    ``scale`` is drawn from U[0, 1) for each environment at the start of each of its trials, so that
    every batch holds trials from nearly greedy to very noisy. Actions change only under
    ``ExplorationType.RANDOM``; call :meth:`step` with the number of frames collected.

    Args:
        num_actions: A.
        horizon: length of a trial in steps.
        anneal_frames: environment steps, all environments together, over which noise fades.
        start_of_trial: epsilon at a trial's first step, at the start and the end of training.
        end_of_trial: epsilon at a trial's last step, at the start and the end of training.
        power: above 1 it moves the change from start to end towards the trial's end; with a power
            of ``horizon / n``, noise is confined to about the last n steps.
        randomize: draw ``scale``; False keeps it at 1.
        one_hot: whether actions are one-hot encoded (``[*B, A]``) or indices (``[*B]``).
        action_key: entry to change.
        time_key: steps since the trial began, ``[*B, 1]``.
        init_key: first step of a trial, ``[*B, 1]``.
        scale_key: private entry that carries ``scale``, ``[*B, 1]``.

    Raises:
        ValueError: if ``horizon`` or ``anneal_frames`` is smaller than 1, or ``power`` not positive.

    Example:
        >>> explore = BilevelEpsilonGreedy(num_actions=5, horizon=45, anneal_frames=1000)
        >>> explore.epsilon(torch.tensor([[0], [45], [90]])).flatten()
        tensor([1.0000, 0.8000, 0.8000])
        >>> explore.step(1000)
        >>> explore.epsilon(torch.tensor([0, 45]))
        tensor([0.0500, 0.0100])
    """

    frames: Tensor

    def __init__(
        self,
        num_actions: int,
        horizon: int,
        anneal_frames: int = 1_000_000,
        *,
        start_of_trial: tuple[float, float] = (1.0, 0.05),
        end_of_trial: tuple[float, float] = (0.8, 0.01),
        power: float = 1.0,
        randomize: bool = True,
        one_hot: bool = False,
        action_key: NestedKey = keys.ACTION,
        time_key: NestedKey = keys.TIME_IDX,
        init_key: NestedKey = keys.IS_INIT,
        scale_key: NestedKey = keys.EPSILON_SCALE,
    ) -> None:
        super().__init__()
        if horizon < 1 or anneal_frames < 1:
            raise ValueError(
                f"horizon and anneal_frames must be at least 1, got {horizon} and {anneal_frames}. "
                "They are the steps in a trial and the environment steps over which noise fades."
            )
        if power <= 0:
            raise ValueError(
                f"power must be positive, got {power}. 1 lets noise change evenly over the trial, "
                "more keeps the change for its end."
            )
        self.num_actions, self.horizon, self.anneal_frames = num_actions, horizon, anneal_frames
        self.start_of_trial, self.end_of_trial = start_of_trial, end_of_trial
        self.power = power
        self.randomize, self.one_hot = randomize, one_hot
        self.action_key, self.time_key, self.init_key = action_key, time_key, init_key
        self.scale_key = scale_key
        self.in_keys = [action_key, time_key, init_key, scale_key]
        self.out_keys = [action_key, scale_key]
        self.register_buffer("frames", torch.zeros((), dtype=torch.int64))

    def step(self, frames: int = 1) -> None:
        """Count ``frames`` more environment steps."""
        self.frames += frames

    def epsilon(self, time_idx: Tensor) -> Tensor:
        """Epsilon at these steps of a trial before ``scale``, float, the shape of ``time_idx``."""
        trained = (self.frames / self.anneal_frames).clamp(max=1.0)
        start = self.start_of_trial[0] + trained * (self.start_of_trial[1] - self.start_of_trial[0])
        end = self.end_of_trial[0] + trained * (self.end_of_trial[1] - self.end_of_trial[0])
        used_up = (time_idx / self.horizon).clamp(0.0, 1.0)
        return start + (end - start) * used_up**self.power

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replace some actions by uniformly random ones."""
        time_idx = tensordict.get(self.time_key)
        scale = tensordict.get(self.scale_key, None)
        if scale is None or not self.randomize:
            scale = torch.ones_like(time_idx, dtype=torch.float32)
        if interaction_type() is not InteractionType.RANDOM:
            return tensordict.set(self.scale_key, scale)
        if self.randomize:
            is_init = tensordict.get(self.init_key)
            scale = torch.where(is_init, torch.rand_like(scale), scale)
        explore = torch.rand_like(scale) < scale * self.epsilon(time_idx)
        action = tensordict.get(self.action_key)
        random = torch.randint(self.num_actions, time_idx.shape[:-1], device=action.device)
        if self.one_hot:
            random = nn.functional.one_hot(random, self.num_actions)
        else:
            explore = explore.squeeze(-1)
        tensordict.set(self.action_key, torch.where(explore, random.to(action.dtype), action))
        return tensordict.set(self.scale_key, scale)
