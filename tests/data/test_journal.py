from __future__ import annotations

import errno
import multiprocessing
import os

import numpy as np
import pytest

from torchrl_amago.data import journal as module
from torchrl_amago.data.journal import (
    EVICT,
    RECORD,
    START,
    TRIAL,
    Journal,
    exclusive,
    make_records,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "journal.bin"
    path.touch()
    return path


def append(journal, *records):
    with exclusive(journal.path.parent):
        journal.read()
        for record in records:
            journal.append(record)
            journal.read()


def test_a_reader_sees_each_record_once(path):
    writer, reader = Journal(path), Journal(path, writable=False)
    append(writer, make_records(START, 0))
    append(writer, make_records(TRIAL, [0, 1], [0, 6], [5, 8]))
    records = reader.read()
    assert records["kind"].tolist() == [START, TRIAL, TRIAL]
    assert records["first"].tolist() == [0, 0, 6]
    assert records["steps"].tolist() == [0, 5, 8]
    assert len(reader.read()) == 0
    append(writer, make_records(EVICT, 1))
    assert reader.read()["number"].tolist() == [1]


@pytest.mark.parametrize("torn", range(1, RECORD.itemsize))
def test_a_torn_record_is_passed_over_and_cut_off_by_the_next_writer(path, torn):
    append(Journal(path), make_records(TRIAL, 0, 0, 5))
    with path.open("ab") as stream:
        stream.write(make_records(TRIAL, 1, 6, 5).tobytes()[:torn])
    reader = Journal(path, writable=False)
    assert reader.read()["number"].tolist() == [0]
    append(Journal(path), make_records(TRIAL, 1, 6, 7))
    assert reader.read()["steps"].tolist() == [7]
    assert path.stat().st_size == 2 * RECORD.itemsize


@pytest.mark.parametrize("byte", range(RECORD.itemsize))
def test_any_changed_byte_of_the_last_record_ends_the_journal_there(path, byte):
    content = bytearray(make_records(TRIAL, [0, 1, 2], [0, 2, 4], [1, 1, 1]).tobytes())
    content[2 * RECORD.itemsize + byte] ^= 16
    path.write_bytes(content)
    assert Journal(path).read()["number"].tolist() == [0, 1]


@pytest.mark.parametrize("byte", range(RECORD.itemsize))
def test_a_changed_byte_with_intact_records_behind_it_is_damage(path, byte, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", (0.0,))
    content = bytearray(make_records(TRIAL, [0, 1, 2, 3], [0, 2, 4, 6], 1).tobytes())
    content[RECORD.itemsize + byte] ^= 16
    path.write_bytes(content)
    journal = Journal(path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"number 1 hasn't.*is damaged.*another copy"):
            append(journal, make_records(TRIAL, 4, 8, 1))
    assert path.read_bytes() == content


def test_damage_is_numbered_from_the_beginning(path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", (0.0,))
    journal = Journal(path)
    append(journal, make_records(TRIAL, [0, 1], [0, 2], 1))
    content = bytearray(make_records(TRIAL, [2, 3, 4], [4, 6, 8], 1).tobytes())
    content[RECORD.itemsize] ^= 16
    with path.open("ab") as stream:
        stream.write(content)
    with pytest.raises(RuntimeError, match="number 3 hasn't"):
        journal.read()


def test_a_record_that_is_being_written_is_no_damage(path, monkeypatch):
    """A reader may copy the first of two records before they are written, and the second after that."""
    records = make_records(TRIAL, [0, 1], [0, 2], 1).tobytes()
    views = [bytes(RECORD.itemsize) + records[RECORD.itemsize :], records]
    path.write_bytes(views[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: path.write_bytes(views[1]))
    assert Journal(path, writable=False).read()["number"].tolist() == [0, 1]


def test_a_rewritten_journal_is_read_anew(path):
    writer, reader, other = Journal(path), Journal(path, writable=False), Journal(path)
    append(writer, make_records(TRIAL, np.arange(5), 0, 1))
    reader.read()
    with exclusive(path.parent):
        writer.prepare(make_records(START, 5))
        writer.replace(sync=True)
    append(other, make_records(TRIAL, 5, 0, 2))
    records = reader.read()
    assert records["kind"].tolist() == [START, TRIAL]
    append(writer, make_records(TRIAL, 6, 3, 2))
    assert reader.read()["number"].tolist() == [6]


def fill_disk(monkeypatch, room=10):
    """Make the disk one with room for so many bytes more at the end of each file."""
    write = os.pwrite

    def write_what_fits(descriptor, content, offset):
        new = offset + len(content) - os.fstat(descriptor).st_size
        return write(descriptor, content[: len(content) - max(0, new - room)], offset)

    monkeypatch.setattr(os, "pwrite", write_what_fits)


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    journal = Journal(path)
    append(journal, make_records(TRIAL, 0, 0, 5))
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="10 of 32 bytes"):
        append(journal, make_records(TRIAL, 1, 6, 5))
    monkeypatch.undo()
    assert path.stat().st_size == RECORD.itemsize
    append(journal, make_records(TRIAL, 1, 6, 5))
    assert Journal(path).read()["number"].tolist() == [0, 1]


def test_reserved_space_is_there_on_a_full_disk(path, monkeypatch):
    journal, reader = Journal(path), Journal(path, writable=False)
    append(journal, make_records(TRIAL, 0, 0, 5))
    journal.reserve(3)
    assert reader.read()["number"].tolist() == [0]
    fill_disk(monkeypatch)
    append(journal, make_records(EVICT, 1))
    assert reader.read()["kind"].tolist() == [EVICT]
    append(journal, make_records(TRIAL, [1, 2], [0, 6], 5))
    assert reader.read()["number"].tolist() == [1, 2]
    with pytest.raises(OSError, match="10 of 32 bytes"):
        append(journal, make_records(TRIAL, 3, 12, 5))
    assert path.stat().st_size == 4 * RECORD.itemsize


def test_space_that_was_reserved_in_vain_is_cut_off(path):
    """By a writer that died before it appended anything."""
    dead, writer = Journal(path), Journal(path)
    append(dead, make_records(TRIAL, 0, 0, 5))
    dead.reserve(5)
    append(writer, make_records(TRIAL, 1, 6, 5))
    assert path.stat().st_size == 2 * RECORD.itemsize


def test_a_full_disk_during_a_rewrite_leaves_the_file_as_it_was(path, monkeypatch):
    journal = Journal(path)
    append(journal, make_records(TRIAL, 0, 0, 5))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.prepare(make_records(START, 5))
    assert Journal(path).read()["kind"].tolist() == [TRIAL]
    assert [file.name for file in path.parent.glob(".*")] == []


def _read_for_ever(journal):
    while True:
        journal.read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_reads_and_writes_at_places_of_its_own(path):
    """What is open at a fork is shared by both processes, a file's position too."""
    journal = Journal(path)
    append(journal, make_records(START, 0))
    child = multiprocessing.get_context("fork").Process(target=_read_for_ever, args=(journal,))
    child.start()
    try:
        for number in range(2000):
            append(journal, make_records(TRIAL, number, 6 * number, 5))
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
    assert Journal(path).read()["number"].tolist() == [0, *range(2000)]


def _count(folder):
    for _ in range(200):
        with exclusive(folder):
            number = int((folder / "number").read_text())
            (folder / "number").write_text(str(number + 1))


def test_the_lock_lets_one_process_in_at_a_time(tmp_path):
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_count, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "number").read_text() == "600"
