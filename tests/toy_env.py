"""An environment with any kind of action and no consequences, for tests and benchmarks."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import EnvBase

ACTIONS = {
    "categorical": Categorical(4),
    "one_hot": OneHot(4),
    "multi_categorical": MultiCategorical([2, 3]),
    "binary": Binary(3),
    "continuous": Bounded(-1.0, 1.0, shape=(2,)),
}


class Toy(EnvBase):
    """Random observations, no reward, no end and, if asked for, a mask that allows actions 1 and 2."""

    repeats_task = True

    def __init__(self, action_spec: TensorSpec, rows: int = 3, mask: bool = False) -> None:
        super().__init__(batch_size=(rows,))
        self.mask = mask
        entries = {"observation": Unbounded(shape=(rows, 2))}
        if mask:
            entries["action_mask"] = Binary(
                action_spec.n, shape=(rows, action_spec.n), dtype=torch.bool
            )
        self.observation_spec = Composite(entries, shape=(rows,))
        self.action_spec = action_spec.expand(rows, *action_spec.shape)
        self.reward_spec = Unbounded(shape=(rows, 1))
        ends = ("done", "terminated", "truncated")
        self.done_spec = Composite(
            {end: Categorical(2, shape=(rows, 1), dtype=torch.bool) for end in ends}, shape=(rows,)
        )

    def _observe(self) -> TensorDict:
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        td = TensorDict(
            observation=torch.randn(*self.batch_size, 2),
            done=done,
            terminated=done.clone(),
            truncated=done.clone(),
            batch_size=self.batch_size,
        )
        if self.mask:
            allowed = torch.zeros(self.observation_spec["action_mask"].shape, dtype=torch.bool)
            td["action_mask"] = allowed.index_fill(-1, torch.tensor([1, 2]), True)
        return td

    def _reset(self, tensordict=None, **kwargs):
        return self._observe()

    def _step(self, tensordict):
        return self._observe().set("reward", torch.zeros(*self.batch_size, 1))

    def _set_seed(self, seed):
        torch.manual_seed(seed)
