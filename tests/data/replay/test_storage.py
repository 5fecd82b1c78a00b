"""Folders of trials: what is kept, who may use them, and what damage and full disks do."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensordict import TensorDict

from tests.data import trials
from tests.data.trials import assert_same, content_of, flipped, full, make_trial, make_trials
from torchrl_amago import _files as files
from torchrl_amago._files import DamagedError
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.data.replay._layout import ENTRY
from torchrl_amago.data.replay._storage import TrialStorage


def write(storage, lengths, first_id=0):
    trials = make_trials(lengths, first_id)
    storage.write(torch.cat(trials), lengths)
    return trials


def contents(storage):
    """The ids of every stored trial."""
    lengths = storage.trials().length.tolist()
    return [ids.tolist() for ids in storage[:]["id"].split(lengths)] if lengths else []


def assert_holds(storage, trials):
    """Exactly these trials, bit by bit."""
    assert storage.trials().length.tolist() == [len(trial) for trial in trials]
    if trials:
        assert_same(storage[:], torch.cat(trials))
    storage.verify()


def opened(path, mode="read"):
    return TrialStorage(path=path, mode=mode)


@given(
    st.integers(9, 30),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2), min_size=1, max_size=15),
)
@example(20, [[4]] * 50)
def test_what_is_stored_is_what_was_written_last(capacity, writes):
    storage = TrialStorage(capacity)
    written = []
    for lengths in writes:
        if sum(lengths) > capacity:
            continue
        written += write(storage, lengths, first_id=sum(map(len, written)))
        count = len(storage.trials().length)
        assert count >= len(lengths)
        # Rows that are not in use are never read.
        entries = storage.trials().entries
        in_use = {row for e in entries for row in range(e["first"], e["first"] + e["length"] + 1)}
        free = [row for row in range(len(storage._storage)) if row not in in_use]
        for _, content in storage._content.items():
            content[free] = 255  # NaN in every float
        assert_holds(storage, written[-count:])
        assert len(storage) == sum(map(len, written[-count:])) <= capacity
        assert storage.trials().written == sum(map(len, written))


def assert_refuses_places(storage, places, match="out of bounds"):
    for place in places:
        with pytest.raises(IndexError, match=match):
            storage[place]


def test_steps_are_found_by_place_mask_and_number():
    storage = TrialStorage(20)
    assert_refuses_places(storage, [-13, 12, [0, 40]])
    write(storage, [4, 3, 5])
    mask = torch.arange(12) >= 10
    for place, ids in [
        (5, 5),
        (-1, 11),
        ([0, 4, 11], [0, 4, 11]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (slice(3, 9, 2), [3, 5, 7]),
        *((chosen, [10, 11]) for chosen in (mask, mask.numpy(), mask.tolist())),
    ]:
        assert storage[place]["id"].tolist() == ids
    assert_refuses_places(storage, [-13, -20, 12, [0, 40], [[3, -13]]])
    assert_refuses_places(storage, [mask[:3]], "boolean")
    assert_refuses_places(storage, [torch.ones(3)], "integer")
    write(storage, [10], first_id=12)
    row = storage.trials().index(np.array([1, 0]), torch.tensor([[0, 1], [1, 2]]))
    assert storage.get(row)["id"].tolist() == [[7, 8], [5, 6]]
    some = storage.get(row, [("next", "nested", "state"), "id"])
    assert set(some.keys(True, True)) == {("next", "nested", "state"), "id"}
    assert some["next", "nested", "state"][..., 0].tolist() == [[8, 9], [6, 7]]
    with pytest.raises(KeyError, match="colour.*not found.*observation"):
        storage.get(row, ["colour"])


def test_an_entry_of_the_root_alone_is_read_under_next_from_the_row_after():
    storage = TrialStorage(20)
    storage.write(TensorDict({"goal": torch.arange(6)}, [6]), [6])
    assert storage.get(torch.arange(4), [("next", "goal")])["next", "goal"].tolist() == [1, 2, 3, 4]


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [False, True])
def test_other_processes_and_copies_go_on_where_it_stopped(tmp_path, flush):
    storage = TrialStorage(12, path=tmp_path / "a", flush=flush)
    learner = TrialStorage(12, path=tmp_path / "a", mode="continue")
    assert contents(learner) == []
    written = write(storage, [4, 5, 3]) + write(storage, [6], first_id=12)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    storage.dumps(tmp_path / "c")
    readers = [opened(tmp_path / name) for name in "abc"]
    writers = [opened(tmp_path / name, "continue") for name in "abc"]
    writers_of_a = [storage, writers[0], pickle.loads(pickle.dumps(storage))]  # noqa: S301
    count = 2
    for number in range(21):
        for each in (storage, learner, *readers, *writers):
            assert_holds(each, written[-count:])
            assert each.trials().written == sum(map(len, written))
        for writer in (writers_of_a[number % 3], *writers[1:]):
            new = write(writer, [1 + number % 5], first_id=100 * number)
        written += new
        count = len(storage.trials().length)


@pytest.mark.parametrize("mode", ["continue", "read"])
def test_others_wait_while_trials_are_read_or_copied(tmp_path, mode):
    writer = TrialStorage(12, path=tmp_path / "replay")
    write(writer, [4, 5])
    storage = opened(tmp_path / "replay", mode)
    with trials.written_beside(storage, "table", write, writer, [5, 5], 100):
        assert storage[:]["id"].tolist() == [*range(9)]
    assert contents(storage) == [[*range(100, 105)], [*range(105, 110)]]
    with trials.written_beside(storage, "table", write, writer, [3, 4], 100):
        storage.verify()
    with trials.written_beside(storage, "table", write, writer, [5], 100):
        storage.dumps(tmp_path / "copy")
    copy = opened(tmp_path / "copy", "continue")
    assert contents(copy) == [[*range(105, 110)], [100, 101, 102], [103, 104, 105, 106]]
    assert contents(writer) == [*contents(copy)[1:], [*range(100, 105)]]
    copy.verify()
    for number in range(4):
        write(copy, [4], first_id=10 * number)
    assert contents(copy)[-1] == [30, 31, 32, 33]


def test_readers_do_not_wait_for_each_other_and_writers_for_all(tmp_path):
    writer = TrialStorage(12, path=tmp_path)
    write(writer, [4])
    one, two = opened(tmp_path), opened(tmp_path)
    with one.lock():
        with two.lock(), pytest.raises(BlockingIOError), files.lock(tmp_path / "lock", wait=False):
            pass
        thread = threading.Thread(target=write, args=(writer, [5]))
        thread.start()
        thread.join(0.2)
        # A waiting writer comes before the next reader.
        with pytest.raises(BlockingIOError), files.lock(tmp_path / "queue", wait=False):
            pass
    thread.join()
    assert len(two) == 9


def test_what_a_writer_left_empty_and_a_copy_of_it_count_on(tmp_path):
    storage = TrialStorage(12, path=tmp_path / "replay")
    write(storage, [4, 5])
    storage.table().evict(2)  # as one that dies before it announces what it wrote
    storage.dumps(tmp_path / "copy")
    for left in (storage, opened(tmp_path / "copy", "continue")):
        assert (contents(left), left.trials().written) == ([], 9)
        write(left, [3])
        assert (left.trials().number.tolist(), left.trials().written) == ([2], 12)


def test_temporary_folders_are_removed_with_their_owner_and_at_exit():
    storage = TrialStorage(10)
    write(storage, [3])
    path, copy = storage.path, pickle.dumps(storage)
    assert path.exists()
    del storage
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=r"Temporary folders go with their owner\. Make"):
        pickle.loads(copy)  # noqa: S301
    code = (
        "import torch; from tensordict import TensorDict\n"
        "from torchrl_amago.data import make_trial_buffer\n"
        "rb = make_trial_buffer(10, 1, 1)\n"
        "rb.extend(TensorDict({'x': torch.zeros(3)}, [3]), lengths=[3])\n"
        "rb.me = rb; print(rb.storage.path)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(run.stdout.split()[-1]).exists()


def test_bytes_per_step_are_those_of_one_file_per_trajectory(tmp_path):
    """The arrays of the public reference's trajectory files, in theirs and in our form."""
    length = 500
    observation, previous = torch.randn(length + 1, 39), torch.randn(length + 1, 5)
    action, reward = torch.randn(length, 4), torch.randn(length, 1)
    time, done = torch.arange(length + 1).unsqueeze(-1), torch.zeros(length, 1, dtype=torch.bool)
    theirs = {
        "_OBS_KEY_observation": observation, "rl2s": previous, "time_idxs": time,
        "rews": reward, "dones": done, "actions": action,
    }  # fmt: skip
    np.savez(tmp_path / "trajectory.npz", **theirs)
    size = 100 * (tmp_path / "trajectory.npz").stat().st_size
    both = {
        "observation": observation, "time_idx": time,
        "prev_reward": previous[:, :1], "prev_action": previous[:, 1:],
    }  # fmt: skip
    trial = {key: x[:-1] for key, x in both.items()} | {"action": action, "is_init": time[1:] == 1}
    trial["next"] = {key: x[1:] for key, x in both.items()} | {"reward": reward}
    trial["next"] |= dict.fromkeys(["done", "terminated", "truncated", "is_init"], done)
    steps = TensorDict(trial, [length])
    storage = TrialStorage(100 * length, path=tmp_path / "replay")
    for _ in range(250):  # several rounds
        storage.write(steps, [length])
    storage.dumps(tmp_path / "saved")
    for folder in ("replay", "saved"):
        found = [file for file in (tmp_path / folder).rglob("*") if file.is_file()]
        assert sum(file.stat().st_blocks * 512 for file in found) <= 1.2 * size
    assert sum(file.stat().st_size for file in found) <= 1.25 * size


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    storage = TrialStorage(12, path=tmp_path / "replay")
    write(storage, [4, 5])
    return tmp_path / "replay"


