"""The base of natively batched tasks: specs, randomness, partial resets, masked steps, saving.

A task writes down its rules for all rows of a batch at once, in four methods; everything else that
TorchRL and the trial transform need is here.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from torchrl_amago._validation import check_counts
from torchrl_amago.envs._reset_request import read_reset_request

_FLAGS = ("done", "terminated", "truncated")


class BatchedTask(EnvBase):
    """Base of environments with one discrete action whose rows are stepped by the same operations.

    A subclass makes its buffers with ``_state(name, value)`` (what changes, saved by
    ``state_dict()``) and ``_constant(name, value)`` (look-up tables), and writes

    - ``_draw_tasks(rows)``: new tasks for these rows, int64 ``[n]``;
    - ``_begin_episodes(selected)``: the episode's start in the rows of a bool mask ``[rows]``;
    - ``_advance(action)``: one step of all rows, ``action`` int64 ``[rows]``; returns reward
      float32 and terminated bool, both ``[rows]``; ``_num_steps`` counts this step already;
    - ``_observe()``: the observation, float32 ``[rows, size]``;
    - ``_draw(row, cell_pixels)``: the picture that :meth:`render` returns, if there is one.

    ``truncated`` is set at the step limit, if the episode isn't terminated.

    ``env.reset(td, repeat_task=True)`` starts a new episode at the same task in the rows that
    ``td["_reset"]`` selects (all without that entry); a bool tensor ``[*B, 1]`` chooses row by row.
    The other selected rows draw a new task. Without the keyword, an entry ``repeat_task`` of the
    reset tensordict is read (``TransformedEnv`` and ``ParallelEnv`` drop it).

    ``state_dict()`` holds all that changes (buffers, generator), so that a loaded environment
    continues exactly. The next step changes its tensors: ``deepcopy`` one to load in this process.

    Args:
        observation_bounds: lowest and highest value of each entry of the observation.
        num_actions: A.
        max_episode_steps: step limit of an episode.
        categorical_action_encoding: integer actions ``[*B]``, else one-hot ``[*B, A]``.
        batch_size: any shape; all rows are stepped together.
        seed: as for ``set_seed(seed)``; by default drawn from torch's global generator.

    Raises:
        ValueError: if an integer action is out of its range (checked on CPU only).

    Examples:
        >>> class Guess(BatchedTask):
        ...     def __init__(self, **options):
        ...         super().__init__([(0.0, 1.0)], num_actions=2, max_episode_steps=5, **options)
        ...         self._state("_answer", torch.zeros(self.num_rows, dtype=torch.int64))
        ...     def _draw_tasks(self, rows):
        ...         self._answer[rows] = (self._random() < 0.5).long()[rows]
        ...     def _begin_episodes(self, selected):
        ...         pass
        ...     def _advance(self, action):
        ...         right = action == self._answer
        ...         return right.float(), right
        ...     def _observe(self):
        ...         return torch.zeros(self.num_rows, 1)
        >>> Guess(batch_size=[4]).rollout(3, break_when_any_done=False)["next", "reward"].shape
        torch.Size([4, 3, 1])
    """

    repeats_task = True
    # `state_dict` holds all that changes: a collector can stop in mid-trial and go on elsewhere.
    can_save_state = True
    # Ends the error message for an action out of range.
    action_meaning = "Sample from env.action_spec to see them."
    # Buffers that a step changes, besides the step counter: a masked step puts them back.
    episode_buffers: tuple[str, ...] = ()

    def __init__(
        self,
        observation_bounds: list[tuple[float, float]],
        *,
        num_actions: int,
        max_episode_steps: int,
        categorical_action_encoding: bool = True,
        batch_size: torch.Size | tuple[int, ...] = (),
        device: torch.device | str | int | None = None,
        seed: int | None = None,
    ) -> None:
        check_counts("It limits one episode.", max_episode_steps=max_episode_steps)
        super().__init__(device=device, batch_size=torch.Size(batch_size))
        self.num_actions, self.max_episode_steps = num_actions, max_episode_steps
        self._categorical = categorical_action_encoding
        self._make_specs(observation_bounds)
        self._state("_has_task", torch.zeros(self.num_rows, dtype=torch.bool))
        self._state("_num_steps", torch.zeros(self.num_rows, dtype=torch.int64))
        # Not the subclass's: its buffers don't exist yet, and will be new.
        BatchedTask._set_seed(self, seed)

    @property
    def num_rows(self) -> int:
        """Rows of the flattened batch."""
        return self.batch_size.numel()

    @abstractmethod
    def _draw_tasks(self, rows: Tensor) -> None: ...

    @abstractmethod
    def _begin_episodes(self, selected: Tensor) -> None: ...

    @abstractmethod
    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _observe(self) -> Tensor: ...

    def _make_specs(self, observation_bounds: list[tuple[float, float]]) -> None:
        batch_size, where = self.batch_size, {"shape": self.batch_size, "device": self.device}
        low, high = torch.tensor(observation_bounds, device=self.device).unbind(-1)
        bounds = Bounded(low, high).expand(*batch_size, len(observation_bounds)).clone()
        self.observation_spec = Composite(observation=bounds, **where)
        self.action_spec = (
            Categorical(self.num_actions, **where)
            if self._categorical
            else OneHot(self.num_actions, device=self.device).expand(*batch_size, self.num_actions)
        )
        self.reward_spec = Unbounded(shape=(*batch_size, 1), device=self.device)
        flag = Categorical(2, shape=(*batch_size, 1), dtype=torch.bool, device=self.device)
        self.done_spec = Composite({key: flag.clone() for key in _FLAGS}, **where)

    def _state(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.to(self.device))

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.to(self.device), persistent=False)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        self._generator = torch.Generator(self._num_steps.device).manual_seed(seed)
        self._has_task.zero_()

    def _random(self, *shape: int) -> Tensor:
        """Draw numbers from U[0, 1), by default one for each row."""
        shape = shape or self._num_steps.shape
        return torch.rand(shape, generator=self._generator, device=self._num_steps.device)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the generator's state, saved besides the buffers."""
        return {"generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())

    def to(self, device: torch.device | str | int) -> BatchedTask:
        """Move the state to a device. Randomness continues from a new generator there."""
        super().to(device)
        if self._generator.device != self._num_steps.device:
            # Generators of different devices cannot share a state: seed one from the other.
            old = self._generator
            seed = torch.randint(2**62, (), generator=old, device=old.device)
            self._generator = torch.Generator(self._num_steps.device).manual_seed(int(seed))
        return self

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        repeat_task: bool | Tensor | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        selected, repeated = map(self._rows, read_reset_request(tensordict, repeat_task))
        new_task = selected & ~(repeated & self._has_task)
        rows = new_task.nonzero().squeeze(-1)
        if len(rows):
            self._draw_tasks(rows)
            self._has_task.index_fill_(0, rows, True)
        self._num_steps.masked_fill_(selected, 0)
        self._begin_episodes(selected)
        done = torch.zeros((3, *self.batch_size, 1), dtype=torch.bool, device=new_task.device)
        return self._outcome(done[0], done[1], done[2])

    def _rows(self, mask: bool | Tensor) -> Tensor:
        """Return a reset mask ``[*B, 1]``, or one value for all rows, as bool ``[rows]``."""
        if isinstance(mask, Tensor):
            return mask.reshape(-1).expand_as(self._has_task)
        return torch.full_like(self._has_task, mask)

    def _outcome(self, done: Tensor, terminated: Tensor, truncated: Tensor) -> TensorDict:
        flags = dict(zip(_FLAGS, (done, terminated, truncated), strict=True))
        entries = {"observation": self._observe().view(*self.batch_size, -1), **flags}
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        stepped = tensordict.get("_step", None)
        if stepped is None:
            return self._step_all(self._read_action(tensordict))
        # Masked rows skip this step: advance every row, then put those back.
        kept = ~stepped.reshape(-1)
        changing = [getattr(self, name) for name in ("_num_steps", *self.episode_buffers)]
        before = [value.clone() for value in changing]
        out = self._step_all(self._read_action(tensordict))
        for value, old in zip(changing, before, strict=True):
            value[kept] = old[kept]
        return torch.where(stepped.view(self.batch_size), out, self._skip_tensordict(tensordict))

    def _read_action(self, tensordict: TensorDictBase) -> Tensor:
        action = tensordict.get("action")
        if not self._categorical:
            one_hot = action.reshape(-1, self.num_actions)
            is_bool = one_hot.dtype == torch.bool  # which argmax doesn't take
            return (one_hot.to(torch.uint8) if is_bool else one_hot).argmax(-1)
        action = action.reshape(-1)
        # Elsewhere than on CPU, looking at the values would wait for the device at every step.
        if action.device.type == "cpu":
            low, high = map(int, action.aminmax())
            if low < 0 or high >= self.num_actions:
                got = f"got values from {low} to {high}. {self.action_meaning}"
                raise ValueError(f"action must be in [0, {self.num_actions - 1}], {got}")
        return action

    def _step_all(self, action: Tensor) -> TensorDict:
        self._num_steps.add_(1)
        reward, terminated = self._advance(action)
        truncated = (self._num_steps >= self.max_episode_steps) & ~terminated
        flags = (terminated | truncated, terminated, truncated)
        out = self._outcome(*(flag.view(*self.batch_size, 1) for flag in flags))
        return out.set("reward", reward.view(*self.batch_size, 1))

    def render(self, row: int | tuple[int, ...] = 0, *, cell_pixels: int = 32) -> np.ndarray:
        """Draw one row from above, all that is hidden from the agent included.

        ``row`` is an index into the flattened batch, or one index per batch dimension. Returns
        uint8 ``[height, width, 3]``.
        """
        rows = np.arange(self.num_rows)
        index = rows.reshape(self.batch_size)[row] if isinstance(row, tuple) else rows[row]
        return self._draw(int(index), cell_pixels)
