"""make_trainer: every setting arrives where it belongs, and the parts fit together."""

from __future__ import annotations

import csv

import pytest
import torch

from tests.data.trials import even_mixture
from tests.toy_env import ACTIONS, Toy
from torchrl_amago import TMaze, amago_loss, make_policy, make_trial_buffer, make_trial_env
from torchrl_amago.trainers import Intervals, make_trainer


@pytest.fixture
def env():
    return make_trial_env(TMaze(3, batch_size=[6], seed=0), episodes=1)


def small_policy(env, context_length=4):
    memory = dict(d_model=16, num_heads=2, num_layers=1)
    options = dict(seq_model_options=memory, exploration={}, discounts=(0.5, 0.9))
    return make_policy(env, context_length=context_length, **options)


@pytest.fixture
def policy(env):
    return small_policy(env)


def test_settings_arrive(env, policy, tmp_path):
    trainer = make_trainer(
        env, policy, trial_length=4, total_updates=9, run_dir=tmp_path, updates_per_round=3,
        batch_size=5, capacity=77, learning_rate=0.25, tau=0.125, warmup_updates=1,
        critic_options=dict(hidden_size=24, num_critics=3), loss_options=dict(reward_scale=2.0),
    )  # fmt: skip
    assert trainer.collector.requested_frames_per_batch == 6 * 4
    assert trainer.replay_buffer.storage.max_size == 77
    assert trainer.policy is policy
    assert trainer.replay_buffer.batch_size == 5
    assert trainer.updates_per_round == 3
    assert trainer.total_updates == 9
    assert trainer.exploration is policy.exploration
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25
    loss = trainer.loss_module
    assert loss.reward_scale == 2.0
    shapes = {tuple(p.shape) for p in loss.critic_network_params.values(True, True)}
    assert any(shape[0] == 3 and 24 in shape for shape in shapes)
    assert trainer.target_updater.eps == pytest.approx(1 - 0.125)
    trainer.collector.shutdown()


def test_rounds_and_slices_may_be_shorter_than_trials(env, policy, tmp_path):
    trainer = make_trainer(
        env, policy, trial_length=4, round_steps=3, slice_length=2, batch_size=500,
        total_updates=1, run_dir=tmp_path,
    )  # fmt: skip
    assert trainer.collector.requested_frames_per_batch == 6 * 3
    rounds = iter(trainer.collector)
    next(rounds)
    assert len(trainer.replay_buffer) == 0  # trials have four steps
    next(rounds)
    assert len(trainer.replay_buffer) == 6 * 4
    batch = trainer.replay_buffer.sample()
    assert batch.shape == (500, 2)
    # A window of two steps begins at one of five places, once before the trial and once at its end.
    is_last = batch["next", "done"].squeeze(-1) & batch["collector", "mask"]
    assert is_last.any(1).float().mean() == pytest.approx(2 / 5, abs=0.1)
    trainer.collector.shutdown()


CLONING = {"online_coeff": 0.0, "offline_coeff": 1.0, "advantage_filter": None}


@pytest.mark.parametrize(
    ("loss", "loss_options", "precision"),
    [
        ("amago", {}, "fp32"),
        ("amago", {}, "bf16"),
        ("amago2", {}, "bf16"),
        (amago_loss, CLONING, "fp32"),
    ],
    ids=["amago", "amago bf16", "amago2 bf16", "cloning"],
)
def test_every_loss_trains_and_reports_every_discount(tmp_path, loss, loss_options, precision):
    env = make_trial_env(Toy(ACTIONS["continuous"], 4), horizon=6)
    policy = small_policy(env, 6)
    before = [parameter.clone() for parameter in policy.parameters()]
    trainer = make_trainer(
        env, policy, trial_length=6, total_updates=4, updates_per_round=2, batch_size=3,
        run_dir=tmp_path, loss=loss, loss_options=loss_options, critic_options={"hidden_size": 16},
        precision=precision, intervals=Intervals(log=2),
    )  # fmt: skip
    assert trainer.train() == "finished"
    changed = [not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    (row, *_) = csv.DictReader((tmp_path / "progress.csv").read_text().splitlines())
    clones = loss is amago_loss
    parts = ["encoder", "actor"] if clones else ["encoder", "actor", "critic"]
    squares = sum(float(row[f"grad_norm_{part}"]) ** 2 for part in parts)
    # The rows' means of two updates; norms differ little between them.
    assert float(row["grad_norm"]) == pytest.approx(squares**0.5, rel=0.1)
    assert ("q_value/0.5" in row) == ("td_target_min" in row) == (not clones)
    assert float(row["effective_batch"]) == 18
    if not clones:
        assert row["q_value/0.9"] == row["q_value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({name: value}, f"{name} must be at least 1, got {value}")
            for name in ("trial_length", "round_steps", "slice_length")
            for value in (0, -3)
        ],
        ({"total_updates": 0}, "total_updates must be at least 1, got 0"),
        ({"updates_per_round": 0}, "updates_per_round must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"loss": "sac"}, r"loss must be one of \['amago', 'amago2'\].* got 'sac'"),
        ({"tau": 5.0}, r"tau must be in \[0, 1\], got 5.0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"precision": "fp16"}, "precision must be one of 'fp32', 'bf16', got 'fp16'"),
        ({"final_lr_fraction": 2.0}, r"final_fraction must be in \[0, 1\], got 2.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"learning_rate": -1e-3}, "learning_rate must be positive, got -0.001"),
    ],
)
def test_values_out_of_range_are_refused(env, policy, tmp_path, options, message):
    options = {"trial_length": 4, "total_updates": 1, "run_dir": tmp_path, **options}
    with pytest.raises(ValueError, match=message):
        make_trainer(env, policy, **options)


def test_a_replay_buffer_of_ones_own(env, policy, tmp_path):
    online, data = (make_trial_buffer(50, slice_length=4, batch_size=5) for _ in range(2))
    data.extend(env.rollout(4).exclude("_stream").reshape(-1))
    mixture = even_mixture({"data": data, "online": online}, 5, online="online")
    options = dict(trial_length=4, total_updates=3, run_dir=tmp_path, updates_per_round=1)
    trainer = make_trainer(env, policy, replay_buffer=mixture, online_after=2, **options)
    assert trainer.replay_buffer is mixture
    assert trainer.collector.replay_buffer is online
    assert trainer.train() == "finished"
    assert trainer.counts.frames == 6 * 4 == len(online)
    with pytest.raises(ValueError, match="slice_length and buffer_options are for the buffer that"):
        make_trainer(env, policy, replay_buffer=mixture, slice_length=2, **options)


def test_buffer_options_and_fragments(env, policy, tmp_path):
    trainer = make_trainer(
        env, policy, trial_length=4, total_updates=6, updates_per_round=2, batch_size=4,
        run_dir=tmp_path / "run", fragment_length=3, progress_bar=False,
        buffer_options={"path": tmp_path / "replay", "sample_by": "priority", "min_trials": 20},
    )  # fmt: skip
    assert trainer.train() == "finished"
    buffer = trainer.replay_buffer
    # The priorities of drawn trials have come from the loss.
    assert len(set(buffer.sampler.state_dict()["weights"])) > 5
    assert buffer.num_trials >= 20
    kept = make_trial_buffer(None, 4, 4, path=tmp_path / "replay", mode="read")
    assert (kept[:] == buffer[:]).all()
    assert kept.storage.trials().length.max() <= 3
