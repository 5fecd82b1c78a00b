"""Collectors as Ray actors, on any number of machines."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrl import logger as torchrl_logger

from torchrl_amago.scaling._board import Board, describe
from torchrl_amago.scaling._spool import store_segment
from torchrl_amago.scaling.pool import _PATIENCE, _START_FACTOR, WorkerPool
from torchrl_amago.scaling.worker import Player


@dataclass(eq=False)
class _Place:
    """A place in the pool, the actor that fills it, and its rounds that are not taken in."""

    name: str
    actor: Any = None
    rounds: deque = field(default_factory=deque)  # references, the oldest first
    since: float = 0.0  # when the oldest was begun, or the one before it was ready
    facts: Mapping[str, Any] = field(default_factory=dict)
    starts: int = 0


class RayPool(WorkerPool):
    """Supervised Ray actors: a round's whole trials are a call's value, weights one ``ray.put``.

    An actor that dies, raises or hangs is replaced by one on any machine that has room. Collectors
    and evaluators with the run's folder may join, too.

    Args:
        num_workers: number of actors.
        address: of ``ray.init``, unless Ray is initialised already.
        actor_options: of each actor, such as ``{"num_cpus": 2, "resources": {"emulator": 1}}``.
        max_unread: rounds of an actor that may wait for the learner.
        options: of :class:`WorkerPool`.
    """

    def __init__(
        self,
        *args: Any,
        num_workers: int,
        address: str | None = None,
        actor_options: Mapping[str, Any] | None = None,
        max_unread: int = 1,
        **options: Any,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(f'{error}. Run pip install "torchrl-amago[ray]".') from error
        super().__init__(*args, num_workers=0, **options)
        self._ray, self._address = ray, address
        self._actor_options, self.max_unread = {"num_cpus": 1, **(actor_options or {})}, max_unread
        self._places = [_Place(f"worker-{i}") for i in range(num_workers)]
        self._failures = self._restarted = 0
        self._owns_ray = False

    @staticmethod
    def _pack(*parts: Any) -> Any:
        return parts  # Ray pickles them

    def _start(self) -> None:
        if not self._ray.is_initialized():
            self._ray.init(address=self._address, include_dashboard=False)
            self._owns_ray = True
        self._parts = self._ray.put(self._content)
        self._give_weights()
        super()._start()

    def _publish(self, finished: bool) -> None:
        super()._publish(finished)
        if self._ray.is_initialized():
            self._give_weights()

    def _give_weights(self) -> None:
        self._weights = self._ray.put(describe(self.policy, self.version, self._board.settings))

    def _supervise(self) -> None:
        """Keep every actor busy, and replace those that hang."""
        super()._supervise()
        for place in () if self._stops else self._places:
            if place.actor is None:
                seed = (self._seed + 1000 * place.starts + self._places.index(place)) % 2**31
                make = self._ray.remote(**self._actor_options)(_Actor)
                place.actor, place.starts = make.remote(self._parts, seed), place.starts + 1
                place.facts, place.since = {}, time.monotonic()
            # A round begins with the newest weights once the one before has ended.
            if not place.rounds or self._is_ready(place.rounds[-1]):
                if len(place.rounds) < self.max_unread:
                    place.rounds.append(place.actor.round.remote(self._weights))
                place.since = time.monotonic()
            limit = self.hung_after * (1 if place.facts else _START_FACTOR)
            if time.monotonic() - place.since > limit:
                self._replace_actor(place, f"it has played one round for {limit} s")

    def _is_ready(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])

    def _replace_actor(self, place: _Place, problem: object) -> None:
        torchrl_logger.warning(f"{place.name} is replaced: {problem}")
        self._ray.kill(place.actor)
        self._restarted += 1
        place.actor = None
        place.rounds.clear()

    def _take(self) -> dict[str, float] | None:
        for place in [p for p in self._places if p.rounds and self._is_ready(p.rounds[0])]:
            self._places.append(self._places.pop(self._places.index(place)))  # others come first
            try:
                segment, facts = self._ray.get(place.rounds.popleft())
            except self._ray.exceptions.RayError as error:
                self._failures += 1
                if self._failures > _PATIENCE * len(self._places):
                    raise
                self._replace_actor(place, error)
                continue
            self._failures = 0
            place.facts = facts
            try:
                if segment is not None:
                    return store_segment(segment, self.replay_buffer)
            except ValueError as error:
                torchrl_logger.warning(f"a segment of {place.name} is dropped: {error}")
        return super()._take()

    def pids(self) -> list[int]:
        """Return the processes' numbers of the actors, as of their last rounds."""
        return [place.facts["pid"] for place in self._places if place.facts]

    def _figures(self) -> dict[str, float]:
        living = {place.name: place.facts for place in self._places if place.facts}
        return self._describe(living, sorted(living), self._restarted)

    def _stop(self) -> None:
        super()._stop()
        for place in self._places if self._ray.is_initialized() else ():
            if place.actor is not None:
                self._ray.kill(place.actor)
                place.actor = None
        if self._owns_ray:
            self._ray.shutdown()


class _Actor:
    """A player in a process of Ray."""

    def __init__(self, parts: tuple, seed: int) -> None:
        make_env, self._policy, role = parts
        self._board = Board("the learner", role.pop("settings"))
        self._player = Player(make_env, self._policy, **role, seed=seed)
        self._facts = {"pid": os.getpid(), "frames": 0, "waited": 0.0}
        self._begin = self._ended = time.monotonic()

    def round(self, state: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Play a round with these weights; return its trials, and facts of this process."""
        self._facts["waited"] += time.monotonic() - self._ended
        self._player.version = self._board.load(state, self._policy)
        segment = self._player.play()
        self._ended = time.monotonic()
        self._facts["frames"] += self._player.frames
        return segment, {**self._facts, "seconds": self._ended - self._begin}
