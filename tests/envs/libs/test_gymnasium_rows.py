"""Gymnasium environments as rows: specs of single spaces, several games, masks, success, new luck."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, Unbounded
from torchrl.envs import GymEnv, SerialEnv, check_env_specs

from tests.envs.transforms.helpers import SeededGoal, drive, number_tasks
from torchrl_amago import make_policy
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.envs import ReseedEpisodes, gymnasium_rows, make_trial_env

SPACES = {
    "box": (spaces.Box(-1, 1, (3,)), Bounded, (3,)),
    "number": (spaces.Box(-1, 1, ()), Bounded, (1,)),
    "image": (spaces.Box(0, 255, (8, 8, 3), np.uint8), Unbounded, (8, 8, 3)),
    "discrete": (spaces.Discrete(5), Categorical, ()),
    "equal parts": (spaces.MultiDiscrete([4, 4]), Categorical, (2,)),
    "parts": (spaces.MultiDiscrete([3, 4]), MultiCategorical, (2,)),
    "grid": (spaces.MultiDiscrete([[2, 3, 4]] * 2), MultiCategorical, (2, 3)),
    "bits": (spaces.MultiBinary(4), Binary, (4,)),
}


class Sampled(gym.Env):
    """Observes and takes anything of its spaces; counts its steps in ``info``."""

    def __init__(self, observation_space, action_space=None, mask=None, **info) -> None:
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Discrete(3)
        self.mask, self.info = mask, info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), self._info()

    def _info(self):
        mask = {} if self.mask is None else {"action_mask": np.array(self.mask, np.int8)}
        return {**mask, "number": 4}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        info = {"won": np.bool_(True)} if self.steps == 2 else {}
        return (
            self.observation_space.sample(),
            0.0,
            False,
            self.steps == 4,
            {**self._info(), **info},
        )


def rows_of(*args, num_envs=3, **kwargs):
    names = ("success_key", "task_key", "task_names", "seed", "processes")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    return gymnasium_rows(lambda: Sampled(*args, **kwargs), num_envs, **options)


@pytest.mark.parametrize("kind", SPACES)
def test_specs_are_those_of_one_row(kind):
    space, spec, shape = SPACES[kind]
    env = rows_of(space)
    assert isinstance(env.observation_spec["observation"], spec)
    assert env.observation_spec["observation"].shape == (3, *shape)
    trial = make_trial_env(env, episodes=2)
    check_env_specs(trial)
    vector = SyncVectorEnv([lambda: Sampled(space)] * 3, autoreset_mode=AutoresetMode.DISABLED)
    for same in (make_trial_env(vector, episodes=2), make_trial_env(Sampled(space), episodes=2)):
        check_env_specs(same)
        assert same.observation_spec_unbatched == trial.observation_spec_unbatched


@pytest.mark.parametrize("kind", ["box", "discrete", "equal parts", "parts", "bits"])
def test_actions_of_one_row_reach_it(kind):
    space, spec, shape = SPACES[kind]
    env = make_trial_env(rows_of(spaces.Discrete(2), space), episodes=2)
    check_env_specs(env)
    assert isinstance(env.action_spec, spec)
    assert env.action_spec.shape == (3, *shape)
    ActionSpace.from_spec(env.full_action_spec_unbatched["action"])


def test_dicts_and_tuples_are_entries():
    parts = {"name": spaces.Discrete(2), "deep": spaces.Dict(x=spaces.Box(0, 1, (2,)))}
    space = spaces.Dict(**parts, pair=spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2))))
    env = make_trial_env(rows_of(space), episodes=2)
    check_env_specs(env)
    step = env.rollout(3)
    assert step["deep", "x"].shape == (3, 3, 2)
    assert step["pair", "0"].shape == (3, 3)
    assert step["pair", "1"].shape == (3, 3, 2)
    assert isinstance(env.observation_spec["pair"], Composite)


@pytest.mark.parametrize("part", [spaces.Text(10), spaces.Discrete(2, start=1)])
def test_spaces_without_a_spec(part):
    space = spaces.Dict(mission=part, place=spaces.Discrete(2))
    with pytest.raises(
        ValueError, match=r"the space\['mission'\] must be a Box.*FilterObservation"
    ):
        rows_of(space)


@pytest.mark.parametrize("where", ["info", "observation"])
def test_masks_are_bools_that_the_policy_reads(where):
    box = spaces.Box(-1, 1, (2,))
    if where == "info":
        env = rows_of(box, mask=[1, 0, 1])
    else:
        # MultiBinary is int8.
        env = rows_of(spaces.Dict(observation=box, action_mask=spaces.MultiBinary(3)))
    env = make_trial_env(env, episodes=2)
    check_env_specs(env)
    step = env.reset()
    assert step["action_mask"].dtype == torch.bool
    assert step["action_mask"].shape == (3, 3)
    if where == "info":
        policy = make_policy(env, context_length=4, action_mask_key="action_mask")
        assert not (env.rollout(12, policy)["action"] == 1).any()


def test_success_and_task_go_with_the_trial_but_not_to_the_policy():
    env = rows_of(spaces.Box(-1, 1, (2,)), success_key="won", task_key="number")
    env = make_trial_env(env, episodes=2)
    check_env_specs(env)
    steps = env.rollout(8)
    assert "success" not in steps["next"]
    expected = [False, True, True, True] * 2
    assert steps["next", "episode_success"][0].flatten().tolist() == expected
    assert (steps["task_id"] == 4).all()
    policy = make_policy(env, context_length=4)
    read = set(map(str, policy.in_keys))
    assert not read & {"success", "episode_success", "task_id"}


def test_each_row_plays_its_game():
    games = {"easy/pole": "CartPole-v1", "hard/pole": "CartPole-v1"}
    env = make_trial_env(gymnasium_rows(games, 3), episodes=2)
    assert env.task_names == ("easy/pole", "hard/pole")
    assert env.rollout(4)["task_id"][:, -1].flatten().tolist() == [0, 1, 0]
    assert gymnasium_rows(["CartPole-v1"] * 2).batch_size == (2,)


def test_rows_in_processes_play_as_those_in_this_one():
    def play(processes):
        env = gymnasium_rows("CartPole-v1", 2, processes=processes)
        env = make_trial_env(env, episodes=2)
        env.set_seed(5)
        steps = drive(env, torch.ones(2, 40, dtype=torch.int64))
        env.close()
        return steps

    here = play(False)
    starts = here["observation"][0][here["soft_reset"][0].squeeze(-1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
    assert torch.equal(here["observation"], play(True)["observation"])


def test_rows_in_a_serial_environment_repeat_their_tasks():
    env = make_trial_env(SerialEnv(2, lambda: gymnasium_rows(SeededGoal, 2)), episodes=2)
    check_env_specs(env)
    env.set_seed(0)
    actions = torch.tensor([[0, 1, 1, 1, 1], [1, 0, 0, 2, 2]]).expand(2, 2, 5)
    goals = drive(env, actions)["observation"]
    for goal, expected in zip(
        goals.flatten(0, 1), [[0, 0, 0, 1, 1], [0] * 4 + [1]] * 2, strict=True
    ):
        assert number_tasks(goal).tolist() == expected
    assert goals[..., 0, 0].unique().numel() == 4


def test_a_seed_decides_the_rows():
    first, again, other = (gymnasium_rows(SeededGoal, 2, seed=seed).reset() for seed in (1, 1, 2))
    assert torch.equal(first["observation"], again["observation"])
    assert not torch.equal(first["observation"], other["observation"])


class Chance(SeededGoal):
    """Each step's reward is random."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(self.np_random.uniform()), *rest


