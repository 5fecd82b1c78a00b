"""Every tensordict entry of the project in one table: shape, dtype, writer, readers, meaning.

Shapes: ``*B`` batch of environments (or ``B, T`` for a batch of slices), ``A`` action size,
``D`` features, ``G`` discounts, ``P`` distribution parameters. Keys are defaults: every module,
transform and loss takes its own as arguments or through ``set_keys``.
"""

from __future__ import annotations

from typing import NamedTuple

from tensordict import NestedKey

from torchrl_amago import keys


class KeySpec(NamedTuple):
    """One row of the table."""

    key: NestedKey
    shape: str
    dtype: str
    written_by: str
    read_by: str
    meaning: str


KEY_TABLE: tuple[KeySpec, ...] = (
    KeySpec(keys.OBSERVATION, "*B, ...", "any", "environment", "timestep encoder",
            "the task's observation; any number of keys of any name"),
    KeySpec(keys.SOFT_RESET, "*B, 1", "bool", "TrialTransform", "timestep encoder, evaluation",
            "True at the first step of an episode"),
    KeySpec(keys.TRIAL_PROGRESS, "*B, 1", "float32", "TrialTransform", "timestep encoder",
            "fraction of the trial that is used up, in [0, 1]; absent when hidden"),
    KeySpec(keys.EPISODE_IDX, "*B, 1", "int64", "TrialTransform", "evaluation",
            "number of the episode, from 0"),
    KeySpec(keys.EPISODE_RETURN, "*B, 1", "float32", "TrialTransform", "evaluation",
            "return of the episode that the last step belonged to, that step included"),
    KeySpec(keys.SUCCESS, "*B, 1", "bool", "environment", "TrialTransform",
            "True at a step that succeeds; replaced by EPISODE_SUCCESS"),
    KeySpec(keys.EPISODE_SUCCESS, "*B, 1", "bool", "TrialTransform", "evaluation",
            "SUCCESS was True at a step of the episode that the last step belonged to"),
    KeySpec(keys.TASK_ID, "*B, 1", "int64", "environment", "evaluation",
            "number of the task; policies don't read it unless obs_keys names it"),
    KeySpec(keys.ACTION_MASK, "*B, n", "bool", "environment", "timestep encoder, actor",
            "True for each action that is allowed"),
    KeySpec(keys.PREV_ACTION, "*B, A", "float32", "PreviousStepTransform", "timestep encoder",
            "action of the previous step (one-hot if discrete, else in [-1, 1]); 0 at the start"),
    KeySpec(keys.PREV_REWARD, "*B, 1", "float32", "PreviousStepTransform", "timestep encoder",
            "reward of the previous step; 0 at the start"),
    KeySpec(keys.TIME_IDX, "*B, 1", "int64", "TrialTransform (without one: PreviousStepTransform)",
            "trajectory encoder, exploration, TrialTransform",
            "steps since the trial began, from 0; soft resets do not restart it"),
    KeySpec(keys.IS_INIT, "*B, 1", "bool", "InitTracker", "trajectory encoder, exploration",
            "True at the first step of a trial, where memory is cleared"),
    KeySpec(keys.POLICY_VERSION, "*B", "int64", "workers", "logging",
            "number of updates of the policy that chose the action"),
    KeySpec(keys.STREAM, "*B, 1", "int64", "trajectory encoder", "trajectory encoder",
            "number of the rollout, for the module's own memories"),
    KeySpec(keys.EPSILON_SCALE, "*B, 1", "float32", "exploration", "exploration",
            "random factor of this trial's exploration schedule"),
    KeySpec(keys.NOISE, "*B, 1 + N", "float32", "exploration", "exploration",
            "chance to keep the noise for a step more, and the noise; absent unless it is held"),
    KeySpec(keys.TIMESTEP, "*B, D", "float32", "timestep encoder", "trajectory encoder",
            "embedding of one step alone"),
    KeySpec(keys.STATE, "*B, D", "float32", "trajectory encoder", "actor, critics",
            "embedding of the trial so far"),
    KeySpec(keys.ACTION_PARAMS, "*B, G, P", "float32", "actor head", "policy, loss",
            "distribution parameters for every discount"),
    KeySpec(keys.LOGITS, "*B, P", "float32", "policy", "policy",
            "distribution parameters for the acting discount"),
    KeySpec(keys.ACTION_VECTOR, "*S, *B, G, A", "float32", "loss", "critics that take actions",
            "actions as vectors, with S samples"),
    KeySpec(keys.ACTION_VALUE, "*B, C, G, A or *S, *B, C, G", "float32", "critic ensemble", "loss",
            "raw values of all actions or of ACTION_VECTOR, for every critic and discount; codecs "
            "of bins add a dimension"),
    KeySpec(keys.ACTION, "*B, one action's", "the action space's", "policy", "environment, loss",
            "action of this step"),
    KeySpec(("next", "reward"), "*B, 1", "float32", "environment", "loss", "reward of this step"),
    KeySpec(("next", "terminated"), "*B, 1", "bool", "environment", "loss",
            "end of the trial with nothing more to gain; nothing else stops bootstrapping"),
    KeySpec(keys.MASK, "B, T", "bool", "TrialReplayBuffer", "timestep encoder, loss",
            "True on real steps, False on padding"),
    KeySpec(keys.CHECKED, "B, T", "bool", "loss, and its check", "loss, trajectory encoder",
            "present in rows of one trial each, padded on the right, whose values were checked"),
    KeySpec(keys.TRAJECTORY, "*B", "int64", "TorchRL's collectors", "loss",
            "number of the trial; slices are cut where it changes"),
    KeySpec(keys.SOURCE, "B, T", "int64", "TrialMixture", "TrialMixture",
            "number of the buffer that the slice was drawn from"),
)  # fmt: skip
