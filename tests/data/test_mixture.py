"""Mixtures: fractions by weight, weights by time, protected buffers that never change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, assert_close
from torchrl.data import LazyTensorStorage, ReplayBufferEnsemble, TensorDictReplayBuffer
from torchrl.data.replay_buffers import RandomSampler

from tests.data.trials import make_trial
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.data import mixture as mixture_module
from torchrl_amago.data.mixture import TrialMixture

SOURCE = ("collector", "source")
MASK = ("collector", "mask")


def make_buffer(lengths=(), first_id=0, **options):
    options = {"slice_length": 4, "batch_size": 8, "warn_short": False, **options}
    buffer = make_trial_buffer(200, **options)
    for length in lengths:
        buffer.extend(make_trial(length, first_id))
        first_id += length
    return buffer


def make_mixture(old=(5, 6), new=(), **options):
    buffers = {"old": make_buffer(old), "new": make_buffer(new, first_id=1000)}
    options = {"weights": {"old": 0.8, "new": 0.2}, "batch_size": 16, **options}
    return TrialMixture(buffers, online="new", **options)


def test_slices_come_from_the_buffer_they_say():
    mixture = make_mixture(new=[7, 7])
    for _ in range(20):
        batch = mixture.sample()
        assert batch.shape == (16, 4)
        source = batch[SOURCE]
        assert source.dtype == torch.int64
        assert torch.equal(batch["id"] >= 1000, source == 1)
        assert (source == source[:, :1]).all()
    assert mixture.sample(5).shape == (5, 4)
    assert len(mixture) == 25


def test_no_warnings_of_batches_of_other_sizes():
    """TorchRL warns at the first batch of another size than the buffer's."""
    mixture = make_mixture(new=[7, 7], batch_size=1)
    for size in (8, 8, 1, 3, 16):
        assert len(mixture.sample(size)) == size


def test_fractions_are_the_weights():
    mixture = make_mixture(new=[7, 7], batch_size=500, generator=torch.Generator().manual_seed(0))
    count = sum(int((mixture.sample()[SOURCE][:, 0] == 1).sum()) for _ in range(20))
    # 10,000 draws of probability 0.2: three standard deviations are 120.
    assert count == pytest.approx(2000, abs=120)
    assert mixture.fractions() == {"old": pytest.approx(0.8), "new": pytest.approx(0.2)}
    assert mixture.metrics() == {
        "fraction/old": pytest.approx(0.8),
        "fraction/new": pytest.approx(0.2),
    }


def fractions_of(mixture, updates):
    fractions = []
    for _ in range(updates):
        fractions.append(mixture.fractions()["new"])
        mixture.sample()
    return fractions


def test_a_buffer_that_comes_later_rises_from_nothing():
    mixture = make_mixture(weights={"old": 0.5, "new": 0.5}, anneal_updates=4)
    assert fractions_of(mixture, 3) == [0, 0, 0]
    mixture.extend(make_trial(5, 1000))
    # Its weight goes up by 0.125 a batch, to 0.5; the other one stays at 0.5.
    expected = [0.125 / 0.625, 0.25 / 0.75, 0.375 / 0.875, 0.5, 0.5]
    assert fractions_of(mixture, 5) == pytest.approx(expected)
    assert mixture.ready_at == {"old": 0, "new": 3}


def test_initial_weights():
    mixture = make_mixture(
        new=[5],
        initial_weights={"old": 1.0, "new": 0.0},
        weights={"old": 0, "new": 2},
        anneal_updates=2,
    )
    # Weights 0.5 and 1 at the first batch, 0 and 2 from the second on.
    assert fractions_of(mixture, 3) == pytest.approx([1 / 1.5, 1, 1])


def test_all_at_once():
    mixture = make_mixture()
    assert fractions_of(mixture, 2) == [0, 0]
    mixture.extend(make_trial(5, 1000))
    assert fractions_of(mixture, 2) == pytest.approx([0.2, 0.2])