def assert_intact(folder):
    assert contents(opened(folder)) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_folders_are_opened_as_their_mode_says(tmp_path, folder):
    with pytest.raises(FileExistsError, match=r"needs a folder without one.*mode='continue'"):
        TrialStorage(12, path=folder)
    with pytest.raises(FileNotFoundError, match=r"has none\. Check the path"):
        opened(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    for mode in ("continue", "read"):
        with pytest.raises(ValueError, match=r"capacity: 12 there, 20 here.*None takes"):
            TrialStorage(20, path=folder, mode=mode)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        TrialStorage(0)
    assert_intact(folder)
    schema = files.read_json(folder / "trials/schema.json")
    files.write_json(folder / "trials/schema.json", schema | {"format": "trials 9"})
    with pytest.raises(ValueError, match=r"format: trials 9 there, torchrl_amago trials 4 here"):
        opened(folder, "continue")


@pytest.mark.parametrize("mode", ["continue", "read"])
@pytest.mark.parametrize("name", ["rows/id.memmap", "table.bin", "schema.json"])
@pytest.mark.parametrize("size", [None, 0, 7])
def test_missing_and_cut_files_are_named_and_nothing_changes(folder, mode, name, size):
    file = folder / "trials" / name
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)
    before = content_of(folder)
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        TrialStorage(12, path=folder, mode=mode)
    with pytest.raises((RuntimeError, FileExistsError)):
        TrialStorage(12, path=folder)
    assert content_of(folder) == before


