"""The collect role: play rounds with the newest policy, hand over whole trials."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_amago import keys
from torchrl_amago._files import DamagedError
from torchrl_amago._signals import on_signals
from torchrl_amago._validation import check_counts
from torchrl_amago.data import TrialCollector
from torchrl_amago.scaling._board import Board
from torchrl_amago.scaling._spool import Outbox, make_segment
from torchrl_amago.scaling._stop import LeaveError, Outcome, Stop

MakeEnv = Callable[[], EnvBase]

_RETRY_SECONDS = 5.0


class Player:
    """An environment and a copy of the policy that play rounds; each step has its version."""

    def __init__(
        self,
        make_env: MakeEnv,
        policy: nn.Module,
        *,
        round_steps: int,
        fragment_length: int | None = None,
        seed: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        torch.manual_seed(seed)
        env = make_env()
        self.policy, self.version, self._on_step = policy, -1, on_step
        self.frames, self._trials = env.batch_size.numel() * round_steps, []
        policy.register_forward_hook(self._stamp)
        options = {"replay_buffer": self, "frames_per_batch": self.frames, "total_frames": -1}
        self._collector = TrialCollector(env, policy, fragment_length=fragment_length, **options)
        self._collector.set_seed(seed)
        self._rounds = iter(self._collector)

    def _stamp(self, _: nn.Module, __: Any, step: TensorDictBase) -> None:
        self._on_step()
        step.set(keys.POLICY_VERSION, torch.full(step.shape, self.version, device=step.device))

    def extend(self, trials: TensorDictBase, lengths: list[int] | None = None) -> None:
        """Keep the trials that the collector writes, as if this were its replay buffer."""
        self._trials.append(make_segment(trials, lengths, self.frames))

    def play(self) -> dict[str, Any] | None:
        """Play a round; return the segment of the trials that it ended, or None without any."""
        next(self._rounds)
        return self._trials.pop() if self._trials else None

    def close(self) -> None:
        """Close the environment."""
        self._collector.shutdown()


class Heart:
    """A worker's heartbeat: a small file that changes at least every second while it plays."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.file = heartbeat_file(run_dir, name)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.facts = {"host": socket.gethostname(), "pid": os.getpid()}
        self.facts |= dict.fromkeys(("beats", "rounds", "frames", "waited"), 0)
        self._begin = time.monotonic()
        self._next = 0.0

    def beat(self) -> None:
        """Write the numbers so far, at most once a second."""
        now = time.monotonic()
        if now >= self._next:
            self._next, self.facts["beats"] = now + 1.0, self.facts["beats"] + 1
            partial = self.file.with_suffix(".partial")
            try:
                partial.write_text(json.dumps({**self.facts, "seconds": now - self._begin}))
                os.replace(partial, self.file)
            except OSError as error:
                torchrl_logger.warning(f"no heartbeat: {error}")

    def wait(self, seconds: float) -> None:
        """Wait, and count it."""
        time.sleep(seconds)
        self.facts["waited"] += seconds
        self.beat()

    def stop(self) -> None:
        """Remove the file: this worker left by itself."""
        self.file.unlink(missing_ok=True)


def heartbeat_file(run_dir: Path, name: str) -> Path:
    """Return the path of a worker's heartbeat."""
    return Path(run_dir) / "workers" / f"{name}.json"


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
    run_dir, stop = Path(run_dir), Stop()
    board, outbox, heart = Board(run_dir, settings), Outbox(run_dir, name), Heart(run_dir, name)
    seed, player = secrets.randbelow(2**31) if seed is None else seed, None

    def on_step() -> None:
        heart.beat()
        stop.check()

    with on_signals(stop.request):
        while stop.outcome is None:
            if (state := board.newer()) is not None:
                if state["finished"]:
                    stop.outcome = "finished"
                    continue
                version = board.load(state, policy)
                if player is None:
                    options = {"round_steps": round_steps, "fragment_length": fragment_length}
                    player = Player(make_env, policy, **options, seed=seed, on_step=on_step)
                player.version = heart.facts["version"] = version
            if player is None or outbox.unread() >= max_unread:
                heart.wait(0.1)
                continue
            try:
                segment = player.play()
            except LeaveError:
                break
            heart.facts["rounds"] += 1
            heart.facts["frames"] += player.frames
            while segment is not None and not _put(outbox, segment) and stop.outcome is None:
                heart.wait(_RETRY_SECONDS)
    heart.stop()
    if player is not None:
        player.close()
    return stop.outcome


def _put(outbox: Outbox, segment: Mapping[str, Any]) -> bool:
    """Write a segment; return False, with a warning, if the disk is full or away."""
    try:
        outbox.put(segment)
    except (OSError, DamagedError) as error:
        torchrl_logger.warning(f"waiting with {sum(segment['lengths'])} steps: {error}")
        return False
    return True
