"""Mixtures: fractions by weight, weights by time, protected buffers that never change."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchrl.data import LazyTensorStorage, ReplayBufferEnsemble, TensorDictReplayBuffer
from torchrl.data.replay_buffers import RandomSampler

from tests.data import trials
from tests.data.trials import assert_same, even_mixture, filled, make_buffer, make_trial, seeded
from torchrl_amago.data import mixture as mixture_module
from torchrl_amago.data.mixture import TrialMixture

SOURCE = ("collector", "source")
MASK = ("collector", "mask")


def make_mixture(old=(5, 6), new=(), **options):
    buffers = {"old": make_buffer(old), "new": make_buffer(new, 1000)}
    options = {"weights": {"old": 0.8, "new": 0.2}, "batch_size": 16, **options}
    return TrialMixture(buffers, online="new", **options)


def test_slices_come_from_the_buffer_they_say_in_fractions_of_the_weights():
    mixture = make_mixture(new=[7, 7], batch_size=500, generator=seeded())
    count = 0
    for _ in range(20):
        batch = mixture.sample()
        assert batch.shape == (500, 4)
        source = batch[SOURCE]
        assert source.dtype == torch.int64
        assert torch.equal(batch["id"] >= 1000, source == 1)
        assert (source == source[:, :1]).all()
        count += int((source[:, 0] == 1).sum())
    # 10,000 draws of probability 0.2: three standard deviations are 120.
    assert count == pytest.approx(2000, abs=120)
    assert mixture.fractions() == {"old": pytest.approx(0.8), "new": pytest.approx(0.2)}
    assert mixture.metrics() == {f"fraction/{k}": x for k, x in mixture.fractions().items()}
    # Other sizes than the buffers' 8, of which TorchRL warns, and warnings are errors.
    for size in (1, 5):
        assert mixture.sample(size).shape == (size, 4)
    assert len(mixture) == 25


@pytest.mark.parametrize(
    ("is_late", "before", "after"),
    [(False, 0.5, [0.5, 0.5]), (True, 0.125 / 0.625, [0.375 / 0.875, 0.5])],
)
def test_a_buffer_that_falls_below_its_minimum_waits_again(is_late, before, after):
    """Then it goes on, on its way to its weight, as if it had been ready all along."""
    new = make_buffer(capacity=60, min_trials=3)
    options = {"anneal_updates": 4, "online": "new"}
    mixture = even_mixture({"old": make_buffer([5]), "new": new}, 16, **options)
    if is_late:
        mixture.sample()
    filled(mixture, [10] * 3, 1000)
    assert mixture.fractions()["new"] == pytest.approx(before)
    mixture.sample()
    filled(mixture, [28] * 2, 2000)  # long trials push the short ones out
    assert not new.can_sample()
    assert mixture.fractions()["new"] == 0
    assert (mixture.sample()[SOURCE] == 0).all()
    assert not even_mixture({"new": new}).can_sample()
    filled(mixture, [10] * 3, 3000)
    for fraction in after:
        assert mixture.fractions()["new"] == pytest.approx(fraction)
        mixture.sample()
    assert mixture.ready_at == {"old": 0, "new": int(is_late)}


# Initial weight, final weight, batch at which it becomes ready.
part = st.tuples(st.floats(0, 5), st.floats(0.1, 5), st.integers(0, 6))


@given(st.lists(part, min_size=1, max_size=4), st.integers(0, 5), st.booleans())
@example([(0, 1, 2)], 0, False)  # there is nothing to sample at first
@example([(0, 0.5, 0), (0, 0.5, 3)], 4, False)  # a late one rises from nothing
@example([(0, 0.8, 0), (0, 0.2, 2)], 0, False)  # a late one has its weight at once
@example([(1, 0, 0), (0, 2, 0)], 2, True)  # from the initial weights to the final ones
def test_weights_against_a_plain_account(parts, anneal_updates, gives_initial):
    names = [str(number) for number in range(len(parts))]
    buffers = {name: make_buffer() for name in names}
    first, last, at = (dict(zip(names, column, strict=True)) for column in zip(*parts, strict=True))
    gives_initial &= any(first.values())
    options = {"initial_weights": first if gives_initial else None, "batch_size": 2}
    mixture = TrialMixture(buffers, last, anneal_updates=anneal_updates, **options)
    drawn, ready = 0, {}
    for round_number in range(8):
        for name in names:
            if at[name] == round_number:
                buffers[name].extend(make_trial(5))
                ready[name] = drawn
        weights = dict.fromkeys(names, 0.0)
        for name, ready_at in ready.items():
            start = first[name] if gives_initial else (0.0 if ready_at else last[name])
            gone = min((drawn - ready_at + 1) / anneal_updates, 1.0) if anneal_updates else 1.0
            weights[name] = (1 - gone) * start + gone * last[name]
        total = sum(weights.values())
        fractions = {name: weight / total if total else 0.0 for name, weight in weights.items()}
        assert mixture.fractions() == pytest.approx(fractions)
        assert mixture.ready_at == ready
        assert mixture.can_sample() == (total > 0)
        if total > 0:
            mixture.sample()
            drawn += 1
        else:
            with pytest.raises(RuntimeError, match="a buffer that has a weight and is ready"):
                mixture.sample()


def test_a_folder_that_is_only_read(tmp_path):
    written = make_buffer([5, 6], path=tmp_path / "data")
    kept = written[:].clone()
    files = trials.content_of(tmp_path / "data")
    protected = make_buffer(capacity=None, path=tmp_path / "data", mode="read")
    mixture = even_mixture({"old": protected, "new": make_buffer()}, 16, online="new")
    assert mixture.online is mixture.buffers["new"]
    for trial in trials.make_trials([7] * 60, 1000):  # more than its capacity
        mixture.extend(trial)
        mixture.sample()
    assert len(mixture.online) > 80
    assert_same(protected[:], kept)
    assert files == trials.content_of(tmp_path / "data")
    assert mixture.num_trials == 2 + mixture.online.num_trials
    with pytest.raises(RuntimeError, match=r"one of \['old'\], got online=None"):
        even_mixture({"old": written}).extend(make_trial(5))


@pytest.mark.parametrize(
    ("padding", "mask", "ids"),
    [
        ("right", [True, True, False, False], [0, 1, 1, 1]),
        ("left", [False, False, True, True], [0, 0, 0, 1]),
    ],
)
def test_slices_of_another_width_are_padded_on_their_side(padding, mask, ids):
    options = {"trim_padding": True, "padding": padding}
    buffers = {"short": make_buffer([2], **options), "long": make_buffer([9], 1000, **options)}
    batch = even_mixture(buffers, 12).sample()
    assert batch.shape == (12, 4)
    is_short = batch[SOURCE] == 0
    assert is_short.any()
    assert not is_short.all()
    assert torch.equal(batch[MASK], ~is_short | torch.tensor(mask))
    assert (batch["id"][is_short[:, 0]] == torch.tensor(ids)).all()


@pytest.mark.parametrize("own_generator", [True, False])
def test_goes_on_as_if_nothing_had_been(tmp_path, own_generator):
    def make():
        torch.manual_seed(1)
        return make_mixture(anneal_updates=9, generator=seeded(3) if own_generator else None)

    one = make()
    one.sample()
    one.extend(make_trial(7, 1000))
    one.sample()
    one.online.dumps(tmp_path / "replay")
    state, rng = one.state_dict(), torch.get_rng_state()
    expected = [one.sample() for _ in range(4)]

    other = make()
    other.online.loads(tmp_path / "replay")
    other.load_state_dict(state)
    torch.manual_seed(2)  # a mixture with its own generator doesn't depend on the global one
    if not own_generator:
        torch.set_rng_state(rng)
    assert (other.updates, other.ready_at) == (2, {"old": 0, "new": 1})
    for batch in expected:
        assert_same(other.sample(), batch)


@pytest.mark.parametrize("had_one", [True, False])
def test_cant_go_on_with_other_generators(had_one):
    generators = torch.Generator() if had_one else None, None if had_one else torch.Generator()
    one, other = (make_mixture(generator=generator) for generator in generators)
    one.sample()
    match = "the generator that it was saved with, .*; pass a generator if it had one"
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(one.state_dict())
    assert (other.updates, other.ready_at) == (0, {})


def with_one_more(trial, key, step):
    trial[key][step, 0] += 1
    return trial


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (make_trial(4), make_trial(5, 4)),
        (make_trial(5, 1), make_trial(6, 6)),
        (make_trial(6), make_trial(5, 6)),
        (make_trial(6, 5), make_trial(5)),
        (make_trial(5), with_one_more(make_trial(6, 5), ("next", "reward"), 0)),
        (make_trial(5), with_one_more(make_trial(6, 5), ("next", "reward"), 5)),
        (make_trial(5), with_one_more(make_trial(6, 5), ("next", "nested", "state"), 5)),
    ],
    ids=["steps", "content", "lengths", "order", "reward", "last reward", "what the last led to"],
)
def test_other_data_cant_go_on(first, second):
    state = make_mixture().state_dict()
    mixture = make_mixture(old=())
    mixture.buffers["old"].extend(torch.cat([first, second]))
    before, steps = mixture.state_dict(), len(first) + len(second)
    match = rf"saved with, .*'11 steps, .*, got .*'{steps} steps, .* Load the same data in the same"
    with pytest.raises(ValueError, match=match):
        mixture.load_state_dict(state | {"updates": 7})
    assert mixture.state_dict() == before


def test_the_same_data_go_on_wherever_they_lie(tmp_path):
    state = even_mixture({"old": make_buffer([5, 6], path=tmp_path / "data")}).state_dict()
    opened = make_buffer(capacity=None, path=tmp_path / "data", mode="read")
    at_once = make_buffer()
    at_once.extend(torch.cat(trials.make_trials([5, 6])))
    # Other trials lay there before.
    moved = filled(make_buffer([4, 7], 900, capacity=12), [5, 6])
    for buffer in (opened, at_once, moved):
        even_mixture({"old": buffer}).load_state_dict(state)


def test_data_are_read_through_once_for_all_checkpoints(monkeypatch):
    checksum = Mock(wraps=mixture_module._checksum)
    monkeypatch.setattr(mixture_module, "_checksum", checksum)
    mixture = make_mixture(new=[5])
    first = mixture.state_dict()["facts"]
    assert mixture.state_dict()["facts"] == first
    checksum.assert_called_once_with(mixture.buffers["old"])
    mixture.buffers["old"].extend(make_trial(5))
    assert mixture.state_dict()["facts"] != first


@pytest.mark.parametrize("key", ["_stream", ("collector", "traj_ids")])
def test_entries_of_the_collection_may_be_missing(key):
    buffers = {"with": make_buffer(), "without": make_buffer([5])}
    buffers["with"].extend(make_trial(5).set(key, torch.ones(5)))
    mixture = even_mixture(buffers, 16)
    assert all(key not in mixture.sample().keys(True) for _ in range(3))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("reading", torch.ones(5), r"'reading': .* in 'one', nothing in 'other'"),
        ("observation", torch.ones(5, 3), r"'observation': \(\(3,\), .*\) in 'one', \(\(2,\)"),
        ("observation", torch.ones(5, 2).double(), r"torch.float64\) in 'one'"),
    ],
)
def test_buffers_of_different_steps(key, value, message):
    buffers = {"one": make_buffer(), "other": make_buffer([5])}
    buffers["one"].extend(make_trial(5).set(key, value))
    with pytest.raises(ValueError, match=message):
        even_mixture(buffers, 64).sample()


def test_priorities_go_where_the_slices_came_from():
    mixture = make_mixture(new=[7, 7])
    for buffer in mixture.buffers.values():
        buffer.update_tensordict_priority = Mock()
    batch = mixture.sample().set("td_error", torch.rand(16, 4))
    mixture.update_tensordict_priority(batch)
    for number, buffer in enumerate(mixture.buffers.values()):
        (rows,) = buffer.update_tensordict_priority.call_args.args
        assert torch.equal(rows["td_error"], batch["td_error"][batch[SOURCE][:, 0] == number])


def test_wrong_arguments():
    buffers = {"a": make_buffer([5]), "b": make_buffer()}
    wrong_weights = {"a": 1}, {"a": 1, "b": -1}, {"a": 0, "b": 0}, {"a": 1, "c": 1}, {}
    needed = "weights must have a number of at least 0 for each of"
    prefetching = buffers | {"b": make_buffer(prefetch=2)}
    for options, message in (
        *(({"weights": weights}, f"^{needed}") for weights in wrong_weights),
        ({"initial_weights": {"a": 1}}, f"^initial_{needed}"),
        ({"online": "c"}, "online must be one of None, 'a', 'b', got 'c'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"buffers": prefetching}, "must not prefetch, got .'b'. that"),
        ({"buffers": buffers | {"b": make_buffer(padding="left")}}, "on the same side, .*'left'"),
    ):
        arguments = {"buffers": buffers, "weights": {"a": 1, "b": 1}, "batch_size": 2, **options}
        with pytest.raises(ValueError, match=message):
            TrialMixture(**arguments)


# ------------------------------------------------------------------ TorchRL's buffers


class WholeTrials(RandomSampler):
    """Indices `[B, 4]` of whole trials, by their ends, and the mask."""

    padding = "right"

    def sample(self, storage, batch_size):
        last_N = storage[:]["next", "done"].flatten().nonzero().flatten()
        length_N = last_N.diff(prepend=last_N.new_tensor([-1]))
        trial_B = torch.randint(len(last_N), (batch_size,), generator=self._rng)
        length_B1, step_T = length_N[trial_B].unsqueeze(-1), torch.arange(4)
        index_BT = last_N[trial_B].unsqueeze(-1) - length_B1 + 1 + step_T.minimum(length_B1 - 1)
        return index_BT, {MASK: step_T < length_B1}

    def can_sample(self, storage, batch_size):
        return len(storage) > 0


def stock_buffer(lengths=(), first_id=0, kind=TensorDictReplayBuffer):
    buffer = kind(storage=LazyTensorStorage(200), sampler=WholeTrials(), batch_size=8)
    return filled(buffer, lengths, first_id)


@pytest.mark.parametrize("make_new", [stock_buffer, make_buffer])
def test_stock_buffers(make_new):
    def make(first_id=0, **options):
        buffers = {"old": stock_buffer([2, 3], first_id), "new": make_new()}
        return even_mixture(buffers, 32, online="new", **options)

    mixture = make(generator=seeded())
    assert mixture.fractions() == {"old": 1.0, "new": 0.0}
    assert mixture.sample().shape == (32, 4)
    mixture.extend(make_trial(4, 1000))
    batch = mixture.sample()
    assert torch.equal(batch["id"] >= 1000, batch[SOURCE] == 1)
    assert batch[MASK].sum(-1).unique().tolist() == [2, 3, 4]
    mixture.update_tensordict_priority(batch)  # they have none, and say nothing
    state = mixture.state_dict()
    again = make(generator=torch.Generator())
    again.extend(make_trial(4, 1000))
    again.load_state_dict(state)
    assert_same(again.sample(), mixture.sample())
    with pytest.raises(ValueError, match="Load the same data"):
        make(first_id=1, generator=torch.Generator()).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Calling update_priority")
def test_torchrls_ensemble_lacks_what_a_mixture_needs():
    """Each of these is a reason for a mixture of our own; one that fails here is one less."""

    class Counting(TensorDictReplayBuffer):
        sampled = 0

        def _sample(self, batch_size):
            Counting.sampled += 1
            return super()._sample(batch_size)

    members = stock_buffer([3], kind=Counting), stock_buffer([3])
    ensemble = ReplayBufferEnsemble(*members, p=[1.0, 1.0], batch_size=8)
    batch = ensemble.sample()
    assert batch.shape == (2, 4, 4)  # blocks of slices: fractions of a batch are halves
    assert Counting.sampled == 0  # a member's own way to sample is passed over
    got = []
    ensemble[0].sampler.update_priority = lambda *args, **kwargs: got.append(args)
    ensemble.update_priority(batch["index"], torch.ones(2, 4, 4))
    assert not got
    members = stock_buffer([3]), stock_buffer()
    waiting = ReplayBufferEnsemble(*members, p=[1e-6, 1.0], batch_size=64)
    assert waiting.can_sample()
    with pytest.raises(RuntimeError, match="non-initialized storage"):
        waiting.sample()