def test_any_flipped_bit_of_the_description_is_refused_or_changes_nothing(folder):
    file = folder / "trials" / "schema.json"
    content, refused = file.read_bytes(), 0
    for place in range(len(content)):
        file.write_bytes(flipped(content, place, place % 8))
        try:
            assert_intact(folder)
        except (DamagedError, ValueError):
            refused += 1
    assert refused > 0.75 * len(content)  # all but some blanks


def test_any_flipped_bit_of_the_values_is_found_by_verify(folder):
    storage = opened(folder, "continue")
    storage.verify()
    for _, memory in storage._content.items():
        for place in np.ndindex(11, memory.shape[1]):
            memory[place] ^= 4
            with pytest.raises(DamagedError, match="has changed since it was written, in 1"):
                storage.verify()
            memory[place] ^= 4
    storage.verify()


def test_damage_that_comes_later_stops_the_next_write(folder):
    storage, other = (opened(folder, "continue") for _ in range(2))
    write(other, [1, 1, 1], first_id=9)
    table = folder / "trials/table.bin"
    damaged = flipped(table.read_bytes(), (1 + 3) * ENTRY.itemsize)
    with table.open("r+b") as stream:
        stream.write(damaged)
    before = content_of(folder)
    for _ in range(2):
        with pytest.raises(DamagedError, match="table.bin has changed"):
            write(storage, [6], first_id=9)
    assert content_of(folder) == before


