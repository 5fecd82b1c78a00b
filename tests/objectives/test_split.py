"""Losses of flat batches and rows of several trials equal those of trials padded by hand."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs.transforms import NextStateReconstructor
from torchrl.objectives import SoftUpdate

from tests.objectives.test_amago import (
    DISCOUNTS,
    FORMS,
    LENGTHS,
    B,
    T,
    make_batch,
    make_loss,
    run,
    total,
)
from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
from torchrl_amago.objectives import AMAGOLoss, amago_loss
from torchrl_amago.rows import split_trials

MARKS = ["is_init", "done", "traj_ids"]


def marked_batch(actions: str = "discrete") -> TensorDict:
    """Padded rows, with every mark of beginnings and ends."""
    batch = make_batch(actions=actions)
    batch["is_init"][:, 0] = True
    batch["next", "done"] = torch.zeros(B, T, 1, dtype=torch.bool)
    batch["next", "done"][range(B), LENGTHS - 1] = True
    batch["collector", "traj_ids"] = torch.arange(B).unsqueeze(1).expand(B, T).clone()
    return batch


def with_mark(batch: TensorDict, mark: str) -> TensorDict:
    """Only one of the marks says where trials are."""
    if mark != "is_init":
        batch["is_init"].zero_()
    if mark != "done":
        del batch["next", "done"]
    if mark != "traj_ids":
        del batch["collector", "traj_ids"]
    return batch


def in_one_row(padded: TensorDict, layout: str) -> TensorDict:
    """The real steps of `padded`, flat or in rows of several trials."""
    flat = padded[padded["collector", "mask"]]
    if layout == "flat":
        return flat.exclude(("collector", "mask"))
    if layout == "flat with a mask":
        padding = flat[:1].clone()
        padding["collector", "mask"].zero_()
        return torch.cat([flat[:6], padding, padding, flat[6:], padding])
    rest = torch.cat([flat[6:], flat[:1]])
    rest["collector", "mask"][-1] = False
    return torch.stack([flat[:6], rest])


LAYOUTS = ["flat", "flat with a mask", "rows"]
# The plain form with every mark in every layout, the other forms with each of both once.
CASES = [({}, mark, layout) for mark in MARKS for layout in LAYOUTS]
CASES += [
    (form, *pair)
    for form in (*FORMS[1:4], {"reduction": "none"})
    for pair in zip(MARKS, LAYOUTS, strict=True)
]


@pytest.mark.parametrize(("form", "mark", "layout"), CASES, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_equals_the_batch_padded_by_hand(form, mark, layout, compact):
    padded = marked_batch(form.get("actions", "discrete"))
    mask = padded["collector", "mask"].clone()
    batch = with_mark(in_one_row(padded, layout), mark)
    padded = with_mark(padded, mark)
    real = batch.get(("collector", "mask"), torch.ones(batch.shape, dtype=torch.bool))
    expected_loss, loss = (make_loss(**form, compact=compact) for _ in range(2))
    if "reduction" in form:
        torch.manual_seed(3)
        expected = expected_loss(padded)
        torch.manual_seed(3)
        out = loss(batch)
        for name in ("loss_actor", "loss_qvalue"):
            assert out[name].shape[: batch.ndim] == batch.shape
            assert torch.equal(out[name][real], expected[name][mask]), name
            assert not out[name][~real].any()
        return
    expected, grads = run(expected_loss, padded)
    out, split_grads = run(loss, batch)
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, msg=name)
    for ours, theirs in zip(split_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for (name, ours), theirs in zip(loss.named_buffers(), expected_loss.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert batch["td_error"].shape == batch.shape
    torch.testing.assert_close(batch["td_error"][real], padded["td_error"][mask])


@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_estimates_keep_the_shape_of_the_batch(layout):
    padded = marked_batch()
    batch = in_one_row(padded, layout)
    real = batch.get(("collector", "mask"), torch.ones(batch.shape, dtype=torch.bool))
    loss = make_loss()
    expected, estimates = loss.estimates(padded), loss.estimates(batch)
    for name, value in estimates.items():
        assert value.shape == (*batch.shape, len(DISCOUNTS))
        torch.testing.assert_close(value[real], expected[name][padded["collector", "mask"]])


def test_importance_weights_go_with_their_steps():
    padded = marked_batch()
    padded["priority_weight"] = torch.rand(B, T)
    expected, _ = run(make_loss(), padded)
    out, _ = run(make_loss(), in_one_row(padded, "flat"))
    torch.testing.assert_close(total(out), total(expected))


def test_rows_of_one_trial_are_left_as_they_are():
    loss, batch = make_loss(), marked_batch()
    assert loss._read(batch, compact=None).tensordict is batch
    assert loss._read(in_one_row(batch, "rows"), compact=None).tensordict is not batch


@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_keywords_take_the_marks(layout):
    padded = marked_batch()
    batch = in_one_row(padded, layout)
    expected, _ = run(make_loss(), batch.clone())
    loss = make_loss()
    batch = batch.exclude(("collector", "traj_ids"))
    names = [key for key in (*loss.in_keys, ("next", "done")) if key in batch.keys(True)]
    torch.manual_seed(3)
    out = loss(**{"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in names})
    assert torch.equal(torch.stack(out), torch.stack([*expected.values()]))


def test_a_flat_batch_must_mark_its_trials():
    batch = in_one_row(make_batch(), "flat").exclude("is_init", ("next", "is_init"))
    with pytest.raises(ValueError, match="a flat batch must mark where trials start or end"):
        make_loss()(batch)


def test_flat_batches_raise_in_compiled_code(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(
        ValueError, match=r"unless it is compiled, flat ones.*Use split_trials\(batch\)"
    ):
        make_loss()(in_one_row(marked_batch(), "flat"))


# --- batches of TorchRL's own collectors and buffers ---


def collect(**options) -> tuple[AMAGOLoss, TensorDict]:
    """A loss, and 80 steps of each of three environments in trials of 2 to 20 steps."""
    torch.manual_seed(0)
    env = make_trial_env(MetaFrozenLake(batch_size=(3,), size=3), episodes=2, horizon=20)
    policy = make_policy(
        env,
        context_length=20,
        timestep_options={"hidden_size": 16, "output_size": 16},
        seq_model_options={"d_model": 16, "num_heads": 2, "num_layers": 1},
        discounts=DISCOUNTS,
    )
    loss = amago_loss(policy, critic_options={"hidden_size": 16}, compact=True)
    loss.target_update = SoftUpdate(loss, tau=0.1)
    collector = Collector(env, policy, frames_per_batch=240, total_frames=240, **options)
    (batch,) = list(collector)
    collector.shutdown()
    return loss, batch


def sampled(batch: TensorDict, *transforms, slice_len: int = 5) -> TensorDict:
    """A flat batch of slices from a stock buffer."""
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(240),
        sampler=SliceSampler(
            slice_len=slice_len, traj_key=("collector", "traj_ids"), strict_length=False
        ),
        batch_size=40,
    )
    for transform in transforms:
        buffer.append_transform(transform)
    buffer.extend(batch.reshape(-1))
    return buffer.sample()


def test_a_collectors_batch_equals_its_trials():
    loss, batch = collect()
    rows = split_trials(batch)
    assert batch.shape == (3, 80)
    assert len(rows) > 10
    loss.eval()  # no statistic moves between the two
    torch.manual_seed(1)
    expected = loss(rows)
    for given in (batch, batch.reshape(-1)):
        torch.manual_seed(1)
        out = loss(given)
        assert torch.equal(total(out), total(expected))
        assert given["td_error"].shape == given.shape


def test_slices_of_a_stock_buffer():
    loss, batch = collect()
    flat = sampled(batch)
    assert flat.ndim == 1
    out = loss(flat)
    total(out).backward()
    assert total(out).isfinite()
    assert out["effective_batch"] == len(flat) > 30
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.requires_grad)
    # Slices end where the sampler says, also where both parts are of the same trial.
    rows = split_trials(flat)
    assert (rows["time_idx"].diff(dim=1)[rows["collector", "mask"][:, 1:]] == 1).all()


def test_compact_observations_raise():
    loss, batch = collect(compact_obs=True)
    with pytest.raises(KeyError, match="missing under next.*compact_obs=False"):
        loss(batch)
    read = loss.in_keys[: loss.in_keys.index("action")]
    exact = [key for key in read if not batch[key].is_floating_point()]
    flat = sampled(
        batch,
        NextStateReconstructor(keys=[key for key in read if key not in exact]),
        NextStateReconstructor(keys=exact, fill_value=0),
    )
    with pytest.raises(ValueError, match="NaN under next at .* of .. steps.*compact_obs=False"):
        loss(flat)
