"""Segments reach the buffer once each, whatever dies, and damaged ones do no harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.scaling.lakes import make_buffer, make_player
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.scaling import _exchange
from torchrl_amago.scaling._exchange import Inbox, Outbox


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def segments():
    player = make_player()
    player.board.version = 3
    return [segment for _ in range(6) if (segment := player.play()) is not None]


def put_all(run_dir, segments, name="worker-0"):
    outbox = Outbox(run_dir, name)
    for segment in segments:
        outbox.put(segment)
    return outbox


def take_all(inbox):
    taken = []
    while (numbers := inbox.take()) is not None:
        taken.append(numbers)
    return taken


def stored(buffer):
    return buffer[:]["observation"]


def expected(segments):
    return torch.cat([segment["entries"]["observation",] for segment in segments])


def test_trials_arrive_as_they_were_played(tmp_path, segments):
    outbox = put_all(tmp_path, segments)
    assert outbox.unread() == len(segments)
    buffer = make_buffer()
    inbox = Inbox(tmp_path, buffer)
    inbox.recover()
    taken = take_all(inbox)
    assert outbox.unread() == 0
    assert [numbers["steps"] for numbers in taken] == [sum(s["lengths"]) for s in segments]
    assert stored(buffer).equal(expected(segments))
    assert (buffer[:]["policy_version"] == 3).all()
    assert not [*(tmp_path / "spool" / "intake").iterdir()]


def test_versions_within_a_trial_are_counted(segments):
    player = make_player()
    first = player.play()
    player.board.version = 1
    second = player.play()
    buffer = make_buffer()
    numbers = _exchange.store_segment(first, buffer)
    assert numbers["versions"] == numbers["trials"]
    numbers = _exchange.store_segment(second, buffer)
    assert numbers["trials"] < numbers["versions"] <= 2 * numbers["trials"]


@pytest.mark.parametrize("place", ["before the claim", "before storing", "before removing"])
def test_each_segment_arrives_once_after_a_crash(tmp_path, segments, monkeypatch, place):
    put_all(tmp_path, segments)
    replay = dict(path=tmp_path / "replay", mode="continue")
    inbox = Inbox(tmp_path, make_buffer(**replay))
    inbox.recover()
    inbox.take()

    def crash(*_, **__):
        raise Crash

    owner, name = {
        "before the claim": (_exchange.os, "replace"),
        "before storing": (TrialReplayBuffer, "extend"),
        "before removing": (Path, "unlink"),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, crash)
        with pytest.raises(Crash):
            inbox.take()
    buffer = make_buffer(**replay)
    after = Inbox(tmp_path, buffer)
    after.recover()
    take_all(after)
    assert stored(buffer).equal(expected(segments))


def test_a_crash_while_writing_leaves_no_segment(tmp_path, segments, monkeypatch):
    outbox = Outbox(tmp_path, "worker-0")
    with monkeypatch.context() as patched:
        patched.setattr("torchrl_amago._files.os.fsync", lambda _: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            outbox.put(segments[0])
    assert outbox.unread() == 0


def test_two_processes_of_one_name_keep_their_segments(tmp_path, segments):
    put_all(tmp_path, segments[:1])
    assert put_all(tmp_path, segments[1:2]).unread() == 2


def test_bad_segments_are_set_aside(tmp_path, segments, caplog):
    flipped, foreign, poisoned, good = segments[:4]
    outbox = put_all(tmp_path, [flipped])
    (file,) = outbox.folder.glob("*.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    buffer = make_buffer()
    _exchange.store_segment(good, buffer)
    entries = {key: x for key, x in foreign["entries"].items() if "prev_action" not in key}
    outbox.put(foreign | {"entries": entries})
    reward = poisoned["entries"]["next", "reward"].clone()
    reward[0] = float("nan")
    outbox.put(poisoned | {"entries": poisoned["entries"] | {("next", "reward"): reward}})
    outbox.put(good)
    inbox = Inbox(tmp_path, buffer)
    inbox.recover()
    assert len(take_all(inbox)) == 1
    assert inbox.rejected == 3
    assert len([*(tmp_path / "spool" / "rejected").iterdir()]) == 3
    assert stored(buffer).equal(expected([good, good]))


def test_workers_take_turns(tmp_path, segments, monkeypatch):
    put_all(tmp_path, segments[:3], "fast")
    put_all(tmp_path, segments[3:4], "slow")
    inbox = Inbox(tmp_path, make_buffer())
    inbox.recover()
    order = []
    for _ in range(4):
        inbox.take()
        order.append(inbox._last)
    assert order == ["fast", "slow", "fast", "fast"]
