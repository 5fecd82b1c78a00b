"""Ring of the keys and values of a rollout's last steps; the newest overwrites the oldest.

Legend: L layers, B batch, H heads, D features of one head, S slots of the ring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from torchrl_amago._cpu import reads_are_free
from torchrl_amago.modules.trajectory.kernels.attention import ring_attention
from torchrl_amago.modules.trajectory.memory.base import Memory

# Slots are read in blocks: products over fewer numbers take a slow path in PyTorch's CPU kernels.
_BLOCK = 64


class RingCache(Memory):
    """Ring of keys and values; nothing is shifted or copied at any step.

    All rows write the same slot at the same step, and a row sees the slots written since its trial
    began, at most the last `context_length`. A cleared row's slots are zeroed, so that not even NaN
    passes from one trial into the next. On a GPU they are hidden, and only finite numbers written.

    Args:
        num_layers: L; the next three are B, H and D.
        context_length: number of steps a row sees, the newest included.
        device: where the ring is stored.
        dtype: of keys and values.
        num_sinks: number of a trial's first steps that stay visible, in slots before the ring.
        sink_bias: added to the scores of those steps.

    Example:
        >>> cache = RingCache(1, 2, 1, 4, context_length=3)
        >>> for _ in range(5):
        ...     cache.advance()
        ...     cache.write(0, torch.zeros(2, 1, 4), torch.ones(2, 1, 4))
        >>> cache.length.tolist(), cache.attend(0, torch.zeros(2, 1, 4)).sum().item()
        ([3, 3], 8.0)
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_size: int,
        context_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_sinks: int = 0,
        sink_bias: float = 0.0,
    ) -> None:
        self.batch_size, self.context_length = batch_size, context_length
        self.num_sinks, self.sink_bias = num_sinks, sink_bias
        self._num_slots = math.ceil((num_sinks + context_length) / _BLOCK) * _BLOCK
        rows = batch_size * num_heads
        # Memory outlives the no-grad or inference block it is made in, and is written in others.
        with torch.inference_mode(False):
            make = partial(torch.zeros, device=device, dtype=dtype)
            # Keys are transposed, the layout that the product with a query reads fastest.
            self.keys = [make(rows, head_size, self._num_slots) for _ in range(num_layers)]
            self.values = [make(rows, self._num_slots, head_size) for _ in range(num_layers)]
            self.bias = make(rows, 1, self._num_slots).fill_(-math.inf)
            # A tensor, so that a compiled step is compiled once and not for every slot.
            self.newest_1 = torch.zeros(1, dtype=torch.int64, device=device)
            self.has_sink_NS = torch.zeros(rows, num_sinks, dtype=torch.bool, device=device)
        self.device = self.bias.device
        self._written = num_sinks  # slots that hold anything
        self._slot = num_sinks - 1  # slot of the newest step

    @property
    def length(self) -> Tensor:
        """Number of steps each row sees, `[B]`."""
        return self.bias.view(self.batch_size, -1, self._num_slots)[:, 0].isfinite().sum(-1)

    def tensors(self) -> dict[str, Tensor]:
        names = ("keys", "values")
        layers = {f"{name}.{i}": z for name in names for i, z in enumerate(getattr(self, name))}
        return {**layers, "bias": self.bias, "newest": self.newest_1, "has_sink": self.has_sink_NS}

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "place": torch.tensor([self._slot, self._written])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict({name: z for name, z in state.items() if name != "place"})
        self._slot, self._written = state["place"].tolist()

    def clear(self, rows_B: Tensor) -> None:
        heads = len(self.bias) // self.batch_size
        if not reads_are_free(rows_B):
            rows_N1 = rows_B.repeat_interleave(heads).unsqueeze(1)
            self.bias.masked_fill_(rows_N1.unsqueeze(2), -math.inf)
            self.has_sink_NS.masked_fill_(rows_N1, False)
            return
        if not rows_B.any():
            return
        if rows_B.all():
            # Slots that were never written are still zero.
            for keys, values in zip(self.keys, self.values, strict=True):
                keys[..., : self._written].zero_()
                values[:, : self._written].zero_()
            self.bias.fill_(-math.inf)
            self.has_sink_NS.zero_()
            self._written, self._slot = self.num_sinks, self.num_sinks - 1
            return
        rows_N = rows_B.repeat_interleave(heads).nonzero().squeeze(1)
        for stored in (*self.keys, *self.values):
            stored.index_fill_(0, rows_N, 0.0)
        self.bias.index_fill_(0, rows_N, -math.inf)
        self.has_sink_NS.index_fill_(0, rows_N, False)

    def advance(self) -> None:
        """Move to the next slot, which all rows see from now on, and hide the one that left."""
        self._slot = self._wrap(self._slot + 1)
        self._written = min(self._written + 1, self._num_slots)
        if self.num_sinks + self.context_length < self._num_slots:
            self.bias[..., self._wrap(self._slot - self.context_length)].fill_(-math.inf)
        self.bias[..., self._slot].zero_()
        self.newest_1.fill_(self._slot)
        self.span = min(math.ceil(self._written / _BLOCK) * _BLOCK, self._num_slots)

    def _wrap(self, slot: int) -> int:
        """Find a slot's place in the ring, which starts after the sinks."""
        return self.num_sinks + (slot - self.num_sinks) % (self._num_slots - self.num_sinks)

    def mark_sinks(self, positions_B: Tensor) -> None:
        """Mark rows whose newest step is a sink; once per step, before the first :meth:`write`."""
        if not self.num_sinks:
            return
        heads = len(self.bias) // self.batch_size
        position_N1 = positions_B.repeat_interleave(heads).unsqueeze(1)
        sink_S = torch.arange(self.num_sinks, device=self.device)
        self._is_sink_NS = position_N1 == sink_S
        # A memory that was lost in mid-trial has no sinks.
        self.has_sink_NS.logical_or_(self._is_sink_NS)
        # A sink is seen in the ring until it leaves, and from then on in its own slot.
        beyond_NS = (position_N1 - sink_S >= self.context_length) & self.has_sink_NS
        bias_NS = torch.where(beyond_NS, self.sink_bias, -math.inf)
        self.bias[:, 0, : self.num_sinks] = bias_NS
        newest_N11 = torch.where(position_N1 < self.num_sinks, self.sink_bias, 0.0).unsqueeze(1)
        self.bias.index_copy_(2, self.newest_1, newest_N11.to(self.bias.dtype))

    def write(self, layer: int, key_BHD: Tensor, value_BHD: Tensor) -> None:
        """Store the newest step's keys and values of one layer."""
        keys_NDS, values_NSD = self.keys[layer], self.values[layer]
        if not reads_are_free(key_BHD):
            key_BHD, value_BHD = (x.nan_to_num(0.0, 0.0, 0.0) for x in (key_BHD, value_BHD))
        key_ND1 = key_BHD.reshape(len(keys_NDS), -1, 1)
        value_N1D = value_BHD.reshape(len(values_NSD), 1, -1)
        keys_NDS.index_copy_(2, self.newest_1, key_ND1.to(keys_NDS.dtype))
        values_NSD.index_copy_(1, self.newest_1, value_N1D.to(values_NSD.dtype))
        if self.num_sinks:
            sinks_NDS, is_sink_N1S = keys_NDS[..., : self.num_sinks], self._is_sink_NS[:, None]
            sinks_NDS.copy_(torch.where(is_sink_N1S, key_ND1, sinks_NDS))
            sinks_NSD = values_NSD[:, : self.num_sinks]
            sinks_NSD.copy_(torch.where(is_sink_N1S.mT, value_N1D, sinks_NSD))

    def attend(self, layer: int, q_BHD: Tensor, logit_clip: float | None = None) -> Tensor:
        """Attend in one layer from the newest step to all that its row sees: `[B, H, D]`."""
        keys, values = self.keys[layer][..., : self.span], self.values[layer][:, : self.span]
        bias = self.bias[..., : self.span]
        return ring_attention(q_BHD.to(keys.dtype), keys, values, bias, logit_clip)
