"""Recorded trials played back under an environment's transforms, which write the other entries.

Legend: R rows played side by side, S rows of a trial, T steps of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv

from torchrl_amago.envs import RecordedEnv, TrialTransform
from torchrl_amago.offline.trajectory import FLAGS, RecordedTrial, TrajectoryChecker, require

MAX_ROWS = 256  # played side by side: a step of many costs little more than a step of one
_MIN_PIECE = 100  # steps of a piece of a trial; bookkeeping outweighs shorter ones


def join(rule: TrialTransform, parts: Sequence[RecordedTrial]) -> RecordedTrial:
    """Join episodes to a trial, or take one trajectory that is a trial or a piece of one."""
    is_joinable = len(parts) == 1 or not any(x.marks_episodes or x.is_fragment for x in parts)
    require(is_joinable, "only whole episodes can be joined: load others by episodes_per_trial=1.")
    for one in parts[:-1]:
        one.rows_S["done"][-1] = True
    rows_S, last = torch.cat([one.rows_S for one in parts]), parts[-1]
    length = len(rows_S) - len(parts)
    # The first row of each later episode comes twice: the episode before it ended there.
    if last.marks_episodes:
        begins = last.recorded_S[rule.soft_reset_key].flatten()[1:].nonzero().flatten() + 1
        rows_S = rows_S[torch.cat([torch.arange(len(rows_S)), begins]).sort()[0]]
        first = begins + torch.arange(1, len(begins) + 1)
        for key in FLAGS:
            rows_S[key][first - 1], rows_S[key][first] = key != "terminated", False
    before = last.recorded_S if last.is_fragment else {}
    episodes = int(1 + rows_S["done"][:-1].sum() + before.get(rule.episode_idx_key, [0])[0])
    time = int(length + before.get(rule.time_idx_key, [0])[0])
    is_short = episodes <= (rule.episodes or episodes) and time <= (rule.horizon or time)
    limits = f"must not be longer than the env's ({rule.episodes} episodes, {rule.horizon} steps)"
    require(is_short, f"a trial {limits}, got {episodes} episodes of {time} steps. Cut them.")
    is_over = (episodes == rule.episodes and rows_S["done"][-1].item()) or time == rule.horizon
    by_episode = rule.trial_end == "episode" and rows_S["terminated"][-1].item()
    bootstraps = not (is_over and (by_episode or rule.trial_end == "terminated"))
    if bootstraps and not last.has_final_observation:
        require(length > 1, "the observation after a lone step must be known to bootstrap there.")
        rows_S, is_over = rows_S[:-1], False
    if not is_over:
        for key in FLAGS:
            rows_S[key][-1] = False  # no other episode begins in this trial
    return RecordedTrial(rows_S, last.recorded_S if len(parts) == 1 else {})


def replay(checker: TrajectoryChecker, trials: Sequence[RecordedTrial]) -> TensorDict:
    """Play trials under the environment's transforms; return their steps ``[N]`` in order."""
    lengths = [one.length for one in trials]
    piece = max(_MIN_PIECE, -(-sum(lengths) // MAX_ROWS))
    # Of each row the trial, its first step there and its length: long episodes take several rows.
    starts = []
    for k, one in enumerate(trials):
        size = lengths[k] if one.rows_S["done"][:-1].any() else piece
        starts += [(k, t, min(size, lengths[k] - t)) for t in range(0, lengths[k], size)]
    trial_R, start_R, length_R = torch.tensor(starts).unbind(1)
    first = torch.tensor([0, *(len(one.rows_S) for one in trials)]).cumsum(0)[trial_R] + start_R
    transforms = Compose(*(one.clone() for one in checker.transforms))
    for one in transforms:
        if isinstance(one, TrialTransform):
            one.repeat, one.options = "env", None
    rows = torch.cat([one.rows_S for one in trials])
    base = RecordedEnv(*checker.recorded_specs, rows=rows, first=first)
    env = TransformedEnv(base, transforms)
    step = env.reset()
    for r, (k, t, _) in enumerate(starts):
        if t or trials[k].recorded_S:
            _seed(checker, step[r], trials[k], t)
    root = [*checker.shown, *FLAGS]  # the environment may hide some
    kept = [*root, checker.action_key, *(("next", key) for key in (*root, checker.reward_key))]
    steps = []
    for _ in range(int(length_R.max())):
        steps.append(env.step(base.act(step)))
        step = env.step_mdp(steps[-1])
    steps_RT = torch.stack(steps, 1).select(*kept)
    end = torch.arange(len(starts)), length_R - 1
    later = start_R.nonzero().squeeze(-1)
    for key in root:  # a piece begins as the one before it ended
        steps_RT[key][later, 0] = steps_RT["next", key][end][later - 1]
    # A trial that isn't over where the data end is cut off.
    last = tuple(x[start_R.roll(-1) == 0] for x in end)
    steps_RT["next", "truncated"][last] |= ~steps_RT["next", "done"][last]
    steps_RT["next", "done"][last] = True
    return steps_RT[torch.arange(steps_RT.shape[1]) < length_R.unsqueeze(-1)]


def _seed(checker: TrajectoryChecker, first: TensorDict, trial: RecordedTrial, start: int) -> None:
    """Write the past of a row into its first step, where the transforms read it."""
    for key, x_S in trial.recorded_S.items():
        first[key].copy_(x_S[0])
    if not start:
        return
    rule, return_key = checker.trial, checker.trial.episode_return_key
    if rule.episode_success_key in checker.shown:
        first[rule.episode_success_key] |= trial.rows_S[rule.success_key][1 : start + 1].any()
    for key in {checker.previous.time_idx_key, rule.time_idx_key} & {*checker.written}:
        first[key].add_(start)
    if return_key in checker.written:
        before = first[return_key] * ~first[rule.soft_reset_key]
        rewards = trial.rows_S[checker.reward_key][1 : start + 1, 0].float()
        # Summed up as the transform does: one after the other, in float32.
        first[return_key].fill_(torch.cat([before, rewards]).numpy().cumsum()[-1].item())
        first[rule.soft_reset_key].fill_(False)
