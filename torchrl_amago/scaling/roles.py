"""The roles beside a learner, with its newest policy: collect trials, or evaluate."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_amago import keys
from torchrl_amago._files import lock
from torchrl_amago._signals import EXIT_CODES, Outcome, on_signals
from torchrl_amago._validation import check_counts
from torchrl_amago.data import TrialCollector
from torchrl_amago.data._trials import trial_lengths
from torchrl_amago.data.replay._layout import entries_of
from torchrl_amago.evaluation import Results, evaluation_metrics
from torchrl_amago.progress import ProgressTable
from torchrl_amago.scaling._exchange import Board, Outbox, Segment

MakeEnv = Callable[[], EnvBase]

_RETRY_SECONDS, _POLL_SECONDS, _LAST_SECONDS = 5.0, 0.5, 10.0
_PR_SET_PDEATHSIG = 1


class LeaveError(Exception):
    """A signal came a while ago, and the piece of work still runs."""


class Role(Board):
    """A collector or evaluator: its copy of the newest policy, and the signals that end it."""

    outcome: Outcome | None = None
    _deadline = math.inf

    def request_stop(self, outcome: Outcome) -> None:
        """End after the running piece of work, as a handler of signals."""
        self.outcome, self._deadline = outcome, time.monotonic() + _LAST_SECONDS

    def check(self, *_: Any) -> None:
        """Raise :class:`LeaveError` once the work has had 10 seconds, as a hook of the policy."""
        if time.monotonic() > self._deadline:
            raise LeaveError


class Player:
    """An environment and a board's policy that play rounds; each step has the policy's version."""

    def __init__(
        self,
        make_env: MakeEnv,
        board: Board,
        *,
        round_steps: int,
        fragment_length: int | None = None,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        env = make_env()
        self.board, self.frames, self._segments = board, env.batch_size.numel() * round_steps, []
        board.policy.register_forward_hook(self._stamp)
        options = {"frames_per_batch": self.frames, "fragment_length": fragment_length}
        options |= {"replay_buffer": self, "total_frames": -1}
        self.collector = TrialCollector(env, board.policy, **options)
        self.collector.set_seed(seed)
        self._rounds = iter(self.collector)

    def _stamp(self, _: nn.Module, __: Any, step: TensorDictBase) -> None:
        version = torch.full(step.shape, self.board.version, device=step.device)
        step.set(keys.POLICY_VERSION, version)

    def extend(self, trials: TensorDictBase, lengths: list[int] | None = None) -> None:
        """Keep the whole trials ``[N]`` that the collector writes, as if this were its buffer."""
        lengths = trial_lengths(trials) if lengths is None else lengths
        entries = {key: x.cpu() for key, x in entries_of(trials)[0].items()}
        self._segments.append({"entries": entries, "lengths": lengths, "frames": self.frames})

    def play(self) -> Segment | None:
        """Play a round; return the segment of the trials that it ended, or None without any."""
        next(self._rounds)
        return self._segments.pop() if self._segments else None


def collect(
    make_env: MakeEnv,
    policy: nn.Module,
    run_dir: str | Path,
    *,
    round_steps: int,
    fragment_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    seed: int | None = None,
    max_unread: int = 1,
) -> Outcome:
    """Collect for the learner of a run until it has finished, or until a signal.

    The run's folder may be on a network disk. Any number of collectors may come and go, before the
    learner as well. Between rounds each takes the newest policy, and it waits while `max_unread` of
    its segments are unread, so nothing is discarded. On a full disk it waits, too.

    Args:
        make_env: makes the batched environment, with trial and previous-step transforms.
        policy: built as the learner's; its weights come from the learner.
        run_dir: the learner's folder.
        round_steps: steps of each environment in a round.
        fragment_length: see :class:`~torchrl_amago.data.TrialCollector`.
        settings: values by name that must be those of the learner, as its trainer's ``settings``.
        name: of this worker, unique in the run; by default host, process and a random number.
        seed: of tasks and exploration; a random one by default. No two workers should share one.
        max_unread: segments that may wait for the learner.

    Returns:
        ``"finished"``; ``"interrupted"`` after Ctrl-C; ``"preempted"`` after SIGTERM and the like.
        Complete trials of the running round are handed over if it ends within 10 seconds.

    Raises:
        ValueError: if task or network differ from the learner's; the message names them.
    """
    check_counts(round_steps=round_steps, max_unread=max_unread)
    name = name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    role, outbox, player = Role(run_dir, policy, settings), Outbox(Path(run_dir), name), None
    steps = {"round_steps": round_steps, "fragment_length": fragment_length}
    seed = secrets.randbelow(2**31) if seed is None else seed
    policy.register_forward_pre_hook(outbox.beat)
    policy.register_forward_pre_hook(role.check)
    with on_signals(role.request_stop):
        while role.outcome is None:
            role.update()
            if role.is_last:
                role.outcome = "finished"
                break
            if role.version < 0 or outbox.unread() >= max_unread:
                outbox.wait(0.1)
                continue
            player = player or Player(make_env, role, **steps, seed=seed)
            try:
                segment = player.play()
            except LeaveError:
                break
            outbox.facts["rounds"] += 1
            outbox.facts["frames"] += player.frames
            while segment is not None:
                try:
                    outbox.put(segment)
                    break
                except OSError as error:  # the disk is full or away
                    torchrl_logger.warning(f"waiting with {sum(segment['lengths'])} steps: {error}")
                    if role.outcome is not None:
                        break
                    outbox.wait(_RETRY_SECONDS)
    outbox.heartbeat.unlink(missing_ok=True)  # this worker leaves by itself
    if player is not None:
        player.collector.shutdown()
    return role.outcome


def evaluate_run(
    policy: nn.Module,
    evaluator: Callable[[], Results],
    run_dir: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Evaluate a run's newest policy, again and again, until its learner has finished.

    Rows go to ``<run_dir>/evaluations/0.csv``, those of a second evaluator at the same time to
    ``1.csv``, and so on. A policy that is replaced during an evaluation is skipped.

    Args:
        policy: built as the learner's; the evaluator plays it.
        evaluator: called without arguments; returns numbers by name or ``TrialResults``.
        run_dir, settings: see :func:`~torchrl_amago.scaling.collect`, as for results and errors.
    """
    role = Role(run_dir, policy, settings)
    hook = policy.register_forward_pre_hook(role.check)
    with _free_table(Path(run_dir) / "evaluations") as table, hook, on_signals(role.request_stop):
        while role.outcome is None:
            if not role.update():
                time.sleep(_POLL_SECONDS)
                continue
            begin = time.monotonic()
            with contextlib.suppress(LeaveError):
                metrics = evaluation_metrics(evaluator())
                seconds = time.monotonic() - begin
                table.append({"update": role.version, "seconds_evaluation": seconds, **metrics})
            if role.is_last:
                role.outcome = role.outcome or "finished"
    return role.outcome


@contextlib.contextmanager
def _free_table(folder: Path) -> Iterator[ProgressTable]:
    """Hold the first table that no other evaluator writes, with the rows it has."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        for number in itertools.count():
            with contextlib.suppress(BlockingIOError):
                held.enter_context(lock(folder / f".{number}.lock", wait=False))
                break
        table = ProgressTable(folder / f"{number}.csv")
        if table.path.exists():
            table.load_state_dict({"text": table.path.read_text(encoding="utf-8")})
        yield table


def work(content: bytes, run_dir: Path, options: Mapping[str, Any], threads: int) -> None:
    """Be a worker's process, which ends with its parent, even by SIGKILL."""
    if sys.platform == "linux":  # also where Python's threads are held up
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's
    torch.set_num_threads(threads)
    make_env, policy, role = pickle.loads(content)  # noqa: S301 - the parent's own bytes
    sys.exit(EXIT_CODES[collect(make_env, policy, run_dir, **role, **options)])


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
