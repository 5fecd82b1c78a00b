"""Batches from several replay buffers at once: demonstrations beside new experience, data beside data.

Legend: B slices of a batch, T steps of a slice, P buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from torchrl_amago import keys

__all__ = ["TrialMixture", "online_part"]


class TrialMixture:
    """Several buffers of whole trials behind the methods of one.

    Each slice of a batch comes from a buffer drawn by weight among those that are ready, that is,
    ``can_sample()``. A buffer's weight goes in a straight line from its initial to its final one
    while ``anneal_updates`` batches are drawn, from the batch at which it first becomes ready.

    What is written goes to the buffer ``online``; the others are never changed, so nothing in them is
    evicted. Give it to the trainer in place of a buffer, and ``mixture.online`` to the collector.

    Args:
        buffers: by name; each such as :func:`make_trial_buffer` gives, without prefetch, all with the
            same entries in their steps.
        weights: final weight of each; those of the ready ones are scaled to sum up to 1.
        initial_weights: default: the final one for buffers that are ready when the first batch is
            drawn, 0 for those that come later.
        anneal_updates: batches until the final weight is reached; 0 takes it at once.
        online: name of the buffer that is written to; None for none.
        batch_size: slices B of a batch.
        generator: source of all draws, the buffers' own included; by default each keeps what it has,
            and the mixture draws from torch's global generator.
        source_key: where the number of each slice's buffer goes in a batch, in the order of ``buffers``.

    Raises:
        ValueError: for weights that are negative, all zero or of other names than the buffers; for a
            buffer that prefetches, or buffers that pad slices on different sides.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_amago.data import make_trial_buffer
        >>> def trial(length, reward):
        ...     done = (torch.arange(length) == length - 1).unsqueeze(-1)
        ...     after = {"done": done, "reward": torch.full((length, 1), reward)}
        ...     return TensorDict({"next": after}, [length])
        >>> old, new = (make_trial_buffer(100, slice_length=3, batch_size=8) for _ in range(2))
        >>> mixture = TrialMixture(
        ...     {"old": old, "new": new}, {"old": 1.0, "new": 3.0}, online="new", batch_size=8)
        >>> _ = old.extend(trial(5, 0.0))
        >>> mixture.sample()["next", "reward"].mean().item(), mixture.shares()
        (0.0, {'old': 1.0, 'new': 0.0})
        >>> _ = mixture.extend(trial(5, 1.0))
        >>> mixture.sample().shape, mixture.shares()
        (torch.Size([8, 3]), {'old': 0.25, 'new': 0.75})
    """

    def __init__(
        self,
        buffers: Mapping[str, ReplayBuffer],
        weights: Mapping[str, float],
        *,
        initial_weights: Mapping[str, float] | None = None,
        anneal_updates: int = 0,
        online: str | None = None,
        batch_size: int,
        generator: torch.Generator | None = None,
        source_key: NestedKey = keys.SOURCE,
    ) -> None:
        self.buffers = dict(buffers)
        self.weights = _checked_weights("weights", weights, self.buffers)
        self.initial_weights: dict[str, float] | None = None
        if initial_weights is not None:
            self.initial_weights = _checked_weights(
                "initial_weights", initial_weights, self.buffers
            )
        if online is not None and online not in self.buffers:
            raise ValueError(
                f"online must name one of the buffers {list(self.buffers)}, got {online!r}. None is "
                "for a mixture that isn't written to."
            )
        if batch_size < 1 or anneal_updates < 0:
            raise ValueError(
                f"batch_size must be at least 1 and anneal_updates at least 0, got {batch_size} and "
                f"{anneal_updates}. They count slices of a batch, and batches."
            )
        for name, buffer in self.buffers.items():
            _prepare(name, buffer)
        self._pads_left = _padding_side(self.buffers) == "left"
        self.batch_size, self.source_key = batch_size, source_key
        self.anneal_updates = anneal_updates
        self._online = online
        self.updates = 0
        #: Batches drawn before each buffer first became ready: where its way to its weight began.
        self.ready_at: dict[str, int] = {}
        self._entries: dict[str, dict[NestedKey, tuple]] = {}
        self._rng: torch.Generator | None = None
        if generator is not None:
            self.set_rng(generator)

    # -- what a replay buffer does -------------------------------------------------------------

    @property
    def online(self) -> ReplayBuffer:
        """The buffer that is written to.

        Raises:
            RuntimeError: if there is none.
        """
        if self._online is None:
            raise RuntimeError(
                f"a mixture is written to by way of one of its buffers, and none of "
                f"{list(self.buffers)} was chosen. Make it with TrialMixture(..., online=...)."
            )
        return self.buffers[self._online]

    @property
    def num_trials(self) -> int:
        """Complete trials, in all buffers together."""
        return sum(buffer.num_trials for buffer in self.buffers.values())

    def extend(self, steps: TensorDictBase) -> Any:
        """Write whole trials to :attr:`online`."""
        return self.online.extend(steps)

    def __len__(self) -> int:
        """Steps, in all buffers together."""
        return sum(map(len, self.buffers.values()))

    def can_sample(self) -> bool:
        """Whether a buffer that has a weight is ready."""
        return bool(self._weights().sum() > 0)

    def sample(self, batch_size: int | None = None) -> TensorDictBase:
        """A batch ``[B, T]``, the slices of a buffer side by side.

        Raises:
            RuntimeError: while no buffer is ready.
            ValueError: if the buffers' steps differ in entries, shapes or dtypes.
        """
        weights_P = self._weights()
        if not weights_P.sum() > 0:
            raise RuntimeError(
                f"sampling needs a buffer that has a weight and is ready, and none of "
                f"{list(self.buffers)} is. Ask can_sample() first."
            )
        size = self.batch_size if batch_size is None else batch_size
        drawn_B = torch.multinomial(weights_P, size, replacement=True, generator=self._rng)
        counts = drawn_B.bincount(minlength=len(self.buffers)).tolist()
        parts = []
        for number, (name, count) in enumerate(zip(self.buffers, counts, strict=True)):
            if count:
                part = self.buffers[name].sample(count)
                self._check_entries(name, part)
                parts.append(part.set(self.source_key, torch.full(part.shape, number)))
        self.updates += 1
        return self._join(parts)

    def update_priority(self, batch: TensorDictBase) -> None:
        """Hand the slices' new priorities to the buffers that they came from.

        Args:
            batch: what :meth:`sample` gave, and what each buffer's ``update_tensordict_priority``
                reads.
        """
        source_B = batch.get(self.source_key)[:, 0]
        for number, buffer in enumerate(self.buffers.values()):
            rows = batch[source_B == number]
            if len(rows):
                buffer.update_tensordict_priority(rows)

    def set_rng(self, generator: torch.Generator) -> None:
        """Draw from this generator, all buffers included."""
        self._rng = generator
        for buffer in self.buffers.values():
            buffer.set_rng(generator)

    # -- weights -------------------------------------------------------------------------------

    def shares(self) -> dict[str, float]:
        """Probability of each buffer for a slice of the next batch; all 0 while none is ready."""
        weights_P = self._weights()
        total = weights_P.sum()
        shares_P = weights_P / total if total > 0 else weights_P
        return dict(zip(self.buffers, shares_P.tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """The shares, named for a table of progress."""
        return {f"share/{name}": share for name, share in self.shares().items()}

    def _weights(self) -> Tensor:
        """Weights of the next batch, ``[P]``; 0 for buffers that aren't ready."""
        weights = []
        for name, buffer in self.buffers.items():
            # Asked anew each time: a few long trials may push out more than min_trials of them.
            is_ready = buffer.can_sample()
            if is_ready:
                self.ready_at.setdefault(name, self.updates)
            weights.append(self._weight(name) if is_ready else 0.0)
        return torch.tensor(weights, dtype=torch.float64)

    def _weight(self, name: str) -> float:
        """Weight of a buffer that is ready."""
        final, ready_at = self.weights[name], self.ready_at[name]
        if self.initial_weights is not None:
            initial = self.initial_weights[name]
        else:
            initial = 0.0 if ready_at else final
        if not self.anneal_updates:
            return final
        # The batch at which it becomes ready is the first step of the way: nobody waits at 0.
        progress = min((self.updates - ready_at + 1) / self.anneal_updates, 1.0)
        return initial + (final - initial) * progress

    # -- putting slices together ---------------------------------------------------------------

    def _check_entries(self, name: str, part: TensorDictBase) -> None:
        """Compare a buffer's first slices with those of the others."""
        if name in self._entries:
            return
        entries = {key: (tuple(x.shape[2:]), x.dtype) for key, x in part.items(True, True)}
        for other_name, other in self._entries.items():
            differing = [
                f"{key!r}: {other.get(key, 'nothing')} in {other_name!r}, "
                f"{entries.get(key, 'nothing')} in {name!r}"
                for key in sorted(entries.keys() | other.keys(), key=str)
                if entries.get(key) != other.get(key)
                and not (_may_lack(key) and (key not in entries or key not in other))
            ]
            if differing:
                raise ValueError(
                    "the steps of a mixture's buffers must have the same entries, shapes and dtypes, "
                    f"and differ in {'; '.join(differing)}. Collect and load all of them with one "
                    "environment, and draw from all of them alike."
                )
        self._entries[name] = entries

    def _join(self, parts: list[TensorDictBase]) -> TensorDictBase:
        width = max(part.shape[1] for part in parts)
        common = set.intersection(*(set(entries) for entries in self._entries.values()))
        common.add(self.source_key)
        parts = [part.select(*common) for part in parts]
        return torch.cat([_widen(part, width, self._pads_left) for part in parts])

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the weights and generators are; not what the buffers hold.

        Save :attr:`online` with :func:`save_replay` beside it; the others don't change.
        """
        return {
            "updates": self.updates,
            "ready_at": dict(self.ready_at),
            "steps": {name: len(self.buffers[name]) for name in self._unchanging()},
            "checksums": {name: self._checksum(name) for name in self._unchanging()},
            "generators": {
                place: generator.get_state() for place, generator in self._generators().items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: if a buffer that doesn't change holds other steps than it did, or the mixture was
                saved with other generators. Then nothing has been changed.
        """
        steps = {name: len(self.buffers[name]) for name in self._unchanging()}
        if steps != dict(state["steps"]):
            raise ValueError(
                "a mixture goes on with the data that it was saved with: its buffers had "
                f"{dict(state['steps'])} steps, and have {steps}. Load the same data into them, in the "
                "same order."
            )
        checksums = state.get("checksums", {})  # earlier checkpoints have none
        differing = [name for name, saved in checksums.items() if self._checksum(name) != saved]
        if differing:
            raise ValueError(
                f"a mixture goes on with the data that it was saved with: its buffers {differing} hold "
                "as many steps as then, but not the same. Load the same data into them, in the same "
                "order."
            )
        if self._rng is not None:
            self.set_rng(self._rng)  # load_replay gives the online buffer one of its own
        generators, saved = self._generators(), state["generators"]
        if generators.keys() != saved.keys():
            raise ValueError(
                "a mixture goes on with the generators that it was saved with: there were those of "
                f"{list(saved)}, and here are those of {list(generators)}. Give it a generator if it "
                "had one, or none if it had none."
            )
        self.updates = int(state["updates"])
        self.ready_at = {name: int(value) for name, value in state["ready_at"].items()}
        for place, generator in generators.items():
            generator.set_state(saved[place])

    def _generators(self) -> dict[str, torch.Generator]:
        """Those that are there, by whose they are."""
        owners = {"mixture": self, **{f"buffer {name}": x for name, x in self.buffers.items()}}
        return {place: x._rng for place, x in owners.items() if x._rng is not None}

    def _checksum(self, name: str) -> int:
        return self.buffers[name].checksum()

    def _unchanging(self) -> list[str]:
        return [name for name in self.buffers if name != self._online]


