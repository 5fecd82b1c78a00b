"""MetaFrozenLake inside SerialEnv, ParallelEnv and TransformedEnv."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torchrl.envs import InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from tests.envs.workers import forked
from torchrl_amago.envs.tasks import MetaFrozenLake


def make_env() -> MetaFrozenLake:
    return MetaFrozenLake(size=5, batch_size=[3], seed=0)


def lakes(env) -> torch.Tensor:
    """The holes of every worker's rows, ``[W, 3, 25]``."""
    return torch.stack([state["_lake"] for state in env.state_dict().values()])


@pytest.fixture(scope="module", params=[SerialEnv, forked], ids=["serial", "parallel"])
def env(request):
    env = request.param(2, make_env)
    yield env
    env.close()


def test_workers_have_the_declared_specs(env):
    check_env_specs(env)


def test_workers_repeat_tasks(env):
    env.set_seed(0)
    td = env.reset()
    assert all(list(env.repeats_task))
    first = lakes(env)
    assert not torch.equal(first[0], first[1])
    td["_reset"] = torch.tensor([[1, 1, 0], [0, 1, 0]]).bool().unsqueeze(-1)
    env.reset(td.clone(), repeat_task=True)
    assert torch.equal(lakes(env), first)
    # The keyword also arrives through a wrapper that drops undeclared entries.
    TransformedEnv(env, InitTracker()).reset(td.clone(), repeat_task=True)
    assert torch.equal(lakes(env), first)
    env.reset(td.clone())
    same = (lakes(env) == first).all(-1)
    assert same.tolist() == [[False, False, True], [True, False, True]]


def test_workers_take_one_flag_per_row(env):
    env.set_seed(0)
    env.reset()
    first = lakes(env)
    flag = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool().unsqueeze(-1)
    env.reset(list_of_kwargs=[{"repeat_task": flag[0]}, {"repeat_task": flag[1]}])
    assert torch.equal((lakes(env) == first).all(-1), flag.squeeze(-1))


def test_workers_resume(env):
    env.set_seed(0)
    env.rollout(5, break_when_any_done=False)
    state = deepcopy(env.state_dict())
    env.reset()
    expected = lakes(env)
    env.reset()
    env.load_state_dict(state)
    env.reset()
    assert torch.equal(lakes(env), expected)
