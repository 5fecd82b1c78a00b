"""Settings that choose a Gymnasium environment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
from common import TrainingArgs, draw_steps, drawing
from torchrl.envs import EnvBase

from torchrl_amago import Policy, make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.evaluation import rollout_pictures

# Entries that stay visible under --mask-velocities: position and angle; cosine and sine of the
# angle.
WITHOUT_VELOCITIES = {"CartPole-v0": (0, 2), "CartPole-v1": (0, 2), "Pendulum-v1": (0, 1)}


def discounts_of(trial_length: int) -> tuple[float, ...]:
    """Return four discounts, whose horizons 1 / (1 - discount) grow from 10 steps to a third of a
    trial by the same factor each.
    """
    factor = max(2.0, trial_length / 30)
    return tuple(1.0 - 0.1 / factor ** (i / 3) for i in range(4))


@dataclass
class GymArgs(TrainingArgs):
    """Settings of any Gymnasium environment whose episodes make trials."""

    env_id: str = "CartPole-v1"
    """Id of a registered environment; `module:id` imports the module that registers it first, as in
    `shimmy:dm_control/cartpole-swingup-v0` (with `--max-episode-steps 1000`)."""
    mask_velocities: bool = False
    """Hide the velocities of CartPole and Pendulum, which must then be inferred from the past."""
    keep: tuple[int, ...] = ()
    """Indices of the observation's entries that stay visible; default all."""
    episodes: int = 1
    """Episodes of a trial; all begin with the same seed."""
    max_episode_steps: int | None = None
    """Time limit of an episode; default the environment's own."""
    hide_prev_step: bool | None = None
    """Hide the previous action and reward from the policy, since held noise shows in them; default
    if a trial is one episode, of which they tell little."""
    noise_steps: float = 32.0
    """Largest mean number of steps over which random actions are held, to get further by chance;
    each trial draws its own, half of them less than six."""
    final_noise: float = 0.3
    """Largest fraction of random actions once exploration has faded; each trial draws its own, up
    to this. With several episodes it falls to a fifth within a trial."""

    def policy_options(self, **seq_model_options: Any) -> dict[str, Any]:
        """Arguments of `make_policy`, see :meth:`TrainingArgs.policy_options`."""
        options = super().policy_options(**seq_model_options)
        is_hidden = self.episodes == 1 if self.hide_prev_step is None else self.hide_prev_step
        options["timestep_options"]["hide_prev_step"] = is_hidden
        # A single episode has no later one to use what was found out: its noise doesn't fade.
        end, late_end = (1.0, 1.0) if self.episodes == 1 else (0.8, 0.2)
        options["exploration"] = dict(
            anneal_frames=self.anneal_frames,
            horizon=self.trial_length,
            max_duration=self.noise_steps,
            start_of_trial=(1.0, self.final_noise),
            end_of_trial=(end, late_end * self.final_noise),
        )
        return options

    def make_one(self, **options: str) -> gym.Env:
        """Make one environment, with the entries that stay visible."""
        try:
            env = gym.make(self.env_id, max_episode_steps=self.max_episode_steps, **options)
        except gym.error.UnregisteredEnv as error:
            raise ValueError(
                f"--env-id must be registered in Gymnasium, got {self.env_id!r}: {error} "
                "gymnasium.pprint_registry() lists all; `module:id` imports a module first; "
                "docs/domains.md names the extras."
            ) from error
        except (ImportError, gym.error.Error) as error:
            raise ImportError(
                f"--env-id {self.env_id} can't be made: {error}. docs/domains.md names the extras."
            ) from error
        keep = list(self.keep)
        if self.mask_velocities and not keep:
            if self.env_id not in WITHOUT_VELOCITIES:
                raise ValueError(
                    f"--mask-velocities works for {sorted(WITHOUT_VELOCITIES)}, got "
                    f"{self.env_id!r}. Name the entries that stay visible with --keep."
                )
            keep = list(WITHOUT_VELOCITIES[self.env_id])
        if not keep:
            return env
        space = env.observation_space
        if len(space.shape or ()) != 1 or not all(0 <= i < space.shape[0] for i in keep):
            raise ValueError(f"--keep takes indices of a vector's entries, got {keep} for {space}.")
        visible = gym.spaces.Box(space.low[keep], space.high[keep], dtype=space.dtype)
        return gym.wrappers.TransformObservation(env, lambda entries: entries[keep], visible)

    def make_env(self, num_envs: int, **options: str) -> EnvBase:
        """Make a batched trial environment."""
        return make_trial_env(
            gymnasium_rows(lambda: self.make_one(**options), num_envs),
            episodes=self.episodes,
            show_progress=self.episodes > 1,
            # A time limit that isn't observed says nothing about the last state's value.
            trial_end="episode",
        )

    @cached_property  # an environment is made for it
    def trial_length(self) -> int:
        """Longest trial in steps."""
        steps = self.max_episode_steps or self.make_one().spec.max_episode_steps
        if steps is None:
            raise ValueError(
                f"a trial needs an end, but {self.env_id} has no time limit. "
                "Set one with --max-episode-steps."
            )
        return self.episodes * steps

    def draw_trial(self, policy: Policy, seed: int) -> None:
        """Draw `trial.png`, the first episode of a greedy trial, if that is possible."""
        with drawing(self.env_id):
            env = self.make_env(1, render_mode="rgb_array")
            draw_steps(self, rollout_pictures(policy, env, seed=seed)[0])
