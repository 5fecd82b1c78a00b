"""Relabellers as TorchRL transforms: the points of `TransformBase` in TorchRL's `test/transforms`.

They belong where whole trials are; the points about environments are that they say so at once.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict, assert_close
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import Compose, ParallelEnv, RewardScaling, SerialEnv, TransformedEnv

from tests.data.test_relabel import LIMIT, MASK, maze_env, refilled
from tests.data.trials import seeded
from torchrl_amago import GoalSequenceRelabel, HindsightRelabel, Relabel, make_trial_buffer

REWARD = ("next", "reward")
IDS = ("collector", "traj_ids")
OTHER_ROWS = "rows that are something else"


class NegativeReward(Relabel):
    """Touches the rewards of a random half of the trials."""

    def __init__(self, **options):
        super().__init__([REWARD], [REWARD], **options)

    def relabel(self, trials, generator):
        reward = trials[REWARD]
        chosen = torch.rand(len(trials), 1, 1, generator=generator) < 0.5
        return TensorDict({REWARD: torch.where(chosen, -1 - reward, reward)}, trials.batch_size)


RELABELLERS = {
    "sequence": partial(GoalSequenceRelabel, "some"),
    "single": HindsightRelabel,
    "own": NegativeReward,
}


@pytest.fixture(params=RELABELLERS)
def make(request):
    return RELABELLERS[request.param]


maze_row = partial(maze_env, [])


def relabelling_env(relabel):
    return TransformedEnv(maze_row().base_env, relabel)


@pytest.fixture(scope="module")
def trials():
    """Twelve whole trials `[12, L]`, padded with zeros, as TorchRL's collector gives them."""
    torch.manual_seed(0)
    env = maze_env()
    frames = 8 * 3 * LIMIT
    options = {"trajs_per_batch": 12, "frames_per_batch": frames, "total_frames": frames}
    batch = next(iter(Collector(env, env.rand_action, traj_format="padded", **options)))
    lengths = batch[MASK].sum(-1)
    assert lengths.min() < lengths.max()
    goal = batch["goals"][:, :1, 0].expand(*batch.shape, 2).contiguous()
    for side in (batch, batch["next"]):  # for HER: a goal that stays shown
        side["desired_goal"], side["achieved_goal"] = goal, side["achieved"][:, :, 0]
    return batch


def flat(trials: TensorDict) -> TensorDict:
    """The steps of trials side by side, without what the collector says of the batch."""
    return trials[trials[MASK]].exclude(MASK)


def buffer_of(trials: TensorDict, slice_length: int = LIMIT, **options):
    return refilled(flat(trials), slice_length, **options)


def stock_buffer_of(trials: TensorDict, relabel=None, **options) -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), **options)
    if relabel is not None:
        buffer.append_transform(relabel)
    buffer.extend(flat(trials))
    return buffer


def assert_all_reach_their_goals(batch: TensorDict) -> None:
    assert (batch[REWARD].squeeze(-1).where(batch[MASK], 0).sum(-1) == 1).all()


assert_equal = partial(assert_close, rtol=0, atol=0, equal_nan=False)


# ------------------------------------------------------------------ in environments: nowhere


