"""Helpers of tests of trajectory encoders.

A tiny environment whose rows end at different steps, a policy that remembers, random trials,
checks.
"""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.modules import set_recurrent_mode

from torchrl_amago.modules.trajectory import TransformerEncoder

FEATURES = 3

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)


class StaggeredEnv(EnvBase):
    """Observations that depend on the action; row i's trials last `lengths[i]` steps."""

    def __init__(self, lengths: tuple[int, ...] = (5,), batched: bool = False) -> None:
        super().__init__(batch_size=(len(lengths),) if batched else ())
        self.lengths = torch.tensor(lengths).view(*self.batch_size, 1)
        shape = self.batch_size
        self.observation_spec = Composite(
            observation=Unbounded((*shape, FEATURES)),
            time_idx=Unbounded((*shape, 1), dtype=torch.int64),
            shape=shape,
        )
        self.action_spec = Bounded(-1, 1, (*shape, FEATURES))
        self.reward_spec = Unbounded((*shape, 1))

    def _observe(self, time_idx: Tensor, action: Tensor) -> Tensor:
        return torch.sin(time_idx + torch.arange(FEATURES) + 3 * action + self.lengths)

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDictBase:
        # torchrl takes only the rows that were to be reset.
        time_idx = torch.zeros(*self.batch_size, 1, dtype=torch.int64)
        first = self._observe(time_idx, torch.zeros(*self.batch_size, FEATURES))
        return TensorDict(observation=first, time_idx=time_idx, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        time_idx = tensordict["time_idx"] + 1
        done = time_idx >= self.lengths
        return TensorDict(
            observation=self._observe(time_idx, tensordict["action"]),
            time_idx=time_idx,
            reward=torch.zeros(*self.batch_size, 1),
            done=done,
            terminated=done,
            batch_size=self.batch_size,
        )

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


def batched_env(lengths: tuple[int, ...]) -> EnvBase:
    return TransformedEnv(StaggeredEnv(lengths, batched=True), InitTracker())


def single_env(length: int) -> EnvBase:
    return TransformedEnv(StaggeredEnv((length,)), InitTracker())


def make_policy(context_length: int = 64, **options) -> TensorDictSequential:
    torch.manual_seed(0)
    encoder = TransformerEncoder(
        8,
        context_length=context_length,
        d_model=16,
        num_heads=2,
        num_layers=2,
        window=context_length,
        **options,
    )
    head = nn.Sequential(nn.Linear(16, FEATURES), nn.Tanh())
    policy = TensorDictSequential(
        TensorDictModule(nn.Linear(FEATURES, 8), ["observation"], ["timestep"]),
        encoder,
        TensorDictModule(head, ["state"], ["action"]),
        selected_out_keys=["state", "action", "_stream"],
    )
    for p in policy.parameters():  # states must depend on the past visibly
        p.data.mul_(1.5)
    return policy


def whole_window(policy: TensorDictSequential, data: TensorDictBase) -> Tensor:
    """States of a rollout `[B, T]` in one go."""
    inputs = data.select("observation", "time_idx", "is_init").clone()
    mode = policy.training
    with set_recurrent_mode(True), torch.no_grad():
        out = policy.eval()(inputs)["state"]
    policy.train(mode)
    return out


def assert_remembered(policy: TensorDictSequential, data: TensorDictBase) -> None:
    """A rollout `[B, T]` from trials' starts has the states that one look at all of it gives."""
    assert data["is_init"][:, 0].all()
    expected = whole_window(policy, data)
    torch.testing.assert_close(data["state"], expected, rtol=1e-5, atol=1e-5)
    # The test is worth something only if memory matters.
    forgetful = whole_window(policy, data.reshape(-1, 1)).view_as(expected)
    assert (forgetful - expected).abs().max() > 1e-2


def take_steps(encoder, x, time_idx, is_init, stream=None):
    """States of rows `[B, T]` encoded step by step, and the stream they are in."""
    states = []
    for t in range(x.shape[1]):
        td = TensorDict(
            timestep=x[:, t], time_idx=time_idx[:, t], is_init=is_init[:, t], batch_size=x.shape[:1]
        )
        if stream is not None:
            td["_stream"] = stream
        encoder(td)
        states.append(td["state"])
        stream = td.get("_stream", None)
    return torch.stack(states, 1), stream


def random_trials(batch, steps, reset_fraction=0.15):
    """Inputs `[B, T, 4]`, time indices and trial starts of rows of several trials."""
    is_init = torch.rand(batch, steps, 1) < reset_fraction
    is_init[:, 0] = True
    time_idx = torch.zeros(batch, steps, 1, dtype=torch.int64)
    for t in range(1, steps):
        time_idx[:, t] = torch.where(is_init[:, t], 0, time_idx[:, t - 1] + 1)
    return torch.randn(batch, steps, 4), time_idx, is_init


def sequence_states(encoder, x, time_idx, is_init):
    """States of rows `[B, T]` encoded in one go."""
    return encoder.sequence(x, time_idx.squeeze(-1), is_init.squeeze(-1))


# --- checks ---


@torch.no_grad()
def assert_nan_goes_with_its_trial(encoder):
    """NaN in one row reaches no other one, and not that row's next trial, in either mode."""
    x, time_idx, is_init = random_trials(4, 30)
    is_init[2, 10] = True
    is_init[2, 11:] = False
    time_idx[2, 10:] = torch.arange(20).unsqueeze(-1)
    poisoned = x.clone()
    poisoned[2, 7:10] = torch.nan
    keep = torch.ones(4, 30, dtype=torch.bool)
    keep[2, 7:10] = False
    expected, _ = take_steps(encoder, x, time_idx, is_init)
    states, _ = take_steps(encoder, poisoned, time_idx, is_init)
    assert states[2, 9].isnan().all()
    assert torch.equal(states[keep], expected[keep])
    window = sequence_states(encoder, poisoned, time_idx, is_init)
    torch.testing.assert_close(window[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-5, atol=1e-5)


def assert_padding_has_no_effect(encoder):
    """NaN and nonsense behind a trial's end change neither its states nor any gradient."""
    twin = copy.deepcopy(encoder)
    x, time_idx, is_init = random_trials(3, 10, reset_fraction=0.0)
    mask = torch.arange(10) < torch.tensor([10, 6, 1])[:, None]
    states = []
    for module, fill in ((encoder, 0.0), (twin, torch.nan)):
        td = TensorDict(
            timestep=torch.where(mask[..., None], x, fill),
            time_idx=torch.where(mask[..., None], time_idx, 10**9),
            is_init=torch.where(mask[..., None], is_init, fill != fill),
            collector=TensorDict(mask=mask, batch_size=[3, 10]),
            batch_size=[3, 10],
        )
        with set_recurrent_mode(True):
            states.append(module(td)["state"])
        if states[-1].requires_grad:
            torch.where(mask[..., None], states[-1], 0.0).square().sum().backward()
    assert torch.equal(states[0][mask], states[1][mask])
    for p, q in zip(encoder.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert p.grad.isfinite().all()


@torch.no_grad()
def assert_no_drift(encoder, steps=1000):
    """After so many steps of one trial, taken one by one, the state is that of one look at them."""
    x = torch.randn(2, steps, 4)
    expected = encoder.sequence(x, torch.zeros(2, steps), None)
    memory = encoder.new_memory(2, x.device, x.dtype)
    for t in range(steps):
        state = encoder.step(x[:, t], torch.zeros(2), memory)
    torch.testing.assert_close(state, expected[:, -1], rtol=1e-5, atol=1e-5)


def assert_same_gradients(scan, definition, inputs, is_init):
    """Gradients of the two scans, weighted at random, are the same to every input."""
    weight = torch.randn_like(definition(*inputs, is_init))
    grads = [
        torch.autograd.grad((each(*inputs, is_init) * weight).sum(), inputs)
        for each in (scan, definition)
    ]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def assert_same_on_a_gpu(encoder, **options):
    """Steps and window there agree with the window on a CPU; moves the encoder."""
    trials = random_trials(3, 70, **options)
    expected = sequence_states(encoder, *trials)
    encoder, on_gpu = encoder.cuda(), [z.cuda() for z in trials]
    for states in (sequence_states(encoder, *on_gpu), take_steps(encoder, *on_gpu)[0]):
        torch.testing.assert_close(states.cpu(), expected, rtol=1e-4, atol=1e-4)
