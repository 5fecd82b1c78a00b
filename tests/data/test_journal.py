from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

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
def test_any_changed_byte_ends_the_journal_there(path, byte):
    content = bytearray(make_records(TRIAL, [0, 1, 2], [0, 2, 4], [1, 1, 1]).tobytes())
    content[RECORD.itemsize + byte] ^= 16
    path.write_bytes(content)
    assert Journal(path).read()["number"].tolist() == [0]


def test_a_rewritten_journal_is_read_anew(path):
    writer, reader, other = Journal(path), Journal(path, writable=False), Journal(path)
    append(writer, make_records(TRIAL, np.arange(5), 0, 1))
    reader.read()
    with exclusive(path.parent):
        writer.rewrite(make_records(START, 5))
    append(other, make_records(TRIAL, 5, 0, 2))
    records = reader.read()
    assert records["kind"].tolist() == [START, TRIAL]
    append(writer, make_records(TRIAL, 6, 3, 2))
    assert reader.read()["number"].tolist() == [6]


class Full:
    """A file on a disk with room for ten bytes more."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        return self.file.write(content[:10])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    journal = Journal(path)
    append(journal, make_records(TRIAL, 0, 0, 5))
    monkeypatch.setattr(journal, "_file", Full(journal._file))
    with pytest.raises(OSError, match="10 of 32 bytes"):
        append(journal, make_records(TRIAL, 1, 6, 5))
    monkeypatch.undo()
    assert path.stat().st_size == RECORD.itemsize
    append(journal, make_records(TRIAL, 1, 6, 5))
    assert Journal(path).read()["number"].tolist() == [0, 1]


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
