"""The policy's weights in files: which are kept when."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from torch import nn

from tests.trainers.tiny import make_trainer
from torchrl_amago._state_file import load_state
from torchrl_amago.trainers import load_policy
from torchrl_amago.trainers.checkpoint import PolicyFiles


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
