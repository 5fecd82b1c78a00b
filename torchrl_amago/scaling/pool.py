"""A learner's workers: processes of this machine, supervised, and collectors of other machines."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_amago import keys
from torchrl_amago._signals import EXIT_CODES
from torchrl_amago._validation import check_positive
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.scaling._exchange import Board, Inbox
from torchrl_amago.scaling.roles import MakeEnv, work

_POLL_SECONDS, _LOOK_SECONDS = 0.02, 1.0
_START_FACTOR = 10  # the first round may take so many times longer: imports, compilation
_MAX_BACK_OFF = 60.0
_PATIENCE = 3  # failures in a row of each worker before a first segment arrives


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


@dataclass(eq=False, repr=False)
class WorkerPool:
    """Collector whose trials N supervised processes play, and any number of others with its folder.

    An iteration takes in trials until the buffer holds the steps that are due, and waits where
    there are none. Workers wait while their trials are not taken in. Due are the frames of one more
    round, or as many steps as hold ``samples_per_insert``.

    A process that died is started again, after a pause that doubles while it keeps failing; one
    without a heartbeat for ``hung_after`` seconds is killed and replaced. At most the unfinished
    trials of its last round are lost. The processes end with this one, however it ends.

    Args:
        make_env, round_steps, fragment_length, settings: see
            :func:`~torchrl_amago.scaling.collect`; the function must be picklable.
        policy: the learner's, whose weights the workers get.
        replay_buffer: of whole trials; only this process writes to it.
        run_dir: the run's folder.
        num_workers: 0 for trials from other machines alone.
        total_updates: version at which the workers end.
        publish_interval: updates between two versions for the workers.
        samples_per_insert: real steps of batches for each step that is written.
        keeps_replay: the buffer's folder outlives the process, so that checkpoints don't copy it.
        num_learners: ranks that each sample as many steps.
        hung_after: seconds; before its first round, a process may take ten times longer.
        threads: CPU threads of each process.

    Raises:
        TypeError: if `make_env` or the policy can't be pickled.
        RuntimeError: from iterating, if all workers fail again and again before a first trial.
    """

    make_env: MakeEnv
    policy: nn.Module
    replay_buffer: TrialReplayBuffer
    run_dir: str | Path
    num_workers: int
    _: KW_ONLY
    total_updates: int
    round_steps: int
    fragment_length: int | None = None
    settings: Mapping[str, Any] | None = None
    publish_interval: int = 20
    samples_per_insert: float | None = None
    keeps_replay: bool = False
    num_learners: int = 1
    hung_after: float = 60.0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.samples_per_insert is not None:
            remedy = "None is for a single process's."
            check_positive(remedy, samples_per_insert=self.samples_per_insert)
        self.run_dir = Path(self.run_dir)
        self._heartbeats = self.run_dir / "workers"
        self._content = self._pack()
        self._board = Board(self.run_dir, self.policy, self.settings)
        self._inbox = Inbox(self.run_dir, self.replay_buffer)
        self._own = [Worker(f"worker-{i}", i) for i in range(self.num_workers)]
        self._workers = {worker.name: worker for worker in self._own}  # and others by heartbeats
        begin = self.replay_buffer.write_count
        # Due: the steps that should be written by now, counted as the buffer counts them.
        self._counts = {"due": begin, "begin": begin, "sampled": 0, "version": 0, "round": 1}
        self._is_open = self._stops = self._has_taken = False
        self._seed, self._next_look = 0, 0.0
        self.replay_buffer.append_transform(self._observe)
        self._start_window()

    def __iter__(self) -> Iterator[None]:
        self._is_open, self._published = True, -math.inf
        self.update_policy_weights_()
        self._inbox.recover()
        while self._take_in_due():
            yield

    def _take_in_due(self) -> bool:
        """Take in the trials that are due; return False if a signal comes first."""
        counts, buffer = self._counts, self.replay_buffer
        due = counts["due"]
        if self.samples_per_insert is None:
            due += counts["round"]
        elif not buffer.can_sample():
            due = buffer.write_count + 1
        while buffer.write_count < due and not self._stops:
            self._supervise()
            if (taken := self._take()) is None:
                time.sleep(_POLL_SECONDS)
                self._window["waited"] += _POLL_SECONDS
                continue
            counts["round"], self._has_taken = taken["frames"], True
            self._window.update(taken)
        counts["due"] = due
        return not self._stops

    def request_stop(self) -> None:
        self._stops = True

    def _observe(self, batch: TensorDictBase) -> TensorDictBase:
        """Count the real steps of a sampled batch ``[B, T]``, as a transform of the buffer's."""
        mask_BT, counts = batch.get(keys.MASK, None), self._counts
        if mask_BT is not None:  # not steps read by their places
            lag_N = counts["version"] - batch.get(keys.POLICY_VERSION)[mask_BT]
            sampled = len(lag_N) * self.num_learners
            counts["sampled"] += sampled
            if self.samples_per_insert is not None:
                counts["due"] += sampled / self.samples_per_insert
            self._lags.append(lag_N)
            self._newest_B = batch.get("index")[:, 0]  # numbers of the last batch's trials
        return batch

    def after_update(self, trainer: Any) -> dict[str, float]:
        """Follow the trainer's updates, as one of its callbacks; return the columns of a row."""
        counts, log = trainer.counts, trainer.intervals.log
        self._counts["version"] = counts.updates
        self._supervise()
        return self.metrics() if counts.updates % log == 0 else {}

    def metrics(self) -> dict[str, float]:
        """Return lag, ratio, waiting and the workers' columns since the last call."""
        window, counts, buffer = self._window, self._counts, self.replay_buffer
        inserted = max(buffer.write_count - counts["begin"], 1)
        seconds = max(time.monotonic() - window["since"], 1e-9)
        found = {
            "ratio/samples_per_insert": counts["sampled"] / inserted,
            "wait/learner": min(window["waited"] / seconds, 1.0),
        }
        if self._lags:
            lag_N = torch.cat(self._lags).numpy()
            lags = {"mean": lag_N.mean(), "p95": np.percentile(lag_N, 95), "max": lag_N.max()}
            found |= {f"lag/{name}": float(value) for name, value in lags.items()}
            # Steps written since trials, of which some may be evicted.
            trials = buffer.storage.trials()
            position_B = (self._newest_B.numpy() - trials.number[0]).clip(0)
            stop_B = trials.entries["stop"][position_B]
            found["replay/age"] = buffer.write_count - float(stop_B.mean())
        if window["trials"]:
            found["lag/versions_per_trial"] = window["versions"] / window["trials"]
        self._start_window()
        return found | self._figures()

    def _start_window(self) -> None:
        self._window, self._lags = Counter(since=time.monotonic()), []

    def update_policy_weights_(self, *_: Any, **__: Any) -> None:
        """Publish the weights if the workers' are older than ``publish_interval`` updates."""
        version = self._counts["version"]
        if self._is_open and version - self._published >= self.publish_interval:
            self._publish()
            self._published = version

    def set_seed(self, seed: int, static_seed: bool = False) -> None:
        """Seed the workers that start from now on, each with a number of its own."""
        self._seed = seed

    def reset(self) -> None:
        """Do nothing: workers begin new trials when they start."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; trials in progress are the workers'."""
        return {"in_progress": {**self._counts, "seed": self._seed}}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Go on counting; trials that were written since then count as well."""
        saved = dict(state["in_progress"])
        # Another seed than before, or the tasks would come again.
        self._seed = saved.pop("seed") + saved["version"] + 1
        # A replay buffer of another folder may have fewer.
        written = self.replay_buffer.write_count
        self._counts = saved | {name: min(saved[name], written) for name in ("due", "begin")}

    def shutdown(self, **_: Any) -> None:
        """End the workers; those of other machines too if this was the last update."""
        if self._is_open and self._counts["version"] >= self.total_updates:
            self._publish(is_last=True)
        self._is_open = False
        for worker in self._own:
            if worker.process is not None:
                self._kill(worker.process)
            worker.process = None
            (self._heartbeats / f"{worker.name}.json").unlink(missing_ok=True)

    def _pack(self, dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
        """Pickle what workers need; given to a process as they are, tensors would be shared."""
        names = ("round_steps", "fragment_length", "settings")
        try:
            if isinstance(self.make_env, EnvBase):
                raise TypeError(type(self.make_env).__name__)
            # On the CPU, where every worker can load it.
            policy = copy.deepcopy(self.policy).to("cpu")
            return dumps((self.make_env, policy, {name: getattr(self, name) for name in names}))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                "workers get a function that makes their environment and the policy by pickle, got "
                f"{error}. Give a function of a module, or functools.partial of one."
            ) from error

    def _publish(self, is_last: bool = False) -> None:
        self._board.publish(self._counts["version"], is_last)

    def _take(self) -> dict[str, float] | None:
        return self._inbox.take()

    def _supervise(self) -> None:
        """Start workers, replace those that have died or hang, at most once a second."""
        now = time.monotonic()
        if now < self._next_look or self._stops or not self._is_open:
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
        for file in self._heartbeats.glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                facts = json.loads(file.read_text())
                worker = self._workers.setdefault(file.stem, Worker(file.stem))
                if worker.facts != facts:
                    # Left by another's dead process, perhaps: it counts once it changes.
                    is_alive = worker.facts or worker.number is not None
                    worker.facts, worker.since = facts, now if is_alive else worker.since

    def _find_problem(self, worker: Worker, now: float) -> str | None:
        """Describe the death of a worker, or its silence."""
        # An actor has no exit code: its death shows in the value of its round.
        if (code := getattr(worker.process, "exitcode", None)) is not None:
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
        has_server = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if has_server else "spawn")
        context.set_forkserver_preload([__name__])  # later ones then start at once
        (self._heartbeats / f"{name}.json").unlink(missing_ok=True)  # of the process before
        args = (self._content, self.run_dir, {"name": name, "seed": seed}, self.threads)
        process = context.Process(target=work, args=args, name=name)
        process.start()
        return process

    def _kill(self, process: Any) -> None:
        process.kill()  # what it has handed over is complete
        process.join()
        process.close()

    def pids(self) -> list[int]:
        """Return the processes' numbers of own workers that have played a round."""
        return [worker.facts["pid"] for worker in self._own if worker.facts.get("rounds")]

    def _figures(self) -> dict[str, float]:
        """Return the columns of workers by what they say of themselves."""
        oldest, rates, waits = time.monotonic() - self.hung_after, {}, []
        for worker in self._workers.values():
            is_ended = worker.number is not None and worker.process is None
            if worker.facts and worker.since > oldest and not is_ended:
                seconds = max(worker.facts["seconds"], 1e-9)
                rates[worker.name] = worker.facts["frames"] / seconds
                waits.append(worker.facts["waited"] / seconds)
        found = {
            "workers/alive": len(rates),
            "workers/restarted": sum(max(w.starts - 1, 0) for w in self._own),
            "workers/rejected_segments": self._inbox.rejected,
            "workers/frames_per_second": sum(rates.values()),
        }
        own = [w.name for w in self._own if w.name in rates]
        found |= {f"{name}/frames_per_second": rates[name] for name in own}
        return found | ({"wait/workers": sum(waits) / len(waits)} if waits else {})
