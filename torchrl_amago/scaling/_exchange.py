"""The files by which a learner and its workers exchange weights and trials.

The weights are one file, replaced in one step. Trials travel as segments: those of one round as an
immutable file, which the learner takes in once. A run's folder ``spool`` has a folder for each
worker, who writes ``<number>-<random>.npz``, complete and on the disk before it gets its name. The
learner renames it to ``intake/<write_count>.npz``, stores its trials, and removes it. The name is
the intention: after a crash, the trials are there already if the buffer's ``write_count`` is
larger. Machines need no common clock, and no memory maps of a network disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl import logger as torchrl_logger

from torchrl_amago import _files as files
from torchrl_amago import keys
from torchrl_amago._facts import check_same, describe_policy, facts
from torchrl_amago._state_file import load_state, save_state
from torchrl_amago._validation import check_choice
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.data._trials import trial_lengths
from torchrl_amago.data.replay import _layout as layout

_INTAKE, _REJECTED = "intake", "rejected"


class Board:
    """A policy, and the file ``<run_dir>/board/policy.npz`` that it is written to or read from.

    The version of a policy is the number of its updates.
    """

    def __init__(
        self, run_dir: str | Path, policy: nn.Module, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.file, self.policy = Path(run_dir) / "board" / "policy.npz", policy
        self.settings, self.version, self.is_last = settings or {}, -1, False
        self._seen: tuple | None = None

    def publish(self, version: int, is_last: bool = False) -> None:
        """Replace the policy on the board; after the last one workers and evaluators end."""
        save_state(self.file, self.describe(version, is_last))

    def describe(self, version: int, is_last: bool = False) -> dict[str, Any]:
        """Return all that workers need of the policy, with the counters of its exploration."""
        state = {k: x for k, x in self.policy.state_dict().items() if isinstance(x, Tensor)}
        found = {"policy": state, "facts": self._facts()}
        return found | {"version": version, "is_last": is_last}

    def update(self) -> bool:
        """Load the policy on the board; return False if there is none, or the same as before."""
        try:
            found = os.stat(self.file)
            seen = found.st_mtime_ns, found.st_ino, found.st_size
            if seen == self._seen:
                return False
            state = load_state(self.file)
        except (OSError, files.DamagedError) as error:  # none yet, or a network disk in between
            if self.file.exists():
                torchrl_logger.warning(f"keeping the older policy: {error}")
            return False
        self._seen = seen
        self.load(state)
        return True

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a described policy; ValueError if task or network are not the learner's."""
        check_same(self.file, state["facts"], self._facts())
        self.policy.load_state_dict(state["policy"], strict=False)
        self.version, self.is_last = state["version"], state["is_last"]

    def _facts(self) -> dict[str, Any]:
        own = describe_policy(self.policy)
        return facts({"weights": own["weights"]}, {**self.settings, **own["settings"]})


def make_segment(
    steps: TensorDictBase, lengths: Sequence[int] | None, frames: int
) -> dict[str, Any]:
    """Make the segment of whole trials ``[N]``, side by side, that a round of `frames` ended."""
    lengths = trial_lengths(steps) if lengths is None else [*map(int, lengths)]
    entries = {key: x.cpu() for key, x in layout.entries_of(steps)[0].items()}
    return {"entries": entries, "lengths": lengths, "frames": frames}


def store_segment(segment: Mapping[str, Any], buffer: TrialReplayBuffer) -> dict[str, float]:
    """Write a segment's trials to a buffer; ValueError if they aren't its environment's, or finite.

    Return the numbers of its steps, trials and versions, and the frames of its round.
    """
    lengths, entries = segment["lengths"], segment["entries"]
    floats = {key: x for key, x in entries.items() if x.is_floating_point()}
    bad = [key for key, x in floats.items() if not math.isfinite(x.sum(dtype=torch.float64))]
    check_choice("entries that are not finite", bad, ([],), "The environment made them.")
    buffer.extend(TensorDict(entries, [sum(lengths)]), lengths=lengths)
    version_N = entries[(keys.POLICY_VERSION,)]
    # Versions only rise within a trial; changes from one trial to the next don't count.
    last_K = torch.tensor(lengths).cumsum(0)[:-1] - 1
    is_change = version_N.diff() != 0
    is_change[last_K] = False
    versions = len(lengths) + int(is_change.sum())
    numbers = {"steps": sum(lengths), "trials": len(lengths), "versions": versions}
    return numbers | {"frames": segment["frames"]}


