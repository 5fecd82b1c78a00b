"""A tiny environment whose rows end at different steps, a policy that remembers, and their check."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.modules import set_recurrent_mode

from torchrl_amago.modules.trajectory import TransformerEncoder

FEATURES = 3


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
        stream = td["_stream"]
    return torch.stack(states, 1), stream


def random_trials(batch, steps, reset_share=0.15):
    """Inputs `[B, T, 4]`, time indices and trial starts of rows in which trials follow each other."""
    is_init = torch.rand(batch, steps, 1) < reset_share
    is_init[:, 0] = True
    time_idx = torch.zeros(batch, steps, 1, dtype=torch.int64)
    for t in range(1, steps):
        time_idx[:, t] = torch.where(is_init[:, t], 0, time_idx[:, t - 1] + 1)
    return torch.randn(batch, steps, 4), time_idx, is_init


def sequence_states(encoder, x, time_idx, is_init):
    """States of rows `[B, T]` encoded in one go."""
    return encoder.sequence(x, time_idx.squeeze(-1), is_init.squeeze(-1))
