"""Train an agent on any environment of gymnax, or on Craftax, stepped in JAX.

    pip install "torchrl-amago[jax]"
    python examples/02_gymnax.py                                           # CartPole
    python examples/02_gymnax.py --env-id MemoryChain-bsuite --params memory_length 20 \
        --run-dir runs/memory_chain
    python examples/02_gymnax.py --env-id Breakout-MinAtar --timestep-encoder cnn \
        --run-dir runs/breakout
    python examples/02_gymnax.py --env-id Craftax-Classic-Symbolic-v1 --params max_timesteps 500 \
        --run-dir runs/craftax           # first its textures are made, which takes minutes, once
    python examples/02_gymnax.py --debug     # about a minute, a test of the setup

A trial is one episode, or `--episodes` of them that begin alike. The run's folder gets curves,
`trial.png`, evaluations, weights. `JAX_COMPILATION_CACHE_DIR=~/.cache/jax` spares later compiling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from common import TrainingArgs, command_line, draw_progress, draw_steps, run
from torchrl.envs import EnvBase

from torchrl_amago import HeldOutEvaluator, make_policy, make_trial_env
from torchrl_amago.envs.libs import craftax_env, gymnax_env
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults, rollout_pictures


@dataclass
class Args(TrainingArgs):
    """Any environment of gymnax, or Craftax, with AMAGO."""

    env_id: str = "CartPole-v1"
    """Id of gymnax, such as MemoryChain-bsuite or Breakout-MinAtar, or of Craftax."""
    params: dict[str, float] = field(default_factory=dict)
    """Changes of the environment's own parameters, as in `--params memory_length 20`."""
    episodes: int = 1
    """Episodes of a trial; all begin alike."""
    timestep_encoder: Literal["mlp", "cnn", "combined"] = "mlp"
    """Encoder of a step: mlp for vectors, cnn for images, combined for categories."""
    context_length: int = 32
    """Steps that the policy sees; at least as many as must be remembered."""
    round_steps: int = 25
    """Steps of each environment between updates."""
    discounts: tuple[float, ...] = (0.9, 0.97, 0.99)
    """Discounts that are trained; the last one is acted with."""
    n_step: int = 5
    """Rewards in a TD target."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/gymnax")
    num_envs: int = 32
    total_updates: int = 8000
    batch_size: int = 24
    eval_trials: int = 128


def make_env(args: Args, num_envs: int, seed: int) -> EnvBase:
    # Numbers of the command line, of which gymnax takes whole ones as integers.
    params = {name: int(x) if x == int(x) else x for name, x in args.params.items()}
    make = craftax_env if args.env_id.startswith("Craftax") else gymnax_env
    rows = make(env_id=args.env_id, num_envs=num_envs, params=params, seed=seed)
    # A time limit that isn't observed says nothing about the last state's value.
    return make_trial_env(
        rows, episodes=args.episodes, show_progress=args.episodes > 1, trial_end="episode"
    )


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    make = partial(make_env, args, args.num_envs, args.seed)
    env = make()
    length = args.episodes * env.base_env.max_episode_steps
    context_length = min(args.context_length, length)
    options = args.policy_options(positions="rotary", window=context_length)
    if args.timestep_encoder == "cnn":
        options["timestep_options"] = dict(output_size=args.d_model, trunk="grid")
    policy = make_policy(
        env,
        context_length=context_length,
        timestep_encoder=args.timestep_encoder,
        discounts=args.discounts,
        exploration=dict(anneal_frames=args.anneal_frames, horizon=length),
        **options,
    )
    held_out = HeldOutEvaluator(policy, make_env(args, min(64, args.eval_trials), HELD_OUT_SEED))
    parts = (args, make, env, policy, held_out)
    results = run(
        *parts,
        "trial_return",
        trial_length=length,
        slice_length=context_length,
        round_steps=min(args.round_steps, length),
        loss_options=dict(n_step=args.n_step),
    )
    draw_progress(args, f"{args.env_id}, {args.seq_model}, {args.loss}")
    draw_steps(args, rollout_pictures(policy, make_env(args, 1, 0), seed=held_out.seed + 1)[0])
    return results


if __name__ == "__main__":
    with command_line(Args, debug=dict(eval_trials=16)) as args:
        train(args)
