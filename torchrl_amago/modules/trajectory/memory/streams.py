"""Table of rollouts' memories. It belongs to the module and is addressed by a number, the stream.

A key-value cache in the tensordict would be copied at every step; a cache per batch shape would be
overwritten as soon as the same policy also runs an evaluation.
"""

from __future__ import annotations

import secrets
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from torchrl_amago._cpu import reads_are_free
from torchrl_amago.modules.trajectory.memory.base import Memory


def stream_of(number: Tensor | None, key: NestedKey) -> int:
    """Return the stream that all rows of a step belong to, or 0 for a new rollout."""
    if number is None or not number.numel():
        return 0
    # Rows of environments that were just reset hold 0, the others the rollout's stream.
    low, stream = (int(bound) for bound in number.aminmax())
    if low != stream and ((number != 0) & (number != stream)).any():
        raise ValueError(
            "all rows of a step must belong to one rollout, got streams "
            f"{number.unique().tolist()} in {key!r}. Call the policy on each rollout's tensordict."
        )
    return stream


class StreamTable:
    """Table of up to `max_streams` memories; the least recently used one leaves first.

    Copies are empty: a copied memory would follow a rollout that the original continues.

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
        self._fingerprint: Tensor | None = None
        self._written: tuple[Tensor | None, int] = None, 0

    def __len__(self) -> int:
        return len(self._memories)

    def __contains__(self, stream: int) -> bool:
        return stream in self._memories

    def __getstate__(self) -> dict:
        return vars(StreamTable(self.max_streams))

    def read(self, number: Tensor | None, key: NestedKey) -> int:
        """Return the stream of a step; on a GPU without a look at what the last step wrote."""
        written, stream = self._written
        is_known = number is not None and number is written and not reads_are_free(number)
        return stream if is_known else stream_of(number, key)

    def write(self, stream: int, like: Tensor) -> Tensor:
        """Return the entry of a step's stream, of the shape of `like`."""
        # A new tensor each time: environments zero it in place when they reset.
        number = torch.full_like(like, stream, dtype=torch.int64)
        self._written = number, stream
        return number

    def find(self, stream: int) -> Memory | None:
        """Return a stream's memory, or None if there is none; count it as used."""
        memory = self._memories.get(stream)
        if memory is not None:
            self._memories.move_to_end(stream)
        return memory

    def add(self, memory: Memory) -> int:
        """Store a memory under a new stream and return that stream, a positive integer."""
        # Random: a tensordict of another process finds no memory here, rather than a wrong one.
        stream = 1 + secrets.randbits(62)
        self._memories[stream] = memory
        while len(self._memories) > self.max_streams:
            self._memories.popitem(last=False)
        return stream

    def clear_if_changed(self, parameters: Iterable[Tensor]) -> None:
        """Clear every memory if the parameters differ from those of the last call."""
        # Version counters would miss writes through `.data` and from other processes. An update of
        # weights moves every vector (gains, biases) and every matrix's first row.
        parts = [p.detach().reshape(-1)[: p.shape[-1]] for p in parameters if p.ndim]
        if not parts:
            return
        before, self._fingerprint = self._fingerprint, torch.cat(parts)
        if before is not None and not torch.equal(self._fingerprint, before.to(self._fingerprint)):
            for memory in self._memories.values():
                memory.clear(torch.ones(memory.batch_size, dtype=torch.bool, device=memory.device))

    def warn_of_lost_memory(
        self, stream: int, memory: Memory | None, num_rows: int, key: NestedKey
    ) -> None:
        """Warn of a rollout in mid-trial without memory, or raise if its number of rows changed."""
        if memory is not None and memory.batch_size != num_rows:
            raise ValueError(
                f"a rollout's batch size must not change between trials: stream {stream} has "
                f"{memory.batch_size} rows, got {num_rows}. Step all rows of a rollout together."
            )
        reason = (
            f"its stream {stream} is not in this module: either it was evicted (raise max_streams, "
            f"now {self.max_streams}), or the module is a copy and the rollout is another's"
            if stream
            else f"{key!r} was lost between steps: keep it in selected_out_keys, and put "
            "TransformedEnv around a ParallelEnv, which drops entries its workers don't have"
        )
        warnings.warn(
            f"a rollout continues in mid-trial without its memory; {reason}.", stacklevel=3
        )

    def state_dict(self, streams: Collection[int] | None = None) -> dict[str, Any]:
        """Copy the memories of the given streams, by default of all, as tensors in nested dicts."""
        kept = [stream for stream in self._memories if streams is None or stream in streams]
        memories = {
            str(i): {"num_rows": torch.tensor(memory.batch_size), "memory": memory.state_dict()}
            for i, memory in enumerate(self._memories[stream] for stream in kept)
        }
        state = {"streams": torch.tensor(kept, dtype=torch.int64), "memories": memories}
        if self._fingerprint is not None:
            state["fingerprint"] = self._fingerprint.clone()
        return state

    def load_state_dict(
        self, state: Mapping[str, Any], new_memory: Callable[[int, torch.dtype], Memory]
    ) -> None:
        """Replace the memories by those of a :meth:`state_dict`, under their streams.

        Of more than `max_streams` the last ones are kept. If one doesn't fit, nothing changes.
        `new_memory` makes an empty memory for a number of rows and a dtype.
        """
        memories = OrderedDict()
        for i, stream in list(enumerate(state["streams"].tolist()))[-self.max_streams :]:
            saved = state["memories"][str(i)]
            dtypes = (z.dtype for z in saved["memory"].values() if z.is_floating_point())
            memory = new_memory(int(saved["num_rows"]), next(dtypes, torch.float32))
            memory.load_state_dict(saved["memory"])
            memories[stream] = memory
        self._memories, self._fingerprint = memories, state.get("fingerprint")
