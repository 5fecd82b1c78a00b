"""Learn on-policy with TorchRL's own PPO on top of our encoders: RL2, on the task of example 00.

    python examples/ppo_with_memory.py                       # minutes on two CPU cores; any --seq-model
    python examples/ppo_with_memory.py --debug               # under a minute, to see that all runs

Timestep and trajectory encoder are the backbone that actor and critic share; loss, advantages and
collector are TorchRL's. Lakes and held-out evaluation are those of example 00, to compare with. The
run's folder gets `progress.csv`, `learning_curve.png`, `adaptation_curve.png`, `evaluation.npz` and
`evaluation_sampled.npz`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential as Seq
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import MLP, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from tqdm import tqdm

import torchrl_amago as amago
from torchrl_amago.trainers import ProgressTable, check_no_existing_run


@dataclass
class Args:
    """Meta-FrozenLake with PPO."""

    run_dir: Path = Path("runs/ppo_with_memory")
    """Folder for everything this run writes."""
    debug: bool = False
    """A short run with a small network, to see that everything works (well under a minute)."""
    seed: int = 1
    """Seed of everything: networks, lakes, actions, batches."""
    seq_model: Literal[tuple(amago.SEQ_MODELS)] = "transformer"
    """What remembers: the trajectory encoder."""
    d_model: int = 64
    """Width of the sequence model; other networks are four times as wide."""
    num_layers: int = 2
    """Layers of the sequence model."""
    num_envs: int = 128
    """Lakes played at the same time, in each round for as long as a trial may last."""
    rounds: int = 100
    """Rounds of collecting and learning."""
    epochs: int = 4
    """Passes over what a round collected."""
    batch_size: int = 32
    """Rows in a batch."""
    learning_rate: float = 5e-4
    """Step size of AdamW."""
    eval_trials: int = 1024
    """Trials in the evaluation at the end, on held-out lakes."""
    threads: int = 2
    """CPU threads."""


DEBUG = dict(rounds=4, num_envs=16, batch_size=8, d_model=32, num_layers=1, eval_trials=64)


def make_env(num_envs: int) -> EnvBase:
    return amago.make_trial_env(amago.MetaFrozenLake(3, batch_size=(num_envs,)), episodes=5)


def make_networks(args: Args, env: EnvBase, horizon: int) -> tuple[Seq, Mod]:
    """The actor, encoders included, and the critic's head, which reads the state that they write."""
    # Without dropout and moving averages of inputs, the policy that learns is the one that acted.
    options = dict(d_model=args.d_model, num_layers=args.num_layers)
    if args.seq_model in ("transformer", "linear_attention"):
        options |= dict(num_heads=4, dropout_ff=0.0, dropout_emb=0.0)
    elif args.seq_model == "identity":
        options = {}
    width = 4 * args.d_model
    timestep = amago.make_timestep_encoder(env, hidden_size=width, output_size=args.d_model,
                                           normalize_inputs=False)  # fmt: skip
    seq_model = amago.SEQ_MODELS[args.seq_model]
    trajectory = seq_model(args.d_model, context_length=horizon, **options)
    head = dict(in_features=trajectory.output_size, num_cells=[width])
    sampler = ProbabilisticTensorDictModule(["logits"], ["action"], return_log_prob=True,
                                            distribution_class=amago.ClippedCategorical)  # fmt: skip
    logits = Mod(MLP(**head, out_features=env.action_spec.n), ["state"], ["logits"])
    actor = ProbabilisticTensorDictSequential(timestep, trajectory, logits, sampler)
    return actor, Mod(MLP(**head, out_features=1), ["state"], ["state_value"])


@torch.no_grad()
def add_advantages(batch: TensorDictBase, value_network: Seq, gae: GAE) -> None:
    """Write advantages and value targets into a batch of rows `[B, T]`.

    One pass over T + 1 steps gives the value of each step and of the one after, with its own history.
    (GAE by itself would read the next steps as sequences of their own, which lack the first step.)
    """
    keys, last = value_network.in_keys, batch["next"][:, -1:]
    inputs = torch.cat([td.select(*keys, strict=False) for td in (batch, last)], 1)
    with set_recurrent_mode(True):
        out = value_network(inputs)
    batch["state_value"] = out["state_value"][:, :-1]
    batch["next", "state_value"] = out["state_value"][:, 1:]
    gae(batch)


def train(args: Args) -> None:
    check_no_existing_run(args.run_dir)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_env(args.num_envs)
    env.set_seed(args.seed)
    horizon = 5 * env.base_env.max_episode_steps
    actor, critic = make_networks(args, env, horizon)
    loss_module = ClipPPOLoss(actor, critic, normalize_advantage=True, critic_coeff=0.5)
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=None)
    optimizer = amago.make_optimizer(loss_module, learning_rate=args.learning_rate)
    frames = args.num_envs * horizon
    # Rows begin with a reset, so that a sequence holds all that the policy remembered as it acted.
    collector = Collector(env, actor, frames_per_batch=frames, total_frames=args.rounds * frames,
                          reset_at_each_iter=True)  # fmt: skip
    table = ProgressTable(args.run_dir / "progress.csv")
    progress = tqdm(collector, total=args.rounds, disable=None, unit="round")
    for number, data in enumerate(progress, 1):
        batch = data.exclude("timestep", "state", "logits", "_stream")
        add_advantages(batch, Seq(*actor[:-2], critic), gae)
        for _ in range(args.epochs):
            for rows in torch.randperm(args.num_envs).split(args.batch_size):
                with set_recurrent_mode(True):
                    losses = loss_module(batch[rows])
                optimizer.zero_grad()
                sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
                torch.nn.utils.clip_grad_norm_(loss_module.parameters(), 1.0)
                optimizer.step()
        done, reward = batch["next", "done"].int(), batch["next", "reward"]
        first_trial = done.cumsum(1) == done  # rows hold one whole trial and part of another
        row = {name: value.item() for name, value in losses.items() if value.numel() == 1}
        row |= {"train/trial_return": reward[first_trial].sum().item() / args.num_envs}
        table.append({"update": number, "frames": number * frames, **row})
        progress.set_postfix(trial_return=f"{row['train/trial_return']:.2f}")
    collector.shutdown()
    finish(args, actor)


def finish(args: Args, actor: Seq) -> None:
    env = make_env(min(256, args.eval_trials))
    results = amago.HeldOutEvaluator(actor, env).evaluate_greedy_and_sampled(args.eval_trials)
    results.save(args.run_dir)
    print(results.describe())
    amago.plot_learning_curve(args.run_dir / "progress.csv", args.run_dir / "learning_curve.png")
    amago.plot_adaptation_curve(
        results.greedy,
        args.run_dir / "adaptation_curve.png",
        reference=amago.bayes_optimal_success(3, 5).success_by_episode,
        title=f"PPO, {args.seq_model}: {len(results.greedy)} held-out 3x3 lakes, greedy",
    )


def main(command: list[str] | None = None) -> None:
    args = tyro.cli(Args, args=command)
    train(dataclasses.replace(args, **DEBUG) if args.debug else args)


if __name__ == "__main__":
    main()
