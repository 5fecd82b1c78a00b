"""Learn on-policy with TorchRL's own PPO on top of our encoders: RL2, on the task of example 00.

    python examples/ppo_with_memory.py                # minutes on two CPU cores
    python examples/ppo_with_memory.py --debug        # under a minute, a test of the setup

Actor and critic share the timestep and trajectory encoders; loss, advantages and collector are
TorchRL's. The run's folder gets `progress.csv`, `learning_curve.png`, `adaptation_curve.png`,
`evaluation.npz` and `evaluation_sampled.npz`, comparable with those of example 00.
"""

from __future__ import annotations

import dataclasses
import time

import torch
import tyro
from ppo_args import DEBUG, Args
from ppo_parts import add_advantages, draw_pictures, make_lakes, make_networks, trial_return
from tensordict.nn import TensorDictSequential as Seq
from torchrl.collectors import Collector
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from tqdm import tqdm

from torchrl_amago import HeldOutEvaluator, make_optimizer
from torchrl_amago.evaluation import EvaluationResults, evaluation_metrics
from torchrl_amago.trainers import ProgressTable, check_no_existing_run


def train(args: Args) -> EvaluationResults:
    check_no_existing_run(args.run_dir)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_lakes(args, args.num_envs, "train")
    env.set_seed(args.seed)
    horizon = args.episodes * env.base_env.max_episode_steps
    actor, critic = make_networks(args, env, horizon)
    loss_module = ClipPPOLoss(actor, critic, normalize_advantage=True, critic_coeff=0.5)
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=None)
    optimizer = make_optimizer(loss_module, learning_rate=args.learning_rate)
    frames = args.num_envs * horizon
    # Rows begin with a reset, so that a sequence holds all that the policy remembered as it acted.
    collector = Collector(env, actor, frames_per_batch=frames, total_frames=args.rounds * frames,
                          reset_at_each_iter=True)  # fmt: skip
    held_out = HeldOutEvaluator(actor, make_lakes(args, min(256, args.eval_trials), "heldout"))
    table, begin = ProgressTable(args.run_dir / "progress.csv"), time.perf_counter()
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
        trained = time.perf_counter()
        row = {"update": number, "frames": number * frames, "seconds_training": trained - begin}
        row |= {"train/trial_return": trial_return(batch)}
        row |= {name: value.item() for name, value in losses.items() if value.numel() == 1}
        if number % args.eval_interval == 0:
            row |= evaluation_metrics(held_out.evaluate(args.eval_trials // 4))
        table.append(row)
        progress.set_postfix(trial_return=f"{row['train/trial_return']:.2f}")
        begin += time.perf_counter() - trained
    collector.shutdown()
    results = held_out.evaluate_greedy_and_sampled(args.eval_trials)
    results.save(args.run_dir)
    print(results.describe())
    draw_pictures(args, results.greedy)
    return results


def main(command: list[str] | None = None) -> None:
    args = tyro.cli(Args, args=command)
    train(dataclasses.replace(args, **DEBUG) if args.debug else args)


if __name__ == "__main__":
    main()
