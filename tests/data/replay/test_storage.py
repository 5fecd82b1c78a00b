from __future__ import annotations

import errno
import json
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
from hypothesis import given
from hypothesis import strategies as st
from tensordict import assert_close
from tests.data.test_journal import fill_disk

from tests.data.trials import make_trial, make_trials
from torchrl_amago.data import TrialStorage
from torchrl_amago.data import trial_storage as module
from torchrl_amago.data.journal import RECORD, Journal

FILES = ["journal.bin", "lock", "rows.bin", "schema.json"]
KEPT = make_trial(3).keys(True, True)


def write(storage, lengths, first_id=0):
    trials = make_trials(lengths, first_id)
    storage.write(torch.cat(trials), lengths)
    return trials


def contents(storage):
    """The ids of every stored trial."""
    steps = storage.follow().steps.tolist()
    return [ids.tolist() for ids in storage[:]["id"].split(steps)] if steps else []


def assert_holds(storage, trials):
    """Exactly these trials, bit by bit."""
    assert storage.follow().steps.tolist() == [len(trial) for trial in trials]
    if trials:
        found = storage[:]
        assert set(found.keys(True, True)) == set(KEPT)
        assert_close(found, torch.cat(trials), rtol=0, atol=0)


@given(
    st.integers(9, 30),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2), min_size=1, max_size=15),
)
def test_what_is_stored_is_what_was_written_last(capacity, writes):
    storage = TrialStorage(capacity)
    written = []
    for lengths in writes:
        if sum(lengths) > capacity:
            continue
        written += write(storage, lengths, first_id=sum(len(trial) for trial in written))
        count = len(storage.table)
        assert count >= len(lengths)
        assert_holds(storage, written[-count:])
        assert len(storage) == sum(len(trial) for trial in written[-count:]) <= capacity
        assert storage.table.written == sum(len(trial) for trial in written)


def test_evicted_rows_are_never_read():
    storage = TrialStorage(20)
    for first_id in range(0, 200, 4):
        write(storage, [4], first_id)
        in_use = set()
        for first, steps in zip(storage.table.first, storage.table.steps, strict=True):
            in_use |= set(range(first, first + steps + 1))
        free = [row for row in range(storage.table.max_rows) if row not in in_use]
        storage._rows.tensor[free] = 255  # NaN in every float
        assert storage[:]["observation"].isfinite().all()
        assert storage[:]["next", "reward"].isfinite().all()
        batch = storage.read_slices(
            torch.from_numpy(storage.table.first), torch.from_numpy(storage.table.steps), 6
        )
        assert batch["observation"].isfinite().all()
        assert batch["next", "nested", "state"].isfinite().all()
        assert batch["next", "reward"].isfinite().all()


def test_steps_are_found_by_their_place():
    storage = TrialStorage(20)
    write(storage, [4, 3, 5])
    assert storage[5]["id"].item() == 5
    assert storage[-1]["id"].item() == 11
    assert storage[[0, 4, 11]]["id"].tolist() == [0, 4, 11]
    assert storage[torch.tensor([[1, 2], [3, 4]])]["id"].tolist() == [[1, 2], [3, 4]]
    assert storage[3:9:2]["id"].tolist() == [3, 5, 7]
    assert storage.newest(4)["id"].tolist() == [8, 9, 10, 11]
    assert storage.newest(400)["id"].tolist() == list(range(12))
    assert len(storage.newest(0)) == 0
    assert 11 in storage
    assert 12 not in storage


@pytest.mark.parametrize("place", [-13, -20, 12, [0, 40], [[3, -13]]])
def test_a_place_without_a_step_is_refused(place):
    storage = TrialStorage(20)
    with pytest.raises(IndexError, match="with 0 steps stored"):
        storage[place]
    write(storage, [4, 3, 5])
    outside = place if isinstance(place, int) else np.ravel(place)[1]
    with pytest.raises(IndexError, match=rf"from -12 to 11, with 12 steps stored, got {outside}\."):
        storage[place]


def test_steps_are_found_by_a_mask():
    storage = TrialStorage(20)
    write(storage, [5, 3], first_id=10)
    mask = torch.arange(8) >= 6
    for chosen in (mask, mask.numpy(), mask.tolist()):
        assert storage[chosen]["id"].tolist() == [16, 17]
    assert storage[[]]["id"].shape == (0,)
    with pytest.raises(IndexError, match=r"one value for each of the 8 steps .* shape \[3\]"):
        storage[mask[:3]]
    with pytest.raises(IndexError, match="integers, a slice or a mask, got float32"):
        storage[torch.ones(3)]


