"""Train an agent that finds out the goal of a grid world by trying, XLand-MiniGrid, in JAX.

    pip install "torchrl-amago[jax]"
    python examples/11_xland_minigrid.py               # one goal among three objects
    python examples/11_xland_minigrid.py --debug       # about two minutes, a test of the setup
    python examples/11_xland_minigrid.py --resume      # go on after Ctrl-C
    python examples/11_xland_minigrid.py --benchmark small-1m --env-id XLand-MiniGrid-R4-13x13 \
        --size 13 --max-episode-steps 500 --episodes 15 --num-envs 4096 --run-dir runs/xland_small

A trial is five episodes at the same goal, which the agent doesn't see, with new places for all
objects in each. The published benchmarks are downloaded at their first use. The run's folder gets
`progress.csv`, `learning_curve.png`, `adaptation_curve.png`, `trial.png`, `evaluation.npz`,
`evaluation_sampled.npz`, weights and checkpoints. `JAX_COMPILATION_CACHE_DIR=~/.cache/jax` spares
the next run half a minute of compiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import TrainingArgs, command_line, draw_progress, run
from torchrl.envs import EnvBase

from torchrl_amago import HeldOutEvaluator, make_policy, make_trial_env
from torchrl_amago.envs.libs import trivial_ruleset, xland_env
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults
from torchrl_amago.plots import plot_adaptation_curve, plot_trial_strip


@dataclass
class Args(TrainingArgs):
    """XLand-MiniGrid with AMAGO."""

    env_id: str = "XLand-MiniGrid-R1-9x9"
    """Id of the package: R1 has one room, R4 four, ..."""
    benchmark: str = "trivial"
    """Rulesets: trivial (made here), or a published benchmark's name or file."""
    num_objects: int = 3
    """Objects in the room, for trivial."""
    size: int = 7
    """Cells on each side, walls included."""
    episodes: int = 5
    """Episodes of a trial."""
    max_episode_steps: int = 30
    """Steps of an episode."""
    context_length: int = 150
    """Steps that the policy remembers."""
    discounts: tuple[float, ...] = (0.9, 0.95, 0.99)
    """Discounts that are trained; the last one is acted with."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/xland")
    d_model: int = 128
    hidden_size: int = 128
    total_updates: int = 4000
    anneal_frames: int = 300_000
    capacity: int = 300_000


def make_env(args: Args, num_envs: int, seed: int) -> EnvBase:
    benchmark = args.benchmark
    if benchmark == "trivial":
        benchmark = partial(trivial_ruleset, num_objects=args.num_objects)
    params = dict(height=args.size, width=args.size, max_steps=args.max_episode_steps)
    rows = xland_env(num_envs, args.env_id, benchmark=benchmark, params=params, seed=seed)
    return make_trial_env(rows, episodes=args.episodes)


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    make = partial(make_env, args, args.num_envs, args.seed)
    env = make()
    length = args.episodes * args.max_episode_steps
    context_length = min(args.context_length, length)
    policy = make_policy(
        env,
        context_length=context_length,
        timestep_encoder="combined",
        discounts=args.discounts,
        exploration=dict(anneal_frames=args.anneal_frames, horizon=length),
        **args.policy_options(),
    )
    rows = min(64, args.eval_trials)
    held_out = HeldOutEvaluator(policy, make_env(args, rows, HELD_OUT_SEED))
    parts = (args, make, env, policy, held_out)
    results = run(
        *parts,
        trial_length=length,
        slice_length=context_length,
    )
    title = f"{args.benchmark}, {args.size} x {args.size} cells, {args.seq_model}"
    draw_progress(args, title)
    path = args.run_dir / "adaptation_curve.png"
    plot_adaptation_curve(results.greedy, path, measure="return", title=f"{title}, greedy")
    plot_trial_strip(held_out.pictures(), args.run_dir / "trial.png", title="One held-out trial")
    return results


if __name__ == "__main__":
    with command_line(Args, debug=dict(num_envs=8, eval_trials=16, eval_interval=40)) as args:
        train(args)