class Killed(BaseException):
    """The end of a process."""


def die(*_):
    raise Killed


def fails_after(calls, function, fail):
    """The function, which fails once the calls are used up."""

    def call(*args, **kwargs):
        return (fail if next(calls, None) is None else function)(*args, **kwargs)

    return call


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("when", ["create", "load"])
def test_a_death_while_a_folder_is_made_or_replaced(tmp_path, folder, monkeypatch, when, moment):
    storage = TrialStorage(12, path=tmp_path / "other")
    kept = write(storage, [3, 2], first_id=50) if when == "load" else []
    new = make_trials([4, 5] if kept else [4])
    calls = iter(range(moment))
    with monkeypatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        patch.setattr(os, "replace", fails_after(calls, os.replace, die))
        patch.setattr(files, "write_json", fails_after(calls, files.write_json, die))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # who dies doesn't tidy up
        storage.loads(folder) if kept else write(storage, [4])
        die()
    storage = TrialStorage(12, path=tmp_path / "other", mode="continue")
    assert_holds(storage, new if len(storage) == sum(map(len, new)) else kept)
    write(storage, [5], first_id=70)
    assert contents(storage)[-1] == [*range(70, 75)]
    names = sorted(file.name for file in (tmp_path / "other").iterdir())
    assert names == ["lock", "queue", "trials"]


def test_flush_waits_for_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    write(TrialStorage(12, path=tmp_path / "a"), [4])
    assert not synced
    storage = TrialStorage(12, path=tmp_path / "b", flush=True)
    write(storage, [4])
    assert {"table.bin", "schema.json", "id.memmap", "b"} <= set(synced)
    # Rows before what announces them.
    assert {Path(name).suffix for name in synced[-7:-1]} == {".memmap"}
    assert synced[-1] == "table.bin"
    synced.clear()
    write(storage, [10], first_id=4)
    # An eviction before the rows that it frees are overwritten.
    assert synced[0] == synced[-1] == "table.bin"
    assert {Path(name).suffix for name in synced[1:-1]} == {".memmap"}


def test_nothing_that_lies_beside_is_read(folder):
    (folder / "trials/rows/meta.json").write_text('{"_type": "<class \'os.system\'>"}')
    (folder / "trials/rows/other.pickle").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert_intact(folder)


def test_other_entries_are_refused_and_nothing_is_lost(folder):
    storage = opened(folder, "continue")
    trial = make_trial(4)
    trial["observation"] = torch.zeros(4, 5)
    del trial["is_init"]
    differing = "is_init: bool 1 there, absent here; observation: float32 2 there, float32 5 here"
    with pytest.raises(ValueError, match=differing):
        storage.write(trial, [4])
    assert_intact(folder)


