from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)
from torchrl.envs import (
    ActionDiscretizer,
    Compose,
    EnvBase,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)

from tests.envs.transforms.helpers import CountingEnv, drive
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform


class ActionEnv(EnvBase):
    """Takes any action; ends never, so resets are the caller's."""

    def __init__(self, action_spec, batch_size=()) -> None:
        super().__init__(batch_size=torch.Size(batch_size))
        shape = (*self.batch_size, 1)
        self.observation_spec = Composite(observation=Unbounded(shape), shape=self.batch_size)
        self.action_spec = action_spec
        self.reward_spec = Unbounded(shape)

    def _set_seed(self, seed):
        pass

    def _reset(self, tensordict=None, **kwargs):
        return self.observation_spec.zero()

    def _step(self, tensordict):
        out = self.observation_spec.zero()
        return out.update({"reward": torch.ones(*self.batch_size, 1)}).update(
            self.full_done_spec.zero()
        )


def encoded(spec, action, batch_size=(2,)):
    env = TransformedEnv(ActionEnv(spec, batch_size), PreviousStepTransform())
    check_env_specs(env)
    step = env.step(env.reset().set("action", torch.as_tensor(action, dtype=spec.dtype)))
    value = step["next", "prev_action"]
    assert value.dtype == torch.float32
    assert env.observation_spec["prev_action"].is_in(value)
    return value.tolist()


# -------------------------------------------------------------------- encodings


def test_encodings_by_hand():
    assert encoded(Categorical(3, shape=(2,)), [2, 0]) == [[0, 0, 1], [1, 0, 0]]
    assert encoded(Categorical(3, shape=(2, 1)), [[2], [0]]) == [[0, 0, 1], [1, 0, 0]]
    assert encoded(OneHot(3, shape=(2, 3)), [[0, 1, 0], [1, 0, 0]]) == [[0, 1, 0], [1, 0, 0]]
    assert encoded(MultiCategorical([2, 3], shape=(2, 2)), [[1, 0], [0, 2]]) == [
        [0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1],
    ]
    assert encoded(MultiOneHot([2, 3], shape=(2, 5)), [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]) == [
        [0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1],
    ]
    assert encoded(Binary(3, shape=(2, 3)), [[0, 1, 1], [1, 0, 0]]) == [[0, 1, 1], [1, 0, 0]]


def test_continuous_actions_are_scaled_where_bounded():
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    spec = Bounded(low.expand(2, 2), high.expand(2, 2), shape=(2, 2))
    assert encoded(spec, [[1.0, 10.0], [-2.0, 5.0]]) == [[0.5, 1.0], [-1.0, 0.0]]
    assert encoded(Unbounded((2, 1)), [[3.5], [-7.0]]) == [[3.5], [-7.0]]
    half_open = Bounded(low=torch.zeros(2, 1), high=torch.full((2, 1), torch.inf), shape=(2, 1))
    assert encoded(half_open, [[3.5], [7.0]]) == [[3.5], [7.0]]
    single = Bounded(-4.0, 4.0, shape=(1,), dtype=torch.float64)
    assert encoded(single, [1.0], batch_size=()) == [0.25]


def test_several_actions_are_concatenated():
    assert encoded(Categorical(2, shape=(2, 2)), [[1, 0], [0, 0]]) == [[0, 1, 1, 0], [1, 0, 1, 0]]


def test_action_is_the_one_that_the_policy_chose():
    # The discretizer turns action 3 of 5 into +0.5 for the environment below it.
    base = ActionEnv(Bounded(-1.0, 1.0, shape=(1,)))
    discretizer = ActionDiscretizer(5, categorical=True)
    env = TransformedEnv(base, Compose(discretizer, PreviousStepTransform()))
    step = env.step(env.reset().set("action", torch.tensor([3])))
    assert step["next", "prev_action"].tolist() == [0, 0, 0, 1, 0]


# ---------------------------------------------------------------------- in time


