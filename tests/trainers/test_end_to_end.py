"""The real parts together: frozen lakes, Transformer policy with its memory, AMAGOLoss, evaluation."""

from __future__ import annotations

import signal

import gymnasium as gym
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.objectives import SoftUpdate

from tests.trainers.test_amago_resume import assert_same_run, finish
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.envs import MetaFrozenLake, make_trial_env
from torchrl_amago.evaluation import evaluate
from torchrl_amago.modules import make_policy
from torchrl_amago.objectives import amago_loss
from torchrl_amago.trainers import AMAGOTrainer, make_optimizer, read_progress

TOTAL = 14


def lake(rows, layouts="all"):
    base = MetaFrozenLake(batch_size=(rows,), max_episode_steps=4, layouts=layouts)
    return make_trial_env(base, episodes=2)


def cart_poles(rows):
    autoreset = gym.vector.AutoresetMode.DISABLED
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.make("CartPole-v1", max_episode_steps=4)] * rows, autoreset_mode=autoreset
    )
    base = GymWrapper(envs, categorical_action_encoding=True)
    return make_trial_env(base, episodes=2, repeat="seed")


def make_run(run_dir, make_env=lake, *, weights_seed=0, total_updates=TOTAL, **options):
    torch.manual_seed(weights_seed)
    env, held_out = make_env(6), make_env(4)
    policy = make_policy(
        env,
        context_length=6,  # shorter than the trials: memory rolls over
        seq_model_options={"d_model": 16, "num_heads": 2, "num_layers": 2, **options},
        timestep_options={"hidden_size": 16, "output_size": 16},
        exploration={"anneal_frames": 500},
    )
    loss = amago_loss(policy, critic_options={"hidden_size": 16})
    rb = make_trial_buffer(200, slice_length=6, batch_size=4, warn_short=False)
    collector = Collector(
        env, policy, frames_per_batch=18, total_frames=-1, trajs_per_batch=1, replay_buffer=rb
    )
    return AMAGOTrainer(
        collector=collector,
        loss_module=loss,
        optimizer=make_optimizer(loss, learning_rate=1e-3),
        replay_buffer=rb,
        total_updates=total_updates,
        updates_per_round=3,
        run_dir=run_dir,
        target_updater=SoftUpdate(loss, tau=0.01),
        exploration=policy.exploration,
        evaluator=lambda: evaluate(policy, held_out, trials_per_row=1, seed=7),
        eval_interval=5,
        checkpoint_interval=5,
        log_interval=2,
        warmup_updates=5,
        progress_bar=False,
        seed=3,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(make_run(tmp_path_factory.mktemp("run") / "whole"))


def test_finished_then_resumed(uninterrupted, tmp_path):
    make_run(tmp_path, total_updates=10).train()
    assert_same_run(uninterrupted, finish(make_run(tmp_path, weights_seed=5).resume()))


def test_interrupted_twice(uninterrupted, tmp_path):
    for number, stop in enumerate((7, 13)):
        trainer = make_run(tmp_path, weights_seed=number)
        trainer.register_op(
            "post_optim",
            lambda t=trainer, n=stop: t.counts.updates == n and signal.raise_signal(signal.SIGINT),
        )
        if number:
            trainer.resume()
        assert trainer.train() == "interrupted"
    assert_same_run(uninterrupted, finish(make_run(tmp_path, weights_seed=9).resume()))


def test_the_rows_tell_what_one_watches(uninterrupted):
    rows = read_progress(uninterrupted[1])
    for name in ("trial_return", "trial_length", "success_first", "success_last"):
        assert (rows[f"eval/{name}"][rows["update"] % 5 == 0] >= 0).all()
        assert (rows[f"train/{name}"] >= 0).any()
    assert {"loss_actor", "loss_qvalue", "entropy", "td_error"} <= rows.keys()


def test_seed_repeated_gymnasium_task(tmp_path):
    whole = finish(make_run(tmp_path / "whole", cart_poles, total_updates=8))
    make_run(tmp_path / "parts", cart_poles, total_updates=5).train()
    parts = make_run(tmp_path / "parts", cart_poles, total_updates=8, weights_seed=5)
    assert_same_run(whole, finish(parts.resume()))


def test_memory_that_restarts_with_new_weights(tmp_path):
    options = {"total_updates": 8, "on_weight_update": "restart"}
    whole = finish(make_run(tmp_path / "whole", **options))
    make_run(tmp_path / "parts", **options | {"total_updates": 5}).train()
    parts = make_run(tmp_path / "parts", weights_seed=5, **options)
    assert_same_run(whole, finish(parts.resume()))
