"""Where the memory of rollouts lives: in the module, one entry per rollout, addressed by a number.

A key-value cache in the tensordict would be copied at every step; a cache per batch shape would be
overwritten as soon as the same policy also runs an evaluation. So a rollout carries a number, its
stream, and the module keeps a bounded table from streams to memories.
"""

from __future__ import annotations

import abc
import itertools
import os
import secrets
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor
from torch.utils._pytree import tree_leaves

# One counter per process, from a random start: a tensordict that outlives its process, or comes from
# another one, then meets no memory rather than a stranger's.
_next_stream = itertools.count(1 + secrets.randbits(48))


def _start_elsewhere() -> None:
    global _next_stream
    _next_stream = itertools.count(1 + secrets.randbits(48))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_elsewhere)


class Memory(abc.ABC):
    """What an encoder keeps of a rollout between steps, for every row of the batch.

    Attributes:
        batch_size: number of rows.
        device: device of the stored tensors.
    """

    batch_size: int
    device: torch.device

    @abc.abstractmethod
    def clear(self, rows_B: Tensor) -> None:
        """Forget everything about the rows where the bool `rows_B` is True."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return sum(z.nbytes for z in tree_leaves(vars(self)) if isinstance(z, Tensor))

    def tensors(self) -> dict[str, Tensor]:
        """All that is remembered, by name: by default the tensors among the attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of :meth:`tensors`, and of what else the next step depends on."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over, in place, what :meth:`state_dict` gave.

        Raises:
            ValueError: if names, shapes or dtypes are those of another memory.
        """
        found, expected = _describe(state), _describe(self.tensors())
        if found != expected:
            raise ValueError(
                f"a memory takes over only tensors like its own, {expected}; got {found}. Build the "
                "encoder with the arguments of the one that was saved."
            )
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])

    def advance(self) -> None:  # noqa: B027  (a hook, optional on purpose)
        """Make room for one more step; called once before each, outside of compiled code."""


def stream_of(number: Tensor | None, key: NestedKey) -> int:
    """The stream that all rows of a step belong to; 0 for a new rollout.

    Args:
        number: `[*B, 1]`, int64, or None.
        key: where it was read, for the message.

    Raises:
        ValueError: if rows belong to several.

    Example:
        >>> stream_of(torch.tensor([[7], [0]]), "_stream")
        7
    """
    if number is None or not number.numel():
        return 0
    # Rows of environments that were just reset hold 0, the others the rollout's stream.
    low, stream = (int(bound) for bound in number.aminmax())
    if low != stream and ((number != 0) & (number != stream)).any():
        raise ValueError(
            "all rows of a step must belong to one rollout, got streams "
            f"{number.unique().tolist()} in {key!r}. Call the policy on each "
            "rollout's tensordict separately, or remove the entry to start anew."
        )
    return stream


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{z.dtype} {list(z.shape)}" for name, z in tensors.items()}


class StreamTable:
    """Bounded table of memories: the one that was not used for the longest time leaves first.

    Args:
        max_streams: how many are kept.

    Example:
        >>> from torchrl_amago.modules.trajectory import RingCache
        >>> table = StreamTable(max_streams=1)
        >>> first, second = (table.add(RingCache(1, 2, 1, 4, context_length=3)) for _ in range(2))
        >>> first in table, second in table
        (False, True)
    """

    def __init__(self, max_streams: int) -> None:
        self.max_streams = max_streams
        self._memories: OrderedDict[int, Memory] = OrderedDict()

    def __len__(self) -> int:
        return len(self._memories)

    def __contains__(self, stream: int) -> bool:
        return stream in self._memories

    def find(self, stream: int) -> Memory | None:
        """Return a stream's memory, or None if the table doesn't hold it; count it as used."""
        memory = self._memories.get(stream)
        if memory is not None:
            self._memories.move_to_end(stream)
        return memory

    def add(self, memory: Memory) -> int:
        """Store a memory under a new stream and return that stream, a positive integer."""
        stream = next(_next_stream)
        self._memories[stream] = memory
        while len(self._memories) > self.max_streams:
            self._memories.popitem(last=False)
        return stream

    def complain_of_loss(
        self, stream: int, memory: Memory | None, num_rows: int, key: NestedKey
    ) -> None:
        """Warn where a rollout in mid-trial gets a new memory; raise if its rows' number has changed."""
        if memory is not None and memory.batch_size != num_rows:
            raise ValueError(
                f"a rollout's batch size must not change between trials: stream {stream} has "
                f"{memory.batch_size} rows, got {num_rows}, some of them in mid-trial. "
                f"Step all rows of a rollout together, or remove {key!r} to start anew."
            )
        reason = (
            f"its stream {stream} is not in this module: either it was evicted (raise max_streams, "
            f"now {self.max_streams}), or the module is a copy and the rollout isn't its own"
            if stream
            else f"{key!r} was lost between steps: keep it in selected_out_keys, and put "
            "TransformedEnv around a ParallelEnv, which by itself drops what its workers don't know"
        )
        warnings.warn(f"a rollout goes on in mid-trial without its memory; {reason}.", stacklevel=3)

    def state_dict(self, streams: Collection[int] | None = None) -> dict[str, Any]:
        """Copies of all memories, or of those of some streams.

        Returns:
            ``streams``, int64 ``[S]``, the one not used for the longest time first; ``memories``: for
            each of ``"0"`` to ``"S - 1"`` its ``num_rows`` and its ``memory``, a dict of tensors.
        """
        kept = [stream for stream in self._memories if streams is None or stream in streams]
        memories = {
            str(i): {"num_rows": torch.tensor(memory.batch_size), "memory": memory.state_dict()}
            for i, memory in enumerate(self._memories[stream] for stream in kept)
        }
        return {"streams": torch.tensor(kept, dtype=torch.int64), "memories": memories}

    def load_state_dict(
        self, state: Mapping[str, Any], new_memory: Callable[[int, torch.dtype], Memory]
    ) -> None:
        """Hold the memories of :meth:`state_dict` instead, under their streams.

        Of more than `max_streams` the last ones are kept. If one doesn't fit, nothing changes.

        Args:
            state: what :meth:`state_dict` gave.
            new_memory: makes an empty memory for a number of rows and a dtype.

        Raises:
            ValueError: if a memory that `new_memory` makes has other tensors.
        """
        memories = OrderedDict()
        streams = state["streams"].tolist()
        for i, stream in list(enumerate(streams))[-self.max_streams :]:
            saved = state["memories"][str(i)]
            dtypes = (z.dtype for z in saved["memory"].values() if z.is_floating_point())
            memory = new_memory(int(saved["num_rows"]), next(dtypes, torch.float32))
            memory.load_state_dict(saved["memory"])
            memories[stream] = memory
        self._memories = memories

    def clear_rows(self) -> None:
        """Make every memory forget every row; streams stay valid."""
        for memory in self._memories.values():
            memory.clear(torch.ones(memory.batch_size, dtype=torch.bool, device=memory.device))

    def drop(self) -> None:
        """Forget every stream."""
        self._memories.clear()

    def __deepcopy__(self, memo: dict) -> StreamTable:
        return StreamTable(self.max_streams)

    def __getstate__(self) -> dict:
        return {"max_streams": self.max_streams, "_memories": OrderedDict()}