def test_columns_of_whole_trials():
    storage = TrialStorage(30)
    write(storage, [4, 2, 6])
    table = storage.table
    index = [2, 0, 2, 1]
    out = storage.read_columns(
        torch.from_numpy(table.first[index]),
        torch.from_numpy(table.steps[index]),
        ["id", ("nested", "state"), ("next", "nested", "state"), ("next", "reward")],
    )
    assert out.shape == (4, 6)
    for row, first, length in [(0, 6, 6), (1, 0, 4), (2, 6, 6), (3, 4, 2)]:
        trial = make_trial(length, first)
        for key in [("nested", "state"), ("next", "nested", "state"), ("next", "reward"), "id"]:
            assert torch.equal(out[row, :length][key], trial[key])
    with pytest.raises(KeyError, match="'colour'"):
        storage.read_columns(torch.tensor([0]), torch.tensor([4]), ["colour"])


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [False, True])
def test_goes_on_where_it_stopped(tmp_path, flush):
    storage = TrialStorage(12, path=tmp_path / "replay", flush=flush)
    first = write(storage, [4, 5])
    storage = TrialStorage(path=tmp_path / "replay", mode="continue")
    assert_holds(storage, first)
    second = write(storage, [6], first_id=9)
    assert_holds(storage, [first[1], *second])
    assert storage.table.written == 15
    assert_holds(TrialStorage(path=tmp_path / "replay", mode="read"), [first[1], *second])


def test_a_copied_folder_is_the_same_storage(tmp_path):
    storage = TrialStorage(12, path=tmp_path / "a")
    write(storage, [4, 5, 3])
    write(storage, [6], first_id=12)
    before = contents(storage)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    storage.dumps(tmp_path / "c")
    for name in ("b", "c"):
        for mode in ("read", "continue"):
            assert contents(TrialStorage(path=tmp_path / name, mode=mode)) == before
    copy = TrialStorage(path=tmp_path / "c", mode="continue")
    for number in range(5):
        write(storage, [2 + number], first_id=100 * number)
        write(copy, [2 + number], first_id=100 * number)
        assert contents(copy) == contents(storage)


def test_a_saved_folder_is_as_long_as_its_content(tmp_path):
    storage = TrialStorage(100_000, path=tmp_path / "a")
    write(storage, [4, 5])
    storage.dumps(tmp_path / "b")
    assert (tmp_path / "b/rows.bin").stat().st_size == 11 * storage.layout.row_bytes


def test_readers_follow_writers(tmp_path):
    writer = TrialStorage(12, path=tmp_path)
    learner = TrialStorage(12, path=tmp_path, mode="continue")
    assert contents(learner) == []
    write(writer, [4])
    reader = TrialStorage(path=tmp_path, mode="read")
    other = pickle.loads(pickle.dumps(writer))  # noqa: S301
    for number in range(20):
        write(writer if number % 3 else other, [1 + number % 5], first_id=100 * number)
        assert contents(learner) == contents(reader) == contents(writer)


