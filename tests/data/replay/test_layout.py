from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict

from tests.data.trials import make_trial, make_trials
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.data.replay import _layout as layout

DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64,
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip


def random_trial(length: int, entries) -> TensorDict:
    """A trial of the given entries ``(kind, dtype, shape)``, named by their number."""
    trial = TensorDict({"next": TensorDict(batch_size=[length])}, [length])
    for number, (kind, dtype, shape) in enumerate(entries):
        values = (100 * torch.randn(length + 1, *shape)).to(dtype)
        key = (f"x{number}",) if number % 2 else ("group", f"x{number}")
        if kind != "next":
            trial[key] = values[:-1]
        if kind != "root":
            trial[("next", *key)] = values[1:]
    return trial


entries = st.lists(
    st.tuples(
        st.sampled_from(["root", "next", "both"]),
        st.sampled_from(DTYPES),
        st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,)]),
    ),
    min_size=1,
    max_size=8,
).filter(lambda kinds: any(0 not in shape for _, _, shape in kinds))


@given(entries, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_what_is_written_is_read_back_bit_by_bit(kinds, lengths):
    trials = [random_trial(length, kinds) for length in lengths]
    rb = make_trial_buffer(50, 1, 1, warn_short=False)
    rb.extend(torch.cat(trials), lengths=lengths)
    other = make_trial_buffer(None, 1, 1, path=rb.storage.path, mode="read", verify=True)
    for found in (rb[:], other[:]):
        for key, value in torch.cat(trials).items(True, True):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), key
        assert len([*found.keys(True, True)]) == len([*trials[0].keys(True, True)])


def test_names_of_entries_may_be_odd(tmp_path):
    names = ["a.b", ("a", "b"), "../up", "/root", "a b%2E", ("..", "ä")]
    steps = TensorDict(batch_size=[3])
    for number, name in enumerate(names):
        steps[name] = torch.arange(3) + 10 * number
    rb = make_trial_buffer(9, 1, 1, path=tmp_path / "replay", warn_short=False)
    rb.extend(steps, lengths=[3])
    assert (rb[:] == steps).all()
    assert [file.name for file in tmp_path.iterdir()] == ["replay"]


def test_each_value_is_stored_once():
    steps, _ = layout.entries_of(make_trial(5))
    rows = layout.pack(steps, [5])
    assert set(rows.keys(True, True)) == {
        "id", "observation", "is_init", ("nested", "state"), ("next", "done"), ("next", "reward"),
    }  # fmt: skip
    assert len(rows) == 6
    assert rows["nested", "state"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_collectors_own_entries_are_left_out():
    trial = make_trial(3)
    trial["collector"] = TensorDict({"traj_ids": torch.zeros(3)}, [3])
    trial["_stream"] = torch.zeros(3)
    trial["next", "_stream"] = torch.zeros(3)
    assert layout.entries_of(trial)[1] == layout.entries_of(make_trial(3))[1]


def test_next_that_is_not_the_following_root_is_refused():
    trials = torch.cat(make_trials([4, 3]))
    trials["next", "nested", "state"][3] += 1  # the state after a last step is no root
    trials["nested", "state"][1] = trials["next", "nested", "state"][0] = float(
        "nan"
    )  # equals itself
    layout.pack(layout.entries_of(trials)[0], [4, 3])
    trials["next", "nested", "state"][5, 0] += 1
    with pytest.raises(
        ValueError, match=r"'nested\.state'.*differs in 1 values.*Make the environment"
    ):
        layout.pack(layout.entries_of(trials)[0], [4, 3])


def test_entries_that_cannot_be_stored_raise():
    trial = make_trial(3)
    trial["next", "nested", "state"] = trial["next", "nested", "state"].float()
    with pytest.raises(
        ValueError,
        match=r"the root of steps must.*next\.nested\.state: float64 2 there, float32 2 here",
    ):
        layout.entries_of(trial)
    trial = make_trial(3)
    trial["text"] = NonTensorData("a", batch_size=[3])
    with pytest.raises(TypeError, match="stores tensors, got .* at 'text'"):
        layout.entries_of(trial)
