"""Replacing files and folders, manifests, disk space and locks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import time

import pytest

from tests.data.trials import flipped
from tests.processes import forked
from torchrl_amago._files import (
    MANIFEST,
    DamagedError,
    explain_full_disk,
    lock,
    read_manifest,
    recover,
    remove_folder,
    replace_file,
    replace_folder,
    reserve,
    verify_manifest,
    write_manifest,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "note.txt"
    for text in ("first", "second"):
        with replace_file(path, "w", encoding="utf-8") as file:
            file.write(text)
    assert path.read_text() == "second"
    assert names(path.parent) == ["note.txt"]


def test_an_error_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")

    def replace():
        with replace_file(path, "w") as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "checkpoint"
    for name in ("a", "b"):
        with replace_folder(path) as folder:
            (folder / name).write_text(name)
    assert names(path) == ["b"]
    assert names(tmp_path) == ["checkpoint"]


def test_an_error_keeps_the_folder_that_was_there(tmp_path):
    path = tmp_path / "checkpoint"
    with replace_folder(path) as folder:
        (folder / "a").write_text("a")

    def replace():
        with replace_folder(path) as folder:
            (folder / "b").write_text("b")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        replace()
    assert names(path) == ["a"]
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("renamed", [False, True])
def test_recovery_brings_back_the_last_complete_version(tmp_path, renamed):
    """A crash before the first, or between the two renames of a replacement."""
    path = tmp_path / "checkpoint"
    (tmp_path / ".checkpoint.partial").mkdir()
    (tmp_path / ".table.csv.partial").write_text("half")
    old = tmp_path / ".checkpoint.previous" if renamed else path
    old.mkdir()
    (old / "a").write_text("a")
    recover(tmp_path)
    assert names(tmp_path) == ["checkpoint"]
    assert names(path) == ["a"]


def test_recovery_of_one_name_leaves_the_others_alone(tmp_path):
    for name in (".a[b].partial", ".a[b].previous", ".ab.partial", ".notes.previous"):
        (tmp_path / name).mkdir()
    recover(tmp_path, "a[b]")
    assert names(tmp_path) == [".ab.partial", ".notes.previous", "a[b]"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "checkpoint"
    link.symlink_to("disk")
    for content in ("first", "second"):
        with replace_folder(link) as folder:
            (folder / "a").write_text(content)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "second"
    assert names(tmp_path) == ["checkpoint", "disk"]


def test_recovery_finishes_removals(tmp_path):
    (tmp_path / ".gone.previous").mkdir()
    recover(tmp_path)
    assert names(tmp_path) == []


def test_removing_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.fixture
def described(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(bytes(range(200)))
    (tmp_path / "note.txt").write_text("hello")
    write_manifest(tmp_path, {"format": 3})
    return tmp_path


def test_an_intact_folder_passes(described):
    assert verify_manifest(described)["format"] == 3
    assert sorted(read_manifest(described)["files"]) == ["note.txt", "sub/data.bin"]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda x: (x / "note.txt").unlink(), "note.txt is missing"),
        (lambda x: (x / "note.txt").write_text("hell"), "has 4 bytes instead of 5"),
        (lambda x: (x / "note.txt").write_text("hullo"), "SHA-256 differs"),
        (lambda x: (x / "planted.pt").write_text("x"), "planted.pt is not listed"),
        (lambda x: (x / "sub" / "planted").symlink_to("/nowhere"), "planted is not listed"),
        (lambda x: (x / MANIFEST).unlink(), "missing or cannot be read"),
        (lambda x: (x / MANIFEST).write_text("{"), "missing or cannot be read"),
        (lambda x: (x / MANIFEST).write_text(json.dumps({"files": []})), "cannot be read"),
    ],
)
def test_damage_is_found(described, damage, match):
    damage(described)
    with pytest.raises(DamagedError, match=match):
        verify_manifest(described)


def test_no_flipped_bit_of_the_manifest_changes_what_it_says(described):
    file, before = described / MANIFEST, read_manifest(described)
    content = file.read_bytes()
    for place in random.Random(0).sample(range(8 * len(content)), 200):
        file.write_bytes(flipped(content, place // 8, place % 8))
        try:
            assert verify_manifest(described) == before  # white space
        except DamagedError:
            continue


def test_space_is_reserved_past_the_end(tmp_path):
    file = tmp_path / "rows.bin"
    reserve(file, 0, 4096)
    reserve(file, 4096, 4096)
    assert file.stat().st_size == 4096
    assert file.stat().st_blocks * 512 >= 4096


def test_a_full_disk_is_explained_once(tmp_path):
    with (
        pytest.raises(
            OSError, match=r"room for .*a/b: 10 bytes are needed, \d+ bytes are free"
        ) as e,
        explain_full_disk(tmp_path),
        explain_full_disk(tmp_path / "a" / "b", 10),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert e.value.errno == errno.ENOSPC


def test_other_errors_pass(tmp_path):
    with pytest.raises(OSError, match="^.*denied$"), explain_full_disk(tmp_path):
        raise OSError(errno.EACCES, "denied")


def _hold(file, ready):
    with lock(file, wait=False):
        ready.set()
        time.sleep(60)


def test_the_death_of_its_holder_releases_a_lock(tmp_path):
    file = tmp_path / "lock"
    ready = forked.Event()
    process = forked.Process(target=_hold, args=(file, ready))
    process.start()
    assert ready.wait(60)
    with (
        pytest.raises(BlockingIOError, match=f"in use by process {process.pid}"),
        lock(file, wait=False),
    ):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock(file, wait=False):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_forked_while_a_lock_is_held_neither_keeps_nor_releases_it(tmp_path):
    """A thread that draws batches ahead may hold it while workers are started."""
    import fcntl

    ours, theirs = os.pipe()
    held = contextlib.ExitStack()
    held.enter_context(lock(tmp_path / "lock", wait=False))
    held.enter_context(replace_folder(tmp_path / "folder"))
    if not (process := os.fork()):
        os.close(theirs)
        os.read(ours, 1)  # until the parent is done
        os._exit(0)
    if not (other := os.fork()):
        held.pop_all().__exit__(SystemExit, SystemExit(), None)
        os._exit(0)
    os.waitpid(other, 0)
    with pytest.raises(BlockingIOError), lock(tmp_path / "lock", wait=False):
        pass
    (tmp_path / ".folder.partial").mkdir(exist_ok=True)
    held.close()
    try:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        with lock(tmp_path / "lock", wait=False):
            pass
    finally:
        os.close(theirs)
        os.waitpid(process, 0)
