from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
from tensordict import TensorDict

from tests.trainers.tiny import make_trainer
from torchrl_amago.trainers import Intervals, NonFiniteError
from torchrl_amago.trainers.nonfinite import check_data, nonfinite_entries

NAN, INF = float("nan"), float("inf")


def batch(value, at=(0, 1), mask=None):
    reward = torch.zeros(2, 3, 1)
    reward[at] = value
    entries = {"action": torch.zeros(2, 3).long(), "next": {"reward": reward}}
    if mask is not None:
        entries["collector"] = {"mask": mask}
    return TensorDict(entries, [2, 3])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_finds_and_dumps(tmp_path, value):
    with pytest.raises(NonFiniteError, match=r"in \('next', 'reward'\) \(1 of 6 steps\)") as caught:
        check_data(batch(value), tmp_path, "data")
    loaded = TensorDict.load_memmap(caught.value.dump)
    torch.testing.assert_close(loaded["next", "reward"][0, 1].item(), value, equal_nan=True)
    assert not list(tmp_path.rglob("*.pkl"))


def test_opposite_infinities_do_not_cancel(tmp_path):
    td = batch(INF)
    td["next", "reward"][1, 2] = -INF
    with pytest.raises(NonFiniteError, match="2 of 6 steps"):
        check_data(td, tmp_path, "data")


def test_padding_may_hold_anything(tmp_path):
    mask = torch.tensor([[True, False, False], [True, True, True]])
    check_data(batch(NAN, (0, 1), mask), tmp_path, "data")
    with pytest.raises(NonFiniteError, match="1 of 4 steps"):
        check_data(batch(NAN, (0, 0), mask), tmp_path, "data")


def test_huge_numbers_are_finite(tmp_path):
    td = TensorDict(x=torch.full((8,), 3e38), batch_size=[8])
    check_data(td, tmp_path, "data")
    assert nonfinite_entries(td) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["reward", "observation"])
def test_environment_data_stops_the_run(tmp_path, key):
    trainer = make_trainer(tmp_path, poison=(key, 20, NAN), total_updates=200)
    # An observation breaks the policy within the rollout, a reward is found after it.
    where = {"reward": "collected observations and rewards", "observation": "the policy.s inputs"}
    message = f"{where[key]} must be finite, .*'{key}'.*were not changed"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert trainer.counts.updates > 0
    dump = TensorDict.load_memmap(tmp_path / "nonfinite_batch")
    assert dump["next", key].isnan().any() if key == "reward" else dump[key].isnan().any()
    assert all(p.isfinite().all() for p in trainer.loss_module.parameters())
    resumed = make_trainer(tmp_path, total_updates=trainer.counts.updates + 2)
    assert resumed.resume().train() == "finished"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_loss_stops_the_run_before_the_weights_change(tmp_path, where):
    trainer = make_trainer(tmp_path, total_updates=20, intervals=Intervals(checkpoint=4))
    compute, before = trainer.loss_module.forward, {}

    def state():
        weights = dict(trainer.loss_module.named_parameters())
        moments = dict(enumerate(s["exp_avg"] for s in trainer.optimizer.state.values()))
        return {name: value.detach().clone() for name, value in (weights | moments).items()}

    def spoil(sub_batch):
        losses = compute(sub_batch)
        if trainer.counts.updates == 9:
            before.update(state())
            if where == "loss":
                losses["loss_actor"] = losses["loss_actor"] * NAN
            else:  # finite, with an infinite slope
                zero = (losses["loss_actor"] * 0).square()
                losses["loss_actor"] = losses["loss_actor"] + zero.sqrt()
        return losses

    trainer.loss_module.forward = spoil
    expected = r"'loss_actor' \(nan\)" if where == "loss" else "the gradients"
    with pytest.raises(NonFiniteError, match=f"not so: {expected}.*the batch itself is finite"):
        trainer.train()
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert TensorDict.load_memmap(tmp_path / "nonfinite_batch").shape == (3, 5)
    assert trainer.checkpoints.latest().name == "update_0000008"
    assert trainer.collector.closed


def test_bad_data_in_a_training_batch(tmp_path):
    trainer = make_trainer(tmp_path, total_updates=20)
    sample = trainer.replay_buffer.sample

    def spoil():
        td = sample()
        if trainer.counts.updates == 5:
            td["next", "reward"][0, 0] = INF
        return td

    trainer.replay_buffer.sample = spoil
    with pytest.raises(NonFiniteError, match=r"training batch must be finite.*'reward'"):
        trainer.train()
    state = trainer.loss_module.state_dict()  # running statistics included
    assert all(x.isfinite().all() for x in state.values())


def test_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NonFiniteError, match="There is no room for the batch") as caught:
        check_data(batch(NAN), tmp_path, "data")
    assert not caught.value.dump.exists()
