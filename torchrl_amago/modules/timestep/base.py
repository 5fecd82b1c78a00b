"""The contract of every timestep encoder: each step alone, padding unseen, ablation by a switch."""

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
from torchrl_amago.modules._settings import Configurable

Shape = tuple[int, ...]


def flatten_and_join(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """Entries side by side in one vector, in the order given.

    Args:
        inputs: ``[*M, *shape]`` each, of one dtype.
        shapes: the shape of one step of each.

    Returns:
        ``[*M, F]``.

    Example:
        >>> flatten_and_join([torch.ones(5, 2, 3), torch.zeros(5)], [(2, 3), ()]).shape
        torch.Size([5, 7])
    """
    flat = [
        x.flatten(x.ndim - len(shape)) if shape else x.unsqueeze(-1)
        for x, shape in zip(inputs, shapes, strict=True)
    ]
    return torch.cat(flat, -1)


class TimestepEncoder(Configurable, TensorDictModuleBase):
    """Base of all timestep encoders. To write your own, implement :meth:`encode`.

    Inputs under a False mask (padding) are left out, or replaced by zeros, before anything else
    sees them.

    Args:
        shapes: for each entry to read, in order, the shape of one step: the entry is
            ``[*B, *shape]``.
        output_size: D, size of the embedding.
        hide_prev_reward: show zeros in place of the previous reward (an ablation).
        hide_prev_step: show zeros in place of the previous reward and action.
        prev_reward_key: entry that ``hide_prev_reward`` hides.
        prev_action_key: entry that ``hide_prev_step`` hides as well.
        out_key: entry to write, ``[*B, D]``.
        mask_key: entry that is True on real steps, ``[*B]`` or ``[*B, 1]``; may be absent.

    Raises:
        ValueError: if there is nothing to read, or what is to be hidden isn't read; when called, if
            an entry has another shape.
        KeyError: when called, if the tensordict lacks an entry.

    Example:
        >>> from tensordict import TensorDict
        >>> class Brightness(TimestepEncoder):
        ...     def encode(self, inputs, mask):
        ...         return inputs[0].mean((-2, -1)).unsqueeze(-1)
        >>> encoder = Brightness({"pixels": (8, 8)}, output_size=1)
        >>> td = TensorDict(pixels=torch.ones(5, 8, 8, dtype=torch.uint8), batch_size=[5])
        >>> encoder(td)["timestep"].shape
        torch.Size([5, 1])
    """

    #: Whether `encode` gets floats whatever the dtype of an entry; False leaves integers as they are.
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
        if not shapes:
            raise ValueError(
                f"{type(self).__name__} needs at least one entry to read, got shapes={{}}. "
                "Pass {'observation': (size,)} or use make_policy."
            )
        self.in_keys, self.out_keys = list(shapes), [out_key]
        self.shapes = tuple(tuple(shape) for shape in shapes.values())
        self.event_dims = tuple(len(shape) for shape in self.shapes)
        self.output_size = output_size
        self.mask_key = mask_key
        self.hidden_keys = {prev_reward_key} if hide_prev_reward or hide_prev_step else set()
        if hide_prev_step:
            self.hidden_keys |= {prev_action_key}
        if missing := self.hidden_keys - set(self.in_keys):
            raise ValueError(
                f"{sorted(map(str, missing))} can only be hidden if the encoder reads it, but it "
                f"reads {self.in_keys}. Name the entries with prev_reward_key and "
                "prev_action_key, or leave out the switch."
            )

    @classmethod
    def from_specs(cls, specs: Mapping[NestedKey, TensorSpec], **options: Any) -> TimestepEncoder:
        """Build the encoder for the observations of an environment.

        Args:
            specs: for each entry to read, in order, the spec of one step.
            options: further arguments of the constructor.

        Raises:
            ValueError: for an entry that isn't a tensor.
        """
        for key, spec in specs.items():
            if isinstance(spec, NonTensor):
                raise ValueError(
                    f"the timestep encoder reads tensors, and {key!r} is none of them (NonTensor). Name the "
                    "entries to read with obs_keys, or make a tensor of it with a transform."
                )
        return cls({key: tuple(spec.shape) for key, spec in specs.items()}, **options)

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
        """Embed steps.

        Args:
            inputs: one tensor ``[*M, *shape]`` per entry of ``in_keys``, in the parameters' precision
                unless :attr:`casts_to_float` is False; ``*M`` is ``*B``, or the real steps alone in
                one row. Zero where padded.
            mask: bool ``[*M, 1]``, or None if every step is real.

        Returns:
            ``[*M, D]``.
        """
        raise NotImplementedError

    @property
    def moves_statistics(self) -> bool:
        """Whether statistics of inputs follow this batch: in training, on sequences, with gradient."""
        return self.training and recurrent_mode() and torch.is_grad_enabled()

    def augment(self, inputs: list[Tensor], rows: Tensor, num_rows: int) -> list[Tensor]:
        """Change inputs at random; called in training on sequences only, before :meth:`encode`.

        Args:
            inputs: those of :meth:`encode`.
            rows: ``[*M]`` int64, which row of the batch (which trial) each step belongs to.
            num_rows: how many rows there are.

        Returns:
            What :meth:`encode` shall get; here, the same inputs.
        """
        return inputs

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read ``in_keys``, write the embedding."""
        inputs = self.read(tensordict)
        shape = inputs[0].shape[: inputs[0].ndim - self.event_dims[0]]
        mask = tensordict.get(self.mask_key, None)
        steps = None if mask is None else Steps(mask.reshape(shape))
        selected = inputs if steps is None else [steps.select(x, fill=0) for x in inputs]
        if self.training and recurrent_mode():
            num_rows = math.prod(shape[:-1])
            rows = torch.arange(num_rows, device=inputs[0].device)
            rows = rows.reshape((*shape[:-1], *(1,) * bool(shape))).expand(shape)
            selected = self.augment(
                selected, rows if steps is None else steps.select(rows), num_rows
            )
        if steps is None:
            out = self.encode(selected, None)
        else:
            out = self.encode(selected, None if steps.compact else steps.mask.unsqueeze(-1))
            out = steps.restore(out)
        return tensordict.set(self.out_keys[0], out)

    def read(self, tensordict: TensorDictBase) -> list[Tensor]:
        """The inputs of :meth:`encode`, one per entry of ``in_keys``."""
        read = zip(self.in_keys, self.shapes, strict=True)
        inputs = [self._read(tensordict, key, shape) for key, shape in read]
        if not self.casts_to_float:
            return inputs
        # Gymnasium's float64 too: weights say which precision is meant.
        weight = next(self.parameters(), None)
        dtype = torch.get_default_dtype() if weight is None else weight.dtype
        return [x if weight is None and x.is_floating_point() else x.to(dtype) for x in inputs]

    def _read(self, tensordict: TensorDictBase, key: NestedKey, shape: Shape) -> Tensor:
        value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"the timestep encoder reads {key!r}, but the tensordict holds only "
                f"{sorted(map(str, tensordict.keys(True, True)))}. Build the encoder from the "
                "environment's specs (make_policy), or name the entries with obs_keys."
            )
        if tuple(value.shape[max(value.ndim - len(shape), 0) :]) != shape:
            raise ValueError(
                f"entry {key!r} must end in {shape} for each step, got {tuple(value.shape)}. "
                "The environment's specs differ from those the encoder was built with."
            )
        if key in self.hidden_keys:
            # Not `0 * value`: an environment may write NaN.
            value = torch.zeros_like(value)
        return value

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
