"""The parts of a run's state, the lock on its folder, and settings that a resumed run must keep."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn

from tests.processes import forked
from tests.trainers.tiny import make_trainer, stop_at
from torchrl_amago.trainers import FiniteOptimizationStepper, Intervals
from torchrl_amago.trainers.optim import OptimizerState, make_optimizer, make_schedule


class Counter:
    """A part of a user's own."""

    calls = 0

    def __call__(self, trainer):
        self.calls += 1

    def state_dict(self):
        return {"calls": self.calls, "history": torch.arange(self.calls)}

    def load_state_dict(self, state):
        assert torch.equal(state["history"], torch.arange(state["calls"]))
        self.calls = state["calls"]


def test_an_unknown_part_is_saved_and_restored(tmp_path):
    def make(total_updates, part):
        options = {"components": {"mine": part}, "callbacks": [part]}
        return make_trainer(tmp_path, total_updates=total_updates, **options)

    make(7, Counter()).train()
    resumed = make(9, counter := Counter()).resume()
    assert counter.calls == 7
    resumed.train()
    assert counter.calls == 9
    with pytest.raises(ValueError, match="differ in 1 entries: mine: present there, absent here"):
        make_trainer(tmp_path).resume()


def test_components_need_both_methods_and_names_of_their_own(tmp_path):
    with pytest.raises(AttributeError, match="'int' object has no attribute 'state_dict'"):
        make_trainer(tmp_path, components={"mine": 3}).train()
    with pytest.raises(TypeError, match="multiple values for keyword argument 'loss'"):
        make_trainer(tmp_path, components={"loss": Counter()})


def test_every_part_of_a_trainer_is_a_component(tmp_path):
    """Each attribute that has a state is in the dictionary, or inside of a part there."""
    trainer = make_trainer(tmp_path)
    inside = {"optimizer", "scheduler", "collector", "policy", "online_buffer", "replay_buffer"}
    assert trainer.stepper.state_dict() == {}
    parts = {id(p) for p in (*trainer.components.values(), trainer.components, trainer.stepper)}
    held = {name: x for name, x in vars(trainer).items() if hasattr(x, "load_state_dict")}
    assert {name for name, part in held.items() if id(part) not in parts} <= inside
    optimisation = trainer.components["optimizer"]
    assert optimisation.optimizer is trainer.optimizer
    assert optimisation.scheduler is trainer.scheduler
    assert trainer.components["rollouts"].collector is trainer.collector


def make_optimisation(learning_rate, make_scheduler):
    optimizer = make_optimizer(nn.Linear(1, 1), learning_rate)
    part = OptimizerState(optimizer, make_scheduler(optimizer))
    optimizer.step()
    if part.scheduler is not None:
        part.scheduler.step()
    return part


@pytest.mark.parametrize(
    ("make_scheduler", "rate"),
    [
        (lambda optimizer: None, 0.5),
        (lambda optimizer: make_schedule(optimizer, 4), 0.25),
        # Of other schedules nothing is known but their state.
        (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1), 0.1),
    ],
    ids=["constant", "rise", "other"],
)
def test_the_learning_rate_is_that_of_the_run_that_resumes(make_scheduler, rate):
    part = make_optimisation(0.5, make_scheduler)
    part.load_state_dict(make_optimisation(1.0, make_scheduler).state_dict())
    assert part.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def first_steps(rollouts):
    return rollouts.collector._carrier["observation"].clone()


def test_the_saved_generator_decides_the_trials_that_begin(tmp_path):
    trainer = make_trainer(tmp_path)  # kept: a trainer that is collected shuts its collector down
    rollouts = trainer.components["rollouts"]
    rollouts.capture()
    saved = rollouts.state_dict()
    trainer.monitor._unfinished[99] = [(1.0, 99)]
    rollouts.go_on()
    assert not trainer.monitor._unfinished
    first, expected = first_steps(rollouts), torch.rand(3)
    rollouts.go_on()
    assert not torch.equal(first_steps(rollouts), first)
    rollouts.load_state_dict(saved)
    rollouts.resume()
    assert torch.equal(first_steps(rollouts), first)
    assert torch.equal(torch.rand(3), expected)  # generators are those of the checkpoint
    other = torch.Generator().manual_seed(99).get_state()
    rollouts.load_state_dict({**saved, "random": {**saved["random"], "torch_cpu": other}})
    rollouts.resume()
    assert not torch.equal(first_steps(rollouts), first)


