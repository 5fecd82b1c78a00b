"""Environment with known trials, and the keys of a trial transform."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase


class ScriptedTrials(EnvBase):
    """Batch whose environment r repeats `script[r]`: a list of trials, each a list of episodes.

    An episode is the list of its rewards. Actions change nothing.
    """

    def __init__(self, script: list[list[list[list[float]]]]):
        rows = len(script)
        super().__init__(batch_size=[rows])
        self.script = script
        self.position = [[-1, 0, 0] for _ in script]  # trial, episode, step
        flag = Binary(1, (rows, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            observation=Unbounded((rows, 1)),
            episode_return=Unbounded((rows, 1)),
            soft_reset=flag.clone(),
            shape=[rows],
        )
        self.reward_spec = Unbounded((rows, 1))
        self.full_done_spec = Composite(done=flag.clone(), terminated=flag.clone(), shape=[rows])
        self.action_spec = Categorical(2, (rows,))
        self.num_steps = 0
        self.seeds: list[int | None] = []

    def _set_seed(self, seed: int | None) -> None:
        self.seeds.append(seed)
        self.position = [[-1, 0, 0] for _ in self.script]

    def _reset(self, tensordict=None, **kwargs):
        rows = len(self.script)
        chosen = [True] * rows
        if tensordict is not None and "_reset" in tensordict:
            chosen = tensordict["_reset"].reshape(-1).tolist()
        for row in range(rows):
            if chosen[row]:
                trial = (self.position[row][0] + 1) % len(self.script[row])
                self.position[row] = [trial, 0, 0]
        return self._outcome([0.0] * rows, chosen, [False] * rows)

    def _step(self, tensordict):
        self.num_steps += 1
        rows = len(self.script)
        reward, episode_return, soft_reset, done = ([None] * rows for _ in range(4))
        for row, (trial, episode, step) in enumerate(self.position):
            episodes = self.script[row][trial]
            reward[row] = episodes[episode][step]
            episode_return[row] = sum(episodes[episode][: step + 1])
            is_over = step + 1 == len(episodes[episode])
            done[row] = is_over and episode + 1 == len(episodes)
            soft_reset[row] = is_over and not done[row]
            self.position[row] = [trial, episode + is_over, 0 if is_over else step + 1]
        outcome = self._outcome(episode_return, soft_reset, done)
        return outcome.set("reward", torch.tensor(reward).unsqueeze(-1))

    def _outcome(self, episode_return, soft_reset, done):
        column = {
            "observation": [0.0] * len(done),
            "episode_return": episode_return,
            "soft_reset": soft_reset,
            "done": done,
            "terminated": done,
        }
        columns = {key: torch.tensor(value).unsqueeze(-1) for key, value in column.items()}
        return TensorDict(columns, self.batch_size)

    def render(self, row: int):
        """Return a picture whose value encodes (trial, episode, step) of one environment."""
        trial, episode, step = self.position[row]
        return torch.full((2, 2, 3), 100 * trial + 10 * episode + step, dtype=torch.uint8).numpy()


def act(tensordict):
    """Policy for environments that ignore actions."""
    return tensordict.set("action", torch.zeros(tensordict.shape, dtype=torch.int64))


def assert_equal(actual, expected):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), equal_nan=True
    )
