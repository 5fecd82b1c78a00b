"""A task, a policy and a run so small that a round takes a fraction of a second."""

from __future__ import annotations

import torch

from torchrl_amago import (
    MetaFrozenLake,
    make_policy,
    make_trainer,
    make_trial_buffer,
    make_trial_env,
)
from torchrl_amago.scaling._exchange import Board
from torchrl_amago.scaling.roles import Player
from torchrl_amago.trainers import Intervals

LENGTH = 9


def make_env(rows: int = 4, size: int = 3):
    return make_trial_env(MetaFrozenLake(size, batch_size=(rows,)), episodes=1)


def small_policy(size: int = 3, d_model: int = 8):
    torch.manual_seed(0)
    options = dict(seq_model="gru", seq_model_options={"d_model": d_model})
    steps = dict(hidden_size=8, output_size=8)
    return make_policy(
        make_env(size=size),
        context_length=LENGTH,
        timestep_options=steps,
        actor_options=dict(hidden_size=8),
        exploration=dict(anneal_frames=1000),
        discounts=(0.9,),
        **options,
    )


def make_buffer(capacity: int = 2000, **options):
    options = dict(trim_padding=True, warn_short=False) | options
    return make_trial_buffer(capacity, slice_length=LENGTH, batch_size=4, **options)


def make_player(seed: int = 0, version: int = 0) -> Player:
    board = Board("nowhere", small_policy())
    player = Player(make_env, board, round_steps=LENGTH, seed=seed)
    board.version = version
    return player


def small_trainer(run_dir, workers=1, *, make=make_env, total_updates=40, **options):
    worker_options = options.pop("worker_options", {})
    defaults = dict(
        trial_length=LENGTH,
        updates_per_round=5,
        batch_size=4,
        capacity=2000,
        critic_options=dict(hidden_size=8),
        progress_bar=False,
        warmup_updates=0,
        seed=1,
        intervals=Intervals(log=10, evaluate=1000, checkpoint=10),
    )
    return make_trainer(
        make,
        small_policy(),
        run_dir=run_dir,
        total_updates=total_updates,
        workers=workers,
        worker_options=worker_options,
        **defaults | options,
    )