@pytest.mark.parametrize("wrap", ["alone", "serial outside", "serial inside"])
def test_previous_step_by_hand(wrap):
    env = {
        "alone": lambda: TransformedEnv(CountingEnv([1]), PreviousStepTransform()),
        "serial outside": lambda: TransformedEnv(
            SerialEnv(1, CountingEnv), PreviousStepTransform()
        ),
        "serial inside": lambda: SerialEnv(
            1, lambda: TransformedEnv(CountingEnv(), PreviousStepTransform())
        ),
    }[wrap]()
    check_env_specs(env)
    env.set_seed(0)
    # Task 0 gives rewards 0, 1, 2; it ends at the third step, then task 1 gives 10, 11.
    steps = drive(env, torch.tensor([[0, 0, 2, 0, 0]]))[0]
    a0, a2, none = [1, 0, 0], [0, 0, 1], [0, 0, 0]
    assert steps["time_idx"].flatten().tolist() == [0, 1, 2, 0, 1]
    assert steps["prev_reward"].flatten().tolist() == [0, 0, 1, 0, 10]
    assert steps["prev_action"].tolist() == [none, a0, a0, none, a0]
    assert steps["next", "time_idx"].flatten().tolist() == [1, 2, 3, 1, 2]
    assert steps["next", "prev_reward"].flatten().tolist() == [0, 1, 2, 10, 11]
    assert steps["next", "prev_action"].tolist() == [a0, a0, a2, a0, a0]
    assert steps["time_idx"].dtype == torch.int64
    assert steps["prev_reward"].dtype == torch.float32


def test_keys_are_arguments():
    transform = PreviousStepTransform(
        prev_action_key=("past", "action"), prev_reward_key=("past", "reward"), time_idx_key="clock"
    )
    env = TransformedEnv(CountingEnv([2]), transform)
    check_env_specs(env)
    step = env.rollout(2, break_when_any_done=False)
    assert step["clock"][0].flatten().tolist() == [0, 1] or step["next", "done"].any()
    assert step["past", "action"].shape == (2, 2, 3)


def test_prev_reward_is_not_the_reward_itself():
    env = TransformedEnv(CountingEnv([2]), PreviousStepTransform())
    step = env.step(env.reset().set("action", torch.zeros(2, dtype=torch.int64)))
    step["next", "reward"].fill_(-1.0)
    assert (step["next", "prev_reward"] != -1.0).all()


# ----------------------------------------------------------------------- errors


def test_integer_ranges_are_no_actions():
    spec = Bounded(0, 5, shape=(2, 1), dtype=torch.int64)
    env = TransformedEnv(ActionEnv(spec, (2,)), PreviousStepTransform())
    with pytest.raises(
        ValueError, match=r"supports Categorical, .*got BoundedDiscrete of dtype torch\.int64"
    ):
        env.reset()


def test_one_of_several_actions_must_be_named():
    spec = Composite(left=Categorical(2), right=Categorical(3))
    env = TransformedEnv(ActionEnv(spec), PreviousStepTransform())
    with pytest.raises(KeyError, match="more than one key present"):
        env.reset()
    env = TransformedEnv(ActionEnv(spec.clone()), PreviousStepTransform(action_key="right"))
    assert env.rollout(2)["prev_action"].shape == (2, 3)


def test_a_second_one_has_no_entries_left():
    env = TransformedEnv(CountingEnv(), Compose(PreviousStepTransform(), PreviousStepTransform()))
    with pytest.raises(ValueError, match="writes 'prev_action', but the environment already has"):
        _ = env.observation_spec


def test_step_without_reset_names_the_missing_entry():
    env = TransformedEnv(CountingEnv(), PreviousStepTransform())
    env.reset()
    with pytest.raises(KeyError, match="needs the entry 'time_idx'"):
        env.step(TensorDict({"action": torch.tensor(0)}))


def test_the_time_of_a_trial_is_left_as_it_is():
    entries = [TrialTransform(episodes=2), PreviousStepTransform()]
    env = TransformedEnv(CountingEnv(), Compose(*entries))
    check_env_specs(env)
    steps = drive(env, torch.tensor([1, 0, 1, 0]))
    assert steps["time_idx"].flatten().tolist() == [0, 1, 2, 0]
    own = [TrialTransform(episodes=2), PreviousStepTransform(time_idx_key="clock")]
    steps = drive(TransformedEnv(CountingEnv(), Compose(*own)), torch.tensor([1, 0, 1, 0]))
    assert torch.equal(steps["clock"], steps["time_idx"])
