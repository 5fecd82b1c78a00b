"""Collectors as Ray actors, on any number of machines."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchrl import logger as torchrl_logger

from torchrl_amago.scaling._exchange import Board, store_segment
from torchrl_amago.scaling.pool import WorkerPool
from torchrl_amago.scaling.roles import Player


@dataclass(eq=False, repr=False, kw_only=True)
class RayPool(WorkerPool):
    """Supervised Ray actors: a round's whole trials are a call's value, weights one ``ray.put``.

    An actor that dies, raises or hangs is replaced by a spare one, where there is room for one, or
    by a new one on any machine. Collectors and evaluators with the run's folder may join, too.

    Args:
        address: of ``ray.init``, unless Ray is initialised already.
        actor_options: of each actor, such as ``{"num_cpus": 2, "resources": {"emulator": 1}}``.
        max_unread: rounds of an actor that may wait for the learner.
        options: of :class:`WorkerPool`; ``num_workers`` is the number of actors.
    """

    address: str | None = None
    actor_options: Mapping[str, Any] | None = None
    max_unread: int = 1

    def __post_init__(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(f'{error}. Run pip install "torchrl-amago[ray]".') from error
        self._ray, self._owns_ray, self._spare = ray, False, None
        self.actor_options = {"num_cpus": 1, **(self.actor_options or {})}
        super().__post_init__()

    def __iter__(self) -> Iterator[None]:
        if not self._ray.is_initialized():
            options = {"address": self.address, "include_dashboard": False}
            if self.address == "local":  # its own cluster, with room for all and a spare actor
                room = (len(self._own) + 1) * self.actor_options["num_cpus"]
                options["num_cpus"] = max(os.cpu_count(), math.ceil(room))
            self._ray.init(**options)
            self._owns_ray = True
        self._parts = self._ray.put(self._content)
        yield from super().__iter__()

    def _pack(self) -> bytes:
        return super()._pack(self._ray.cloudpickle.dumps)  # takes functions of scripts, too

    def _publish(self, is_last: bool = False) -> None:
        super()._publish(is_last)
        if not is_last:
            self._weights = self._ray.put(self._board.describe(self._counts["version"]))

    def _launch(self, name: str, seed: int) -> Any:
        actor, self._spare = self._spare, None
        make = self._ray.remote(**self.actor_options)(_Actor).remote
        return actor or make(self._parts, seed)

    def _kill(self, process: Any) -> None:
        if self._ray.is_initialized():
            self._ray.kill(process)

    def _is_ready(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])

    def _supervise(self) -> None:
        """Keep every actor busy and a spare one ready, and replace those that hang."""
        for worker in self._own:
            # A round begins with the newest weights once the one before has ended.
            if worker.process is None or (worker.rounds and not self._is_ready(worker.rounds[-1])):
                continue
            if len(worker.rounds) < self.max_unread:
                worker.rounds.append(worker.process.round.remote(self._weights))
            worker.since = time.monotonic()
        super()._supervise()  # afterwards: a round that is there isn't late, however long the pause
        if self._spare is None and 0 < len(self._own) == len(self.pids()):
            # Imports take most of a start, and a spare has made them.
            starts = sum(worker.starts for worker in self._own)
            self._spare = self._launch("spare", (self._seed + 1000 * starts + 999) % 2**31)

    def _take(self) -> dict[str, float] | None:
        for worker in [w for w in self._own if w.rounds and self._is_ready(w.rounds[0])]:
            self._own.remove(worker)
            self._own.append(worker)  # others come first
            try:
                segment, worker.facts = self._ray.get(worker.rounds.popleft())
                if segment is not None:
                    return store_segment(segment, self.replay_buffer)
            except self._ray.exceptions.RayError as error:
                worker.failures += 1
                self._end(worker, error)
            except ValueError as error:
                torchrl_logger.warning(f"a segment of {worker.name} is dropped: {error}")
        return super()._take()

    def shutdown(self, **options: Any) -> None:
        """End the actors as well, and Ray if it was started here."""
        super().shutdown(**options)
        if self._spare is not None:
            self._kill(self._spare)
        if self._owns_ray:
            self._ray.shutdown()


class _Actor(Player):
    """A player in a process of Ray."""

    def __init__(self, content: bytes, seed: int) -> None:
        make_env, policy, role = pickle.loads(content)  # noqa: S301 - the learner's own bytes
        board = Board("the learner", policy, role.pop("settings"))
        super().__init__(make_env, board, **role, seed=seed)
        self._facts = {"pid": os.getpid(), "rounds": 0, "frames": 0, "waited": 0.0}
        self._begin = self._ended = time.monotonic()

    def round(self, state: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Play a round with these weights; return its trials, and facts of this process."""
        self._facts["waited"] += time.monotonic() - self._ended
        self.board.load(state)
        segment = self.play()
        self._ended = time.monotonic()
        self._facts["rounds"] += 1
        self._facts["frames"] += self.frames
        return segment, {**self._facts, "seconds": self._ended - self._begin}