class Outbox:
    """A worker's end: the folder of its segments, and its heartbeat.

    The heartbeat is a small file that changes at least every second while the worker plays.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self.folder, self.heartbeat = run_dir / "spool" / name, heartbeat_file(run_dir, name)
        for folder in (self.folder, self.heartbeat.parent):
            folder.mkdir(parents=True, exist_ok=True)
        files.recover(self.folder)  # an earlier process of this name may have died writing
        self.facts = {"host": socket.gethostname(), "pid": os.getpid()}
        self.facts |= dict.fromkeys(("beats", "rounds", "frames", "waited"), 0)
        self._number, self._begin, self._next_beat = 0, time.monotonic(), 0.0

    def unread(self) -> int:
        """Return the number of own segments that the learner hasn't taken in."""
        with contextlib.suppress(FileNotFoundError):  # a starting learner removes empty folders
            return len([*self.folder.glob("*.npz")])
        return 0

    def put(self, segment: Mapping[str, Any]) -> None:
        """Write a segment; OSError if the disk is full."""
        # Numbers order the segments of one process; the random part makes names unique.
        save_state(self.folder / f"{self._number:08d}-{secrets.token_hex(4)}.npz", segment)
        self._number += 1

    def beat(self) -> None:
        """Write the numbers so far, at most once a second."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat, self.facts["beats"] = now + 1.0, self.facts["beats"] + 1
            partial = self.heartbeat.with_suffix(".partial")
            try:
                partial.write_text(json.dumps({**self.facts, "seconds": now - self._begin}))
                os.replace(partial, self.heartbeat)
            except OSError as error:
                torchrl_logger.warning(f"no heartbeat: {error}")

    def wait(self, seconds: float) -> None:
        """Wait, and count it."""
        time.sleep(seconds)
        self.facts["waited"] += seconds
        self.beat()

    def close(self) -> None:
        """Remove the heartbeat: this worker leaves by itself."""
        self.heartbeat.unlink(missing_ok=True)


def heartbeat_file(run_dir: Path, name: str) -> Path:
    """Return the path of a worker's heartbeat."""
    return run_dir / "workers" / f"{name}.json"


class Inbox:
    """The learner's end of the spool: the oldest segment of each worker in turn."""

    def __init__(self, run_dir: Path, buffer: TrialReplayBuffer) -> None:
        self.folder, self.buffer = run_dir / "spool", buffer
        self.rejected = 0
        self._last = ""  # the worker of the last segment

    def recover(self) -> None:
        """Finish what an earlier process began; only the holder of the run's lock may."""
        for folder in (_INTAKE, _REJECTED):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        for claimed in (self.folder / _INTAKE).glob("*.npz"):
            if self.buffer.write_count > int(claimed.stem):
                claimed.unlink()
            else:
                self._store(claimed)
        for folder in self._workers():
            files.recover(folder)  # a worker that still writes there tries again
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def take(self) -> dict[str, float] | None:
        """Store the next segment; return its numbers, or None if there is none."""
        for folder in self._workers():
            for path in sorted(folder.glob("*.npz"))[:1]:
                self._last = folder.name
                claimed = self.folder / _INTAKE / f"{self.buffer.write_count}.npz"
                with contextlib.suppress(FileNotFoundError):  # removed by its worker's machine
                    os.replace(path, claimed)
                    return self._store(claimed) or self.take()
        return None

    def _workers(self) -> list[Path]:
        """Return the workers' folders, those after the last one first."""
        folders = [x for x in self.folder.iterdir() if x.name not in (_INTAKE, _REJECTED)]
        return sorted(folders, key=lambda folder: (folder.name <= self._last, folder.name))

    def _store(self, claimed: Path) -> dict[str, float] | None:
        """Store a segment, or set it aside if it can't be."""
        try:
            numbers = store_segment(load_state(claimed), self.buffer)
        except (files.DamagedError, ValueError, LookupError, TypeError) as error:
            place = self.folder / _REJECTED / f"{self._last}-{secrets.token_hex(4)}.npz"
            os.replace(claimed, place)
            self.rejected += 1
            torchrl_logger.warning(f"a segment is set aside in {place}: {error}")
            return None
        claimed.unlink()
        return numbers
