"""Mixture of replay buffers: batches of demonstrations and new experience, or of several data sets.

TorchRL's ``ReplayBufferEnsemble`` reads storages itself, without the relabelling, transforms and
priorities of its members. It fails if one isn't ready or slices differ in width.

Legend: B slices of a batch, T steps of a slice, P buffers.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from torchrl_amago import keys
from torchrl_amago._validation import check_choice, check_counts


class TrialMixture:
    """Mixture of several buffers of whole trials, with the methods of one.

    Each slice of a batch comes from a buffer drawn by weight among those that are ready
    (``can_sample()``). A buffer's weight moves linearly from its initial to its final value during
    ``anneal_updates`` batches, beginning with the first for which it is ready.

    Args:
        buffers: by name; each must sample slices ``[B, T]`` with the mask ``("collector",
            "mask")``, without prefetch, padded on the same side, with the same entries.
        weights: final weight of each; those of the ready ones are scaled to sum up to 1.
        initial_weights: default: the final one for buffers that are ready when the first batch is
            drawn, 0 for the others.
        anneal_updates: batches until the final weight is reached; 0 takes it at once.
        online: name of the buffer that new trials are written to; the others never change.
        batch_size: slices B of a batch.
        generator: source of all random numbers, also of the buffers; None for torch's global one.
        source_key: entry of a batch for the index of each slice's buffer in ``buffers``.

    Raises:
        ValueError: for weights that are negative, all zero or of other names than the buffers, and
            for buffers that don't fit together.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_amago.data import make_trial_buffer
        >>> trial = TensorDict({"next": {"done": torch.tensor([[False], [False], [True]])}}, [3])
        >>> old, new = (make_trial_buffer(100, slice_length=3, batch_size=8) for _ in range(2))
        >>> mixture = TrialMixture(
        ...     {"old": old, "new": new}, {"old": 1.0, "new": 3.0}, online="new", batch_size=8)
        >>> _ = old.extend(trial)
        >>> mixture.sample().shape, mixture.fractions()
        (torch.Size([8, 3]), {'old': 1.0, 'new': 0.0})
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
        check_choice("online", online, (None, *buffers))
        check_counts("It is the number of slices in a batch.", batch_size=batch_size)
        for name, given in (("weights", weights), ("initial_weights", initial_weights or weights)):
            values = list(given.values())
            if set(given) != set(buffers) or min(values, default=-1) < 0 or not sum(values) > 0:
                raise ValueError(
                    f"{name} must have a number of at least 0 for each of the buffers "
                    f"{list(buffers)}, not all of them 0, got {dict(given)}."
                )
        self._pads_left = _check_buffers(buffers)
        self.buffers, self.weights = dict(buffers), dict(weights)
        self.initial_weights, self.anneal_updates = initial_weights or {}, anneal_updates
        self.batch_size, self.source_key = batch_size, source_key
        self._online, self.updates = online, 0
        #: Number of batches drawn before each buffer was first ready.
        self.ready_at: dict[str, int] = {}
        self._entries: dict[str, dict[NestedKey, tuple]] = {}
        self._checksums: dict[tuple, int] = {}
        self._resized: set[str] = set()
        self.set_rng(generator)

    @property
    def online(self) -> ReplayBuffer:
        """Buffer that is written to; RuntimeError if there is none."""
        if self._online is None:
            raise RuntimeError(f"writing needs one of {list(self.buffers)}, got online=None.")
        return self.buffers[self._online]

    @property
    def num_trials(self) -> int:
        """Number of complete trials in all buffers together."""
        return sum(buffer.num_trials for buffer in self.buffers.values())

    def extend(self, steps: TensorDictBase) -> Any:
        """Write whole trials to :attr:`online`."""
        return self.online.extend(steps)

    def __len__(self) -> int:
        return sum(map(len, self.buffers.values()))

    def can_sample(self) -> bool:
        """Return whether a buffer that has a weight is ready."""
        return bool(self._weights().sum() > 0)

    def sample(self, batch_size: int | None = None) -> TensorDictBase:
        """Draw a batch ``[B, T]``, ordered by buffer; RuntimeError if none is ready."""
        weights_P = self._weights()
        if not weights_P.sum() > 0:
            raise RuntimeError(
                "sampling needs a buffer that has a weight and is ready, and none of "
                f"{list(self.buffers)} is. Call can_sample() first."
            )
        size = batch_size or self.batch_size
        drawn_B = torch.multinomial(weights_P, size, replacement=True, generator=self._rng)
        parts = []
        for number, count in zip(*drawn_B.unique(return_counts=True), strict=True):
            part = self._sample_part(list(self.buffers)[number], int(count))
            parts.append(part.set(self.source_key, number.expand(part.shape)))
        self.updates += 1
        common = set.intersection(*map(set, self._entries.values())) | {self.source_key}
        width = max(part.shape[1] for part in parts)
        return torch.cat([_widen(x.select(*common), width, self._pads_left) for x in parts])

    def update_tensordict_priority(self, batch: TensorDictBase) -> None:
        """Set the priorities in each buffer from its slices of a batch of :meth:`sample`."""
        source_B = batch.get(self.source_key)[:, 0]
        for number, buffer in enumerate(self.buffers.values()):
            if (source_B == number).any():
                buffer.update_tensordict_priority(batch[source_B == number])

    update_priority = update_tensordict_priority

    def set_rng(self, generator: torch.Generator | None) -> None:
        """Use this generator, also in all buffers."""
        self._rng = generator
        for buffer in self.buffers.values():
            buffer.set_rng(generator)

    def fractions(self) -> dict[str, float]:
        """Return each buffer's probability for a slice of the next batch; 0 while none is ready."""
        weights_P = self._weights()
        fractions_P = weights_P / weights_P.sum().clamp(1e-99)
        return dict(zip(self.buffers, fractions_P.tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """Return the fractions as ``fraction/name``."""
        return {f"fraction/{name}": fraction for name, fraction in self.fractions().items()}

    def _weights(self) -> Tensor:
        """Return weights of the next batch, ``[P]``; 0 for buffers that aren't ready."""
        weights = dict.fromkeys(self.buffers, 0.0)
        # Checked each time: a few long trials may evict more than min_trials others.
        for name in (name for name, buffer in self.buffers.items() if buffer.can_sample()):
            ready_at, final = self.ready_at.setdefault(name, self.updates), self.weights[name]
            initial = self.initial_weights.get(name, 0.0 if ready_at else final)
            # The batch at which a buffer becomes ready is its first step: its weight is never 0.
            progress = min((self.updates - ready_at + 1) / max(self.anneal_updates, 1), 1.0)
            weights[name] = initial + (final - initial) * progress
        return torch.tensor(list(weights.values()), dtype=torch.float64)

    def _sample_part(self, name: str, count: int) -> TensorDictBase:
        buffer = self.buffers[name]
        with contextlib.ExitStack() as stack:
            if count != buffer.batch_size and name not in self._resized:
                # TorchRL warns once if a batch has another size than the buffer's own.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="Got conflicting batch_sizes")
                self._resized.add(name)
            part = buffer.sample(count)
        if name not in self._entries:
            self._check_entries(name, part)
        return part

    def _check_entries(self, name: str, part: TensorDictBase) -> None:
        """Compare a buffer's entries with those of the others."""
        entries = {key: (tuple(x.shape[2:]), x.dtype) for key, x in part.items(True, True)}
        for other_name, other in self._entries.items():
            needed = {key for key in entries.keys() ^ other.keys() if not _may_lack(key)}
            for key in sorted(needed | entries.keys() & other.keys(), key=str):
                here, there = (one.get(key, "nothing") for one in (entries, other))
                if here != there:
                    raise ValueError(
                        "the steps of a mixture's buffers must have the same entries, shapes and "
                        f"dtypes, and differ in {key!r}: {there} in {other_name!r}, {here} in "
                        f"{name!r}. Collect and sample them in the same way."
                    )
        self._entries[name] = entries

    def state_dict(self) -> dict[str, Any]:
        """Return the state of weights and generator; :attr:`online` is saved by its `dumps`."""
        state = {"updates": self.updates, "ready_at": dict(self.ready_at), "facts": self._facts()}
        return state | {"generator": None if self._rng is None else self._rng.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; ValueError if data or generator differ from the saved ones."""
        if (saved := state["facts"]) != (here := self._facts()):
            raise ValueError(
                f"a mixture must have the data and the generator that it was saved with, {saved}, "
                f"got {here}. Load the same data in the same order; pass a generator if it had one."
            )
        self.set_rng(self._rng)  # loads gives the online buffer one of its own
        if self._rng is not None:
            self._rng.set_state(state["generator"])
        self.updates, self.ready_at = int(state["updates"]), dict(state["ready_at"])

    def _facts(self) -> dict[str, str]:
        """Return facts that must be the same for a mixture to go on exactly."""
        facts = {"generator": "none" if self._rng is None else "its own"}
        for name, buffer in self.buffers.items():
            if name == self._online:
                continue
            # All trials are read only once, not for every checkpoint.
            version = name, buffer.write_count, len(buffer)
            if version not in self._checksums:
                self._checksums[version] = _checksum(buffer)
            facts[f"buffer {name}"] = f"{len(buffer)} steps, checksum {self._checksums[version]}"
        return facts


def online_part(buffer: ReplayBuffer | TrialMixture) -> ReplayBuffer:
    """Return the buffer that experience is written to: itself, or a mixture's part."""
    return buffer.online if isinstance(buffer, TrialMixture) else buffer


def _check_buffers(buffers: Mapping[str, ReplayBuffer]) -> bool:
    """Check that the buffers' slices fit together; return True if they are padded on the left."""
    if eager := [name for name, one in buffers.items() if getattr(one, "_prefetch", False)]:
        raise ValueError(f"a mixture's buffers must not prefetch, got {eager} that do.")
    sides = {name: getattr(one.sampler, "padding", None) for name, one in buffers.items()}
    if len(set(sides.values()) - {None}) > 1:
        raise ValueError(f"a mixture's buffers must pad slices on the same side, got {sides}.")
    return "left" in sides.values()


def _checksum(buffer: ReplayBuffer) -> int:
    steps, total = buffer[:].flatten_keys() if len(buffer) else {}, 0
    for key in sorted(steps.keys()):
        total = zlib.crc32(steps[key].contiguous().view(torch.uint8).numpy(), total)
    return total


def _may_lack(key: NestedKey) -> bool:
    """Return whether an entry belongs to the collector, not to the task: other data lack it."""
    path = keys.as_tuple(key)
    return path[0] in ("collector", keys.POLICY_VERSION) or path[-1].startswith("_")


def _widen(batch: TensorDictBase, width: int, pads_left: bool) -> TensorDictBase:
    """Pad slices ``[B, T]`` to ``[B, width]`` with their step at that end under a False mask."""
    length, mask = batch.shape[1], batch.get(keys.MASK)
    if length == width:
        return batch
    step_T = torch.arange(width, device=mask.device) - (width - length if pads_left else 0)
    nearest_T = step_T.clamp(0, length - 1)
    return batch[:, nearest_T].set(keys.MASK, mask[:, nearest_T] & (step_T == nearest_T))
