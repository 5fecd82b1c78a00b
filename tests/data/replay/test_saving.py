from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.data import trials
from tests.data.trials import assert_same, filled, flipped, make_trial, seeded
from torchrl_amago._files import write_manifest

LENGTHS = (3, 9, 4, 11, 2, 7)  # more steps than a buffer keeps


def make_buffer(lengths=(), capacity=30, **options):
    return trials.make_buffer(lengths, capacity=capacity, batch_size=16, **options)


def loaded(saved, lengths=(), **options):
    """A buffer of other trials, in place of which saved ones were loaded."""
    rb = make_buffer(lengths, **options)
    rb.loads(saved)
    return rb


def names(folder):
    return {file.name for file in folder.iterdir()}


def assert_same_future(rb, *others):
    """Content, counters, and the draws to come, before and after more writes, are equal."""
    for lengths in ([], [5], [6, 8]):
        batches = []
        for each in (rb, *others):
            assert_same(filled(each, lengths, 1000)[:], rb[:])
            assert (len(each), each.write_count) == (len(rb), rb.write_count)
            torch.manual_seed(3)
            batches.append(each.sample())
            assert_same(batches[-1], batches[0])


@pytest.mark.parametrize("lengths", [(3, 9), LENGTHS], ids=["part", "wrapped"])
@pytest.mark.parametrize("used", [(), (2, 20, 13, 4)], ids=["fresh", "used"])
@pytest.mark.parametrize("draw", ["trials", "steps", "priority", "own generator"])
def test_save_and_load_give_back_the_same_buffer(tmp_path, lengths, used, draw):
    generator = seeded(7) if draw == "own generator" else None
    draw = "trials" if generator else draw
    rb = make_buffer(lengths, sample_by=draw, generator=generator)
    rb.sample()
    if draw == "priority":
        rb.update_priority(torch.arange(6), torch.arange(6.0))
    make_buffer((5, 6)).dumps(tmp_path / "first")  # is replaced
    rb.dumps(tmp_path / "first")
    other = make_buffer(used, sample_by=draw)
    if used:
        other.sample()
    other.loads(tmp_path / "first")
    other.dumps(tmp_path / "second")
    assert names(tmp_path) == {"first", "second"}
    assert_same_future(rb, other, loaded(tmp_path / "second", sample_by=draw))


def test_a_buffer_with_a_folder_is_brought_back_in_it(tmp_path):
    rb = make_buffer(LENGTHS, path=tmp_path / "live")
    rb.dumps(tmp_path / "saved")
    expected = rb[:].clone()
    filled(rb, [8, 9], 500)
    again = loaded(tmp_path / "saved", path=tmp_path / "live", mode="continue")
    for each in (again, make_buffer(path=tmp_path / "live", mode="read")):
        assert_same(each[:], expected)


def test_an_empty_buffer_saved_over_another_is_empty(tmp_path):
    make_buffer(LENGTHS).dumps(tmp_path)
    make_buffer().dumps(tmp_path)
    rb = loaded(tmp_path, LENGTHS)
    assert len(rb) == 0
    assert not rb.can_sample()
    rb.extend(make_trial(5))
    assert set(rb.sample()["id"].unique().tolist()) <= set(range(5))


@pytest.mark.parametrize("mode", ["read", "continue"])
def test_what_was_saved_can_be_opened_and_follows_what_is_saved_over_it(tmp_path, mode):
    rb, path = make_buffer(LENGTHS), tmp_path / "storage"
    rb.dumps(tmp_path)
    before = names(path)
    other = make_buffer(capacity=None, path=path, mode=mode)
    assert_same(other[:], rb[:])
    assert (other.sample()["id"] >= 0).all()
    assert names(path) == before or mode == "continue"
    for first_id, lengths in enumerate(([6, 2], [9], [1, 8, 3], [7]), start=1):
        filled(rb, lengths, 1000 * first_id)
        rb.dumps(tmp_path)
        assert_same(other[:], rb[:])
    if mode == "continue":
        other.extend(make_trial(5, 9000))
        again = make_buffer(capacity=None, path=path, mode="read")
        assert_same(again[:], other[:])
        assert again[-1]["id"] == 9004


def test_only_the_filled_part_is_written_and_nothing_is_pickled(tmp_path):
    make_buffer((3, 9), capacity=100_000).dumps(tmp_path / "replay")
    files = [file for file in (tmp_path / "replay").rglob("*") if file.is_file()]
    rows = [file for file in files if file.suffix == ".memmap"]
    assert sum(file.stat().st_size for file in rows) == (3 + 1 + 9 + 1) * 38
    assert {file.suffix for file in files} == {".json", ".bin", ".memmap"}


