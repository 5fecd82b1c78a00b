"""Collectors as processes of this machine, supervised, and those of other machines."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_amago._signals import EXIT_CODES
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.scaling._board import Board
from torchrl_amago.scaling._learner import RemoteTrials
from torchrl_amago.scaling._spool import Inbox, heartbeat_file
from torchrl_amago.scaling.worker import MakeEnv, collect

_LOOK_SECONDS = 1.0
_START_FACTOR = 10  # the first round may take so many times longer: imports, compilation
_MAX_BACK_OFF = 60.0
_PATIENCE = 3  # failures in a row of each worker before a first segment arrives
_PR_SET_PDEATHSIG = 1


@dataclass(eq=False)
class Place:
    """A place in the pool, and the process or actor that fills it now."""

    name: str
    number: int
    process: Any = None
    starts: int = 0
    failures: int = 0  # in a row
    since: float = 0.0  # its last sign of life, or when the next one may start
    rounds: deque = field(default_factory=deque)  # an actor's that are not taken in


class Pulse(NamedTuple):
    """A worker's numbers of itself, and this process's time when they were new."""

    facts: Mapping[str, Any]
    changed: float


class WorkerPool(RemoteTrials):
    """N supervised collector processes, beside any number of others with the same run folder.

    A process that died is started again, after a pause that doubles while it keeps failing; one
    without a heartbeat for ``hung_after`` seconds is killed and replaced. At most the unfinished
    trials of its last round are lost. The processes end with this one, however it ends.

    Args:
        make_env: makes the batched environment of a worker; must be picklable.
        num_workers: 0 for trials from other machines alone.
        round_steps: steps of each environment in a round.
        fragment_length: see :class:`~torchrl_amago.data.TrialCollector`.
        settings: values that collectors elsewhere must share, besides the policy's own.
        hung_after: seconds; before its first round, a process may take ten times longer.
        threads: CPU threads of each process.
        options: of :class:`RemoteTrials`.

    Raises:
        TypeError: if `make_env` or the policy can't be pickled.
        RuntimeError: from iterating, if all workers fail again and again before a first trial.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        policy: nn.Module,
        replay_buffer: TrialReplayBuffer,
        run_dir: str | Path,
        num_workers: int,
        *,
        round_steps: int,
        fragment_length: int | None = None,
        settings: Mapping[str, Any] | None = None,
        hung_after: float = 60.0,
        threads: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(policy, replay_buffer, run_dir, **options)
        self.hung_after, self._threads = hung_after, threads
        role = {"round_steps": round_steps, "fragment_length": fragment_length}
        role["settings"] = settings
        # On the CPU, where every worker can load it.
        self._content = self._pack(make_env, copy.deepcopy(policy).to("cpu"), role)
        self._board = Board(self.run_dir, settings)
        self._inbox = Inbox(self.run_dir, replay_buffer)
        self._places = {f"worker-{i}": Place(f"worker-{i}", i) for i in range(num_workers)}
        self._pulses: dict[str, Pulse] = {}
        self._has_taken, self._next_look = False, 0.0

    def _pack(self, make_env: MakeEnv, *others: Any) -> Any:
        # Bytes: tensors given to a process otherwise would share their memory with it.
        try:
            if isinstance(make_env, EnvBase):
                raise TypeError(type(make_env).__name__)
            return pickle.dumps((make_env, *others))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                "workers get a function that makes their environment and the policy by pickle, got "
                f"{error}. Give a function of a module, or functools.partial of one."
            ) from error

    def _start(self) -> None:
        self._inbox.recover()
        self._supervise()

    def _publish(self, finished: bool) -> None:
        self._board.publish(self.policy, self.version, finished)

    def _take(self) -> dict[str, float] | None:
        taken = self._inbox.take()
        self._has_taken |= taken is not None
        return taken

    def _supervise(self) -> None:
        """Replace the workers that have died or hang, at most once a second."""
        now = time.monotonic()
        if now < self._next_look or self._stops:
            return
        self._next_look = now + _LOOK_SECONDS
        self._feel_pulses(now)
        for place in self._places.values():
            if place.process is not None and (problem := self._find_problem(place, now)):
                self._end(place, problem)
            if place.process is None and now >= place.since:
                self._pulses.pop(place.name, None)
                heartbeat_file(self.run_dir, place.name).unlink(missing_ok=True)
                seed = (self._seed + 1000 * place.starts + place.number) % 2**31
                place.process = self._launch(place.name, seed)
                place.starts, place.since = place.starts + 1, now
        failures = sum(place.failures for place in self._places.values())
        if not self._has_taken and failures >= _PATIENCE * max(len(self._places), 1):
            raise RuntimeError(
                f"workers failed {failures} times before a first trial arrived: see their error "
                "above. Does make_env() work in a new process?"
            )

    def _feel_pulses(self, now: float) -> None:
        """Read the heartbeats of all workers, also of other machines."""
        for file in (self.run_dir / "workers").glob("*.json"):
            name = file.stem
            with contextlib.suppress(OSError, ValueError):
                facts, before = json.loads(file.read_text()), self._pulses.get(name)
                if before is None or before.facts != facts:
                    # Left by another's dead process, perhaps: it counts once it changes.
                    is_known = before is not None or name in self._places
                    self._pulses[name] = Pulse(facts, now if is_known else -1.0)

    def _find_problem(self, place: Place, now: float) -> str | None:
        """Describe the death of a worker, or its silence."""
        if (code := self._exit_code(place.process)) is not None:
            # A signal from outside is no failure of the worker.
            place.failures += code > 0 and code != EXIT_CODES["preempted"]
            return f"ended with exit code {code}"
        limit = self.hung_after * _START_FACTOR
        if place.name in self._played():
            limit, place.failures = self.hung_after, 0
            place.since = max(place.since, self._pulses[place.name].changed)
        return f"has had no heartbeat for {limit} s" if now - place.since > limit else None

    def _end(self, place: Place, problem: object) -> None:
        """End a worker; the next one starts after a pause."""
        pause = min(2.0**place.failures - 1.0, _MAX_BACK_OFF)
        torchrl_logger.warning(f"{place.name} {problem}: starts again in {pause:.0f} s")
        self._kill(place.process)
        place.process, place.since = None, time.monotonic() + pause
        place.rounds.clear()

    def _launch(self, name: str, seed: int) -> Any:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None
        context = multiprocessing.get_context(method or "spawn")
        if method:  # later ones then start at once
            context.set_forkserver_preload([__name__])
        args = (self._content, self.run_dir, {"name": name, "seed": seed}, self._threads)
        process = context.Process(target=_work, args=args, name=name)
        process.start()
        return process

    def _exit_code(self, process: Any) -> int | None:
        return process.exitcode

    def _kill(self, process: Any) -> None:
        process.kill()  # what it has handed over is complete
        process.join()
        process.close()

    def _played(self) -> list[str]:
        """Return the names of own workers that have played a round."""
        names = self._pulses.keys() & self._places.keys()
        return sorted(name for name in names if self._pulses[name].facts["rounds"])

    def pids(self) -> list[int]:
        """Return the processes' numbers of own workers that have played a round."""
        return [self._pulses[name].facts["pid"] for name in self._played()]

    def _figures(self) -> dict[str, float]:
        """Return the columns of workers by what they say of themselves."""
        oldest, places = time.monotonic() - self.hung_after, self._places
        living = {
            name: facts
            for name, (facts, changed) in self._pulses.items()
            if (places[name].process is not None if name in places else changed > oldest)
        }
        seconds = {name: max(facts["seconds"], 1e-9) for name, facts in living.items()}
        rates = {name: facts["frames"] / seconds[name] for name, facts in living.items()}
        waits = [facts["waited"] / seconds[name] for name, facts in living.items()]
        return {
            "workers/alive": len(living),
            "workers/restarted": sum(max(place.starts - 1, 0) for place in places.values()),
            "workers/rejected_segments": self._inbox.rejected,
            "workers/frames_per_second": sum(rates.values()),
            **{f"{name}/frames_per_second": rates[name] for name in places if name in rates},
            **({"wait/workers": sum(waits) / len(waits)} if waits else {}),
        }

    def _stop(self) -> None:
        for place in self._places.values():
            if place.process is not None:
                self._kill(place.process)
            place.process = None
            heartbeat_file(self.run_dir, place.name).unlink(missing_ok=True)


def _work(content: bytes, run_dir: Path, options: Mapping[str, Any], threads: int) -> None:
    """Be a worker's process."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's
    torch.set_num_threads(threads)
    make_env, policy, role = pickle.loads(content)  # noqa: S301 - the parent's own bytes
    sys.exit(EXIT_CODES[collect(make_env, policy, run_dir, **role, **options)])


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL."""
    if sys.platform == "linux":  # also where Python's threads are held up
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait([parent])
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, daemon=True).start()
