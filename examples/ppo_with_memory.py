"""Learn on-policy with TorchRL's own PPO on top of our encoders: RL2, on the task of example 00.

    python examples/ppo_with_memory.py                # minutes on two CPU cores
    python examples/ppo_with_memory.py --debug        # under a minute, a test of the setup

Actor and critic share the timestep and trajectory encoders; loss, advantages and collector are
TorchRL's. The run's folder gets `progress.csv`, `learning_curve.png`, `adaptation_curve.png`,
`evaluation.npz` and `evaluation_sampled.npz`, comparable with those of example 00.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from ppo_parts import add_advantages, draw_pictures, make_networks
from tensordict.nn import TensorDictSequential as Seq
from torchrl.collectors import Collector
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from tqdm import tqdm

from torchrl_amago import HeldOutEvaluator, MetaFrozenLake, make_optimizer, make_trial_env
from torchrl_amago.evaluation import EvaluationResults
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.trainers import ProgressTable, check_no_existing_run


@dataclass
class Args:
    """Meta-FrozenLake with PPO."""

    run_dir: Path = Path("runs/ppo_with_memory")
    """Folder for everything this run writes."""
    debug: bool = False
    """A short run with a small network, a test of the installation."""
    seed: int = 1
    """Seed of everything: networks, lakes, actions, batches."""
    seq_model: Literal[tuple(SEQ_MODELS)] = "transformer"
    """Trajectory encoder."""
    d_model: int = 64
    """Width of the sequence model; other networks are four times as wide."""
    num_layers: int = 2
    """Layers of the sequence model."""
    num_envs: int = 128
    """Lakes played together, in each round for the steps of the longest trial."""
    rounds: int = 100
    """Rounds of collecting and learning."""
    epochs: int = 4
    """Passes over the data of a round."""
    batch_size: int = 32
    """Rows in a batch."""
    learning_rate: float = 5e-4
    """Step size of AdamW."""
    eval_trials: int = 1024
    """Trials in the evaluation at the end, on held-out lakes."""
    threads: int = 2
    """CPU threads."""


DEBUG = dict(rounds=4, num_envs=16, batch_size=8, d_model=32, num_layers=1, eval_trials=64)


def train(args: Args) -> EvaluationResults:
    check_no_existing_run(args.run_dir)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_trial_env(MetaFrozenLake(3, batch_size=(args.num_envs,)), episodes=5)
    env.set_seed(args.seed)
    horizon = 5 * env.base_env.max_episode_steps
    actor, critic = make_networks(args, env, horizon)
    loss_module = ClipPPOLoss(actor, critic, normalize_advantage=True, critic_coeff=0.5)
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=None)
    optimizer = make_optimizer(loss_module, learning_rate=args.learning_rate)
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
    lakes = MetaFrozenLake(3, batch_size=(min(256, args.eval_trials),))
    results = HeldOutEvaluator(
        actor, make_trial_env(lakes, episodes=5)
    ).evaluate_greedy_and_sampled(args.eval_trials)
    results.save(args.run_dir)
    print(results.describe())
    draw_pictures(args, results.greedy)
    return results


def main(command: list[str] | None = None) -> None:
    args = tyro.cli(Args, args=command)
    train(dataclasses.replace(args, **DEBUG) if args.debug else args)


if __name__ == "__main__":
    main()
