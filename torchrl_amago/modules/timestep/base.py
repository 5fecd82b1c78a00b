"""Timestep encoders: each step alone, from observations and the previous step to one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_amago import keys


class TimestepEncoder(TensorDictModuleBase):
    """Base of all timestep encoders. To write your own, implement :meth:`encode`.

    Inputs under a False mask (padding) are replaced by zeros before anything else sees them.

    Args:
        in_keys: entries of the tensordict to read, ``[*B, ...]`` each.
        event_dims: how many trailing dimensions of each entry belong to one step.
        output_size: D, size of the embedding.
        out_key: entry to write, ``[*B, D]``.
        mask_key: entry that is True on real steps, ``[*B]``; may be absent.

    Raises:
        KeyError: if the tensordict lacks an entry.

    Example:
        >>> from tensordict import TensorDict
        >>> class Brightness(TimestepEncoder):
        ...     def encode(self, inputs, mask):
        ...         return inputs[0].mean((-2, -1)).unsqueeze(-1)
        >>> encoder = Brightness(["pixels"], event_dims=[2], output_size=1)
        >>> td = TensorDict(pixels=torch.ones(5, 8, 8, dtype=torch.uint8), batch_size=[5])
        >>> encoder(td)["timestep"].shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        in_keys: Sequence[NestedKey],
        event_dims: Sequence[int],
        output_size: int,
        out_key: NestedKey = keys.TIMESTEP,
        mask_key: NestedKey = keys.MASK,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = list(in_keys), [out_key]
        self.event_dims = tuple(event_dims)
        self.output_size = output_size
        self.mask_key = mask_key

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
        """Embed steps.

        Args:
            inputs: one float tensor ``[*M, ...]`` per entry of ``in_keys``; ``*M`` is ``*B``, or
                the real steps alone in one row. Zero where padded.
            mask: bool ``[*M, 1]``, or None if every step is real.

        Returns:
            ``[*M, D]``.
        """
        raise NotImplementedError

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read ``in_keys``, write the embedding."""
        mask = tensordict.get(self.mask_key, None)
        inputs = [self._read(tensordict, key) for key in self.in_keys]
        if mask is None:
            out = self.encode(inputs, None)
        elif mask.device.type == "cpu" and not torch.compiler.is_compiling():
            # Real steps alone: less work, and what lies in padding is never touched.
            real = self.encode([value[mask] for value in inputs], None)
            out = real.new_zeros(*mask.shape, real.shape[-1]).index_put((mask,), real)
        else:
            inputs = [
                torch.where(mask.reshape(mask.shape + (1,) * dims), value, 0.0)
                for value, dims in zip(inputs, self.event_dims, strict=True)
            ]
            out = self.encode(inputs, mask.unsqueeze(-1))
        return tensordict.set(self.out_keys[0], out)

    def _read(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"the timestep encoder reads {key!r}, but the tensordict holds only "
                f"{sorted(map(str, tensordict.keys(True, True)))}. Build the encoder from the "
                "environment's specs (make_policy), or name the entries with obs_keys."
            )
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())
