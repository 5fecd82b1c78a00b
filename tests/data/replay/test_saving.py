from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.data.trials import make_trial, make_trials
from torchrl_amago._files import write_manifest
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.data.replay._storage import TrialStorage


def make_buffer(capacity: int = 30, **kwargs):
    return make_trial_buffer(capacity, slice_length=4, batch_size=16, warn_short=False, **kwargs)


def filled_buffer(lengths=(3, 9, 4, 11, 2, 7), **kwargs):
    rb = make_buffer(**kwargs)
    for trial in make_trials(list(lengths)):
        rb.extend(trial)
    return rb


def assert_same_future(rb, other):
    """Content, counters, and the draws to come, before and after more writes, are equal."""
    assert (rb[:] == other[:]).all()
    assert rb.write_count == other.write_count
    for lengths in ([], [5], [6, 8]):
        for trial in make_trials(lengths, first_id=1000):
            rb.extend(trial.clone())
            other.extend(trial.clone())
        torch.manual_seed(3)
        expected = rb.sample()
        torch.manual_seed(3)
        assert (other.sample() == expected).all()
    assert len(rb) == len(other)


@pytest.mark.parametrize("lengths", [(3, 9), (3, 9, 4, 11, 2, 7)], ids=["part", "wrapped"])
@pytest.mark.parametrize("target", ["fresh", "used"])
@pytest.mark.parametrize("draw", ["trials", "steps", "priority"])
def test_save_and_load_give_back_the_same_buffer(tmp_path, lengths, target, draw):
    rb = filled_buffer(lengths, sample_by=draw)
    rb.sample()
    if draw == "priority":
        rb.update_priority(torch.arange(6), torch.arange(6.0))
    rb.dumps(tmp_path / "replay")
    other = (
        make_buffer(sample_by=draw)
        if target == "fresh"
        else filled_buffer((2, 20, 13, 4), sample_by=draw)
    )
    if target == "used":
        other.sample()
    other.loads(tmp_path / "replay")
    assert_same_future(rb, other)


def test_a_state_dict_is_refused():
    with pytest.raises(NotImplementedError, match=r"saved to folders.*Use dumps"):
        filled_buffer().state_dict()


def test_own_generator_continues(tmp_path):
    rb = filled_buffer(generator=torch.Generator().manual_seed(7))
    rb.sample()
    rb.dumps(tmp_path / "replay")
    other = make_buffer()
    other.loads(tmp_path / "replay")
    for _ in range(3):
        assert torch.equal(rb.sample()["id"], other.sample()["id"])


def test_a_buffer_with_a_folder_is_brought_back_in_it(tmp_path):
    rb = filled_buffer(path=tmp_path / "live")
    rb.dumps(tmp_path / "saved")
    expected = rb[:].clone()
    for trial in make_trials([8, 9], first_id=500):
        rb.extend(trial)
    again = make_buffer(path=tmp_path / "live", mode="continue")
    again.loads(tmp_path / "saved")
    assert (again[:] == expected).all()
    assert (TrialStorage(path=tmp_path / "live", mode="read")[:] == expected).all()


def test_what_was_saved_can_be_opened_as_it_is(tmp_path):
    rb = filled_buffer()
    rb.dumps(tmp_path / "replay")
    files = {file.name for file in (tmp_path / "replay/storage").iterdir()}
    opened = make_buffer(None, path=tmp_path / "replay/storage", mode="read")
    assert (opened[:] == rb[:]).all()
    assert (opened.sample()["id"] >= 0).all()
    assert {file.name for file in (tmp_path / "replay/storage").iterdir()} == files


def test_loaded_buffer_can_be_saved_again(tmp_path):
    rb = filled_buffer()
    rb.dumps(tmp_path / "first")
    other = make_buffer()
    other.loads(tmp_path / "first")
    other.dumps(tmp_path / "second")
    third = make_buffer()
    third.loads(tmp_path / "second")
    assert_same_future(rb, third)


