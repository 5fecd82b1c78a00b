"""Trials: several episodes at one task, seen by the agent as one long episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from tensordict import NestedKey, TensorDictBase, is_leaf_nontensor
from tensordict.utils import expand_as_right
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, FrameSkipTransform, MultiAction, Transform

from torchrl_amago import keys
from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.envs.transforms._step_transform import StepTransform
from torchrl_amago.envs.transforms.previous_step import PreviousStepTransform
from torchrl_amago.envs.transforms.repeat import (
    InnerEnv,
    Repeater,
    RepeatMode,
    ResetOptions,
    make_repeater,
)

_DONE_KEYS = ("done", "terminated", "truncated")
TrialEnd = Literal["terminated", "truncated", "episode"]


class TrialTransform(StepTransform):
    """Joins episodes at one task into a trial of ``episodes`` episodes, ``horizon`` steps, or both.

    When the inner environment is done in a row, that row is soft-reset in the same step: the next
    observation is the first one of the next episode, the reward is kept, and ``done``,
    ``terminated`` and ``truncated`` read False. The trial ends with its last episode or at the
    horizon; the next observation is then the episode's own last one. The next reset of the row
    draws a new task.

    Writes (``next`` of step t equals the root of step t+1 within a trial), also declared as state:

    =================== ======= ====================================================================
    key                 dtype   value, shape ``[*B, 1]``
    =================== ======= ====================================================================
    ``time_idx``        int64   steps since the trial began, from 0
    ``episode_idx``     int64   number of the episode, from 0; not counted up when the trial ends
    ``soft_reset``      bool    first step of an episode, the trial's first step included
    ``episode_return``  float32 return of the episode that the last step belonged to, that step
                                included; 0 at the trial's start
    ``episode_success`` bool    ``success`` was True at a step of that episode; replaces that entry
                                of the environment, absent without it
    ``trial_progress``  float32 fraction of the trial that is used up, in [0, 1): ``episode_idx /
                                episodes``, ``time_idx / horizon`` or the larger of both
    =================== ======= ====================================================================

    Ways to repeat a task:

    - ``"env"``: the environment has ``repeats_task = True`` and its ``_reset`` keeps the task in
      the rows reset with the keyword ``repeat_task=True`` (or, without the keyword, with an entry
      ``repeat_task`` in the reset tensordict, bool ``[*B, 1]``).
    - ``"seed"``: for Gymnasium environments whose task depends on the reset seed. A new trial draws
      a seed, and each of its episodes resets with it, which repeats all else that the seed decides,
      too. A new trial costs two resets: TorchRL's own comes first. ``set_seed`` decides the seeds.
    - ``"options"``: soft resets call ``reset(options=options)``.
    - a function ``(env, reset_mask, tensordict) -> tensordict`` of the environment under the
      transforms and the step's next tensordict, which starts a new episode in the rows of
      ``reset_mask``, bool ``[*B, 1]``.

    Batched environments may be outside or inside: seeds and options reach each row of
    ``SerialEnv``, ``ParallelEnv`` and ``GymWrapper(SyncVectorEnv(autoreset_mode=DISABLED))``.
    Forked workers share torch's generator: without ``set_seed`` all play the same tasks.

    Args:
        episodes, horizon: number of episodes, and of steps.
        repeat: how the task is repeated; by default ``"env"`` where the environment can, else
            ``"seed"`` for Gymnasium environments.
        options: for ``repeat="options"``: a dict, or a function of the row's number.
        show_progress: whether ``trial_progress`` is written.
        trial_end: the flag set with ``done`` at the trial's end: ``"terminated"`` (worth nothing
            more) or ``"truncated"`` (values bootstrap); or ``"episode"``, the one of the last
            episode, ``truncated`` where the horizon cuts it off (for trials of one episode with a
            time limit that isn't observed).
        reward_key: reward to sum up in ``episode_return``.
        success_key: bool entry ``[*B, 1]`` of the environment, if it has one, True where a step
            succeeds.
        soft_reset_key, trial_progress_key, episode_idx_key: entries to write.
        episode_return_key, episode_success_key, time_idx_key: entries to write.

    Raises:
        ValueError: once the transform is used, if the environment cannot repeat a task, has several
            done flags, or transforms in an order that can't work.
        RuntimeError: if it is called outside of an environment, as in a replay buffer.

    Examples:
        >>> import gymnasium as gym
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> base = GymEnv("CartPole-v1", max_episode_steps=2)
        >>> trial = TransformedEnv(base, TrialTransform(episodes=3)).rollout(100)
        >>> trial["episode_idx"].flatten().tolist()
        [0, 0, 1, 1, 2, 2]
        >>> bool((trial["observation"][0] == trial["observation"][2]).all())
        True
    """

    def __init__(
        self,
        episodes: int | None = None,
        horizon: int | None = None,
        *,
        repeat: RepeatMode | None = None,
        options: ResetOptions | None = None,
        show_progress: bool = True,
        trial_end: TrialEnd = "terminated",
        reward_key: NestedKey = "reward",
        success_key: NestedKey = keys.SUCCESS,
        soft_reset_key: NestedKey = keys.SOFT_RESET,
        trial_progress_key: NestedKey = keys.TRIAL_PROGRESS,
        episode_idx_key: NestedKey = keys.EPISODE_IDX,
        episode_return_key: NestedKey = keys.EPISODE_RETURN,
        episode_success_key: NestedKey = keys.EPISODE_SUCCESS,
        time_idx_key: NestedKey = keys.TIME_IDX,
    ) -> None:
        dtypes = {episode_idx_key: torch.int64, time_idx_key: torch.int64}
        dtypes |= {soft_reset_key: torch.bool, episode_return_key: torch.float32}
        if show_progress:
            dtypes[trial_progress_key] = torch.float32
        super().__init__(in_keys=[], out_keys=list(dtypes))
        self._dtypes = dtypes
        self.episodes, self.horizon = episodes, horizon
        self.repeat, self.options = repeat, options
        self.show_progress, self.trial_end = show_progress, trial_end
        self.reward_key, self.success_key = reward_key, success_key
        self.soft_reset_key, self.time_idx_key = soft_reset_key, time_idx_key
        self.trial_progress_key, self.episode_idx_key = trial_progress_key, episode_idx_key
        self.episode_return_key = episode_return_key
        self.episode_success_key = episode_success_key
        self._repeater: Repeater | None = None
        self._inner: InnerEnv | None = None
        limits = {"episodes": episodes, "horizon": horizon}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if not limits:
            raise ValueError("a trial needs an end. Pass episodes=, horizon= (steps), or both.")
        check_counts("It counts episodes or steps.", **limits)
        check_choice("trial_end", trial_end, get_args(TrialEnd))
        if not callable(repeat):
            check_choice("repeat", repeat, (None, "env", "options", "seed"))
        if (repeat == "options") != (options is not None):
            raise ValueError(
                "repeat='options' and options= (a dict, or a function of the row's number) belong "
                f"together, got repeat={repeat!r}, options={options!r}."
            )

    def set_container(self, container: Transform | EnvBase) -> None:
        self._repeater = self._inner = None
        super().set_container(container)

    def reset_parent(self) -> None:
        self._repeater = self._inner = None
        super().reset_parent()

    def empty_cache(self) -> None:
        # Not the repeater: it holds the tasks that the rows are at.
        self._inner = None
        super().empty_cache()

    def _get_inner(self) -> InnerEnv:
        if self._inner is None:
            before, _, env = self._neighbours()
            self._inner = InnerEnv(env.base_env, before)
        return self._inner

    def _get_repeater(self) -> Repeater:
        if self._repeater is None:
            options = (self.repeat, self.options, self.episodes == 1)
            self._repeater = make_repeater(self._get_inner().env, *options)
        return self._repeater

    def _neighbours(self) -> tuple[list[Transform], list[Transform], EnvBase]:
        """Return the transforms before this one, those after it, and their environment."""
        before: list[Transform] = []
        after: list[Transform] = []
        inner, outer = self, self._container()
        while isinstance(outer, Compose):
            position = next(i for i, t in enumerate(outer.transforms) if t is inner)
            before = [*outer.transforms[:position], *before]
            after = [*after, *outer.transforms[position + 1 :]]
            inner, outer = outer, outer._container()
        return before, after, outer

    def _reset(self, tensordict: TensorDictBase, first: TensorDictBase) -> TensorDictBase:
        repeater = self._get_repeater()
        done = first.get("done")
        mask = tensordict.get("_reset", torch.ones_like(done)).view(done.shape)
        again = repeater.hard_reset(self._get_inner(), mask)
        if again is not None:
            first.update(again)
        for key in _DONE_KEYS:
            if first.get(key, None) is None:  # see transform_done_spec
                first.set(key, torch.zeros_like(done))
        # Rows outside of the mask are dropped by the caller.
        for key, dtype in self._dtypes.items():
            first.set(key, torch.zeros_like(done, dtype=dtype))
        if first.pop(self.success_key, None) is not None:
            first.set(self.episode_success_key, torch.zeros_like(done))
        return first.set(self.soft_reset_key, torch.ones_like(done))

    def _step(self, tensordict: TensorDictBase, after: TensorDictBase) -> TensorDictBase:
        episode_over = after.get("done")
        if (stepped := tensordict.get("_step", None)) is not None:
            episode_over = episode_over & stepped.view(episode_over.shape)
        written = self._advance(tensordict, after, episode_over)
        soft_reset = written[self.soft_reset_key]
        self._write(tensordict, after, written)
        if soft_reset.any():
            reset = self._get_repeater().soft_reset(self._get_inner(), soft_reset, after)
            reset.pop(self.success_key, None)
            _begin_episodes(after, reset, soft_reset)
        return after

    def _advance(
        self, tensordict: TensorDictBase, after: TensorDictBase, episode_over: Tensor
    ) -> dict[NestedKey, Tensor]:
        """Compute the entries and flags after this step."""
        episode_idx = self._before(tensordict, self.episode_idx_key)
        at_start = self._before(tensordict, self.soft_reset_key)
        episode_return = self._before(tensordict, self.episode_return_key)
        time_idx = self._before(tensordict, self.time_idx_key) + 1
        reward = after.get(self.reward_key).to(torch.float32)
        trial_over = torch.zeros_like(episode_over)
        if self.episodes is not None:
            trial_over = episode_over & (episode_idx >= self.episodes - 1)
        if self.horizon is not None:
            trial_over = trial_over | (time_idx >= self.horizon)
        if self.trial_end == "episode":
            terminated = trial_over & after.get("terminated")
        else:
            terminated = trial_over & (self.trial_end == "terminated")
        soft_reset = episode_over & ~trial_over
        episode_idx = episode_idx + soft_reset
        written = {
            "done": trial_over,
            "terminated": terminated,
            "truncated": trial_over & ~terminated,
            self.soft_reset_key: soft_reset,
            self.episode_idx_key: episode_idx,
            self.episode_return_key: torch.where(at_start, reward, episode_return + reward),
            self.time_idx_key: time_idx,
        }
        if (success := after.pop(self.success_key, None)) is not None:
            before = self._before(tensordict, self.episode_success_key) & ~at_start
            written[self.episode_success_key] = before | success.view_as(before).bool()
        if self.show_progress:
            progress = self._progress(episode_idx, time_idx)
            if self.horizon is not None:
                before = self._before(tensordict, self.trial_progress_key)
                progress = torch.where(trial_over, before, progress)
            written[self.trial_progress_key] = progress
        return written

    def _progress(self, episode_idx: Tensor, time_idx: Tensor) -> Tensor:
        fractions = [
            count.to(torch.float32) / limit
            for count, limit in ((episode_idx, self.episodes), (time_idx, self.horizon))
            if limit is not None
        ]
        return fractions[0] if len(fractions) == 1 else torch.maximum(*fractions)

    def _written_specs(self) -> Mapping[NestedKey, TensorSpec]:
        where = {"shape": (*self.parent.batch_size, 1), "device": self.parent.device}

        def count(limit: int | None) -> TensorSpec:
            if limit is None:
                return Unbounded(dtype=torch.int64, **where)
            return Bounded(0, limit, dtype=torch.int64, **where)

        specs = {
            self.episode_idx_key: count(None if self.episodes is None else self.episodes - 1),
            self.soft_reset_key: Categorical(2, dtype=torch.bool, **where),
            self.episode_return_key: Unbounded(**where),
            self.time_idx_key: count(self.horizon),
        }
        if self.success_key in self.parent.observation_spec.keys(True, True):
            specs[self.episode_success_key] = Categorical(2, dtype=torch.bool, **where)
        if self.show_progress:
            specs[self.trial_progress_key] = Bounded(0.0, 1.0, **where)
        return specs

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        self._check_env()
        self._get_repeater()
        observation_spec = super().transform_observation_spec(observation_spec)
        if self.episode_success_key in observation_spec.keys(True, True):
            del observation_spec[self.success_key]
        return observation_spec

    def transform_done_spec(self, done_spec: Composite) -> Composite:
        for key in _DONE_KEYS:
            if key not in done_spec.keys():  # noqa: SIM118 - not a dict
                done_spec[key] = done_spec["done"].clone()
        return done_spec

    def _check_env(self) -> None:
        env = self.parent
        shape = (*env.batch_size, 1)
        entries = {key: tuple(env.full_done_spec[key].shape) for key in env.done_keys}
        entries[self.reward_key] = tuple(env.full_reward_spec[self.reward_key].shape)
        if not set(env.done_keys) <= set(_DONE_KEYS) or set(entries.values()) != {shape}:
            raise ValueError(
                f"a trial needs one reward and flags {_DONE_KEYS} of shape {shape}, got {entries}. "
                "Reduce those of several agents to one before it."
            )
        before, after, _ = self._neighbours()
        restarting = any(isinstance(t, PreviousStepTransform) for t in before)
        if restarting or keys.IS_INIT in set(env.observation_spec.keys()):
            raise ValueError(
                "PreviousStepTransform and InitTracker must come after the trial transform, got "
                f"{'PreviousStepTransform' if restarting else repr(keys.IS_INIT)} below it, which "
                "would restart with every episode. Use make_trial_env."
            )
        stepping = (t for t in after if isinstance(t, FrameSkipTransform | MultiAction))
        if names := [type(t).__name__ for t in stepping]:
            raise ValueError(
                "transforms that step the environment several times must come before the trial "
                f"transform, got {names} after it. Apply them to make_trial_env's first argument."
            )


def _begin_episodes(after: TensorDictBase, reset: TensorDictBase, mask: Tensor) -> None:
    """Put the reset rows' first observations in place."""
    done = reset.get("done", None)
    if done is not None and (done & mask).any():
        raise RuntimeError(
            "an episode must not be done when it begins, but the environment was done right after "
            "a soft reset. Check its reset, or the function given as repeat=."
        )
    everywhere = bool(mask.all())
    for key in reset.keys(True, True, is_leaf=is_leaf_nontensor):
        if key in (*_DONE_KEYS, "_reset", "repeat_task"):
            continue
        value = reset.get(key)
        before = after.get(key, None)
        if not everywhere and before is not None:
            if isinstance(value, Tensor):
                value = torch.where(expand_as_right(mask.squeeze(-1), value), value, before)
            else:
                rows = mask.view(after.batch_size)
                kept = after.select(key).where(~rows, other=reset.select(key))
                value = kept.get(key)
        after.set(key, value)
