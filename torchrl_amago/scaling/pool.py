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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.scaling._board import Board
from torchrl_amago.scaling._learner import RemoteTrials
from torchrl_amago.scaling._spool import Inbox
from torchrl_amago.scaling._stop import EXIT_CODES
from torchrl_amago.scaling.worker import MakeEnv, collect, heartbeat_file

_LOOK_SECONDS = 1.0
_START_FACTOR = 10  # the first heartbeats may take so many times longer: imports, compilation
_MAX_BACK_OFF = 60.0
_PATIENCE = 3  # failures in a row of each worker before a first segment arrives
_PR_SET_PDEATHSIG = 1


@dataclass
class _Worker:
    """A place in the pool, and the process that fills it now."""

    name: str
    process: Any = None
    starts: int = 0
    failures: int = 0  # in a row
    next_start: float = 0.0


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
        self._workers = [_Worker(f"worker-{i}") for i in range(num_workers)]
        self._hearts: dict[str, _Pulse] = {}
        self._has_taken, self._next_look = False, 0.0

    @staticmethod
    def _pack(make_env: MakeEnv, *others: Any) -> Any:
        # Bytes: tensors given to a process otherwise would share their memory with it.
        problem = "an environment" if isinstance(make_env, EnvBase) else None
        try:
            content = pickle.dumps((make_env, *others))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            problem = str(error)
        if problem:
            raise TypeError(
                "workers get a function that makes their environment and the policy by pickle, got "
                f"{problem}. Give a function of a module, or functools.partial of one."
            )
        return content

    def _start(self) -> None:
        self._inbox.recover()
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None
        self._context = multiprocessing.get_context(method or "spawn")
        if method:  # later ones then start at once
            self._context.set_forkserver_preload(["torchrl_amago.scaling.pool"])
        self._supervise()

    def _publish(self, finished: bool) -> None:
        self._board.publish(self.policy, self.version, finished)

    def _take(self) -> dict[str, float] | None:
        taken = self._inbox.take()
        self._has_taken |= taken is not None
        return taken

    def _supervise(self) -> None:
        now = time.monotonic()
        if now < self._next_look or self._stops:
            return
        self._next_look = now + _LOOK_SECONDS
        self._feel_pulses(now)
        for worker in self._workers:
            if worker.process is not None and worker.process.is_alive():
                self._check_pulse(worker, now)
            else:
                self._replace(worker, now)
        failures = sum(worker.failures for worker in self._workers)
        if not self._has_taken and failures >= _PATIENCE * max(len(self._workers), 1):
            raise RuntimeError(
                f"workers failed {failures} times before a first trial arrived: see their error "
                "above. Does make_env() work in a new process?"
            )

    def _feel_pulses(self, now: float) -> None:
        """Read the heartbeats of all workers, also of other machines."""
        for file in (self.run_dir / "workers").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                facts, before = json.loads(file.read_text()), self._hearts.get(file.stem)
                if before is None or before.facts != facts:
                    # Left by a dead process, perhaps: it counts once it changes.
                    self._hearts[file.stem] = _Pulse(facts, -1.0 if before is None else now)

    def _check_pulse(self, worker: _Worker, now: float) -> None:
        pulse = self._hearts.get(worker.name)
        is_playing = pulse is not None and pulse.facts["pid"] == worker.process.pid
        if is_playing and pulse.facts["rounds"]:
            worker.failures, last, limit = 0, pulse.changed, self.hung_after
        else:
            last, limit = worker.next_start, _START_FACTOR * self.hung_after
        if now - max(last, worker.next_start) > limit:
            torchrl_logger.warning(f"{worker.name} has had no heartbeat for {limit} s: replaced")
            worker.process.kill()
            worker.process.join()

    def _replace(self, worker: _Worker, now: float) -> None:
        """Start a worker's next process once its pause is over."""
        if worker.process is not None:
            code = worker.process.exitcode
            # A signal from outside is no failure of the worker.
            worker.failures += code > 0 and code != EXIT_CODES["preempted"]
            pause = min(2.0**worker.failures - 1.0, _MAX_BACK_OFF)
            torchrl_logger.warning(
                f"{worker.name} ended with exit code {code}: starts again in {pause:.0f} s"
            )
            worker.process.close()
            worker.process, worker.next_start = None, now + pause
        if now < worker.next_start:
            return
        seed = (self._seed + 1000 * worker.starts + self._workers.index(worker)) % 2**31
        options = {"name": worker.name, "seed": seed}
        args = (self._content, self.run_dir, options, self._threads)
        worker.process = self._context.Process(target=_work, args=args, name=worker.name)
        worker.process.start()
        worker.starts, worker.next_start = worker.starts + 1, now

    def _figures(self) -> dict[str, float]:
        now = time.monotonic()
        living = {n: p.facts for n, p in self._hearts.items() if now - p.changed < self.hung_after}
        ended = {w.name for w in self._workers if w.process is None or not w.process.is_alive()}
        living = {name: facts for name, facts in living.items() if name not in ended}
        restarted = sum(max(worker.starts - 1, 0) for worker in self._workers)
        return self._describe(living, [w.name for w in self._workers], restarted)

    def _describe(
        self, living: Mapping[str, Mapping], own: Sequence[str], restarted: int
    ) -> dict[str, float]:
        """Return the columns of workers by what they say of themselves."""
        seconds = {name: max(facts["seconds"], 1e-9) for name, facts in living.items()}
        rates = {name: facts["frames"] / seconds[name] for name, facts in living.items()}
        waits = [facts["waited"] / seconds[name] for name, facts in living.items()]
        return {
            "workers/alive": len(living),
            "workers/restarted": restarted,
            "workers/rejected_segments": self._inbox.rejected,
            "workers/frames_per_second": sum(rates.values()),
            **{f"{name}/frames_per_second": rates[name] for name in own if name in rates},
            **({"wait/workers": sum(waits) / len(waits)} if waits else {}),
        }

    def _stop(self) -> None:
        running = [w.process for w in self._workers if w.process is not None]
        for process in running:
            process.kill()  # what it has handed over is complete
        for process in running:
            process.join()
            process.close()
        for worker in self._workers:
            worker.process = None
            heartbeat_file(self.run_dir, worker.name).unlink(missing_ok=True)


@dataclass
class _Pulse:
    """The last content of a heartbeat, and this process's time when it was new."""

    facts: Mapping[str, Any]
    changed: float


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