def test_prefetched_batches_of_the_old_content_are_dropped(tmp_path):
    filled_buffer((5, 5)).dumps(tmp_path / "replay")
    rb = make_buffer(prefetch=2)
    for trial in make_trials([5, 5], first_id=500):
        rb.extend(trial)
    rb.sample()
    rb.loads(tmp_path / "replay")
    assert rb.sample()["id"].max() < 10
    rb.shutdown()


def test_empty_buffer_round_trip(tmp_path):
    make_buffer().dumps(tmp_path / "replay")
    rb = filled_buffer()
    rb.loads(tmp_path / "replay")
    assert len(rb) == 0
    assert not rb.can_sample()
    rb.extend(make_trial(5))
    assert set(rb.sample()["id"].unique().tolist()) <= set(range(5))


@pytest.mark.parametrize("mode", ["read", "continue"])
def test_an_open_folder_follows_what_is_saved_over_it(tmp_path, mode):
    rb, path = filled_buffer(), tmp_path / "replay"
    rb.dumps(path)
    other = make_trial_buffer(None, 4, 16, path=path / "storage", mode=mode, warn_short=False)
    for first_id, lengths in enumerate(([6, 2], [9], [1, 8, 3], [7]), start=1):
        for trial in make_trials(lengths, 1000 * first_id):
            rb.extend(trial)
        rb.dumps(path)
        assert (other[:] == rb[:]).all()
    if mode == "continue":
        other.extend(make_trial(5, 9000))
        again = make_trial_buffer(None, 4, 16, path=path / "storage", mode="read")
        assert (other[:] == again[:]).all()
        assert again[-1]["id"] == 9004


def test_an_empty_buffer_saved_over_another_is_empty(tmp_path):
    filled_buffer().dumps(tmp_path)
    make_buffer().dumps(tmp_path)
    rb = filled_buffer()
    rb.loads(tmp_path)
    assert len(rb) == 0


def test_only_the_filled_part_is_written_and_nothing_is_pickled(tmp_path):
    filled_buffer((3, 9), capacity=100_000).dumps(tmp_path / "replay")
    files = [file for file in (tmp_path / "replay").rglob("*") if file.is_file()]
    rows = [file for file in files if file.suffix == ".memmap"]
    assert sum(file.stat().st_size for file in rows) == (3 + 1 + 9 + 1) * 38
    assert {file.suffix for file in files} == {".json", ".bin", ".memmap"}


