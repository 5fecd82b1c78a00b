"""Default names of all tensordict entries; ``docs/key_table.py`` says who writes and reads each."""

from __future__ import annotations

from tensordict import NestedKey

OBSERVATION = "observation"
SOFT_RESET = "soft_reset"
TRIAL_PROGRESS = "trial_progress"
EPISODE_IDX = "episode_idx"
EPISODE_RETURN = "episode_return"
SUCCESS = "success"
EPISODE_SUCCESS = "episode_success"
TASK_ID = "task_id"
ACTION_MASK = "action_mask"
PREV_ACTION = "prev_action"
PREV_REWARD = "prev_reward"
TIME_IDX = "time_idx"
IS_INIT = "is_init"
ACTION = "action"
POLICY_VERSION = "policy_version"
STREAM = "_stream"
EPSILON_SCALE = "_epsilon_scale"
NOISE = "_noise"
TIMESTEP = "timestep"
STATE = "state"
ACTION_PARAMS = "action_params"
LOGITS = "logits"
ACTION_VALUE = "action_value"
ACTION_VECTOR = "action_vector"
MASK = ("collector", "mask")
CHECKED = ("collector", "checked")
SOURCE = ("collector", "source")
TRAJECTORY = ("collector", "traj_ids")


def as_tuple(key: NestedKey) -> tuple[str, ...]:
    """Return the names that lead to an entry."""
    return (key,) if isinstance(key, str) else tuple(key)