def make_waiting_mixture(min_trials: int) -> TrialMixture:
    """Of a buffer that is ready and one that waits for so many trials, and holds 60 steps."""
    new = make_trial_buffer(60, slice_length=4, batch_size=8, min_trials=min_trials)
    return TrialMixture(
        {"old": make_buffer([5]), "new": new},
        {"old": 0.5, "new": 0.5},
        anneal_updates=4,
        online="new",
        batch_size=16,
    )


def test_a_buffer_that_falls_below_its_minimum_waits_again():
    mixture = make_waiting_mixture(min_trials=5)
    new = mixture.online
    for number in range(5):
        mixture.extend(make_trial(10, 1000 + 10 * number))
    assert fractions_of(mixture, 2) == pytest.approx([0.5, 0.5])
    for number in range(2):  # long trials push the short ones out
        mixture.extend(make_trial(28, 2000 + 30 * number))
    assert not new.can_sample()
    assert fractions_of(mixture, 2) == [0, 0]
    assert (mixture.sample()[SOURCE] == 0).all()
    assert not TrialMixture({"new": new}, {"new": 1}, batch_size=2).can_sample()
    for number in range(5):
        mixture.extend(make_trial(10, 3000 + 10 * number))
    # The way to its weight is that of a buffer that was ready all along.
    assert fractions_of(mixture, 1) == pytest.approx([0.5])
    assert mixture.ready_at == {"old": 0, "new": 0}


def test_a_late_buffer_goes_on_rising_after_a_pause():
    mixture = make_waiting_mixture(min_trials=3)
    mixture.sample()
    for number in range(3):
        mixture.extend(make_trial(10, 1000 + 10 * number))
    assert fractions_of(mixture, 1) == pytest.approx([0.125 / 0.625])
    for number in range(2):
        mixture.extend(make_trial(28, 2000 + 30 * number))
    assert fractions_of(mixture, 1) == [0]
    for number in range(3):
        mixture.extend(make_trial(10, 3000 + 10 * number))
    assert fractions_of(mixture, 2) == pytest.approx([0.375 / 0.875, 0.5])


