from __future__ import annotations

import torch

from tests.trainers.tiny import make_trainer
from torchrl_amago.trainers import run_state


def first_steps(collector):
    return collector.env.base_env.hidden.clone(), collector._carrier["observation"].clone()


def test_the_seed_decides_the_trials_that_begin(tmp_path):
    trainer = make_trainer(tmp_path)  # kept: a trainer that is collected shuts its collector down
    collector = trainer.collector
    state = run_state.collector_state(collector)
    begun = []
    for seed in (5, 6, 5):
        run_state.restart_trials(collector, seed, state)
        begun.append(first_steps(collector)[1])
    assert torch.equal(begun[0], begun[2])
    assert not torch.equal(begun[0], begun[1])


def test_restarting_leaves_torchs_generator_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    collector = trainer.collector
    collector.env.base_env._set_seed = torch.manual_seed  # as some environments do
    before = torch.get_rng_state()
    run_state.restart_trials(collector, 5, run_state.collector_state(collector))
    assert torch.equal(torch.get_rng_state(), before)


def test_restarting_drops_unfinished_trials_and_numbers_the_new(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, frames_per_batch=4)
    batches = iter(trainer.collector)
    next(batches)  # one step of each row
    state = run_state.collector_state(trainer.collector)
    numbers = []
    for _ in range(2):
        run_state.restart_trials(trainer.collector, 5, state)
        numbers.append(trainer.collector._carrier["collector", "traj_ids"].tolist())
    assert numbers[0] == numbers[1]
    written = []
    monkeypatch.setattr(trainer.replay_buffer, "extend", written.append)
    while not written:
        next(batches)
    assert set(written[0]["collector", "traj_ids"].tolist()) <= set(numbers[0])
    assert written[0]["time_idx"][0] == 0


def test_seeds_come_from_torchs_generator():
    torch.manual_seed(1)
    one = [run_state.draw_seed() for _ in range(3)]
    torch.manual_seed(1)
    assert one == [run_state.draw_seed() for _ in range(3)]
    assert len(set(one)) == 3