def test_reading_never_writes(folder):
    before = content_of(folder)
    storage = opened(folder)
    for episode in (
        lambda: storage.write(make_trial(3), [3]),
        lambda: storage.loads(folder),
        make_trial_buffer(None, 4, 2, path=folder, mode="read").empty,
    ):
        with pytest.raises(PermissionError, match="mode='read' can't write to"):
            episode()
    assert content_of(folder) == before


def test_a_read_only_folder_can_be_read_and_says_no_to_writers(folder, monkeypatch):
    real_open = open

    def refuse(file, mode="r", *args, **kwargs):
        if folder in Path(str(file)).parents and set(mode) & set("wa+"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real_open(file, mode, *args, **kwargs)

    # As root, the tests may write anywhere.
    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    assert_intact(folder)
    with pytest.raises(PermissionError, match=r"Permission denied.*mode='read'"):
        opened(folder, "continue")


@pytest.mark.parametrize("room", range(8))
def test_a_full_disk_is_named_and_nothing_is_lost(folder, monkeypatch, room):
    storage = opened(folder, "continue")
    claim = fails_after(iter(range(room)), os.posix_fallocate, full)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", claim)
        if room < 7:  # the table and six entries
            for _ in range(8):  # what was refused once isn't taken for claimed
                with pytest.raises(OSError, match="the disk must have room.*Free some space"):
                    write(storage, [6], first_id=9)
            assert_intact(folder)
    write(storage, [6], first_id=9)
    assert contents(storage) == [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]


def test_a_full_disk_while_trials_are_loaded_or_the_folder_is_made(tmp_path, folder, monkeypatch):
    storage = TrialStorage(12, path=tmp_path / "other")
    for lengths in ([], [5, 1]):
        kept = write(storage, lengths, first_id=20) if lengths else []
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_json", full)
            with pytest.raises(OSError, match="the disk must have room.*Free some space"):
                storage.loads(folder) if kept else write(storage, [4])
        assert_holds(storage, kept)
    storage.loads(folder)
    assert_holds(storage, make_trials([4, 5]))


def test_a_write_to_a_folder_whose_trials_were_deleted_raises(tmp_path):
    storage = TrialStorage(20, path=tmp_path)
    write(storage, [3])
    shutil.rmtree(tmp_path / "trials")
    with pytest.raises(FileNotFoundError, match="table.bin"):
        write(storage, [4])


def test_more_than_the_disk_holds_is_refused_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=379))
    storage = TrialStorage(10, path=tmp_path / "replay")
    with pytest.raises(OSError, match=r"380 bytes are needed, 379 bytes are free"):
        write(storage, [3])
    assert not any((tmp_path / "replay/trials/rows").iterdir())


def test_a_real_full_disk(tmp_path):
    """A file system of one megabyte, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        storage = TrialStorage(25_000, path=disk / "replay")
        written = write(storage, [50])
        (disk / "other").write_bytes(bytes(300_000))
        with pytest.raises(OSError, match="the disk must have room"):  # noqa: PT012
            for number in range(1, 1000):
                written += write(storage, [50], first_id=50 * number)
        assert len(written) > 100
        assert_holds(opened(disk / "replay"), written)
        (disk / "other").unlink()
        written += write(storage, [50], first_id=5000)
        assert_holds(storage, written)
        del storage
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_writes_of_other_than_whole_trials_raise():
    storage = TrialStorage(10)
    for lengths in ([3], [4, 1], [4, 0], []):
        with pytest.raises(ValueError, match=r"steps \[N\] of whole trials.*TrialCollector"):
            storage.write(make_trial(4), lengths)
    message = "at most capacity=10 steps at once, got steps .11. and lengths .11."
    with pytest.raises(ValueError, match=message):
        storage.write(make_trial(11), [11])
    with pytest.raises(TypeError, match="can't be changed in place"):
        storage[0] = make_trial(1)