def test_saving_replaces_a_replay_folder_and_nothing_else(tmp_path):
    path = tmp_path / "replay"
    filled_buffer((3, 9)).dumps(path)
    rb = filled_buffer((6, 6, 6))
    rb.dumps(path)
    other = make_buffer()
    other.loads(path)
    assert_same_future(rb, other)
    assert [file.name for file in tmp_path.iterdir()] == ["replay"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/draft").write_text("x")
    for taken in (tmp_path / "thesis", tmp_path / "thesis/draft"):
        with pytest.raises(FileExistsError, match=r"replaces only replay folders.*thesis.*Choose"):
            rb.dumps(taken)
    assert (tmp_path / "thesis/draft").read_text() == "x"
    (tmp_path / "empty").mkdir()
    rb.dumps(tmp_path / "empty")
    other.loads(tmp_path / "empty")
    assert (rb[:] == other[:]).all()


def test_interrupted_save_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "replay"
    rb = filled_buffer((3, 9))
    rb.dumps(path)
    monkeypatch.setattr(
        type(rb.sampler), "dumps", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        filled_buffer((6, 6, 6)).dumps(path)
    monkeypatch.undo()
    other = make_buffer()
    other.loads(path)
    assert_same_future(rb, other)


def test_several_may_save_to_one_path_at_once(tmp_path):
    """They take turns, and the last one's content is there, whole."""
    path, buffers = tmp_path / "replay", [filled_buffer((n, 9)) for n in range(3, 7)]
    with ThreadPoolExecutor() as pool:
        [*pool.map(lambda rb: [rb.dumps(path) for _ in range(8)], buffers)]
    other = make_buffer()
    other.loads(path)
    assert any(len(other) == len(rb) and (other[:] == rb[:]).all() for rb in buffers)
    assert [file.name for file in tmp_path.iterdir()] == ["replay"]


def test_crash_between_the_renames_is_recovered(tmp_path):
    path = tmp_path / "replay"
    rb = filled_buffer((3, 9))
    rb.dumps(path)
    path.rename(tmp_path / ".replay.previous")
    (tmp_path / ".replay.partial").mkdir()
    other = make_buffer()
    other.loads(path)
    assert_same_future(rb, other)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("storage/trials/rows/id.memmap", _truncate, r"id\.memmap has \d+ bytes instead of \d+"),
        ("storage/trials/rows/id.memmap", _flip, r"id\.memmap has changed since it was written"),
        ("storage/trials/table.bin", lambda file: file.unlink(), r"table\.bin is missing"),
        ("storage/trials/other", lambda file: file.write_text("x"), r"other is not listed"),
        ("sampler/trial_slice_sampler.json", _flip, r"sampler\.json has changed"),
        ("sampler/trial_slice_sampler.json", _truncate, r"sampler\.json has \d+ bytes"),
        (
            "manifest.json",
            lambda file: file.write_text("{"),
            r"manifest\.json is missing or cannot",
        ),
        ("manifest.json", lambda file: file.unlink(), r"manifest\.json is missing or cannot"),
    ],
)
def test_damaged_folder_is_named_and_leaves_the_buffer_alone(tmp_path, name, damage, message):
    path = tmp_path / "replay"
    filled_buffer().dumps(path)
    damage(path / name)
    rb = filled_buffer((5, 6))
    before, state = rb[:].clone(), rb.sampler.state_dict()
    with pytest.raises(RuntimeError, match=message):
        rb.loads(path)
    assert (rb[:] == before).all()
    assert rb.sampler.state_dict() == state
    assert rb.write_count == 11


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "replay"
    filled_buffer().dumps(path)
    with pytest.raises(ValueError, match=r"capacity: 30 there, 40 here"):
        make_buffer(capacity=40).loads(path)

    rb = make_buffer()
    trial = make_trial(4)
    trial["observation"] = torch.zeros(4, 5)
    rb.extend(trial)
    with pytest.raises(ValueError, match=r"observation: float32 2 there, float32 5 here"):
        rb.loads(path)
    assert len(rb) == 4

    manifest = json.loads((path / "manifest.json").read_text())
    write_manifest(path, manifest | {"facts": manifest["facts"] | {"kind": "TrialMixture"}})
    with pytest.raises(
        ValueError,
        match=r"same format and kind, .*kind: TrialMixture there, TrialReplayBuffer here",
    ):
        make_buffer().loads(path)
    write_manifest(path, manifest | {"facts": manifest["facts"] | {"format": "replay 9"}})
    with pytest.raises(ValueError, match=r"format: replay 9 there, torchrl_amago replay 5 here"):
        make_buffer().loads(path)

    shutil.rmtree(path)
    with pytest.raises(RuntimeError, match="is missing or cannot be read"):
        make_buffer().loads(path)


def test_a_mistyped_path_leaves_its_neighbours_alone(tmp_path):
    (tmp_path / ".mine.partial").mkdir()
    rb = make_trial_buffer(10, 2, 1)
    with pytest.raises(RuntimeError, match="missing or cannot be read"):
        rb.loads(tmp_path / "nowhere")
    assert (tmp_path / ".mine.partial").is_dir()


def test_a_saved_table_is_written_without_a_map(tmp_path):
    """Trials on both sides of the ring's seam, and none at all, come back."""
    rb = make_trial_buffer(6, 2, 1, warn_short=False)
    for length in (2, 3, 1, 1, 2, 1, 2):
        rb.extend(make_trial(length))
    rb.dumps(tmp_path / "a")
    other = make_trial_buffer(6, 2, 1, warn_short=False)
    other.loads(tmp_path / "a")
    assert (other[:] == rb[:]).all()
    assert other.write_count == rb.write_count == 12
    other.empty()
    other.dumps(tmp_path / "b")
    rb.loads(tmp_path / "b")
    assert len(rb) == 0
