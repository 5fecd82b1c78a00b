"""Variants of the lake's agent, each with one change to the baseline, and a run of one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from common import DEBUG, TrainingArgs, final_evaluation, resume_if_asked
from torchrl.envs import EnvBase

from torchrl_amago import (
    HeldOutEvaluator,
    HLGauss,
    MetaFrozenLake,
    PopArt,
    TwoHot,
    make_policy,
    make_trainer,
    make_trial_env,
)
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults
from torchrl_amago.modules import DISCOUNTS

# A trial returns 0 to 5, times the loss's reward_scale of 10. Critics first predict the middle of
# the range, which therefore is 0: optimistic initial values stall learning for thousands of
# updates. 128 bins, the published number, would make one run as long as all others: they are
# outputs for every action.
RETURNS = dict(num_bins=16, min_return=-55.0, max_return=55.0, symlog=False)


@dataclass(frozen=True)
class Variant:
    """One change to the baseline."""

    change: str
    """Description in the table."""
    args: dict[str, Any] = field(default_factory=dict)
    """Fields of the training settings."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Arguments of `make_policy`."""
    loss: Callable[[], dict[str, Any]] = dict
    """Maker of arguments of the loss, one call for each run, since codecs hold statistics."""


def codec(make: Callable[..., Any], **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(value_codec=make(len(DISCOUNTS), **options))


VARIANTS = {
    "baseline": Variant(
        "nothing (seven discounts, PopArt, online and offline terms, one-step targets, Transformer)"
    ),
    "discounts_1": Variant("one discount, 0.999", policy=dict(discounts=(0.999,))),
    "discounts_3": Variant("discounts 0.9, 0.99, 0.999", policy=dict(discounts=(0.9, 0.99, 0.999))),
    "no_popart": Variant(
        "values aren't normalised: regression on returns", loss=codec(PopArt, enabled=False)
    ),
    "online_only": Variant(
        "policy gradient alone, no imitation", loss=lambda: dict(offline_coeff=0.0)
    ),
    "offline_only": Variant(
        "filtered imitation alone; TD targets average two critics, as the loss does then",
        loss=lambda: dict(online_coeff=0.0, offline_coeff=1.0),
    ),
    "two_hot": Variant("two-hot classification of values, 16 bins", loss=codec(TwoHot, **RETURNS)),
    "hl_gauss": Variant(
        "HL-Gauss classification of values, 16 bins", loss=codec(HLGauss, **RETURNS)
    ),
    "n_step_3": Variant("three-step targets", loss=lambda: dict(n_step=3)),
    "memory_free": Variant(
        "no memory: a feed-forward network instead of the Transformer",
        args=dict(seq_model="feedforward"),
    ),
}


@dataclass
class LakeArgs(TrainingArgs):
    """Settings of one run: those of example 00 with the published choices."""

    num_layers: int = 2
    hidden_size: int = 256
    preset: Literal["robust", "paper"] = "paper"
    eval_trials: int = 1024

    def resume_command(self) -> str:
        """Return this script's own command, since it resumes by itself."""
        return shlex.join([sys.executable, *sys.argv])


def train(
    variant: str, folder: Path, seed: int, updates: int, *, threads: int = 1, debug: bool = False
) -> EvaluationResults:
    """Train, resume or finish one run in its folder."""
    changed = VARIANTS[variant]
    settings = dict(
        run_dir=folder,
        seed=seed,
        threads=threads,
        total_updates=updates,
        # As in example 00, exploration is over after the same fraction of a run.
        anneal_frames=200_000 * updates // 2400,
        resume=True,
    )
    run = LakeArgs(**{**(DEBUG if debug else {}), **settings, **changed.args})
    torch.manual_seed(seed)
    env = make_lakes(run.num_envs)
    noise = dict(anneal_frames=run.anneal_frames)
    options = {**run.policy_options(), **changed.policy}
    policy = make_policy(env, context_length=45, exploration=noise, **options)
    held_out = HeldOutEvaluator(policy, make_lakes(min(256, run.eval_trials), seed=HELD_OUT_SEED))
    options = dict(loss_options=changed.loss(), **run.trainer_options(held_out))
    trainer = make_trainer(env, policy, trial_length=45, **options)
    resume_if_asked(run, trainer)
    return final_evaluation(run, trainer.train(), trainer, held_out)


def make_lakes(num_envs: int, seed: int | None = None) -> EnvBase:
    return make_trial_env(MetaFrozenLake(3, batch_size=(num_envs,), seed=seed), episodes=5)