@given(
    st.lists(
        st.tuples(
            st.floats(0, 5),  # initial weight
            st.floats(0.1, 5),  # final weight
            st.integers(0, 6),  # batch at which it becomes ready
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 5),
    st.booleans(),
)
def test_weights_against_a_plain_account(parts, anneal_updates, gives_initial):
    buffers = {str(number): make_buffer() for number in range(len(parts))}
    initial = {str(number): part[0] for number, part in enumerate(parts)}
    if not any(initial.values()):
        gives_initial = False
    mixture = TrialMixture(
        buffers,
        {str(number): part[1] for number, part in enumerate(parts)},
        initial_weights=initial if gives_initial else None,
        anneal_updates=anneal_updates,
        batch_size=2,
    )
    drawn, ready = 0, {}
    for round_number in range(8):
        for number, (_, _, at) in enumerate(parts):
            if at == round_number:
                buffers[str(number)].extend(make_trial(5))
                ready[number] = drawn
        weights = []
        for number, (first, last, _) in enumerate(parts):
            if number not in ready:
                weights.append(0.0)
                continue
            start = first if gives_initial else (last if ready[number] == 0 else 0.0)
            steps = drawn - ready[number] + 1
            gone = 1.0 if not anneal_updates else min(steps / anneal_updates, 1.0)
            weights.append((1 - gone) * start + gone * last)
        fractions = list(mixture.fractions().values())
        total = sum(weights)
        assert mixture.can_sample() == (total > 0)
        assert fractions == pytest.approx([w / total if total else 0.0 for w in weights])
        if total > 0:
            mixture.sample()
            drawn += 1


def test_what_is_collected_goes_to_the_online_buffer():
    mixture = make_mixture()
    before = mixture.buffers["old"][:].clone()
    for number in range(60):  # more than its capacity
        mixture.extend(make_trial(7, 1000 + 10 * number))
    assert_close(mixture.buffers["old"][:], before, rtol=0, atol=0)
    assert mixture.online is mixture.buffers["new"]
    assert len(mixture.online) > 150
    alone = TrialMixture({"old": make_buffer([5])}, {"old": 1}, batch_size=2)
    with pytest.raises(RuntimeError, match=r"one of \['old'\], got online=None"):
        alone.extend(make_trial(5))


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_that_is_only_read(tmp_path):
    written = make_buffer([5, 6], path=tmp_path / "data")
    kept = written[:].clone()
    files = contents(tmp_path / "data")
    protected = make_trial_buffer(
        None, slice_length=4, batch_size=8, path=tmp_path / "data", mode="read", warn_short=False
    )
    buffers = {"old": protected, "new": make_buffer()}
    mixture = TrialMixture(buffers, {"old": 1, "new": 1}, online="new", batch_size=16)
    for number in range(40):
        mixture.extend(make_trial(7, 1000 + 10 * number))
        mixture.sample()
    assert_close(protected[:], kept, rtol=0, atol=0)
    assert files == contents(tmp_path / "data")
    assert mixture.num_trials == 2 + mixture.online.num_trials


def test_slices_of_another_width_are_padded():
    buffers = {
        "short": make_buffer([2], trim_padding=True),
        "long": make_buffer([9], 1000, trim_padding=True),
    }
    mixture = TrialMixture(buffers, {"short": 1, "long": 1}, batch_size=12)
    batch = mixture.sample()
    assert batch.shape == (12, 4)
    is_short = batch[SOURCE] == 0
    assert is_short.any()
    assert not is_short.all()
    expected = ~is_short | (torch.arange(4) < 2)
    assert torch.equal(batch[MASK], expected)
    assert (batch["id"][is_short[:, 0]] == torch.tensor([0, 1, 1, 1])).all()


def test_slices_padded_on_the_left_are_widened_there():
    options = {"trim_padding": True, "padding": "left"}
    buffers = {"short": make_buffer([2], **options), "long": make_buffer([9], 1000, **options)}
    batch = TrialMixture(buffers, {"short": 1, "long": 1}, batch_size=12).sample()
    is_short_B = batch[SOURCE][:, 0] == 0
    assert is_short_B.any()
    assert not is_short_B.all()
    assert (batch[MASK][is_short_B] == torch.tensor([False, False, True, True])).all()
    assert (batch["id"][is_short_B] == torch.tensor([0, 0, 0, 1])).all()
    mixed = buffers | {"right": make_buffer([9], trim_padding=True)}
    with pytest.raises(ValueError, match="pad slices on the same side, got .*'right': 'right'"):
        TrialMixture(mixed, dict.fromkeys(mixed, 1), batch_size=2)


def test_the_same_generator_gives_the_same_batches():
    def batches():
        torch.manual_seed(5)
        mixture = make_mixture(new=[7, 7], generator=torch.Generator().manual_seed(3))
        torch.manual_seed(int(torch.randint(100, ())) + 1)  # the global one doesn't matter
        return [mixture.sample() for _ in range(4)]

    for one, other in zip(batches(), batches(), strict=True):
        assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("own_generator", [True, False])
def test_goes_on_as_if_nothing_had_been(tmp_path, own_generator):
    def make():
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(3) if own_generator else None
        return make_mixture(anneal_updates=9, generator=generator)

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
    torch.set_rng_state(rng)
    assert (other.updates, other.ready_at) == (2, {"old": 0, "new": 1})
    for batch in expected:
        assert_close(other.sample(), batch, rtol=0, atol=0)


@pytest.mark.parametrize("had_one", [True, False])
def test_cant_go_on_with_other_generators(had_one):
    one, other = (
        make_mixture(generator=torch.Generator() if has_one else None)
        for has_one in (had_one, not had_one)
    )
    one.sample()
    with pytest.raises(
        ValueError,
        match="the generator that it was saved with, .*; pass a generator if it had one",
    ):
        other.load_state_dict(one.state_dict())
    assert (other.updates, other.ready_at) == (0, {})


def test_other_data_cant_go_on():
    state = make_mixture().state_dict()
    with pytest.raises(
        ValueError, match=r"saved with, .*'11 steps, .*, got .*'9 steps, .* Load the same data"
    ):
        make_mixture(old=[9]).load_state_dict(state)


@pytest.mark.parametrize(
    "trials",
    [((5, 1), (6, 6)), ((6, 0), (5, 6)), ((6, 5), (5, 0))],
    ids=["content", "lengths", "order"],
)
def test_other_data_of_as_many_steps_cant_go_on(trials):
    state = make_mixture().state_dict()
    other = make_buffer()
    for length, first_id in trials:
        other.extend(make_trial(length, first_id))
    mixture = TrialMixture(
        {"old": other, "new": make_buffer()}, {"old": 0.8, "new": 0.2}, online="new", batch_size=2
    )
    before = mixture.state_dict()
    with pytest.raises(
        ValueError, match=r"saved with, .*'11 steps, .*, got .*'11 steps, .* Load the same data"
    ):
        mixture.load_state_dict(state | {"updates": 7})
    assert mixture.state_dict() == before


def test_one_number_makes_other_data():
    def mixture_of(trial):
        buffer = make_buffer()
        buffer.extend(trial)
        return TrialMixture({"old": buffer}, {"old": 1}, batch_size=2)

    state = mixture_of(make_trial(5)).state_dict()
    mixture_of(make_trial(5)).load_state_dict(state)
    for step in (0, 4):  # rewards, the last step's too, and what the last step led to
        trial = make_trial(5)
        trial["next", "reward"][step] += 1
        with pytest.raises(ValueError, match="Load the same data in the same order"):
            mixture_of(trial).load_state_dict(state)
    trial = make_trial(5)
    trial["next", "nested", "state"][4, 0] += 1
    with pytest.raises(ValueError, match="Load the same data in the same order"):
        mixture_of(trial).load_state_dict(state)


def test_the_same_data_go_on_wherever_they_lie(tmp_path):
    written = make_buffer([5, 6], path=tmp_path / "data")
    state = TrialMixture({"old": written}, {"old": 1}, batch_size=2).state_dict()
    opened = make_trial_buffer(None, 4, 8, path=tmp_path / "data", mode="read", warn_short=False)
    at_once = make_buffer()
    at_once.extend(torch.cat([make_trial(5), make_trial(6, 5)]))
    moved = make_trial_buffer(12, 4, 8, warn_short=False)  # other trials lay there before
    for trial in (make_trial(4, 900), make_trial(7, 950), make_trial(5), make_trial(6, 5)):
        moved.extend(trial)
    for buffer in (opened, at_once, moved):
        TrialMixture({"old": buffer}, {"old": 1}, batch_size=2).load_state_dict(state)


def test_data_are_read_through_once_for_all_checkpoints(monkeypatch):
    read = []
    checksum = mixture_module._checksum
    monkeypatch.setattr(
        mixture_module, "_checksum", lambda buffer: read.append(buffer) or checksum(buffer)
    )
    mixture = make_mixture(new=[5])
    first = mixture.state_dict()["facts"]
    assert mixture.state_dict()["facts"] == first
    assert read == [mixture.buffers["old"]]
    mixture.buffers["old"].extend(make_trial(5))
    assert mixture.state_dict()["facts"] != first


def with_extra(length: int, key, value) -> TensorDict:
    trial = make_trial(length)
    return trial.set(key, value)


@pytest.mark.parametrize("key", ["_stream", ("collector", "traj_ids")])
def test_entries_of_the_collection_may_be_missing(key):
    buffers = {"with": make_buffer(), "without": make_buffer([5])}
    buffers["with"].extend(with_extra(5, key, torch.ones(5)))
    mixture = TrialMixture(buffers, {"with": 1, "without": 1}, batch_size=16)
    batches = [mixture.sample() for _ in range(3)]
    assert all(key not in batch.keys(True) for batch in batches)


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
    buffers["one"].extend(with_extra(5, key, value))
    mixture = TrialMixture(buffers, {"one": 1, "other": 1}, batch_size=64)
    with pytest.raises(ValueError, match=message):
        mixture.sample()


def test_priorities_go_where_the_slices_came_from():
    mixture = make_mixture(new=[7, 7])
    got = {}
    for name, buffer in mixture.buffers.items():
        buffer.update_tensordict_priority = lambda rows, name=name: got.update({name: rows})
    batch = mixture.sample().set("td_error", torch.rand(16, 4))
    mixture.update_tensordict_priority(batch)
    assert len(got["old"]) + len(got["new"]) == 16
    for number, name in enumerate(mixture.buffers):
        rows = batch[batch[SOURCE][:, 0] == number]
        assert torch.equal(got[name]["td_error"], rows["td_error"])


def test_wrong_arguments():
    buffers = {"a": make_buffer([5]), "b": make_buffer()}
    for weights in ({"a": 1}, {"a": 1, "b": -1}, {"a": 0, "b": 0}, {"a": 1, "c": 1}, {}):
        with pytest.raises(
            ValueError, match="weights must have a number of at least 0 for each of"
        ):
            TrialMixture(buffers, weights, batch_size=2)
    with pytest.raises(ValueError, match="initial_weights must have"):
        TrialMixture(buffers, {"a": 1, "b": 1}, initial_weights={"a": 1}, batch_size=2)
    for options, message in (
        ({"online": "c"}, "online must be one of None, 'a', 'b', got 'c'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TrialMixture(buffers, {"a": 1, "b": 1}, **{"batch_size": 2, **options})
    with pytest.raises(ValueError, match=r"must not prefetch, got \['b'\] that do"):
        TrialMixture(buffers | {"b": make_buffer(prefetch=2)}, {"a": 1, "b": 1}, batch_size=2)
    empty = TrialMixture({"b": make_buffer()}, {"b": 1}, batch_size=2)
    assert not empty.can_sample()
    assert empty.fractions() == {"b": 0.0}
    with pytest.raises(RuntimeError, match="needs a buffer that has a weight and is ready"):
        empty.sample()


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


def stock_buffer(lengths=(), first_id=0, **options):
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200), sampler=WholeTrials(), batch_size=8, **options
    )
    for length in lengths:
        buffer.extend(make_trial(length, first_id))
        first_id += length
    return buffer


def test_stock_buffers():
    def make(first_id=0, **options):
        buffers = {"old": stock_buffer([2, 3], first_id), "new": stock_buffer()}
        weights = dict.fromkeys(buffers, 1)
        return TrialMixture(buffers, weights, online="new", batch_size=32, **options)

    mixture = make(generator=torch.Generator().manual_seed(0))
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
    assert_close(again.sample(), mixture.sample(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="Load the same data"):
        make(first_id=1, generator=torch.Generator()).load_state_dict(state)


def test_stock_and_trial_buffers_side_by_side():
    buffers = {"stock": stock_buffer([2, 3]), "trials": make_buffer([5], 1000)}
    batch = TrialMixture(buffers, {"stock": 1, "trials": 1}, batch_size=32).sample()
    assert torch.equal(batch["id"] >= 1000, batch[SOURCE] == 1)
    assert len(batch[SOURCE].unique()) == 2


@pytest.mark.filterwarnings("ignore:Calling update_priority")
def test_torchrls_ensemble_lacks_what_a_mixture_needs():
    """Each of these is a reason for a mixture of our own; one that fails here is one less."""

    class Counting(TensorDictReplayBuffer):
        sampled = 0

        def _sample(self, batch_size):
            Counting.sampled += 1
            return super()._sample(batch_size)

    def full(kind=TensorDictReplayBuffer):
        buffer = kind(storage=LazyTensorStorage(50), sampler=WholeTrials(), batch_size=8)
        buffer.extend(make_trial(3))
        return buffer

    ensemble = ReplayBufferEnsemble(full(Counting), full(), p=[1.0, 1.0], batch_size=8)
    batch = ensemble.sample()
    assert batch.shape == (2, 4, 4)  # blocks of slices: fractions of a batch are halves
    assert Counting.sampled == 0  # a member's own way to sample is passed over
    got = []
    ensemble[0].sampler.update_priority = lambda *args, **kwargs: got.append(args)
    ensemble.update_priority(batch["index"], torch.ones(2, 4, 4))
    assert not got
    waiting = ReplayBufferEnsemble(full(), stock_buffer(), p=[1e-6, 1.0], batch_size=64)
    assert waiting.can_sample()
    with pytest.raises(RuntimeError, match="non-initialized storage"):
        waiting.sample()
