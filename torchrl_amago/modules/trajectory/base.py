"""The contract of every trajectory encoder: two modes with the same states, memory in the module.

Legend: *B batch, T steps, I input features, D state features, N rows (all batch dimensions, flat).
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDictBase, is_batchedtensor
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torch.nn import functional as F
from torchrl.modules import recurrent_mode

from torchrl_amago import keys
from torchrl_amago._cpu import is_traced, reads_are_free
from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.modules._settings import Configurable
from torchrl_amago.modules._state_norm import StateNorm
from torchrl_amago.modules.trajectory.memory import Memory, StreamTable


class TrajectoryEncoder(Configurable, TensorDictModuleBase, abc.ABC):
    """Base of all trajectory encoders: `(timestep, time_idx, is_init) -> state`.

    Under :class:`torchrl.modules.set_recurrent_mode` the encoder reads whole sequences
    `[*B, T, ...]` and is differentiable. Otherwise it takes one step `[*B, ...]`, without gradient
    and always as in evaluation, and remembers it. Both give the same states.

    The module holds the memory of up to `max_streams` rollouts; the entry `_stream` of the
    tensordict selects one. Rows where it is missing or 0 are new, a row with `is_init` starts
    empty. Copies start without memory.

    To write an encoder, implement :meth:`sequence`, :meth:`step` and :meth:`new_memory`, or without
    the last set :attr:`has_memory` to False.

    Args:
        input_size: I, features of a timestep embedding.
        output_size: D, features of a state; default `input_size`.
        context_length: number of steps that a rollout's step sees, itself included; None for all.
            Encoders with a memory of constant size always see all.
        normalize_states: shift and scale each feature of the state to mean 0 and variance 1: in
            training over the batch's real steps (batch normalisation, arXiv 1502.03167), else by
            moving averages. Critics can't then make all states alike (``docs/encoders.md``).
        on_weight_update: `keep` memories when the weights change during a rollout (they hold
            results of older weights), or `restart` them empty at the next step.
        max_streams: number of rollouts to remember; the least recently used one leaves first.
        timestep_key: entry to read, `[*B, I]`.
        time_idx_key: steps since the trial began, `[*B, 1]`, integer.
        is_init_key: first step of a trial, `[*B, 1]`, bool; optional for sequences of one trial.
        stream_key: entry to write, `[*B, 1]` int64, and to read if present.
        mask_key: True on real steps, `[*B, T]`, for sequences; may be absent. Inputs under False
            count as zeros.
        state_key: entry to write, `[*B, D]`.

    Arguments with one meaning in all encoders that have them:
        d_model: D, width, and size of the state.
        num_layers: number of blocks, or of recurrent layers.
        num_heads: attention heads; divides `d_model`.
        d_ff: width of the blocks' hidden layers; default `4 * d_model`.
        dropout_emb: probability of zeroing a feature of the embedding.
        dropout_ff: probability of zeroing a feature of a feed-forward's output.
        activation: name for :func:`~torchrl_amago.modules._layers.make_activation`.
        norm: name for :func:`~torchrl_amago.modules._layers.make_norm`, inside the blocks.
        out_norm: name of the norm of the state.

    Raises:
        KeyError: if the tensordict lacks an entry.
        ValueError: if shapes do not fit, or rows of several rollouts are stepped together; from a
            constructor, if a number is out of its range or a name unknown.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_amago.modules.trajectory import StateMemory
        >>> class SumEncoder(TrajectoryEncoder):
        ...     def sequence(self, x_NTI, positions_NT, is_init_NT):
        ...         return x_NTI.cumsum(1)
        ...     def step(self, x_NI, positions_N, memory):
        ...         return memory.layers[0][0].add_(x_NI).clone()
        ...     def new_memory(self, num_rows, device, dtype):
        ...         return StateMemory(num_rows, [[(self.output_size,)]], device, dtype)
        >>> encoder = SumEncoder(1)
        >>> td = TensorDict(timestep=[[2.0]], time_idx=[[0]], is_init=[[True]], batch_size=[1])
        >>> td = encoder(td)
        >>> encoder(td.set("is_init", torch.tensor([[False]])))["state"]
        tensor([[4.]])
    """

    not_settings = frozenset(  # normalised states show in the weights
        {"max_streams", "attention", "backend", "longest_memory", "normalize_states"}
    )
    #: Whether a rollout's step depends on those before it.
    has_memory: ClassVar[bool] = True

    def __init__(
        self,
        input_size: int,
        output_size: int | None = None,
        *,
        context_length: int | None = None,
        normalize_states: bool = False,
        on_weight_update: Literal["keep", "restart"] = "keep",
        max_streams: int = 8,
        timestep_key: NestedKey = keys.TIMESTEP,
        time_idx_key: NestedKey = keys.TIME_IDX,
        is_init_key: NestedKey = keys.IS_INIT,
        stream_key: NestedKey = keys.STREAM,
        mask_key: NestedKey = keys.MASK,
        state_key: NestedKey = keys.STATE,
    ) -> None:
        super().__init__()
        check_choice("on_weight_update", on_weight_update, ("keep", "restart"))
        self.in_keys = [timestep_key, time_idx_key, is_init_key]
        self.out_keys = [state_key, stream_key] if self.has_memory else [state_key]
        self.stream_key, self.mask_key = stream_key, mask_key
        self.input_size = input_size
        self.output_size = input_size if output_size is None else output_size
        self.context_length = context_length
        self.normalize_states = normalize_states
        self.state_norm = StateNorm(self.output_size) if normalize_states else None
        self.on_weight_update = on_weight_update
        self._streams = StreamTable(max_streams)
        self._takes_mask = "mask_NT" in signature(self.sequence).parameters
        self._use_eager()

    @abc.abstractmethod
    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        """Encode whole sequences into states `[N, T, D]`, with gradient.

        `positions_NT` counts the steps since the trial began. `is_init_NT` is True at first steps
        of trials, or None if none starts after a row's first step. A further argument `mask_NT`, of
        those encoders that have it, is True on real steps; padding may be skipped.
        """

    @abc.abstractmethod
    def step(self, x_NI: Tensor, positions_N: Tensor, memory: Memory | None) -> Tensor:
        """Encode one step per row into states `[N, D]`, as in evaluation, and remember it.

        Called without gradient, after the memory's `clear` and `advance`.
        """

    def new_memory(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> Memory | None:
        """Make an empty memory for a rollout of `num_rows` environments; None without memory."""
        return None

    def check_positions(self, positions: Tensor) -> None:
        """Raise for positions that can't be encoded; called outside of compiled code."""

    def check_mask(self, mask: Tensor) -> None:
        """Raise for masks of sequences ``[*B, T, 1]`` that the encoder can't honour."""

    @property
    def keyword_keys(self) -> list[NestedKey]:
        """Entries that may be passed as keywords: the inputs and a rollout's stream."""
        return [*self.in_keys, *self.out_keys[1:]]

    @dispatch(source="keyword_keys")
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read the timestep's embedding, write the state (and, in step mode, the stream)."""
        x, sequences = self._get(tensordict, 0), bool(recurrent_mode())
        if x.ndim < 1 + sequences or x.shape[-1] != self.input_size:
            raise ValueError(
                f"{self.in_keys[0]!r} must have shape {'[*B, T, I]' if sequences else '[*B, I]'}, "
                f"I = input_size={self.input_size}, with recurrent_mode={sequences}; got "
                f"{tuple(x.shape)}. Build the encoder with the timestep encoder's output_size, and "
                "take single steps outside of set_recurrent_mode(True)."
            )
        shape = x.shape[:-1]
        if not x.numel():
            # No rows or no steps: nothing to encode, and kernels raise for sizes of 0.
            state = x.new_zeros(*shape, self.output_size)
        elif sequences:
            state = self._encode_sequences(tensordict, x)
        else:
            with torch.no_grad():
                positions_N, memory = self.begin_step(tensordict, shape, like=x)
                state = self._step(x.reshape(-1, self.input_size), positions_N, memory)
        state = state.reshape(*shape, self.output_size)
        if self.state_norm is not None and x.numel():
            update = self.training and sequences and torch.is_grad_enabled()
            state = self.state_norm(state, tensordict.get(self.mask_key, None), update)
        return tensordict.set(self.out_keys[0], state)

    def begin_step(
        self, tensordict: TensorDictBase, shape: torch.Size, like: Tensor
    ) -> tuple[Tensor, Memory | None]:
        """Find the rollout's memory and make it ready for one step; write the stream.

        Returns the positions `[N]` and the memory, for :meth:`step`. A new memory takes its device
        and dtype from `like`. Raises RuntimeError under `torch.vmap`.
        """
        positions = self._get(tensordict, 1, shape)
        positions_N = positions.reshape(-1)
        if reads_are_free(positions_N):
            self.check_positions(positions_N)
        if not self.has_memory:
            return positions_N, None
        if is_batchedtensor(positions) or is_batchedtensor(like):
            raise RuntimeError(
                f"torch.vmap can't follow a rollout's memory, got a single step of a "
                f"{type(self).__name__}. Encode sequences under set_recurrent_mode(True), or build "
                "the loss or value estimator with deactivate_vmap=True."
            )
        is_init_N = self._get(tensordict, 2, shape).reshape(-1)
        stream, memory = self._find_memory(tensordict, is_init_N, positions_N, like)
        memory.clear(is_init_N)
        memory.advance()
        tensordict.set(self.stream_key, self._streams.write(stream, positions))
        return positions_N, memory

    def _encode_sequences(self, tensordict: TensorDictBase, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        positions = self._get(tensordict, 1, shape)
        is_init = self._get(tensordict, 2, shape, required=False)
        mask = tensordict.get(self.mask_key, None)
        is_checked = tensordict.get(keys.CHECKED, None) is not None
        if mask is not None:
            mask = mask.reshape(*shape, 1)
            if not (is_traced(mask) or is_checked):
                self.check_mask(mask)
            x = torch.where(mask, x, 0.0)
            positions = torch.where(mask, positions, 0)
            # The first real step after left padding starts a segment.
            starts = mask & ~F.pad(mask, (0, 0, 1, 0), value=True)[..., :-1, :]
            is_init = starts if is_init is None else (is_init & mask) | starts
        if reads_are_free(positions):
            self.check_positions(positions)
        rows = (-1, shape[-1])
        # A checked row holds one trial: to separate trials would cost T x T scores.
        is_init_NT = None if is_init is None or is_checked else is_init.reshape(rows)
        mask_NT = [mask.reshape(rows)] if self._takes_mask and mask is not None else []
        inputs = x.reshape(*rows, x.shape[-1]), positions.reshape(rows), is_init_NT
        return self._sequence(*inputs, *mask_NT)

    def _encode_rows(
        self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None, *mask_NT: Tensor
    ) -> Tensor:
        # No branch on data under `torch.compile` and `torch.vmap`: to cut rows is always right.
        is_used = self.has_memory and is_init_NT is not None
        if is_used and not is_traced(is_init_NT) and not is_init_NT[:, 1:].any():
            is_init_NT = None
        return self.sequence(x_NTI, positions_NT, is_init_NT, *mask_NT)

    def _get(
        self, tensordict: TensorDictBase, i: int, shape: tuple | None = None, required: bool = True
    ) -> Tensor | None:
        """The input at `in_keys[i]`, of the given shape but for a last 1."""
        key = self.in_keys[i]
        value = tensordict.get(key, None)
        if value is None and required:
            raise KeyError(
                f"the trajectory encoder reads {key!r}, but the tensordict holds only "
                f"{sorted(map(str, tensordict.keys(True, True)))}. A timestep encoder writes the "
                "first of its inputs, PreviousStepTransform the second, InitTracker the third."
            )
        if value is not None and shape is not None and value.shape != (*shape, 1):
            raise ValueError(
                f"{key!r} must have shape {(*shape, 1)} to fit the other entries of the step, "
                f"got {tuple(value.shape)}. Keep a last dimension of 1."
            )
        return value

    def reset_streams(self) -> None:
        """Forget all rollouts; those under way continue with empty memories."""
        self._streams = StreamTable(self._streams.max_streams)

    def memory_state_dict(self, streams: Collection[int] | None = None) -> dict[str, Any]:
        """Copy the memories of the given streams, by default of all: see :class:`StreamTable`."""
        return self._streams.state_dict(streams)

    def load_memory_state_dict(
        self, state: Mapping[str, Any], device: torch.device | str | None = None
    ) -> None:
        """Replace all memories by saved ones, so that their rollouts continue exactly.

        Args:
            state: returned by :meth:`memory_state_dict`.
            device: of the rollouts; default: that of the parameters, else the CPU.

        Raises:
            ValueError: if it is from an encoder of other sizes; nothing has changed then.
        """
        if device is None:
            device = next((p.device for p in self.parameters()), "cpu")
        self._streams.load_state_dict(
            state, lambda num_rows, dtype: self.new_memory(num_rows, torch.device(device), dtype)
        )

    def _find_memory(
        self, tensordict: TensorDictBase, is_init_N: Tensor, positions_N: Tensor, x: Tensor
    ) -> tuple[int, Memory]:
        if self.on_weight_update == "restart":
            self._streams.clear_if_changed(self.parameters())
        stream = self._streams.read(tensordict.get(self.stream_key, None), self.stream_key)
        memory = self._streams.find(stream)
        num_rows = is_init_N.numel()
        if memory is not None and memory.batch_size == num_rows and memory.device == x.device:
            return stream, memory
        # Made-up tensordicts, as collectors probe policies with, are all zero: time index included.
        if (~is_init_N & (positions_N > 0)).any():
            self._streams.warn_of_lost_memory(stream, memory, num_rows, self.stream_key)
        dtype = next((p.dtype for p in self.parameters()), x.dtype)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        memory = self.new_memory(num_rows, x.device, dtype)
        return self._streams.add(memory), memory

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile :meth:`sequence` and :meth:`step` in place; copies run eagerly."""
        self._sequence = torch.compile(self._encode_rows, *args, **kwargs)
        self._step = torch.compile(self.step, *args, **kwargs)

    def _use_eager(self) -> None:
        self._sequence, self._step = self._encode_rows, self.step

    def __getstate__(self) -> dict:
        # Compiled code can't be copied, and bound methods would lead back to the original.
        return {k: v for k, v in self.__dict__.items() if k not in ("_sequence", "_step")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._use_eager()


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    check_counts("Sizes are counted; for an agent without memory use FeedForwardEncoder.", **sizes)


def check_heads(d_model: int, num_heads: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    if d_model % num_heads:
        raise ValueError(
            f"num_heads must divide d_model, got num_heads={num_heads}, d_model={d_model}."
        )
