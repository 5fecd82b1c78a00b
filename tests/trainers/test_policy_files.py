"""The policy's weights in files: which are kept when."""

from __future__ import annotations

import math
from collections import deque
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.trainers.tiny import make_trainer
from torchrl_amago._state_file import load_state
from torchrl_amago.trainers import load_policy
from torchrl_amago.trainers.checkpoint import PolicyFiles


def assert_holds(path, expected):
    torch.testing.assert_close(load_state(path)["weights"], dict(expected), rtol=0, atol=0)


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
    linear, function = nn.Linear(1, 1), lambda tensordict: tensordict
    for policy, name in ((linear, "score"), (function, "trial_return")):
        files = PolicyFiles(tmp_path, policy)
        files.save_if_best({f"eval/{name}": 1.0})
        assert files.best_value is None
    files.save_last()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="policy.npz"):
        load_policy(files.last, linear)


def test_a_resumed_run_writes_the_checkpoint_s_policy(tmp_path):
    """A crash may come between the checkpoint and the policy's file."""
    file = tmp_path / "policy.npz"
    make_trainer(tmp_path, total_updates=6).train()
    old = file.read_bytes()
    make_trainer(tmp_path, total_updates=12).resume().train()
    new = file.read_bytes()
    assert new != old
    file.write_bytes(old)
    assert make_trainer(tmp_path, total_updates=12).resume().train() == "finished"
    assert file.read_bytes() == new


def test_a_run_writes_the_last_policy_and_the_best(tmp_path):
    returns, seen = deque([1.0, 3.0, 2.0, 0.0]), []

    def evaluator():
        seen.append(deepcopy(trainer.collector.policy.state_dict()))
        return {"trial_return": returns.popleft()}

    trainer = make_trainer(tmp_path / "run", total_updates=24, evaluator=evaluator)
    trainer.train()
    assert len(seen) == 4
    assert_holds(trainer.policy_files.last, trainer.collector.policy.state_dict())
    assert_holds(trainer.policy_files.best, seen[1])


@pytest.mark.parametrize(("elsewhere", "best"), [(False, 3.0), (True, 2.0)])
def test_a_resumed_run_knows_what_was_best(tmp_path, elsewhere, best):
    """But in another folder, where the best policy isn't, it begins anew."""

    def make(folder, total_updates, *returns):
        results = ({"trial_return": value} for value in returns)
        return make_trainer(folder, total_updates=total_updates, evaluator=results.__next__)

    # The last checkpoint is of the last update, before its evaluation, which is made again.
    make(tmp_path / "run", 12, 3.0, 1.0).train()
    again = make(tmp_path / ("other" if elsewhere else "run"), 18, 2.0)
    again.resume(tmp_path / "run").train()
    assert again.policy_files.best_value == best
    assert again.policy_files.best.exists()
