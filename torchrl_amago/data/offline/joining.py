"""Attempts joined to a trial, completed to what a collector would have written.

A step that an agent trains on holds more than datasets do: the previous action and reward, the time in
the trial, which attempt it is. All of it follows from the trajectories, and is computed here as
`TrialTransform`, `PreviousStepTransform` and `InitTracker` write it while an environment is stepped.

The legend is that of :mod:`~torchrl_amago.data.offline.schema`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago.data.offline.schema import TRIAL_ENTRIES, Attempt, TrialSchema
from torchrl_amago.data.offline.trajectory import TrajectoryError


def join_attempts(schema: TrialSchema, attempts: Sequence[Attempt]) -> TensorDict:
    """The steps ``[L]`` of a trial of these attempts, as a collector writes them.

    Within the trial, an attempt's last step leads to the first observation of the next one.

    Raises:
        TrajectoryError: where they are too much for one trial, a fragment whose beginning is
            needed, or a single step of which nothing tells what it led to, where that is needed.

    Example:
        >>> from torchrl.data import Bounded, Composite, Unbounded
        >>> from torchrl_amago.data.offline import Trajectory
        >>> specs = {"observation": Unbounded((3,)), "prev_reward": Unbounded((1,))}
        >>> schema = TrialSchema(Composite(specs), Bounded(-1.0, 1.0, (1,)))
        >>> attempt = schema.check(Trajectory(
        ...     torch.zeros(3, 3), torch.ones(2, 1), [0.25, 1.0], [0, 1], [0, 0]))
        >>> steps = join_attempts(schema, [attempt])
        >>> steps["prev_reward"].flatten().tolist(), steps["next", "done"].flatten().tolist()
        ([0.0, 0.25], [False, True])
    """
    is_over, terminated, truncated = _end(schema, attempts)
    if attempts[-1].last_is_stand_in and not terminated:
        attempts = [*attempts[:-1], _without_last_step(attempts[-1])]
        is_over, terminated, truncated = _end(schema, attempts)
    held_S = _join_observations(schema, attempts)
    action_L = torch.cat([part.action_L for part in attempts])
    reward_L = torch.cat([part.reward_L for part in attempts])
    length = len(action_L)
    entries = _step_entries(schema, attempts[0], action_L, reward_L)
    if any(name in schema.computed for name in TRIAL_ENTRIES):
        entries |= _trial_entries(schema, attempts, held_S, reward_L, is_over)
    rows_S = {
        schema.computed[name]: x_S for name, x_S in entries.items() if name in schema.computed
    }
    rows_S |= held_S  # what the data hold stays as it is
    root = TensorDict({key: x_S[:-1] for key, x_S in rows_S.items()}, [length])
    root.set(schema.action_key, action_L)
    after = TensorDict({key: x_S[1:] for key, x_S in rows_S.items()}, [length])
    after.set(schema.reward_key, reward_L)
    flags = {"done": terminated or truncated, "terminated": terminated, "truncated": truncated}
    is_last = (torch.arange(length) == length - 1).unsqueeze(-1)
    for name, value in flags.items():
        root.set(name, torch.zeros_like(is_last))
        after.set(name, is_last & value)
    return root.set("next", after)


def _join_observations(schema: TrialSchema, attempts: Sequence[Attempt]) -> dict[NestedKey, Tensor]:
    if len(attempts) == 1:
        return attempts[0].observation_S
    if any(schema.is_whole_trial(part) or part.first_time for part in attempts):
        raise TrajectoryError(
            "only whole attempts can be joined to a trial, got trajectories that are trials or "
            "fragments themselves. Load them with episodes_per_trial=1."
        )
    # Only the task's own: others, such as a time index, would start again with each attempt.
    return {
        key: torch.cat(
            [
                *(part.observation_S[key][:-1] for part in attempts),
                attempts[-1].observation_S[key][-1:],
            ]
        )
        for key in schema.given
    }


def _end(schema: TrialSchema, attempts: Sequence[Attempt]) -> tuple[bool, bool, bool]:
    """Whether the trial is over, and its last step terminated or truncated."""
    last, length = attempts[-1], sum(len(part.action_L) for part in attempts)
    if schema.rule is None or schema.is_whole_trial(last):
        return True, last.terminated, last.truncated
    episodes, horizon, trial_end = schema.rule
    too_many = episodes is not None and len(attempts) > episodes
    if too_many or (horizon is not None and length > horizon):
        raise TrajectoryError(
            f"a trial must not be longer than those of the environment ({episodes} attempts, "
            f"{horizon} steps), got {len(attempts)} attempts of {length} steps. Change "
            "episodes_per_trial, or cut them."
        )
    is_over = (len(attempts) == episodes and not last.is_cut) or length == horizon
    if trial_end == "attempt":
        terminated = is_over and last.terminated
    else:
        terminated = is_over and trial_end == "terminated"
    return is_over, terminated, not terminated


def _step_entries(
    schema: TrialSchema, first: Attempt, action_L: Tensor, reward_L: Tensor
) -> dict[str, Tensor]:
    """What `PreviousStepTransform` and `InitTracker` write."""
    length = len(action_L)
    prev_action = [first.first_prev_action_A.unsqueeze(0), schema.space.to_vector(action_L)]
    prev_reward = [torch.tensor([[first.first_prev_reward]]), reward_L.reshape(length, 1)]
    time_S = first.first_time + torch.arange(length + 1).unsqueeze(-1)
    return {
        keys.PREV_ACTION: torch.cat(prev_action),
        keys.PREV_REWARD: torch.cat(prev_reward).to(torch.float32),
        keys.TIME_IDX: time_S,
        keys.IS_INIT: time_S == 0,
    }


def _trial_entries(
    schema: TrialSchema,
    attempts: Sequence[Attempt],
    held_S: dict[NestedKey, Tensor],
    reward_L: Tensor,
    is_over: bool,
) -> dict[str, Tensor]:
    """What `TrialTransform` writes."""
    needed = [key for name, key in schema.computed.items() if name in TRIAL_ENTRIES]
    missing = [key for key in needed if key not in held_S]
    soft_reset_S = held_S.get(schema.computed.get(keys.SOFT_RESET))
    first_time = attempts[0].first_time
    begins_later = first_time > 0 or (soft_reset_S is not None and not soft_reset_S[0].any())
    if begins_later and missing:
        where = f"at step {first_time} of its trial" if first_time else "without soft_reset"
        raise TrajectoryError(
            f"a fragment must hold {needed} in its observations, and one that begins {where} has "
            f"no {missing}: they follow from a trial's beginning. Add them, or load it for an "
            "environment without TrialTransform."
        )
    if soft_reset_S is None:
        soft_reset_S = torch.zeros(len(reward_L) + 1, 1, dtype=torch.bool)
        starts = np.cumsum([0, *(len(part.action_L) for part in attempts[:-1])])
        soft_reset_S[starts] = True
    begins_S = soft_reset_S.reshape(-1)
    episode_S = (begins_S.cumsum(0) - 1).unsqueeze(-1)
    step_S = torch.arange(len(begins_S)).unsqueeze(-1)
    return {
        keys.SOFT_RESET: soft_reset_S,
        keys.EPISODE_IDX: episode_S,
        keys.ATTEMPT_RETURN: _attempt_returns(begins_S, reward_L),
        keys.TRIAL_STEP: step_S,
        keys.TRIAL_PROGRESS: _progress(schema, episode_S, step_S, is_over),
    }


def _progress(schema: TrialSchema, episode_S: Tensor, step_S: Tensor, is_over: bool) -> Tensor:
    episodes, horizon, _ = schema.rule
    progress_S = torch.zeros(episode_S.shape)
    if episodes is not None:
        progress_S = episode_S.float() / episodes
    if horizon is not None:
        progress_S = torch.maximum(progress_S, step_S.float() / horizon)
        if is_over:
            progress_S[-1] = progress_S[-2]
    return progress_S


def _without_last_step(attempt: Attempt) -> Attempt:
    """The attempt cut off before its last step, whose observation is what the one before led to."""
    if len(attempt.action_L) == 1:
        raise TrajectoryError(
            "what the last step led to must be known where a trial is truncated, and is unknown for an "
            "attempt of that step alone. Leave it out, add next_observations, or load it for an "
            "environment whose trials terminate there (trial_end)."
        )
    return attempt._replace(
        observation_S={key: x_S[:-1] for key, x_S in attempt.observation_S.items()},
        action_L=attempt.action_L[:-1],
        reward_L=attempt.reward_L[:-1],
        terminated=False,
        truncated=True,
        is_cut=True,
        last_is_stand_in=False,
    )


def _attempt_returns(begins_S: Tensor, reward_L: Tensor) -> Tensor:
    """Return of the attempt that the step before each row belonged to, ``[S, 1]``."""
    reward = reward_L.reshape(-1).to(torch.float32).numpy()
    returns_S = np.zeros(len(begins_S), dtype=np.float32)
    starts = begins_S[:-1].nonzero().reshape(-1).tolist()
    for start, stop in pairwise([*starts, len(reward)]):
        # numpy adds float32 one after another, as an environment does; torch in double precision.
        returns_S[start + 1 : stop + 1] = np.cumsum(reward[start:stop])
    return torch.from_numpy(returns_S).unsqueeze(-1)
