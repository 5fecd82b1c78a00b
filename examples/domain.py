"""Settings, training and pictures that the examples on other packages' environments share.

An example says how its environment is made, and what its defaults are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from common import TrainingArgs, draw_progress, draw_steps, drawing, run
from torchrl.envs import EnvBase

from torchrl_amago import HeldOutEvaluator, TwoHot, make_policy
from torchrl_amago.data import Relabel
from torchrl_amago.evaluation import EvaluationResults, rollout_pictures
from torchrl_amago.modules.timestep import TIMESTEP_ENCODERS
from torchrl_amago.plots import plot_adaptation_curve


@dataclass
class DomainArgs(TrainingArgs):
    """Settings of any environment whose episodes make trials; a script says how it is made."""

    episodes: int = 2
    """Episodes of a trial, all at one task."""
    max_episode_steps: int = 100
    """Steps after which an episode is cut off."""
    context_length: int = 64
    """Steps that the policy remembers, and steps of a slice in a batch."""
    round_steps: int = 50
    """Steps of each environment between updates."""
    discounts: tuple[float, ...] = (0.1, 0.9, 0.95, 0.97, 0.99)
    """Discounts that are trained; the last one is acted with."""
    reward_scale: float = 1.0
    """Factor of rewards in the loss; the robust preset of amago finds their scale by itself."""
    n_step: int = 1
    """Rewards in a TD target; more of them bring late rewards forward sooner."""
    positions: Literal["rotary", "fixed"] = "rotary"
    """Positions of a Transformer: rotary for distances, fixed where the time itself matters."""
    timestep_encoder: Literal[("auto", *TIMESTEP_ENCODERS)] = "auto"
    """Encoder of a step: mlp for vectors, cnn for one image, combined for anything, auto by what is
    observed."""

    draws: ClassVar[bool] = True  # False for environments without pictures

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        """Make a batch of trial environments, for evaluation or training.

        Args:
            num_envs: rows.
            test: the tasks are those to evaluate on, if the domain keeps some for that.
            options: of the environment, such as ``render_mode``.
        """
        raise NotImplementedError

    @property
    def trial_length(self) -> int:
        """Longest trial in steps."""
        return self.episodes * self.max_episode_steps

    @property
    def num_games(self) -> int:
        """Number of tasks whose rewards may differ in size."""
        return 1

    @property
    def title(self) -> str:
        """Title of the pictures."""
        return f"{type(self).__doc__.partition(',')[0]}, {self.seq_model}, {self.loss}"


def train(
    args: DomainArgs, *, relabel: Relabel | None = None, **policy_options: Any
) -> EvaluationResults:
    """Train on a domain, evaluate on held-out tasks, and draw curves and a trial.

    Args:
        args: settings.
        relabel: hindsight in the replay buffer.
        policy_options: further arguments of :func:`~torchrl_amago.make_policy`.
    """
    torch.manual_seed(args.seed)
    make = partial(args.make_env, args.num_envs)
    env = make()
    context_length = min(args.context_length, args.trial_length)
    policy = make_policy(
        env,
        context_length=context_length,
        timestep_encoder=args.timestep_encoder,
        discounts=args.discounts,
        exploration=dict(anneal_frames=args.anneal_frames, horizon=args.trial_length),
        **{**args.policy_options(positions=args.positions), **policy_options},
    )
    held_out = HeldOutEvaluator(policy, args.make_env(min(32, args.eval_trials), test=True))
    rewards = dict(reward_scale=args.reward_scale, n_step=args.n_step)
    if args.loss == "amago2" and args.num_games > 1:  # one scale wouldn't fit them all
        rewards["value_codec"] = TwoHot(len(args.discounts))
    parts = (args, make, env, policy, held_out)
    results = run(
        *parts,
        trial_length=args.trial_length,
        slice_length=context_length,
        round_steps=min(args.round_steps, args.trial_length),
        buffer_options=dict(relabel=relabel),
        loss_options=rewards,
    )
    draw_progress(args, args.title)
    if args.episodes > 1:
        path = args.run_dir / "adaptation_curve.png"
        plot_adaptation_curve(results.greedy, path, measure="return", title=args.title)
    draw_trial(args, policy, held_out.seed + 1)
    return results


def draw_trial(args: DomainArgs, policy: torch.nn.Module, seed: int) -> None:
    """Draw `trial.png`, the last episode of a greedy trial, if the environment draws."""
    if not args.draws:
        print("No trial.png, since this environment has no pictures.")
        return
    with drawing("this environment"):
        env = args.make_env(1, test=True, render_mode="rgb_array")
        draw_steps(args, rollout_pictures(policy, env, seed=seed)[-1])
        env.close()
