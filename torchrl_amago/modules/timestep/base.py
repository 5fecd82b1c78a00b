"""The contract of every timestep encoder: each step alone, padding without influence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.data import NonTensor, TensorSpec
from torchrl.modules import recurrent_mode

from torchrl_amago import keys
from torchrl_amago._masking import Steps
from torchrl_amago._validation import check_counts
from torchrl_amago.modules._settings import Configurable

Shape = tuple[int, ...]


def flatten_and_join(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """Concatenate flattened entries ``[*M, *shape]`` of one dtype to one vector ``[*M, F]``."""
    flat = [
        x.flatten(x.ndim - len(shape)) if shape else x.unsqueeze(-1)
        for x, shape in zip(inputs, shapes, strict=True)
    ]
    return torch.cat(flat, -1)


class TimestepEncoder(Configurable, TensorDictModuleBase):
    """Base of all timestep encoders. To write your own, implement :meth:`encode`.

    Inputs under a False mask (padding) are left out or zeroed before anything else.

    Args:
        shapes: for each entry to read, in order, the shape of one step; entries are
            ``[*B, *shape]``.
        output_size: D, size of the embedding.
        hide_prev_reward: replace the entry ``prev_reward_key`` by zeros (an ablation).
        hide_prev_step: replace that and the entry ``prev_action_key`` by zeros.
        out_key: entry to write, ``[*B, D]``.
        mask_key: entry that is True on real steps, ``[*B]`` or ``[*B, 1]``; may be absent.

    Other encoders share these arguments: the size ``hidden_size`` of ``num_layers`` hidden layers,
    their ``norm`` (one of ``layer``, ``rms``, ``unit_ball``, ``unit_ball_detached``,
    ``hypersphere``, ``simplicial``, ``none``), ``out_norm`` of the output, and ``activation``
    (``leaky_relu``, ``relu``, ``gelu`` or ``mish``).

    Raises:
        ValueError: without entries, or if a hidden entry isn't read; when called, for other shapes.
        KeyError: when called, if the tensordict lacks an entry.

    Example:
        >>> class Brightness(TimestepEncoder):
        ...     def encode(self, inputs, mask):
        ...         return inputs[0].mean((-2, -1)).unsqueeze(-1)
        >>> encoder = Brightness({"pixels": (8, 8), "prev_reward": (1,)}, output_size=1)
        >>> encoder(pixels=torch.ones(5, 8, 8), prev_reward=torch.zeros(5, 1)).shape
        torch.Size([5, 1])
    """

    #: True: `encode` gets floats for every dtype of an entry; False: integers stay integers.
    casts_to_float = True

    def __init__(
        self,
        shapes: Mapping[NestedKey, Shape],
        output_size: int,
        *,
        hide_prev_reward: bool = False,
        hide_prev_step: bool = False,
        prev_reward_key: NestedKey = keys.PREV_REWARD,
        prev_action_key: NestedKey = keys.PREV_ACTION,
        out_key: NestedKey = keys.TIMESTEP,
        mask_key: NestedKey = keys.MASK,
    ) -> None:
        super().__init__()
        check_counts("Pass shapes={'observation': (size,)}.", number_of_shapes=len(shapes))
        self.in_keys, self.out_keys = list(shapes), [out_key]
        self.shapes = tuple(tuple(shape) for shape in shapes.values())
        self.output_size, self.mask_key = output_size, mask_key
        self.hidden_keys = {prev_reward_key} if hide_prev_reward or hide_prev_step else set()
        self.hidden_keys |= {prev_action_key} if hide_prev_step else set()
        if missing := self.hidden_keys - set(self.in_keys):
            raise ValueError(
                f"{sorted(map(str, missing))} can only be hidden if the encoder reads it, but it "
                f"reads {self.in_keys}. Name the entries with prev_reward_key and prev_action_key."
            )

    @classmethod
    def from_specs(cls, specs: Mapping[NestedKey, TensorSpec], **options: Any) -> TimestepEncoder:
        """Build the encoder from the spec of one step of each entry, with the further arguments."""
        if others := [key for key, spec in specs.items() if isinstance(spec, NonTensor)]:
            raise ValueError(f"encoders read tensors, and {others} are none. Choose obs_keys.")
        return cls({key: tuple(spec.shape) for key, spec in specs.items()}, **options)

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
        """Embed steps, to ``[*M, D]``.

        Args:
            inputs: one tensor ``[*M, *shape]`` per entry of ``in_keys``, zero on padding; floats
                unless :attr:`casts_to_float` is False. ``*M`` is ``*B``, or the real steps alone.
            mask: bool ``[*M, 1]``, or None if every step is real.
        """
        raise NotImplementedError

    @property
    def moves_statistics(self) -> bool:
        """True if statistics of inputs move: in training, on sequences, with gradient."""
        return self.training and recurrent_mode() and torch.is_grad_enabled()

    def augment(self, inputs: list[Tensor], rows: Tensor, num_rows: int) -> list[Tensor]:
        """Change the inputs of :meth:`encode` at random; called in training on sequences only.

        ``rows`` ``[*M]`` int64 is the batch's row (the trial) of each step, below ``num_rows``.
        """
        return inputs

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read ``in_keys``, write the embedding."""
        inputs = self.read(tensordict)
        shape = self.batch_shape(inputs)
        mask = tensordict.get(self.mask_key, None)
        steps = None if mask is None else Steps(mask.reshape(shape))
        if steps is not None:
            inputs = [steps.select(x, fill=0) for x in inputs]
        if self.training and recurrent_mode():
            num_rows = math.prod(shape[:-1])
            rows = torch.arange(num_rows, device=inputs[0].device)
            rows = rows.reshape((*shape[:-1], *(1,) * bool(shape))).expand(shape)
            rows = rows if steps is None else steps.select(rows)
            inputs = self.augment(inputs, rows, num_rows)
        has_padding = steps is not None and not steps.compact
        out = self.encode(inputs, steps.mask.unsqueeze(-1) if has_padding else None)
        return tensordict.set(self.out_keys[0], out if steps is None else steps.restore(out))

    def batch_shape(self, inputs: list[Tensor]) -> torch.Size:
        """Return ``*B`` of the inputs that :meth:`read` returns."""
        return inputs[0].shape[: inputs[0].ndim - len(self.shapes[0])]

    def read(self, tensordict: TensorDictBase) -> list[Tensor]:
        """Return the inputs of :meth:`encode`, one per entry of ``in_keys``."""
        entries = zip(self.in_keys, self.shapes, strict=True)
        inputs = [self._read(tensordict, key, shape) for key, shape in entries]
        if not self.casts_to_float:
            return inputs
        # Gymnasium's float64 too: weights say which precision is meant.
        weight = next(self.parameters(), None)
        dtype = torch.get_default_dtype() if weight is None else weight.dtype
        return [x if weight is None and x.is_floating_point() else x.to(dtype) for x in inputs]

    def _read(self, tensordict: TensorDictBase, key: NestedKey, shape: Shape) -> Tensor:
        value = tensordict[key]
        if tuple(value.shape[max(value.ndim - len(shape), 0) :]) != shape:
            got = f"got {tuple(value.shape)}. Build the encoder from the environment's specs."
            raise ValueError(f"entry {key!r} must end in {shape} for each step, {got}")
        # Not `0 * value`: an environment may write NaN.
        return torch.zeros_like(value) if key in self.hidden_keys else value

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile :meth:`encode` in place, with the arguments of :func:`torch.compile`.

        Copies run eagerly until they are compiled themselves.
        """
        self.encode = torch.compile(self.encode, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code can't be copied; without it, a copy has the method of its class.
        state = super().__getstate__()
        state.pop("encode", None)
        return state
