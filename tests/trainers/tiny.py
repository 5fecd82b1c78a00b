"""A task, a policy and a loss so small that a run takes a fraction of a second."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.objectives import LossModule, SoftUpdate

from tests.data.trials import make_buffer
from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.tasks.batched_task import BatchedTask
from torchrl_amago.modules.exploration import BilevelEpsilonGreedy
from torchrl_amago.trainers import AMAGOTrainer, Intervals, make_optimizer, make_schedule


class GuessTask(BatchedTask):
    """Guess a hidden number from 0 to 2 in episodes of 2 or 3 steps, two of which are a trial.

    ``poison`` puts a value that is not finite into an entry, from a given step on.
    """

    def __init__(self, rows: int = 4, poison: tuple[str, int, float] | None = None) -> None:
        options = {"num_actions": 3, "max_episode_steps": 3, "batch_size": [rows], "seed": 0}
        super().__init__([(0.0, 1.0)] * 3, **options)
        self.poison, self.steps = poison, 0
        for name in ("_hidden", "_length", "_hit"):
            self._state(name, torch.zeros(rows))

    def _draw_tasks(self, rows):
        self._hidden[rows] = (3 * self._random()).floor()[rows]
        self._length[rows] = (2 + 2 * self._random()).floor()[rows]

    def _begin_episodes(self, selected):
        self._hit[selected] = 0.0

    def _advance(self, action):
        self._hit = (action == self._hidden).float()
        return self._hit, self._num_steps >= self._length

    def _observe(self):
        return torch.stack([self._hit, self._num_steps % 2, self._random()], -1)

    def _step(self, tensordict):
        self.steps += 1
        out = super()._step(tensordict)
        if self.poison is not None and self.steps >= self.poison[1]:
            out[self.poison[0]][0] = self.poison[2]
        return out


class TinyLoss(LossModule):
    """Imitation of rewarded actions and a value regression, with target and running statistics."""

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    critic_network: TensorDictModule
    critic_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams

    def __init__(self, actor: TensorDictModule, hidden_size: int) -> None:
        super().__init__()
        critic = TensorDictModule(_mlp(3, hidden_size, 1), ["observation"], ["value"])
        self.convert_to_functional(actor, "actor_network", create_target_params=False)
        self.convert_to_functional(critic, "critic_network", create_target_params=True)
        self.register_buffer("mean_reward", torch.zeros(()))
        self.scale = 1.0

    def forward(self, tensordict):
        mask = tensordict["collector", "mask"]
        reward = tensordict["next", "reward"].squeeze(-1)
        self.mean_reward.lerp_(reward[mask].mean(), 0.1)
        with self.actor_network_params.to_module(self.actor_network):
            logits = self.actor_network(tensordict.select("observation"))["logits"]
        with self.critic_network_params.to_module(self.critic_network):
            value = self.critic_network(tensordict.select("observation"))["value"].squeeze(-1)
        with torch.no_grad(), self.target_critic_network_params.to_module(self.critic_network):
            after = self.critic_network(tensordict["next"].select("observation"))["value"]
        log_prob = logits.log_softmax(-1).gather(-1, tensordict["action"].unsqueeze(-1))[..., 0]
        error = (value - reward - 0.5 * after.squeeze(-1)).square()
        dropped = torch.rand_like(reward) < 0.9  # a loss that draws random numbers, as dropout does
        return TensorDict(
            loss_actor=-self.scale * ((reward - self.mean_reward) * log_prob)[mask].mean(),
            loss_qvalue=error[mask & dropped].sum() / mask.sum(),
            td_error=error[mask].mean().detach(),
        )


def _mlp(size_in: int, hidden_size: int, size_out: int) -> nn.Sequential:
    hidden = nn.Linear(size_in, hidden_size), nn.LayerNorm(hidden_size)
    return nn.Sequential(*hidden, nn.Linear(hidden_size, size_out))


def make_trainer(
    run_dir, *, total_updates=24, weights_seed=0, hidden_size=8, poison=None, device="cpu",
    capacity=100, min_trials=1, replay=None, frames_per_batch=12, total_frames=-1,
    learning_rate=1e-2, warmup_updates=10, final_lr_fraction=1.0, tau=0.1, **options,
) -> AMAGOTrainer:  # fmt: skip
    """A trainer of everything above. ``weights_seed`` decides the initial weights only.

    The environment stays on the CPU; ``device`` is the loss's. ``replay`` makes the sampled buffer
    from the one that is collected into.
    """
    torch.manual_seed(weights_seed)
    env = make_trial_env(GuessTask(poison=poison), episodes=2)
    actor = TensorDictModule(_mlp(3, hidden_size, 3), ["observation"], ["logits"])
    explore = BilevelEpsilonGreedy(num_actions=3, horizon=6, anneal_frames=200)
    sample = TensorDictModule(lambda x: x.softmax(-1).multinomial(1)[:, 0], ["logits"], ["action"])
    rb = make_buffer(capacity=capacity, slice_length=5, batch_size=3, min_trials=min_trials)
    policy = TensorDictSequential(actor, sample, explore).to(device)
    collector = Collector(
        env, policy, frames_per_batch=frames_per_batch, total_frames=total_frames,
        trajs_per_batch=1, replay_buffer=rb, policy_device="cpu",
    )  # fmt: skip
    loss = TinyLoss(actor, hidden_size).to(device)
    optimizer = make_optimizer(loss, learning_rate=learning_rate)
    defaults = {"updates_per_round": 4, "progress_bar": False, "seed": 3}
    defaults["intervals"] = Intervals(log=4, evaluate=6, checkpoint=6)
    parts = (collector, loss, optimizer, rb if replay is None else replay(rb))
    scheduler = make_schedule(optimizer, warmup_updates, total_updates, final_lr_fraction)
    return AMAGOTrainer(
        *parts, target_updater=SoftUpdate(loss, tau=tau), scheduler=scheduler, exploration=explore,
        total_updates=total_updates, run_dir=run_dir, **(defaults | options),
    )  # fmt: skip


def stop_at(update, press):
    """A callback that presses a key, or sends a signal, once this update is done."""
    return lambda trainer: press() if trainer.counts.updates == update else None