def test_a_long_journal_is_rewritten_and_readers_follow(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_STALE_RECORDS", 8)
    writer = TrialStorage(12, path=tmp_path)
    write(writer, [4])
    reader = TrialStorage(path=tmp_path, mode="read")
    sizes = []
    for number in range(60):
        write(writer, [2 + number % 4], first_id=100 * number)
        sizes.append((tmp_path / "journal.bin").stat().st_size)
        if number % 7 == 0:
            assert contents(reader) == contents(writer)
            assert reader.table.written == writer.table.written
    assert max(sizes) < 32 * 40
    assert contents(TrialStorage(path=tmp_path, mode="read")) == contents(writer)


def write_beside(writer, storage, method, monkeypatch, lengths=(5, 5)):
    """Let another process write as soon as `storage` has called one of its methods; and wait for the lock."""
    threads = []
    real = getattr(storage, method)

    def call_and_write(*args):
        result = real(*args)
        if not threads:
            threads.append(threading.Thread(target=write, args=(writer, list(lengths), 100)))
            threads[0].start()
            threads[0].join(0.3)
        return result

    monkeypatch.setattr(storage, method, call_and_write)
    return lambda: threads[0].join()


@pytest.mark.parametrize("mode", ["continue", "read"])
@pytest.mark.parametrize("way", ["dumps", "state_dict"])
def test_a_copy_holds_whole_trials_while_others_write(tmp_path, monkeypatch, mode, way):
    writer = TrialStorage(12, path=tmp_path / "replay")
    write(writer, [4, 5])
    write(writer, [3], first_id=9)
    storage = TrialStorage(path=tmp_path / "replay", mode=mode)
    wait = write_beside(writer, storage, "_snapshot", monkeypatch, lengths=[5])
    if way == "dumps":
        storage.dumps(tmp_path / "copy")
        copy = TrialStorage(path=tmp_path / "copy", mode="continue")
    else:
        copy = TrialStorage(12)
        copy.load_state_dict(storage.state_dict())
    wait()
    # A reader doesn't make others wait: it leaves out what it could not copy in time.
    kept = [[9, 10, 11]] if mode == "read" else [[0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11]]
    assert contents(copy) == kept
    assert contents(writer) == [[9, 10, 11], [100, 101, 102, 103, 104]]
    assert copy.table.written == 12
    for number in range(4):
        write(copy, [4], first_id=10 * number)
    assert contents(copy)[-1] == [30, 31, 32, 33]


@pytest.mark.parametrize("mode", ["continue", "read"])
def test_steps_that_are_overwritten_while_they_are_read_are_read_again(tmp_path, monkeypatch, mode):
    writer = TrialStorage(12, path=tmp_path)
    write(writer, [4, 5])
    storage = TrialStorage(path=tmp_path, mode=mode)
    write_beside(writer, storage, "follow", monkeypatch)
    assert storage[:]["id"].tolist() == [*range(100, 110)]


@pytest.mark.parametrize("mode", ["continue", "read"])
def test_steps_that_are_always_overwritten(tmp_path, monkeypatch, mode):
    """Who may take the lock makes the writers wait; a reader says that it can't keep up."""
    writer = TrialStorage(12, path=tmp_path)
    write(writer, [4, 5])
    storage = TrialStorage(path=tmp_path, mode=mode)
    real = storage.layout.read

    def read_while_others_write(*args):
        thread = threading.Thread(target=write, args=(writer, [6, 6]), daemon=True)
        thread.start()
        thread.join(0.1)
        return real(*args)

    monkeypatch.setattr(storage.layout, "read", read_while_others_write)
    if mode == "continue":
        assert len(storage[:]) == 12
    else:
        with pytest.raises(RuntimeError, match=r"each of 20 attempts.*mode='continue'"):
            storage[:]


def test_a_reader_of_a_saved_folder_follows_who_goes_on_with_it(tmp_path):
    """Whose file is longer then."""
    storage = TrialStorage(30, path=tmp_path / "replay")
    write(storage, [4, 5])
    storage.dumps(tmp_path / "saved")
    reader = TrialStorage(path=tmp_path / "saved", mode="read")
    assert len(contents(reader)) == 2
    writer = TrialStorage(path=tmp_path / "saved", mode="continue")
    for number in range(10):
        write(writer, [7], first_id=10 * number)
        table = reader.follow()
        batch = reader.read_slices(
            torch.from_numpy(table.first), torch.from_numpy(table.steps), int(table.steps.max())
        )
        assert batch["id"][-1].tolist() == [*range(10 * number, 10 * number + 7)]
        assert contents(reader) == contents(writer)


def test_temporary_folders_are_removed():
    storage = TrialStorage(10)
    write(storage, [3])
    path = storage.path
    assert path.exists()
    del storage
    assert not path.exists()


def test_a_copy_without_its_temporary_folder_is_told():
    storage = TrialStorage(20)
    write(storage, [5])
    copy = pickle.dumps(storage)
    del storage
    with pytest.raises(FileNotFoundError, match="a temporary one goes with its owner. Make"):
        pickle.loads(copy)  # noqa: S301


def test_temporary_folders_are_removed_at_exit():
    code = (
        "import torch; from tensordict import TensorDict; from torchrl_amago.data import TrialStorage\n"
        "s = TrialStorage(10); s.write(TensorDict({'x': torch.zeros(3)}, [3]), [3])\n"
        "s.me = s; print(s.path)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(run.stdout.strip()).exists()


def test_bytes_per_step_are_those_of_one_file_per_trajectory(tmp_path):
    """The arrays of the public reference's trajectory files, in theirs and in our form."""
    length, features, actions = 500, 39, 4
    observation, action = torch.randn(length + 1, features), torch.randn(length, actions)
    reward, time = torch.randn(length, 1), torch.arange(length + 1).unsqueeze(-1)
    done = torch.arange(length).unsqueeze(-1) == length - 1
    previous = torch.cat([torch.zeros(1, actions + 1), torch.cat([reward, action], -1)])
    arrays = {
        "_OBS_KEY_observation": observation, "rl2s": previous, "time_idxs": time,
        "rews": reward, "dones": done, "actions": action,
    }  # fmt: skip
    np.savez(tmp_path / "trajectory.npz", **{key: x.numpy() for key, x in arrays.items()})
    both = {
        "observation": observation,
        "time_idx": time,
        "prev_reward": previous[:, :1],
        "prev_action": previous[:, 1:],
    }
    trial = {key: x[:-1] for key, x in both.items()} | {"action": action}
    trial["is_init"] = trial["time_idx"] == 0
    trial["next"] = {key: x[1:] for key, x in both.items()}
    trial["next"] |= {"reward": reward, "done": done, "terminated": done.clone()}
    trial["next"] |= {"truncated": torch.zeros_like(done), "is_init": torch.zeros_like(done)}
    storage = TrialStorage(100 * length, path=tmp_path / "replay")
    for _ in range(100):
        storage.write(module.TensorDict(trial, [length]), [length])
    ours = sum(file.stat().st_blocks * 512 for file in (tmp_path / "replay").iterdir())
    theirs = 100 * (tmp_path / "trajectory.npz").stat().st_size
    assert ours <= 1.1 * theirs


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    storage = TrialStorage(12, path=tmp_path / "replay")
    write(storage, [4, 5])
    return tmp_path / "replay"


def assert_intact(folder):
    assert contents(TrialStorage(path=folder, mode="read")) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_a_new_buffer_needs_a_new_folder(folder):
    with pytest.raises(FileExistsError, match="needs a folder without one.*mode='continue'"):
        TrialStorage(12, path=folder)
    assert_intact(folder)


def test_reading_needs_trials(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no schema\.json.*Check the path"):
        TrialStorage(path=tmp_path / "typo", mode="read")
    assert not (tmp_path / "typo").exists()


def test_another_capacity_is_refused(folder):
    for mode in ("continue", "read"):
        with pytest.raises(ValueError, match=r"that of the folder, 12 steps.*got 20.*Pass None"):
            TrialStorage(20, path=folder, mode=mode)


@pytest.mark.parametrize("mode", ["continue", "read"])
@pytest.mark.parametrize("bytes_left", [0, 1, 200])
def test_truncated_rows_are_named(folder, mode, bytes_left):
    os.truncate(folder / "rows.bin", bytes_left)
    with pytest.raises(RuntimeError, match=rf"rows\.bin must have the 440 bytes.*has {bytes_left}"):
        TrialStorage(path=folder, mode=mode)


@pytest.mark.parametrize("name", ["rows.bin", "journal.bin"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        TrialStorage(path=folder, mode="read")


def test_a_truncated_journal_gives_the_trials_before(folder):
    os.truncate(folder / "journal.bin", (folder / "journal.bin").stat().st_size - 5)
    assert contents(TrialStorage(path=folder, mode="read")) == [[0, 1, 2, 3]]


def damage(folder, number):
    """Change a byte of a record."""
    content = bytearray((folder / "journal.bin").read_bytes())
    content[number * RECORD.itemsize + 9] ^= 1
    (folder / "journal.bin").write_bytes(content)


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("mode", ["continue", "read"])
def test_a_damaged_journal_is_refused_and_left_as_it_is(folder, mode):
    os.truncate(folder / "rows.bin", 440)  # as a saved folder is
    damage(folder, 1)
    before = files_of(folder)
    with pytest.raises(RuntimeError, match=r"number 1 hasn't.*is damaged. Nothing was changed"):
        TrialStorage(path=folder, mode=mode)
    assert files_of(folder) == before


def test_damage_that_comes_later_stops_the_next_write(folder):
    storage = TrialStorage(path=folder, mode="continue")
    other = TrialStorage(path=folder, mode="continue")
    write(other, [1, 1, 1], first_id=9)
    damage(folder, 3)
    before = files_of(folder)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="number 3 hasn't"):
            write(storage, [6], first_id=9)
    assert files_of(folder) == before


@pytest.mark.parametrize("mode", ["continue", "read"])
@pytest.mark.parametrize("size", [0, 31, "no start"])
def test_a_journal_without_its_beginning_is_refused(folder, mode, size):
    if size == "no start":
        content = (folder / "journal.bin").read_bytes()
        (folder / "journal.bin").write_bytes(content[RECORD.itemsize :])
    else:
        os.truncate(folder / "journal.bin", size)
    before = files_of(folder)
    with pytest.raises(RuntimeError, match="must begin with its first record.*another copy"):
        TrialStorage(path=folder, mode=mode)
    assert files_of(folder) == before


@pytest.mark.parametrize("mode", ["create", "continue", "read"])
@pytest.mark.parametrize("without", [[], ["journal.bin"]])
def test_trials_without_a_description_are_not_overwritten(folder, mode, without):
    for name in ["schema.json", *without]:
        (folder / name).unlink()
    before = files_of(folder)
    with pytest.raises(RuntimeError, match=r"schema\.json must be there.*Bring the file back"):
        TrialStorage(12, path=folder, mode=mode)
    assert files_of(folder) == before


def test_a_description_that_gets_lost_before_the_first_write(tmp_path, folder):
    storage = TrialStorage(12, path=tmp_path / "new", mode="continue")
    for name in ("rows.bin", "journal.bin"):
        shutil.copy(folder / name, tmp_path / "new" / name)
    with pytest.raises(RuntimeError, match=r"schema\.json must be there"):
        write(storage, [3])


class Killed(BaseException):
    """The end of a process."""


def die_at(number, monkeypatch):
    """End the process right before its so manieth change of the folder: a file opened, or given its name."""
    count = iter(range(number))

    def counted(function):
        def call(*args):
            if next(count, None) is None:
                raise Killed
            return function(*args)

        return call

    real_open = Path.open

    def counted_open(self, mode="r", *args):
        return (counted(real_open) if mode == "wb" else real_open)(self, mode, *args)

    monkeypatch.setattr(Path, "open", counted_open)
    monkeypatch.setattr(os, "replace", counted(os.replace))


@pytest.mark.parametrize("mode", ["create", "continue"])
@pytest.mark.parametrize("moment", range(4))
def test_a_process_that_dies_while_it_makes_the_folder(tmp_path, monkeypatch, mode, moment):
    storage = TrialStorage(12, path=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        die_at(moment, patch)
        write(storage, [4])
    assert not (tmp_path / "schema.json").exists()
    storage = TrialStorage(12, path=tmp_path, mode=mode)
    assert_holds(storage, write(storage, [4, 5]))
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_flush_waits_for_the_disk_before_the_folder_counts(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def names(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(source, target):
        events.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", names)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(module, "_STALE_RECORDS", 0)
    storage = TrialStorage(12, path=tmp_path / "replay", flush=True)
    write(storage, [4])
    made = ["journal.bin", "rows.bin", ".schema.json.partial", "-> schema.json", "replay"]
    assert events == [*made, "journal.bin"]
    write(storage, [9])
    events.clear()
    write(storage, [9])
    compacted = [".journal.bin.partial", "-> journal.bin", "replay"]
    assert events == ["journal.bin", "journal.bin", *compacted]


def test_another_format_is_refused(folder):
    schema = json.loads((folder / "schema.json").read_text())
    (folder / "schema.json").write_text(json.dumps(schema | {"format": "trials 9"}))
    with pytest.raises(ValueError, match="format 'torchrl_amago trials 1', got 'trials 9'"):
        TrialStorage(path=folder, mode="continue")
    (folder / "schema.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"schema\.json must describe"):
        TrialStorage(path=folder, mode="continue")


def test_other_entries_are_refused_and_nothing_is_lost(folder):
    storage = TrialStorage(path=folder, mode="continue")
    trial = make_trial(4)
    trial["observation"] = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"observation: \[2\] float32.*stored, \[5\] float32"):
        storage.write(trial, [4])
    assert_intact(folder)


def test_reading_never_writes(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    storage = TrialStorage(path=folder, mode="read")
    with pytest.raises(PermissionError, match="mode='read' can't be written to"):
        storage.write(make_trial(3), [3])
    with pytest.raises(PermissionError, match="mode='read' can't be written to"):
        storage.load_state_dict(TrialStorage(12).state_dict())
    with pytest.raises(PermissionError, match="mode='read' can't be written to"):
        storage.loads(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


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
        TrialStorage(path=folder, mode="continue")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_and_nothing_is_lost(folder, monkeypatch):
    storage = TrialStorage(path=folder, mode="continue")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"must have room.*is full \(No space left.*Free some space"):
        write(storage, [6], first_id=9)
    monkeypatch.undo()
    assert_intact(folder)
    write(storage, [6], first_id=9)
    assert contents(storage)[-1] == list(range(9, 15))


@pytest.mark.parametrize("room", [0, 31, 32, 63])
def test_a_full_disk_at_the_journal_loses_nothing_either(folder, monkeypatch, room):
    """Even where there is room to give up trials, but none to list the new ones."""
    storage = TrialStorage(path=folder, mode="continue")
    fill_disk(monkeypatch, room)
    for _ in range(2):
        with pytest.raises(OSError, match="is full.*Free some space"):
            write(storage, [6], first_id=9)
        assert_intact(folder)
    monkeypatch.undo()
    write(storage, [6], first_id=9)
    assert contents(storage) == [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]


def test_a_full_disk_while_the_journal_is_rewritten(folder, monkeypatch):
    monkeypatch.setattr(module, "_STALE_RECORDS", 0)
    storage = TrialStorage(path=folder, mode="continue")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "prepare", full)
        for number in range(5):
            write(storage, [6, 6], first_id=100 * number)
        size = (folder / "journal.bin").stat().st_size
    assert contents(storage) == [[*range(400, 406)], [*range(406, 412)]]
    write(storage, [6, 6])
    assert (folder / "journal.bin").stat().st_size == 3 * RECORD.itemsize < size
    assert contents(TrialStorage(path=folder, mode="read")) == contents(storage)


def test_a_full_disk_while_the_folder_is_made(tmp_path, monkeypatch):
    storage = TrialStorage(12, path=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", full)
        with pytest.raises(OSError, match="is full.*Free some space"):
            write(storage, [4])
    assert_holds(storage, write(storage, [4]))


def test_a_full_disk_while_trials_are_loaded(tmp_path, folder, monkeypatch):
    storage = TrialStorage(12, path=tmp_path / "other")
    write(storage, [5, 1], first_id=20)
    for patched in (lambda patch: patch.setattr(Journal, "prepare", full), fill_disk):
        with monkeypatch.context() as patch:
            patched(patch)
            with pytest.raises(OSError, match="is full.*Free some space"):
                storage.loads(folder)
        assert contents(storage) == [[*range(20, 25)], [25]]
    storage.loads(folder)
    assert contents(storage) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_more_than_the_disk_holds_is_refused_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=399))
    storage = TrialStorage(10, path=tmp_path / "replay")
    with pytest.raises(OSError, match=r"room for capacity=10 steps of 40 bytes, 400 in all"):
        write(storage, [3])
    assert not (tmp_path / "replay/schema.json").exists()


def test_a_real_full_disk(tmp_path):
    """A file system of one megabyte, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        storage = TrialStorage(25_000, path=disk / "replay")
        written = write(storage, [50])
        (disk / "other").write_bytes(bytes(300_000))
        with pytest.raises(OSError, match="is full"):  # noqa: PT012
            for number in range(1, 1000):
                written += write(storage, [50], first_id=50 * number)
        assert len(written) > 100
        assert_holds(TrialStorage(path=disk / "replay", mode="read"), written)
        (disk / "other").unlink()
        written += write(storage, [50], first_id=5000)
        assert_holds(storage, written)
        del storage
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_refuses_writes_that_are_not_whole_trials():
    storage = TrialStorage(10)
    for lengths in ([3], [4, 1], [4, 0], []):
        with pytest.raises(ValueError, match=r"steps \[N\] of whole trials.*TrialCollector"):
            storage.write(make_trial(4), lengths)
    with pytest.raises(ValueError, match="got 11 steps at once for a capacity of 10"):
        storage.write(make_trial(11), [11])
    with pytest.raises(TypeError, match="can't be changed in place"):
        storage[0] = make_trial(1)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        TrialStorage(0)
