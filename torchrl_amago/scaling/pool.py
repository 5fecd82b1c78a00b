"""Collectors as processes of this machine, supervised, and those of other machines."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import math
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
from typing import Any

import torch
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_amago._signals import EXIT_CODES
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.scaling._exchange import Board, Inbox, heartbeat_file
from torchrl_amago.scaling._learner import RemoteTrials
from torchrl_amago.scaling.roles import MakeEnv, collect

_LOOK_SECONDS = 1.0
_START_FACTOR = 10  # the first round may take so many times longer: imports, compilation
_MAX_BACK_OFF = 60.0
_PATIENCE = 3  # failures in a row of each worker before a first segment arrives
_PR_SET_PDEATHSIG = 1


@dataclass(eq=False)
class Worker:
    """A collector of this pool, or of another one, without a number here."""

    name: str
    number: int | None = None
    process: Any = None  # or actor
    starts: int = 0
    failures: int = 0  # in a row
    since: float = -math.inf  # its last sign of life, or when the next process may start
    facts: Mapping[str, Any] = field(default_factory=dict)  # its numbers of itself
    rounds: deque = field(default_factory=deque)  # an actor's that are not taken in


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
        self._own = [Worker(f"worker-{i}", i) for i in range(num_workers)]
        self._workers = {worker.name: worker for worker in self._own}  # and others by heartbeats
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
        self._read_heartbeats(now)
        for worker in self._own:
            if worker.process is not None and (problem := self._find_problem(worker, now)):
                self._end(worker, problem)
            if worker.process is None and now >= worker.since:
                seed = (self._seed + 1000 * worker.starts + worker.number) % 2**31
                worker.process, worker.facts = self._launch(worker.name, seed), {}
                worker.starts, worker.since = worker.starts + 1, now
        failures = sum(worker.failures for worker in self._own)
        if not self._has_taken and failures >= _PATIENCE * max(len(self._own), 1):
            raise RuntimeError(
                f"workers failed {failures} times before a first trial arrived: see their error "
                "above. Does make_env() work in a new process?"
            )

    def _read_heartbeats(self, now: float) -> None:
        for file in (self.run_dir / "workers").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                facts = json.loads(file.read_text())
                worker = self._workers.setdefault(file.stem, Worker(file.stem))
                if worker.facts != facts:
                    # Left by another's dead process, perhaps: it counts once it changes.
                    is_alive = worker.facts or worker.number is not None
                    worker.facts, worker.since = facts, now if is_alive else worker.since

    def _find_problem(self, worker: Worker, now: float) -> str | None:
        """Describe the death of a worker, or its silence."""
        if (code := self._exit_code(worker.process)) is not None:
            # A signal from outside is no failure of the worker.
            worker.failures += code > 0 and code != EXIT_CODES["preempted"]
            return f"ended with exit code {code}"
        limit = self.hung_after * _START_FACTOR
        if worker.facts.get("rounds"):
            limit, worker.failures = self.hung_after, 0
        return f"has had no heartbeat for {limit} s" if now - worker.since > limit else None

    def _end(self, worker: Worker, problem: object) -> None:
        """End a process; the next one starts after a pause."""
        pause = min(2.0**worker.failures - 1.0, _MAX_BACK_OFF)
        torchrl_logger.warning(f"{worker.name} {problem}: starts again in {pause:.0f} s")
        self._kill(worker.process)
        worker.process, worker.since = None, time.monotonic() + pause
        worker.rounds.clear()

    def _launch(self, name: str, seed: int) -> Any:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None
        context = multiprocessing.get_context(method or "spawn")
        if method:  # later ones then start at once
            context.set_forkserver_preload([__name__])
        heartbeat_file(self.run_dir, name).unlink(missing_ok=True)  # of the process before
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

    def pids(self) -> list[int]:
        """Return the processes' numbers of own workers that have played a round."""
        return [worker.facts["pid"] for worker in self._own if worker.facts.get("rounds")]

    def _figures(self) -> dict[str, float]:
        """Return the columns of workers by what they say of themselves."""
        oldest = time.monotonic() - self.hung_after
        living = [w for w in self._workers.values() if w.facts and w.since > oldest]
        living = [w for w in living if w.number is None or w.process is not None]
        seconds = {w.name: max(w.facts["seconds"], 1e-9) for w in living}
        rates = {w.name: w.facts["frames"] / seconds[w.name] for w in living}
        own = [w.name for w in living if w.number is not None]
        found = {
            "workers/alive": len(living),
            "workers/restarted": sum(max(w.starts - 1, 0) for w in self._own),
            "workers/rejected_segments": self._inbox.rejected,
            "workers/frames_per_second": sum(rates.values()),
            **{f"{name}/frames_per_second": rates[name] for name in own},
        }
        if living:
            waits = [w.facts["waited"] / seconds[w.name] for w in living]
            found["wait/workers"] = sum(waits) / len(waits)
        return found

    def _stop(self) -> None:
        for worker in self._own:
            if worker.process is not None:
                self._kill(worker.process)
            worker.process = None
            heartbeat_file(self.run_dir, worker.name).unlink(missing_ok=True)


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
