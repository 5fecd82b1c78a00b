"""Several environments as one: every task belongs to one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import flatdim, flatten


class MultiDomain(gym.Env):
    """Environment that is, in each new task, one of several (as in AMAGO, arXiv 2310.09971).

    The reset's seed draws the environment, then seeds it: trials of ``repeat="seed"``, the default,
    stay at one. ``info["task_id"]`` is its number, ``info["task"]`` its name. Rows of a batch play
    different environments at a time; each is as likely as the others, so that replay of whole
    trials is balanced, however long they are.

    Equal observation spaces stay as they are. Different ones are flattened (categories one-hot) and
    padded with zeros to the longest: ``observation``, float32 ``[D]``. Actions must be
    ``Discrete``. If their numbers differ, ``action_mask``, int8 ``[A]``, is 1 for those that the
    environment has; name it in ``make_policy(..., action_mask_key="action_mask")``.

    Args:
        domains: functions that make the environments, by name.
        show_domain: add ``domain``, the environment's number, to the observation.
        probabilities: of the environments, in order; default equal.

    Raises:
        ValueError: for no environments, probabilities that don't fit them, or other actions than
            ``Discrete`` ones.

    Example:
        >>> make = lambda env_id: lambda: gym.make(env_id)
        >>> env = MultiDomain({name: make(name) for name in ("CartPole-v1", "Acrobot-v1")})
        >>> observation, info = env.reset(seed=3)
        >>> observation["observation"].shape, observation["action_mask"].tolist(), info["task"]
        ((6,), [1, 1, 0], 'CartPole-v1')
    """

    def __init__(
        self,
        domains: Mapping[str, Callable[[], gym.Env]],
        *,
        show_domain: bool = False,
        probabilities: Sequence[float] | None = None,
    ) -> None:
        self.names, self.show_domain = tuple(domains), show_domain
        weights = np.ones(len(self.names)) if probabilities is None else np.array(probabilities)
        if not self.names or weights.shape != (len(self.names),) or not (weights >= 0).all():
            raise ValueError(
                "several environments as one need names, and a probability each or none, got "
                f"{list(self.names)} and probabilities={probabilities}."
            )
        self.probabilities = weights / weights.sum()
        self._envs = [make() for make in domains.values()]
        actions = [env.action_space for env in self._envs]
        for name, space in zip(self.names, actions, strict=True):
            if not isinstance(space, gym.spaces.Discrete) or space.start:
                raise ValueError(
                    f"domains must have Discrete actions that begin at 0, and {name} has {space}. "
                    "Wrap it (gymnasium.wrappers.TransformAction)."
                )
        self.action_space = gym.spaces.Discrete(max(int(space.n) for space in actions))
        spaces = [env.observation_space for env in self._envs]
        self._are_equal = all(space == spaces[0] for space in spaces)
        entries: dict[str, gym.Space] = {}
        if self._are_equal:
            is_dict = isinstance(spaces[0], gym.spaces.Dict)
            entries |= spaces[0].spaces if is_dict else {"observation": spaces[0]}
        else:
            size = max(flatdim(space) for space in spaces)
            entries["observation"] = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self._masks = [np.arange(self.action_space.n) < space.n for space in actions]
        self._has_mask = not np.all(self._masks)
        if self._has_mask:
            entries["action_mask"] = gym.spaces.MultiBinary(int(self.action_space.n))
        if show_domain:
            entries["domain"] = gym.spaces.Discrete(len(self.names))
        self.observation_space = gym.spaces.Dict(entries)
        self.domain: int | None = None

    @property
    def render_mode(self) -> str | None:
        """Render mode of the environment that is played."""
        return self._envs[self.domain or 0].render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw an environment and start an episode in it."""
        super().reset(seed=seed)
        self.domain = int(self.np_random.choice(len(self.names), p=self.probabilities))
        own_seed = int(self.np_random.integers(2**31))
        observation, info = self._envs[self.domain].reset(seed=own_seed, options=options)
        return self._observe(observation), self._label(info)

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take a step in the environment that is played.

        Raises:
            ValueError: for an action that this environment doesn't have.
        """
        if not self._masks[self.domain][action]:
            raise ValueError(
                f"{self.names[self.domain]} has {self._masks[self.domain].sum()} actions, got "
                f"action {action}. Mask actions: make_policy(..., action_mask_key='action_mask')."
            )
        observation, *rest, info = self._envs[self.domain].step(int(action))
        return self._observe(observation), *rest, self._label(info)

    def render(self) -> Any:
        """Draw the environment that is played."""
        return self._envs[self.domain].render()

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _observe(self, observation: Any) -> dict[str, Any]:
        entries = {"observation": observation}
        if not self._are_equal:
            values = flatten(self._envs[self.domain].observation_space, observation)
            padded = np.zeros(self.observation_space["observation"].shape, np.float32)
            padded[: len(values)] = values
            entries = {"observation": padded}
        elif isinstance(observation, dict):
            entries = dict(observation)
        if self._has_mask:
            entries["action_mask"] = self._masks[self.domain].astype(np.int8)
        if self.show_domain:
            entries["domain"] = np.int64(self.domain)
        return entries

    def _label(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "task_id": self.domain, "task": self.names[self.domain]}
