"""Our transforms against the points of `TransformBase` in TorchRL's `test/transforms`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, SerialEnv, TransformedEnv, check_env_specs

from tests.envs.transforms.helpers import CountingEnv, assert_continuous, drive
from tests.envs.workers import forked
from torchrl_amago.envs.tasks import MetaFrozenLake
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform

TRANSFORMS = {
    "trial": partial(TrialTransform, episodes=2),
    "trial of other keys": partial(
        TrialTransform, horizon=4, episode_idx_key=("trial", "episode"), soft_reset_key="again"
    ),
    "previous": PreviousStepTransform,
    "previous of other keys": partial(PreviousStepTransform, prev_action_key=("past", "action")),
}
ACTIONS = torch.tensor([[0, 1, 2, 0, 0, 1], [1, 0, 0, 0, 2, 0]])
EACH = pytest.mark.parametrize("kind", TRANSFORMS)


def transformed(kind: str, base=CountingEnv) -> TransformedEnv:
    return TransformedEnv(base(), TRANSFORMS[kind]())


def expected_steps(kind: str):
    return drive(transformed(kind, partial(CountingEnv, [2])), ACTIONS)


def assert_runs_alike(env, kind: str) -> None:
    """In two rows of one env the transform writes what it writes in natively batched ones."""
    check_env_specs(env)
    env.set_seed(0)
    steps, expected = drive(env, ACTIONS), expected_steps(kind)
    written = TRANSFORMS[kind]().out_keys
    assert set(written) <= set(steps.keys(True, True))
    for key in [*written, *(("next", *((k,) if isinstance(k, str) else k)) for k in written)]:
        assert torch.equal(steps[key], expected[key]), key


ROWS = [CountingEnv, partial(CountingEnv, (), 100)]


@EACH
def test_single_trans_env_check(kind):
    check_env_specs(transformed(kind))
    check_env_specs(transformed(kind, partial(CountingEnv, [3])))


@EACH
def test_serial_trans_env_check(kind):
    assert_runs_alike(SerialEnv(2, [partial(transformed, kind, base) for base in ROWS]), kind)


@EACH
def test_trans_serial_env_check(kind):
    assert_runs_alike(transformed(kind, partial(SerialEnv, 2, ROWS)), kind)


def test_parallel_env_check():
    # Both transforms together, inside and outside of workers: test_parallel_workers in test_trial.py.
    env = forked(2, [partial(transformed, "previous", base) for base in ROWS])
    try:
        assert_runs_alike(env, "previous")
    finally:
        env.close()


def stored_steps() -> TensorDict:
    return CountingEnv([4]).rollout(3, break_when_any_done=False).flatten()


@EACH
@pytest.mark.parametrize(
    "wrap", [lambda it: it, Compose, nn.Sequential], ids=["no env", "compose", "model"]
)
def test_outside_of_an_environment(kind, wrap):
    """No env, in a Compose, before a module."""
    transform = wrap(TRANSFORMS[kind]())
    steps = stored_steps()
    before = steps.clone()
    with pytest.raises(RuntimeError, match=r"must be in an environment.*make_trial_env"):
        transform(steps)
    assert (steps == before).all()


@EACH
def test_transform_env(kind):
    env = transformed(kind, partial(MetaFrozenLake, size=3, batch_size=[8], seed=0))
    written = TRANSFORMS[kind]().out_keys
    first = env.reset()
    for key in written:
        value = first[key]
        assert value.shape[:1] == (8,)
        # Nothing has been done, and the trial's first episode begins.
        assert (value == (key in ("soft_reset", "again"))).all(), key
    step = env.step(env.rand_action(first))
    assert set(written) <= set(step["next"].keys(True, True))
    torch.manual_seed(0)
    assert_continuous(env.rollout(30, break_when_any_done=False))


@EACH
def test_transform_model(kind):
    env = transformed(kind, partial(CountingEnv, [2]))
    key = env.transform.out_keys[0]
    size = env.observation_spec[key].shape[-1]
    read = TensorDictModule(lambda value: value.float() @ torch.ones(size, 1), [key], ["seen"])

    def policy(tensordict):
        return env.rand_action(read(tensordict))

    steps = env.rollout(4, policy, break_when_any_done=False)
    assert torch.equal(steps["seen"], steps[key].float().sum(-1, keepdim=True))


@EACH
@pytest.mark.parametrize("invert", [True, False])
def test_transform_rb(kind, invert):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=4)
    buffer.append_transform(TRANSFORMS[kind](), invert=invert)

    def write_and_sample():
        buffer.extend(stored_steps())
        buffer.sample()

    with pytest.raises(RuntimeError, match="not in a replay buffer"):
        write_and_sample()


@EACH
def test_transform_inverse(kind):
    """Actions arrive as they were chosen."""
    env = transformed(kind, partial(CountingEnv, [2]))
    tensordict = env.reset().set("action", torch.tensor([0, 1]))
    inverted = env.transform.inv(tensordict)
    assert torch.equal(inverted["action"], tensordict["action"])
    step = env.step(tensordict)
    assert step["action"].tolist() == [0, 1]
    assert set(step.keys(True, True)) >= {*env.transform.out_keys, "action"}
    assert not any(str(key).startswith("_taken") for key in step.keys(True, True))