PLACES = {
    "single": lambda relabel: TransformedEnv(maze_env(), relabel),
    "compose": lambda relabel: TransformedEnv(maze_env().base_env, Compose(relabel)),
    "append": lambda relabel: maze_env().append_transform(relabel),
    "append compose": lambda relabel: maze_env().append_transform(Compose(relabel)),
    "insert": lambda relabel: maze_env().insert_transform(0, relabel),
    "compose append": lambda relabel: (env := maze_env()).transform.append(relabel) or env,
    "serial": lambda relabel: SerialEnv(2, partial(relabelling_env, relabel)),
    "trans_serial": lambda relabel: TransformedEnv(SerialEnv(2, maze_row), relabel),
    "parallel": lambda relabel: ParallelEnv(2, partial(relabelling_env, relabel)),
    "trans_parallel": lambda relabel: TransformedEnv(ParallelEnv(2, maze_row), relabel),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore:Nested TransformedEnvs are automatically unwrapped")
def test_environments_are_no_place_for_it(make, place):
    relabel = make()
    with pytest.raises(TypeError, match=r"put into an environment.*make_trial_buffer\(relabel="):
        PLACES[place](relabel)
    assert Compose(relabel)[0] is relabel  # it can go elsewhere


def test_an_environment_that_took_it_nevertheless_does_not_run(make):
    env = maze_env()
    with pytest.raises(TypeError):
        env.append_transform(make())
    with pytest.raises(TypeError, match="put into an environment"):
        env.rollout(2)


# ------------------------------------------------------------------ on batches


def test_no_env_and_no_inverse(make, trials):
    before = trials.clone()
    relabel = make(generator=seeded())
    out = relabel(trials)
    assert_equal(trials, before)
    assert_equal(relabel.inv(trials), before)
    assert set(out.keys(True, True)) == set(trials.keys(True, True))
    changed = make().relabel_trials(trials, seeded())
    assert_equal(out, trials.clone().update(changed))
    assert not torch.equal(out[REWARD], trials[REWARD])
    for key in set(trials.keys(True, True)) - set(relabel.out_keys):
        assert out[key] is trials[key]
    assert set(changed.keys(True, True)) <= {*relabel.out_keys, MASK}
    match = f"{type(relabel).__name__} reads .*reward.*but the trials hold only"
    with pytest.raises(KeyError, match=match):
        relabel.relabel_trials(trials.exclude(REWARD))


def test_compose_and_model(make, trials):
    twice = Compose(make(generator=seeded()), RewardScaling(0, 2, in_keys=[REWARD]))
    expected = make(generator=seeded())(trials)[REWARD] * 2
    assert torch.equal(twice(trials)[REWARD], expected)
    copied = TensorDictModule(nn.Identity(), [REWARD], ["seen"])
    out = nn.Sequential(make(generator=seeded()), copied)(trials)
    assert torch.equal(out["seen"] * 2, expected)


def test_draws_follow_the_generator(make, trials):
    relabel = make()
    relabel.set_rng(seeded(1))
    global_state = torch.get_rng_state()
    first, second = relabel(trials), relabel(trials)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not torch.equal(first[REWARD], second[REWARD])
    assert_equal(make(generator=seeded(1))(trials), first)
    for copied in (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):  # noqa: S301
        twin, relabel = copied(relabel), make(generator=relabel.generator)
        assert_equal(twin(trials), relabel(trials))
    torch.manual_seed(4)
    first = make()(trials)
    torch.manual_seed(4)
    assert_equal(make()(trials), first)


SPOILT = {
    "no mask": (lambda it: it.exclude(MASK), r"trials \[B, L\] with \(\('collector', 'mask'\)"),
    "no time": (lambda it: it.exclude("time_idx"), "'time_idx'"),
    "no done": (lambda it: it.exclude(("next", "done")), "'done'"),
    "flat": (lambda it: it.flatten(), r"something else: a batch \[192\]"),
    "no start": (lambda it: it[:, 1:], OTHER_ROWS),
    "no end": (lambda it: it[:, :2], OTHER_ROWS),
    "several": (lambda it: torch.cat([it, it], 1), OTHER_ROWS),
    "padded left": (lambda it: it.flip(1), OTHER_ROWS),
    "nothing real": (lambda it: it.set(MASK, it[MASK] & (it[IDS] > it[IDS].min())), OTHER_ROWS),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_batches_of_anything_but_whole_trials(make, trials, spoilt):
    spoil, match = SPOILT[spoilt]
    with pytest.raises(ValueError, match=match):
        make()(spoil(trials.clone()))


class Masked(Relabel):
    """Gives trials this mask, and says nothing of anything else."""

    def __init__(self, mask):
        super().__init__([])
        self.mask = mask

    def relabel(self, trials, generator):
        return TensorDict({MASK: self.mask & trials[MASK]}, trials.batch_size)


def test_a_mask_must_be_the_beginning_of_each_trial(trials):
    step = torch.arange(trials.shape[1]).expand(trials.shape)
    first_half = step < (trials[MASK].sum(-1, keepdim=True) + 1) // 2
    assert torch.equal(Masked(first_half)(trials)[MASK], first_half)
    with pytest.raises(ValueError, match="each trial's remaining first steps"):
        Masked(step != 1)(trials)
    with pytest.raises(ValueError, match=r"to at least one step, got lengths \[0, 0.* from \["):
        buffer_of(trials, relabel=Masked(torch.tensor(False))).sample()
    with pytest.raises(TypeError, match="abstract"):
        Relabel([])


# ------------------------------------------------------------------ in buffers


@pytest.mark.parametrize("slice_length", [LIMIT, 5])
@pytest.mark.parametrize("how", ["append", "insert"])
def test_appended_to_a_buffer_of_trials(make, trials, slice_length, how):
    given = buffer_of(trials, slice_length, relabel=make(), generator=seeded())
    buffer = buffer_of(trials, slice_length, generator=seeded())
    stored = buffer[:].clone()
    if how == "append":
        buffer.append_transform(make())
    else:
        buffer.append_transform(RewardScaling(0, 1, in_keys=[REWARD]))
        buffer.insert_transform(0, make())
    for _ in range(3):
        assert_equal(buffer.sample(), given.sample())
    assert_equal(buffer[:], stored)


def test_a_buffer_of_trials_takes_one_relabeller_before_all_else(make, trials):
    buffer = buffer_of(trials, relabel=make())
    with pytest.raises(ValueError, match="has one relabeller"):
        buffer.append_transform(make())
    buffer = buffer_of(trials)
    buffer.append_transform(RewardScaling(0, 1, in_keys=[REWARD]))
    with pytest.raises(ValueError, match="before all other transforms.*at index 1.*Insert it at 0"):
        buffer.append_transform(make())
    with pytest.raises(ValueError, match="with invert=True"):
        buffer_of(trials).append_transform(make(), invert=True)
    with pytest.raises(TypeError, match="relabel must be a Relabel or None, got function"):
        make_trial_buffer(100, 4, 2, relabel=lambda trials, generator: trials)


def test_inside_a_compose_of_a_buffer_it_gets_slices(trials):
    """Slices are whole trials only where none is longer than a slice."""
    buffer = buffer_of(trials, generator=seeded())
    buffer.append_transform(Compose(GoalSequenceRelabel("all")))
    assert_all_reach_their_goals(buffer.sample())
    buffer = buffer_of(trials, slice_length=2)
    buffer.append_transform(Compose(GoalSequenceRelabel("all")))
    with pytest.raises(ValueError, match=OTHER_ROWS):
        buffer.sample()


def stock_sampler(slice_length: int = LIMIT) -> SliceSampler:
    options = {"traj_key": IDS, "strict_length": False, "pad_output": True, "truncated_key": None}
    return SliceSampler(slice_len=slice_length, **options)


@pytest.mark.parametrize("sampler", [None, stock_sampler])
def test_a_stock_buffer_runs_transforms_before_there_is_a_mask(make, trials, sampler):
    buffer = stock_buffer_of(trials, make(), sampler=sampler and sampler(), batch_size=640)
    with pytest.raises(ValueError, match=r"must get whole trials \[B, L\].*docs/hindsight.md"):
        buffer.sample()


def test_a_stock_buffer_that_writes_through_it(make, trials):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=64)
    buffer.append_transform(make(), invert=True)
    with pytest.raises(TypeError, match="whole trials, and was .* inverted"):
        buffer.extend(flat(trials))


def test_trials_that_a_collector_or_a_stock_sampler_has_padded(trials):
    """Each ends by its new goal."""
    buffer = stock_buffer_of(trials, sampler=stock_sampler(), batch_size=640 * LIMIT)
    relabel = GoalSequenceRelabel("all", generator=seeded())
    ends = {"done": True, "terminated": True, "truncated": False, "reward": 1}
    for padded, count in ((trials, 12), (buffer.sample().view(-1, LIMIT), 640)):
        batch = relabel(padded)
        assert_all_reach_their_goals(batch)
        last = batch[MASK].sum(-1, keepdim=True) - 1
        for key, expected in ends.items():
            assert (batch["next", key].squeeze(-1).gather(1, last) == expected).sum() == count, key
    assert_equal(buffer[:].exclude("index"), flat(trials))
    options = {"sampler": stock_sampler(LIMIT - 1), "batch_size": (LIMIT - 1) * 40}
    batch = stock_buffer_of(trials, **options).sample().view(-1, LIMIT - 1)
    assert batch["is_init"][:, 0].all()  # the sampler's: they say nothing
    with pytest.raises(ValueError, match=OTHER_ROWS):
        GoalSequenceRelabel("all")(batch)


# ------------------------------------------------------------------ in collectors


def collected(steps: int, num_goals: int = 1, **options) -> list[TensorDict]:
    """Two batches of so many steps of eight rows."""
    torch.manual_seed(1)
    env = maze_env(num_goals=num_goals)
    options |= {"frames_per_batch": 8 * steps, "total_frames": 2 * 8 * steps}
    return list(Collector(env, env.rand_action, **options))


@pytest.mark.filterwarnings("ignore:split_trajs=True produces a:UserWarning")
@pytest.mark.parametrize("make", [partial(GoalSequenceRelabel, "some"), NegativeReward])
def test_as_a_postproc_of_whole_trials(make):
    """Nine goals are never met in time: each row of a batch is a trial up to its time limit."""
    options = {"num_goals": 9, "split_trajs": True}
    plain = collected(LIMIT, **options)
    shown = collected(LIMIT, postproc=make(generator=seeded()), **options)
    by_hand = make(generator=seeded())
    assert len(plain) == 2
    for one, other in zip(plain, shown, strict=True):
        assert not torch.equal(one[REWARD], other[REWARD])
        assert_equal(by_hand(one).exclude(IDS), other.exclude(IDS))


PADDED = {"trajs_per_batch": 2, "traj_format": "padded"}
OTHER_BATCHES = {
    "raw": (LIMIT, {}),
    "before trajectories are put together": (LIMIT, PADDED),
    "cut": (LIMIT - 1, {"split_trajs": True}),
}


@pytest.mark.filterwarnings("ignore:split_trajs=True produces a:UserWarning")
@pytest.mark.parametrize("batches", OTHER_BATCHES)
def test_as_a_postproc_of_anything_else(make, batches):
    steps, options = OTHER_BATCHES[batches]
    with pytest.raises(ValueError, match="must get whole trials"):
        collected(steps, postproc=make(), **options)
