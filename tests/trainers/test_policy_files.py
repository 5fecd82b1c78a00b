"""The policy's weights in files: which are kept when, and who may read them."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from torch import nn

from tests.trainers.tiny import make_trainer
from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
from torchrl_amago._files import DamagedError
from torchrl_amago._state_file import load_state, save_state
from torchrl_amago.trainers import load_policy
from torchrl_amago.trainers.checkpoint import PolicyFiles

SMALL = {"seq_model": "gru", "seq_model_options": {"d_model": 8}}


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def assert_holds(path, expected) -> None:
    stored = load_state(path)["weights"]
    assert stored.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(stored[name], x), name


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([1.0, 3.0, 2.0], 1),
        ([1.0, 1.0], 1),  # of equals the later one
        ([-5.0, math.nan, -7.0], 0),
        ([math.nan, -7.0], 1),
        ([-math.inf], 0),
    ],
)
def test_the_best_is_kept(tmp_path, values, best):
    policy = nn.Linear(1, 1, bias=False)
    files = PolicyFiles(tmp_path, policy)
    for number, value in enumerate(values):
        policy.weight.data.fill_(number)
        files.save_if_best({"eval/trial_return": value, "eval/success": 0.0})
    assert files.best_value == values[best]
    assert_holds(files.best, {"weight": torch.full((1, 1), float(best))})


def test_nothing_is_written_without_weights_or_the_metric(tmp_path):
    for policy, name in (
        (lambda tensordict: tensordict, "trial_return"),
        (nn.Linear(1, 1), "score"),
    ):
        files = PolicyFiles(tmp_path, policy)
        files.save_if_best({f"eval/{name}": 1.0})
        assert files.best_value is None
    PolicyFiles(tmp_path, lambda tensordict: tensordict).save_last()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="policy.npz"):
        load_policy(files.last, nn.Linear(1, 1))


def windowed(window):
    """A policy with a setting that no shape shows."""
    policy = nn.Linear(2, 1)
    policy.settings = {"window": window, "discounts": (0.9, 0.99)}
    return policy


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        (windowed(8), windowed(16), "differ in 1 entries: window: 8 there, 16 here"),
        (
            nn.Linear(3, 2),
            nn.Linear(3, 4),
            "2 entries: weights.weight.*bias: 2 float32 there, 4 float32 here",
        ),
        (nn.Linear(3, 2), nn.Linear(3, 2, bias=False), "bias: 2 float32 there, absent here"),
    ],
)
def test_another_policy_is_refused(tmp_path, saved, other, message):
    files = PolicyFiles(tmp_path, saved)
    files.save_last()
    before = weights_of(other)
    with pytest.raises(ValueError, match=message):
        load_policy(files.last, other)
    assert all(torch.equal(x, before[name]) for name, x in weights_of(other).items())
    load_policy(files.last, saved)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "another state"])
def test_damage_is_refused_and_changes_nothing(tmp_path, damage):
    files, policy = PolicyFiles(tmp_path, nn.Linear(8, 8)), nn.Linear(8, 8)
    files.save_last()
    content = bytearray(files.last.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    elif damage == "another state":
        save_state(files.last, {"weights": {}})
        content = files.last.read_bytes()
    new = {"cut": content[:-10], "empty": b"", "text": b"weights\n" * 50}
    files.last.write_bytes(new.get(damage, content))
    before = weights_of(policy)
    with pytest.raises((DamagedError, ValueError), match=r"policy\.npz must"):
        load_policy(files.last, policy)
    assert all(torch.equal(x, before[name]) for name, x in weights_of(policy).items())


def test_a_resumed_run_writes_the_checkpoint_s_policy(tmp_path):
    """A crash may come between the checkpoint and the policy's file."""
    make_trainer(tmp_path, total_updates=6).train()
    old = (tmp_path / "policy.npz").read_bytes()
    longer = make_trainer(tmp_path, total_updates=12).resume()
    longer.train()
    new = (tmp_path / "policy.npz").read_bytes()
    assert new != old
    (tmp_path / "policy.npz").write_bytes(old)
    finished = make_trainer(tmp_path, total_updates=12).resume()
    assert finished.train() == "finished"
    assert (tmp_path / "policy.npz").read_bytes() == new


def test_a_run_writes_the_last_policy_and_the_best(tmp_path):
    returns, seen = deque([1.0, 3.0, 2.0, 0.0]), []

    def evaluator():
        seen.append(weights_of(trainer.collector.policy))
        return {"trial_return": returns.popleft()}

    trainer = make_trainer(tmp_path / "run", total_updates=24, evaluator=evaluator)
    trainer.train()
    assert len(seen) == 4
    assert_holds(trainer.policy_files.last, weights_of(trainer.collector.policy))
    assert_holds(trainer.policy_files.best, seen[1])


@pytest.mark.parametrize(("elsewhere", "best"), [(False, 3.0), (True, 2.0)])
def test_a_resumed_run_knows_what_was_best(tmp_path, elsewhere, best):
    """But in another folder, where the best policy isn't, it begins anew."""

    def run(folder, total_updates, returns, resume=None):
        returns = deque(returns)
        trainer = make_trainer(
            folder,
            total_updates=total_updates,
            evaluator=lambda: {"trial_return": returns.popleft()},
        )
        if resume is not None:
            trainer.resume(resume)
        trainer.train()
        return trainer.policy_files

    # The last checkpoint is of the last update, before its evaluation, which is made again.
    first = run(tmp_path / "run", 12, [3.0, 1.0])
    again = tmp_path / ("other" if elsewhere else "run")
    files = run(again, 18, [2.0], resume=first.best.parent)
    assert files.best_value == best
    assert files.best.exists()


def test_exploration_is_no_part_of_a_policy_s_weights(tmp_path):
    env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=2)
    make = lambda **options: make_policy(env, context_length=18, **SMALL, **options)  # noqa: E731
    trained, exploring, plain = make(exploration={}), make(exploration={}), make()
    trained.exploration.step(50)
    exploring.exploration.step(7)
    frames = exploring.exploration.frames.clone()
    files = PolicyFiles(tmp_path, trained)
    files.save_last()
    for other in (exploring, plain):
        assert load_policy(files.last, other) is other
        for a, b in zip(trained.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(exploring.exploration.frames, frames)
