"""Keys and values of a rollout's last steps, in a ring: the oldest leaves by being overwritten.

Legend: L layers, B batch, H heads, D features of one head, S slots of the ring.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchrl_amago.modules.trajectory.attention import ring_attention
from torchrl_amago.modules.trajectory.streams import Memory

# Slots are read in blocks: products over fewer numbers take a slow path in PyTorch's CPU kernels.
_BLOCK = 64


class RingCache(Memory):
    """Ring of keys and values; nothing is shifted or copied, whatever the number of steps.

    All rows write the same slot at the same step, and a row sees the slots written since its trial
    began, at most the last `context_length`. A cleared row's slots are zeroed, so that not even NaN
    gets from one trial into the next.

    In a rolled ring, deeper layers' keys were computed when older tokens were still visible:
    information from before the window survives there (as in banded attention over a whole trial).

    Args:
        num_layers: L.
        batch_size: B.
        num_heads: H.
        head_size: D.
        context_length: how many steps a row sees, the newest included.
        device: where the ring is stored.
        dtype: of keys and values.

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
    ) -> None:
        self.batch_size, self.context_length = batch_size, context_length
        num_slots = math.ceil(context_length / _BLOCK) * _BLOCK
        shape = (num_layers, batch_size, num_heads)
        # Memory outlives the no-grad or inference block it is made in, and is written in others.
        with torch.inference_mode(False):
            # Keys lie transposed, the layout that the product with a query reads fastest.
            self.keys = torch.zeros(*shape, head_size, num_slots, device=device, dtype=dtype)
            self.values = torch.zeros(*shape, num_slots, head_size, device=device, dtype=dtype)
            self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self._slots = torch.arange(num_slots, device=device)
        self.device = self.keys.device
        self._num_slots = num_slots
        self._written = 0  # slots that hold anything
        self._slot = -1  # slot of the newest step
        self._bias: Tensor | None = None

    def clear(self, rows_B: Tensor) -> None:
        """Forget everything about the rows where the bool `rows_B` is True."""
        if not rows_B.any():
            return
        if rows_B.all():
            self.keys[..., : self._written].zero_()
            self.values[..., : self._written, :].zero_()
            self.length.zero_()
            self._written, self._slot = 0, -1
            return
        rows = rows_B.nonzero().squeeze(1)
        self.keys.index_fill_(1, rows, 0.0)
        self.values.index_fill_(1, rows, 0.0)
        self.length.index_fill_(0, rows, 0)

    def advance(self) -> None:
        """Move to the next slot, and work out which slots every row sees from there."""
        self._slot = (self._slot + 1) % self._num_slots
        self._written = min(self._written + 1, self._num_slots)
        self.length.add_(1).clamp_(max=self.context_length)
        self._span = min(math.ceil(self._written / _BLOCK) * _BLOCK, self._num_slots)
        age_S = (self._slot - self._slots[: self._span]) % self._num_slots
        visible_BS = age_S < self.length[:, None]
        bias_BS = torch.where(visible_BS, 0.0, -math.inf).to(self.keys.dtype)
        self._bias = bias_BS.unsqueeze(1)

    def write(self, layer: int, key_BHD: Tensor, value_BHD: Tensor) -> None:
        """Store the newest step's keys and values of one layer."""
        self.keys[layer, ..., self._slot].copy_(key_BHD)
        self.values[layer, :, :, self._slot].copy_(value_BHD)

    def attend(self, layer: int, q_BHD: Tensor) -> Tensor:
        """Attend from the newest step to what its row sees, in one layer: `[B, H, D]`."""
        keys = self.keys[layer, ..., : self._span]
        values = self.values[layer, ..., : self._span, :]
        return ring_attention(q_BHD.to(keys.dtype), keys, values, self._bias)