def test_a_resumed_run_forgets_trials_that_cannot_go_on(tmp_path):
    unfinished = {99: [(1.0, 99)]}
    leave = lambda trainer: trainer.monitor._unfinished.update(unfinished)  # noqa: E731
    make_trainer(tmp_path, total_updates=6, callbacks=[leave]).train()
    resumed = make_trainer(tmp_path, total_updates=7).resume()
    assert resumed.monitor._unfinished == unfinished
    resumed.train()
    assert not resumed.monitor._unfinished


def test_restarting_leaves_torchs_generator_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    rollouts = trainer.components["rollouts"]
    trainer.collector.env.base_env._set_seed = torch.manual_seed  # as some environments do
    rollouts.capture()
    with torch.random.fork_rng():
        torch.randint(2**31 - 1, ())  # the seed
        expected = torch.get_rng_state()
    rollouts.go_on()
    assert torch.equal(torch.get_rng_state(), expected)


def test_restarting_drops_unfinished_trials_and_numbers_the_new(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, frames_per_batch=4)
    rollouts, batches = trainer.components["rollouts"], iter(trainer.collector)
    next(batches)  # one step of each row
    rollouts.capture()
    rollouts.load_state_dict(rollouts.state_dict())
    numbers = []
    for restart in (rollouts.go_on, rollouts.resume):
        restart()
        numbers.append(trainer.collector._carrier["collector", "traj_ids"].tolist())
    assert numbers[0] == numbers[1]
    written = []
    monkeypatch.setattr(trainer.replay_buffer, "extend", written.append)
    while not written:
        next(batches)
    assert set(written[0]["collector", "traj_ids"].tolist()) <= set(numbers[0])
    assert written[0]["time_idx"][0] == 0


def test_settings_of_modules_must_be_those_that_were_saved(tmp_path):
    def make(n_step, **options):
        trainer = make_trainer(tmp_path, **options)
        trainer.loss_module.settings = {"n_step": n_step, "gammas": [0.9]}
        return trainer

    make((1,), total_updates=4).train()
    for n_step, options, match in (
        ([5], {}, r"loss.n_step: \[1\] there, \[5\] here"),
        ([1], {"seed": 4}, "1 entries: seed: 3 there, 4 here"),
        ([1], {"settings": {"size": 4}}, "1 entries: size: absent there, 4 here"),
    ):
        with pytest.raises(ValueError, match=match):
            make(n_step, **options).resume()
    make([1]).resume()


def test_options_that_changed_are_logged(tmp_path, monkeypatch):
    make_trainer(tmp_path, total_updates=4, options={"mine": 1, "same": (2,)}).train()
    lines = []
    monkeypatch.setattr("torchrl_amago.trainers.amago.torchrl_logger.info", lines.append)
    changed = {"total_updates": 8, "learning_rate": 1e-3, "tau": 0.5, "updates_per_round": 2}
    changed |= {"frames_per_batch": 16}
    drawn = {"slice_length": 2, "crop": "left", "sample_by": "steps", "padding": "left"}
    drawn |= {"min_trials": 2, "alpha": 0.9, "beta": 0.1}
    steps = {"clip_norm": None, "clip_each": True, "precision": "bf16"}
    intervals = {"log": 2, "evaluate": 3, "checkpoint": 7}
    parts = {"intervals": Intervals(**intervals), "stepper": FiniteOptimizationStepper(**steps)}
    trainer = make_trainer(tmp_path, options={"mine": 2, "same": [2]}, **changed, **parts)
    vars(trainer.online_buffer.sampler).update(drawn)
    trainer.resume()
    names = {*changed, *drawn, *steps, *(f"{name}_interval" for name in intervals), "mine"}
    assert {line.split()[2].partition("=")[0] for line in lines} == names
    assert "resumed with tau=0.5 instead of 0.1" in lines
    assert "resumed with crop=left instead of none" in lines


def test_a_second_trainer_is_refused_with_the_name_of_the_first(tmp_path):
    first = make_trainer(tmp_path, total_updates=8)
    refused = []

    def try_another():
        for start in (make_trainer(tmp_path).train, make_trainer(tmp_path).resume):
            with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on"):
                start()
            refused.append(start)

    first.callbacks.append(stop_at(5, try_another))
    assert first.train() == "finished"
    assert len(refused) == 2
    # Released at the end.
    assert make_trainer(tmp_path, total_updates=9).resume().train() == "finished"


def hold_the_lock(run_dir, ready):
    def wait():
        ready.set()
        time.sleep(60)

    make_trainer(run_dir, callbacks=[stop_at(7, wait)]).train()


def test_a_crash_releases_the_lock(tmp_path):
    ready = forked.Event()
    process = forked.Process(target=hold_the_lock, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match=f"in use by process {process.pid} on"):
        make_trainer(tmp_path).resume()
    process.kill()
    process.join()
    assert make_trainer(tmp_path).resume().counts.updates == 6