def online_part(buffer: ReplayBuffer | TrialMixture) -> ReplayBuffer:
    """The buffer that experience is written to: itself, or a mixture's part.

    Example:
        >>> from torchrl_amago.data import make_trial_buffer
        >>> buffer = make_trial_buffer(10, slice_length=2, batch_size=1)
        >>> online_part(TrialMixture({"a": buffer}, {"a": 1}, online="a", batch_size=1)) is buffer
        True
    """
    return buffer.online if isinstance(buffer, TrialMixture) else buffer


def _checked_weights(
    argument: str, weights: Mapping[str, float], names: Mapping[str, Any]
) -> dict[str, float]:
    if (
        not weights
        or set(weights) != set(names)
        or min(weights.values()) < 0
        or max(weights.values()) <= 0
    ):
        raise ValueError(
            f"{argument} must be a number of at least 0 for each of the buffers {list(names)}, not "
            f"all of them 0, got {dict(weights)}. They needn't sum up to 1."
        )
    return {name: float(weights[name]) for name in names}


def _prepare(name: str, buffer: ReplayBuffer) -> None:
    if getattr(buffer, "_prefetch", False):
        raise ValueError(
            f"a mixture's buffers must not prefetch, and {name!r} does: how many slices the next batch "
            "takes from it isn't known before. Make it with prefetch=None."
        )
    # Of a batch with another size than the buffer was made for, which here is every batch.
    buffer._warned_batch_size_conflict = True


