"""Networks, advantages and pictures of the PPO example."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential as Seq
from torchrl.envs import EnvBase
from torchrl.modules import MLP, set_recurrent_mode
from torchrl.objectives.value import GAE

from torchrl_amago import MetaFrozenLake, make_trial_env
from torchrl_amago.envs import bayes_optimal_success
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.modules import SEQ_MODELS, ClippedCategorical, make_timestep_encoder
from torchrl_amago.plots import plot_adaptation_curve, plot_learning_curve


def make_lakes(args: Any, num_envs: int, layouts: str) -> EnvBase:
    """Make trial environments, of some layouts alone if a part of them is held out."""
    layouts = layouts if args.hold_out_layouts else "all"
    lakes = MetaFrozenLake(args.size, layouts=layouts, batch_size=(num_envs,))
    return make_trial_env(lakes, episodes=args.episodes)


def make_networks(args: Any, env: EnvBase, horizon: int) -> tuple[Seq, Mod]:
    """Make the actor, encoders included, and the critic's head, which reads the same state."""
    # Without dropout and moving averages of inputs, the policy that learns is the one that acted.
    options = dict(d_model=args.d_model, num_layers=args.num_layers)
    if args.seq_model in ("transformer", "linear_attention"):
        options |= dict(num_heads=4, dropout_ff=0.0, dropout_emb=0.0)
    elif args.seq_model == "identity":
        options = {}
    width = 4 * args.d_model
    timestep = make_timestep_encoder(
        env, hidden_size=width, output_size=args.d_model, normalize_inputs=False
    )
    trajectory = SEQ_MODELS[args.seq_model](args.d_model, context_length=horizon, **options)
    head = dict(in_features=trajectory.output_size, num_cells=[width])
    sampler = ProbabilisticTensorDictModule(
        ["logits"], ["action"], return_log_prob=True, distribution_class=ClippedCategorical
    )
    logits = Mod(MLP(**head, out_features=env.action_spec.n), ["state"], ["logits"])
    actor = ProbabilisticTensorDictSequential(timestep, trajectory, logits, sampler)
    return actor, Mod(MLP(**head, out_features=1), ["state"], ["state_value"])


@torch.no_grad()
def add_advantages(batch: TensorDictBase, value_network: Seq, gae: GAE) -> None:
    """Write advantages and value targets into a batch of rows `[B, T]`.

    One pass over T + 1 steps gives the value of each step and of the one after, with its own
    history. (GAE by itself would read the next steps as sequences of their own, which lack the
    first step.)
    """
    keys, last = value_network.in_keys, batch["next"][:, -1:]
    inputs = torch.cat([td.select(*keys, strict=False) for td in (batch, last)], 1)
    with set_recurrent_mode(True):
        out = value_network(inputs)
    batch["state_value"] = out["state_value"][:, :-1]
    batch["next", "state_value"] = out["state_value"][:, 1:]
    gae(batch)


def trial_return(batch: TensorDictBase) -> float:
    """Return the mean return of the rows' first trials; rows hold a part of another one, too."""
    done, reward = batch["next", "done"].int(), batch["next", "reward"]
    return reward[done.cumsum(1) == done].sum().item() / len(batch)


def draw_pictures(args: Any, results: TrialResults) -> None:
    """Draw the learning curve, and the adaptation curve, beside the exact optimum if known."""
    known = args.size < 4 and not args.hold_out_layouts
    optimum = bayes_optimal_success(args.size, args.episodes) if known else None
    plot_learning_curve(args.run_dir / "progress.csv", args.run_dir / "learning_curve.png")
    plot_adaptation_curve(
        results,
        args.run_dir / "adaptation_curve.png",
        reference=optimum and optimum.success_by_episode,
        title=f"PPO, {args.seq_model}: {len(results)} held-out lakes, greedy",
    )