def test_buffers_are_saved_to_replay_and_empty_folders_only(tmp_path):
    rb = make_buffer((6, 6, 6))
    with pytest.raises(NotImplementedError, match=r"saved to folders.*Use dumps"):
        rb.state_dict()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/draft").write_text("x")
    for taken in (tmp_path / "thesis", tmp_path / "thesis/draft"):
        with pytest.raises(FileExistsError, match=r"replaces only replay folders.*thesis.*Choose"):
            rb.dumps(taken)
    assert (tmp_path / "thesis/draft").read_text() == "x"
    (tmp_path / "empty").mkdir()
    rb.dumps(tmp_path / "empty")
    assert_same(loaded(tmp_path / "empty")[:], rb[:])


def test_interrupted_saves_leave_the_previous_one(tmp_path, monkeypatch):
    path, rb = tmp_path / "replay", make_buffer((3, 9))
    rb.dumps(path)
    with monkeypatch.context() as patch:
        patch.setattr(type(rb.sampler), "dumps", Mock(side_effect=OSError("full")))
        with pytest.raises(OSError, match="full"):
            make_buffer((6, 6, 6)).dumps(path)
    assert_same_future(rb, loaded(path))
    # A crash between the renames.
    rb.dumps(path)
    path.rename(tmp_path / ".replay.previous")
    (tmp_path / ".replay.partial").mkdir()
    assert_same_future(rb, loaded(path))


def test_several_may_save_to_one_path_at_once(tmp_path):
    """They take turns, and the last one's content is there, whole."""
    path, buffers = tmp_path / "replay", [make_buffer((n, 9)) for n in range(3, 7)]
    with ThreadPoolExecutor() as pool:
        [*pool.map(lambda rb: [rb.dumps(path) for _ in range(8)], buffers)]
    found = loaded(path)
    assert any(len(found) == len(rb) and (found[:] == rb[:]).all() for rb in buffers)
    assert names(tmp_path) == {"replay"}


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = file.read_bytes()
    file.write_bytes(flipped(content, len(content) // 2))


def overwrite(file):
    file.write_text("{")


ROW, TABLE, SAMPLER = "trials/rows/id.memmap", "trials/table.bin", "trial_slice_sampler.json"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (f"storage/{ROW}", truncate, r"id\.memmap has \d+ bytes instead of \d+"),
        (f"storage/{ROW}", flip, r"id\.memmap has changed since it was written"),
        (f"storage/{TABLE}", Path.unlink, r"table\.bin is missing"),
        ("storage/trials/other", overwrite, r"other is not listed"),
        (f"sampler/{SAMPLER}", flip, r"sampler\.json has changed"),
        (f"sampler/{SAMPLER}", truncate, r"sampler\.json has \d+ bytes"),
        ("manifest.json", overwrite, r"manifest\.json is missing or cannot"),
        ("manifest.json", Path.unlink, r"manifest\.json is missing or cannot"),
    ],
)
def test_damaged_folder_is_named_and_leaves_the_buffer_alone(tmp_path, name, damage, message):
    make_buffer(LENGTHS).dumps(tmp_path)
    damage(tmp_path / name)
    rb = make_buffer((5, 6))
    before, state = rb[:].clone(), rb.sampler.state_dict()
    with pytest.raises(RuntimeError, match=message):
        rb.loads(tmp_path)
    assert_same(rb[:], before)
    assert rb.sampler.state_dict() == state
    assert rb.write_count == 11


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    path, rb = tmp_path / "replay", make_buffer()
    make_buffer(LENGTHS).dumps(path)
    with pytest.raises(ValueError, match=r"capacity: 30 there, 40 here"):
        make_buffer(capacity=40).loads(path)

    trial = make_trial(4)
    trial["observation"] = torch.zeros(4, 5)
    rb.extend(trial)
    with pytest.raises(ValueError, match=r"observation: float32 2 there, float32 5 here"):
        rb.loads(path)
    assert len(rb) == 4

    manifest = json.loads((path / "manifest.json").read_text())
    for fact, message in [
        ({"kind": "TrialMixture"}, r"kind, .*kind: TrialMixture there, TrialReplayBuffer here"),
        ({"format": "replay 9"}, r"format: replay 9 there, torchrl_amago replay 5 here"),
    ]:
        write_manifest(path, manifest | {"facts": manifest["facts"] | fact})
        with pytest.raises(ValueError, match=message):
            make_buffer().loads(path)

    shutil.rmtree(path)
    (tmp_path / ".mine.partial").mkdir()
    with pytest.raises(RuntimeError, match="is missing or cannot be read"):
        make_buffer().loads(path)
    assert names(tmp_path) == {".mine.partial"}  # a mistyped path leaves its neighbours alone


def test_a_saved_table_is_written_without_a_map(tmp_path):
    """Trials on both sides of the ring's seam, and none at all, come back."""
    options = dict(capacity=6, slice_length=2)
    rb = make_buffer((2, 3, 1, 1, 2, 1, 2), **options)
    rb.dumps(tmp_path / "a")
    other = loaded(tmp_path / "a", **options)
    assert_same(other[:], rb[:])
    assert other.write_count == rb.write_count == 12
    other.empty()
    other.dumps(tmp_path / "b")
    rb.loads(tmp_path / "b")
    assert len(rb) == 0