def _may_lack(key: NestedKey) -> bool:
    """Whether an entry belongs to the collection of steps, not to the task: other data lack it."""
    path = (key,) if isinstance(key, str) else key
    return path[0] == "collector" or path[-1].startswith("_")


def _padding_side(buffers: Mapping[str, ReplayBuffer]) -> str:
    """Where slices are padded: buffers with a sampler of another kind have nothing to pad."""
    sides = {
        name: buffer.sampler.padding
        for name, buffer in buffers.items()
        if hasattr(buffer.sampler, "padding")
    }
    if len(set(sides.values())) > 1:
        raise ValueError(
            f"a mixture's buffers must pad slices on the same side, got {sides}. Make all of them "
            "with the same padding."
        )
    return next(iter(sides.values()), "right")


def _widen(batch: TensorDictBase, width: int, pads_left: bool) -> TensorDictBase:
    """Slices ``[B, T]`` padded to ``[B, width]``, by their step at that end under a False mask."""
    length, mask = batch.shape[1], batch.get(keys.MASK)
    if length == width:
        return batch
    step_T = torch.arange(width, device=mask.device) - (width - length if pads_left else 0)
    nearest_T = step_T.clamp(0, length - 1)
    return batch[:, nearest_T].set(keys.MASK, mask[:, nearest_T] & (step_T == nearest_T))
