r"""Train on POPGym's memory tasks, one of them or several at once.

    pip install "torchrl-amago[popgym]"
    python examples/03_popgym.py                                  # RepeatPreviousEasy, ten minutes
    python examples/03_popgym.py --env-ids AutoencodeEasy --run-dir runs/autoencode
    python examples/03_popgym.py --multi-domain --run-dir runs/multi_domain
    python examples/03_popgym.py --debug                          # a test of the setup

A trial is one episode: in POPGym the cards themselves must be remembered. With several ids, each
trial is at one of them, observations are padded, and actions that a task lacks are masked. The
run's folder gets `progress.csv`, curves, `evaluation.npz`, weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
from common import command_line
from domain import DomainArgs, train
from torchrl.envs import EnvBase

from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import MultiDomain

# Names of `--multi-domain`, as in AMAGO's experiments: short episodes, discrete actions.
SEVERAL = (
    "RepeatPreviousEasy",
    "RepeatFirstEasy",
    "AutoencodeEasy",
    "CountRecallEasy",
    "ConcentrationEasy",
    "HigherLowerEasy",
    "NoisyPositionOnlyCartPoleEasy",
    "PositionOnlyCartPoleEasy",
)

LENGTHS = ("max_episode_length", "episode_length")  # by which tasks name their longest episode


@dataclass
class Args(DomainArgs):
    """POPGym, with AMAGO."""

    env_ids: tuple[str, ...] = ("RepeatPreviousEasy",)
    """Names of tasks, without `popgym-` and `-v0`."""
    multi_domain: bool = False
    """Train on eight tasks at once, in place of env_ids."""
    show_domain: bool = False
    """Show the policy which of several tasks it plays."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/popgym")
    episodes: int = 1
    max_episode_steps: int | None = None
    """Steps after which an episode is cut off; default none, all tasks end by themselves."""
    context_length: int = 110
    round_steps: int = 52
    num_envs: int = 16
    positions: Literal["rotary", "fixed"] = "fixed"
    timestep_encoder: Literal["combined"] = "combined"
    total_updates: int = 4000
    anneal_frames: int = 50_000
    capacity: int = 200_000
    eval_trials: int = 128

    draws: ClassVar[bool] = False

    def make_one(self, name: str, **options: Any) -> gym.Env:
        try:
            import popgym  # noqa: F401 - registers the ids
            from popgym.wrappers import DiscreteAction
        except ImportError as error:
            raise ValueError('install the extra: pip install "torchrl-amago[popgym]"') from error
        try:
            env = gym.make(f"popgym-{name}-v0", **options)
        except gym.error.UnregisteredEnv as error:
            known = [i[7:-3] for i in gym.registry if i.startswith("popgym-")]
            raise ValueError(f"--env-ids: {error} There are {', '.join(known)}.") from error
        if isinstance(env.action_space, gym.spaces.MultiDiscrete):
            env = DiscreteAction(env.unwrapped)  # cells of a board, not rows and columns apart
        limit = self.max_episode_steps
        return env if limit is None else gym.wrappers.TimeLimit(env, limit)

    @property
    def names(self) -> tuple[str, ...]:
        return SEVERAL if self.multi_domain else self.env_ids

    @property
    def num_games(self) -> int:
        return len(self.names)

    @cached_property  # environments are made for it
    def trial_length(self) -> int:
        tasks = [] if self.max_episode_steps else [self.make_one(x).unwrapped for x in self.names]
        longest = (getattr(x, attribute, 0) for x in tasks for attribute in LENGTHS)
        decks = (52 * getattr(x, "num_decks", 0) for x in tasks)
        return self.episodes * (self.max_episode_steps or max(*longest, *decks))

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        names, is_one = self.names, self.num_games == 1
        makers = {name: lambda name=name: self.make_one(name, **options) for name in names}
        rows = gymnasium_rows(
            makers[names[0]]
            if is_one
            else lambda: MultiDomain(makers, show_domain=self.show_domain),
            num_envs,
            task_key=None if is_one else "task_id",
            task_names=() if is_one else names,
        )
        return make_trial_env(rows, episodes=self.episodes, show_progress=self.episodes > 1)


if __name__ == "__main__":
    with command_line(Args, debug=dict(num_envs=4, eval_trials=8)) as args:
        train(args, **({"action_mask_key": "action_mask"} if args.num_games > 1 else {}))
