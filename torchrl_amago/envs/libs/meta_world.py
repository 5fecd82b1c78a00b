"""Meta-World's meta-learning benchmarks: manipulation tasks of a simulated arm, goals hidden."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any, ClassVar, Literal, get_args

import gymnasium as gym
import numpy as np

from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.envs.libs._extras import import_extra

Split = Literal["train", "test"]
BENCHMARKS = ("ML1", "ML10", "ML25", "ML45")


class MetaWorld(gym.Env):
    """Meta-World's ML benchmarks (arXiv 1910.10897, release 3), a task for each trial.

    A task is one of the benchmark's manipulation problems (for ML1 the one that is named) with one
    of its 50 goals. Observations are 39 numbers in float64, among which the goal is zero; actions
    four numbers in [-1, 1]; rewards Meta-World's, between 0 and 10. Episodes are truncated.
    ``info["success"]`` is True in a step that solves the task, ``info["task"]`` is the problem's
    name, and ``info["task_id"]`` its place in :attr:`names`.

    A reset draws a problem, then a goal, from the generator that ``seed`` sets.
    ``reset(options={"same_task": True})`` stays at both, which is what makes trials:
    ``make_trial_env(env, episodes=3, repeat="options", options=MetaWorld.SAME_TASK)``.

    Args:
        benchmark: ``"ML1"``, ``"ML10"``, ``"ML25"`` or ``"ML45"``.
        problem: name of ML1's problem, such as ``"reach-v3"``.
        split: goals of ML1, or problems of the others, to train on or to test on.
        max_episode_steps: steps until an episode is truncated, at most Meta-World's own 500.
        goals_seed: seed of the benchmark's goals. Environments of one process share them, which
            take seconds to draw (a minute or two for ML45).
        render_mode: ``"rgb_array"`` for pictures of ``render()``.

    Raises:
        ImportError: if Meta-World isn't installed.
        ValueError: for an unknown benchmark, problem or split.

    Example:
        >>> env = MetaWorld("ML1", "reach-v3")  # doctest: +SKIP
    """

    SAME_TASK: ClassVar = {"same_task": True}

    def __init__(
        self,
        benchmark: str = "ML1",
        problem: str | None = None,
        *,
        split: Split = "train",
        max_episode_steps: int = 500,
        goals_seed: int = 0,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        check_choice("split", split, get_args(Split))
        check_counts(max_episode_steps=max_episode_steps)
        if max_episode_steps > 500:
            raise ValueError(f"max_episode_steps must be at most 500, got {max_episode_steps}.")
        tasks = _benchmark(benchmark, problem, goals_seed)
        self._classes = tasks.train_classes if split == "train" else tasks.test_classes
        self._goals: defaultdict[str, list] = defaultdict(list)
        for task in tasks.train_tasks if split == "train" else tasks.test_tasks:
            self._goals[task.env_name].append(task)
        self.names = tuple(self._goals)
        self.max_episode_steps, self.render_mode = max_episode_steps, render_mode
        self._simulators: dict[str, gym.Env] = {}
        self._simulator = self._name = None
        self._num_steps = 0
        simulator = self._simulator_of(self.names[0])
        low = np.full(39, -np.inf)
        self.observation_space = gym.spaces.Box(low, -low, dtype=np.float64)
        self.action_space = simulator.action_space

    @staticmethod
    def names_of(
        benchmark: str, problem: str | None = None, split: Split = "train", goals_seed: int = 0
    ) -> tuple[str, ...]:
        """Return :attr:`names` of a benchmark's environments."""
        tasks = _benchmark(benchmark, problem, goals_seed)
        chosen = tasks.train_tasks if split == "train" else tasks.test_tasks
        return tuple(dict.fromkeys(task.env_name for task in chosen))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode at a new task; with the option ``same_task``, at the one before."""
        super().reset(seed=seed)
        if self._name is None or not (options or {}).get("same_task", False):
            self._name = self.names[self.np_random.integers(len(self.names))]
            goals = self._goals[self._name]
            self._simulator = self._simulator_of(self._name)
            self._simulator.set_task(goals[self.np_random.integers(len(goals))])
        self._num_steps = 0
        observation, _ = self._simulator.reset()
        return observation, self._info(False)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step of the arm."""
        observation, reward, _, _, info = self._simulator.step(action)
        self._num_steps += 1
        truncated = self._num_steps >= self.max_episode_steps
        return observation, float(reward), False, truncated, self._info(bool(info["success"]))

    def render(self) -> np.ndarray:
        """Return a picture ``[H, W, 3]`` of the arm."""
        # This camera shows the table from the front, and hangs upside down.
        return np.ascontiguousarray(self._simulator.render()[::-1, ::-1])

    def close(self) -> None:
        for simulator in self._simulators.values():
            simulator.close()

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": success,
            "task": self._name,
            "task_id": self.names.index(self._name),
        }

    def _simulator_of(self, name: str) -> gym.Env:
        """Return a problem's simulator; ML45 would take a minute to make all at once."""
        if name not in self._simulators:
            camera = {"render_mode": self.render_mode, "camera_name": "corner2"}
            self._simulators[name] = self._classes[name](**camera)
        return self._simulators[name]


@functools.lru_cache(maxsize=4)
def _benchmark(benchmark: str, problem: str | None, seed: int) -> Any:
    """Draw a benchmark's goals."""
    metaworld = import_extra("metaworld", "metaworld")
    check_choice("benchmark", benchmark, BENCHMARKS)
    problems = list(metaworld.ML1.ENV_NAMES)
    if (benchmark == "ML1") != (problem is not None) or problem not in (None, *problems):
        raise ValueError(
            f"problem must be given for ML1, and for it alone, got {problem!r} for {benchmark}. "
            f"ML1 has {', '.join(problems)}."
        )
    made = getattr(metaworld, benchmark)
    return made(seed=seed) if problem is None else made(problem, seed=seed)