@pytest.mark.parametrize("reseed_episodes", [False, True])
def test_another_episode_has_the_same_level_and_other_chances(reseed_episodes):
    env = gymnasium_rows(Chance, 2, reseed_episodes=reseed_episodes)
    env = make_trial_env(env, episodes=3)

    def play():
        env.set_seed(0)
        return drive(env, torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]] * 2))

    steps = play()
    assert number_tasks(steps["observation"][0]).tolist() == [0] * 6 + [1] * 2
    first, second, third = steps["next", "reward"][0, :6].view(3, 2)
    assert torch.equal(first, second) != reseed_episodes
    assert torch.equal(second, third) != reseed_episodes
    again = play()
    assert torch.equal(again["next", "reward"], steps["next", "reward"])


def test_reseeding_keeps_the_seed_known():
    env = ReseedEpisodes(Chance())
    env.reset(seed=7)
    assert env.unwrapped.np_random_seed == 7


def test_one_episode_needs_no_way_to_repeat():
    from tests.envs.transforms.helpers import ForgetfulEnv

    env = make_trial_env(ForgetfulEnv([2]), episodes=1)
    steps = drive(env, torch.tensor([[0, 1, 0], [1, 1, 0]]))
    assert steps["next", "done"].squeeze(-1).tolist() == [[False, True, False], [True, True, False]]


def test_vector_environments_that_reset_themselves():
    vector = SyncVectorEnv([SeededGoal] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(
        ValueError, match=r"DISABLED, got .*NEXT_STEP.*Make it with .*gymnasium_rows"
    ):
        make_trial_env(vector, episodes=2)
    with pytest.raises(ValueError, match=r"DISABLED, got .*Make it with gymnasium_rows"):
        make_trial_env(GymEnv("CartPole-v1", num_envs=2), episodes=1)


def test_unknown_ids():
    with pytest.raises(gym.error.UnregisteredEnv, match="NoSuchGame"):
        gymnasium_rows("NoSuchGame-v0", 2)


def test_games_are_made_here_before_their_processes():
    def broken():
        raise FileNotFoundError("no ROM")

    with pytest.raises(FileNotFoundError, match="no ROM"):
        gymnasium_rows([lambda: gym.make("CartPole-v1"), broken], processes=True)
    with pytest.raises(ValueError, match="games must be at least 1, got 0"):
        gymnasium_rows([])
