"""The contract of every trajectory encoder: two modes, one meaning, memory owned by the module.

Legend: *B batch, T steps, I input features, D state features, N rows (all batch dimensions, flat).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDictBase, is_batchedtensor
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torch.nn import functional as F
from torchrl.modules import recurrent_mode

from torchrl_amago import keys
from torchrl_amago._cpu import is_traced
from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.modules._settings import Configurable
from torchrl_amago.modules.trajectory.memory.streams import Memory, StreamTable, stream_of


def check_sizes(**sizes: int) -> None:
    """Refuse sizes of a sequence model below 1, by name."""
    check_counts("Sizes are counted; for an agent without memory use FeedForwardEncoder.", **sizes)


def check_heads(d_model: int, num_heads: int) -> None:
    """Refuse a width that its heads can't share."""
    if d_model % num_heads:
        raise ValueError(
            f"num_heads must divide d_model, got num_heads={num_heads}, d_model={d_model}. "
            f"Choose for example d_model={32 * num_heads}."
        )


def starts_within_rows(is_init_NT: Tensor | None) -> Tensor | None:
    """Where trials begin, or None if none does after a row's first step, so that nothing must be cut.

    Under `torch.compile` and `torch.vmap` rows are always cut, which is right for any data.
    """
    if is_init_NT is None or is_traced(is_init_NT):
        return is_init_NT
    return is_init_NT if is_init_NT[:, 1:].any() else None


class TrajectoryEncoder(Configurable, TensorDictModuleBase):
    """Base of all trajectory encoders: `(timestep, time_idx, is_init) -> state`.

    Under :class:`torchrl.modules.set_recurrent_mode` the encoder reads whole sequences
    `[*B, T, ...]` and is differentiable. Otherwise it takes one step `[*B, ...]`, without gradient
    and always as in evaluation, and remembers. Both give the same states.

    The memory of a rollout is in the module; the entry `_stream` of the tensordict says which one
    it is. Rows where it is missing or 0 are new, a row with `is_init` starts empty. Copies
    (`deepcopy`, `pickle`) start without memory. The table holds `max_streams` rollouts.

    To write an encoder, implement :meth:`sequence`, :meth:`step` and :meth:`new_memory`. One whose step
    needs nothing of earlier ones sets :attr:`has_memory` to False, writes no stream, and its `step`
    gets None for a memory.

    Args:
        input_size: I, features of a timestep embedding.
        output_size: D, features of a state.
        context_length: how many steps a rollout's step sees, itself included; None for all. Encoders
            whose memory doesn't grow see all, whatever it is.
        on_weight_update: what becomes of memories when the weights change during a rollout: `keep`
            them (they hold what older weights computed), or `restart` them empty at the next step.
        max_streams: how many rollouts are remembered; the one left alone for longest goes. Nobody says
            when a rollout is over: one that is paused is forgotten when so many others were begun since.
        timestep_key: entry to read, `[*B, I]`.
        time_idx_key: steps since the trial began, `[*B, 1]`, integer.
        is_init_key: first step of a trial, `[*B, 1]`, bool; optional for sequences of one trial.
        stream_key: entry to write, `[*B, 1]` int64, and to read where it is there: it is none of
            `in_keys`, since environments and batches of a loss don't have it.
        mask_key: True on real steps, `[*B, T]`, for sequences; may be absent. Inputs under False
            count as zeros.
        state_key: entry to write, `[*B, D]`.

    Raises:
        KeyError: if the tensordict lacks an entry.
        ValueError: if shapes do not fit, or rows of several rollouts are stepped together.

    Example:
        >>> from tensordict import TensorDict
        >>> class Total(Memory):
        ...     def __init__(self, rows, size):
        ...         self.batch_size, self.device = rows, torch.device("cpu")
        ...         self.sum = torch.zeros(rows, size)
        ...     def clear(self, rows_B):
        ...         self.sum[rows_B] = 0.0
        >>> class SumEncoder(TrajectoryEncoder):
        ...     def sequence(self, x_NTI, positions_NT, is_init_NT):
        ...         return x_NTI.cumsum(1)
        ...     def step(self, x_NI, positions_N, memory):
        ...         return memory.sum.add_(x_NI).clone()
        ...     def new_memory(self, num_rows, device, dtype):
        ...         return Total(num_rows, self.output_size)
        >>> encoder = SumEncoder(1, 1)
        >>> td = TensorDict(timestep=[[2.0]], time_idx=[[0]], is_init=[[True]], batch_size=[1])
        >>> td = encoder(td)
        >>> encoder(td.set("is_init", torch.tensor([[False]])))["state"]
        tensor([[4.]])
    """

    not_settings = frozenset(
        {"max_streams", "attention", "backend", "longest_memory"}  # of any encoder
    )
    #: Whether a rollout's step depends on those before it.
    has_memory: ClassVar[bool] = True

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        context_length: int | None = None,
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
        self.input_size, self.output_size = input_size, output_size
        self.context_length = context_length
        self.on_weight_update = on_weight_update
        self._streams = StreamTable(max_streams)
        self._fingerprint: Tensor | None = None
        self._use_eager()

    # --- what an encoder implements ---

    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        """Encode whole sequences, with gradient.

        Args:
            x_NTI: timestep embeddings.
            positions_NT: steps since the trial began, int64.
            is_init_NT: where trials begin; None if every row is a part of one trial.

        Returns:
            States `[N, T, D]`.
        """
        raise NotImplementedError

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: Memory | None) -> Tensor:
        """Encode one step per row and remember it, as in evaluation whatever `training` says.

        Called without gradient, after the memory's `clear` and `advance`.

        Returns:
            States `[N, D]`.
        """
        raise NotImplementedError

    def new_memory(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> Memory | None:
        """Make an empty memory for a rollout of `num_rows` environments; None without :attr:`has_memory`."""
        if self.has_memory:
            raise NotImplementedError
        return None

    def check_positions(self, positions: Tensor) -> None:
        """Refuse positions that can't be encoded; called outside of compiled code."""

    def check_mask(self, mask: Tensor) -> None:
        """Refuse masks of sequences ``[*B, T, 1]`` that the encoder can't honour; by default none."""

    # --- what it gets ---

    @property
    def keyword_keys(self) -> list[NestedKey]:
        """Entries that may be given as keywords: the inputs and, to go on with a rollout, its stream."""
        return [*self.in_keys, *self.out_keys[1:]]

    @dispatch(source="keyword_keys")
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read the timestep's embedding, write the state (and, in step mode, the stream)."""
        x = self._get_timestep(tensordict)
        if not x.numel():
            # No rows or no steps: nothing to encode, and kernels refuse sizes of 0.
            return tensordict.set(self.out_keys[0], x.new_zeros(*x.shape[:-1], self.output_size))
        if recurrent_mode():
            return self._forward_sequence(tensordict, x)
        with torch.no_grad():
            positions_N, memory = self.begin_step(tensordict, x.shape[:-1], like=x)
            state_ND = self._step(x.reshape(-1, self.input_size), positions_N, memory)
        return tensordict.set(self.out_keys[0], state_ND.reshape(*x.shape[:-1], -1))

    def reset_streams(self) -> None:
        """Forget all rollouts; those under way continue with empty memories."""
        self._streams.drop()

    def memory_of(self, tensordict: TensorDictBase) -> Memory:
        """What this encoder remembers of the rollout that the tensordict belongs to.

        Raises:
            RuntimeError: if there is none: of sequences, or of an encoder without :attr:`has_memory`.
            KeyError: if the rollout is unknown here.
        """
        if not self.has_memory:
            raise RuntimeError(
                f"{type(self).__name__} looks at each step alone, but its memory was asked for. Ask only "
                "encoders whose has_memory is True."
            )
        if recurrent_mode():
            raise RuntimeError(
                "sequences have no memory, but it was asked for in recurrent mode. Leave "
                "set_recurrent_mode(True), or read the states that the encoder writes."
            )
        stream = stream_of(tensordict.get(self.stream_key, None), self.stream_key)
        memory = self._streams.find(stream) if stream else None
        if memory is None:
            raise KeyError(
                f"no memory of stream {stream} in this encoder: rollouts get one at their first step. "
                f"Pass a tensordict that this encoder has stepped, with its {self.stream_key!r}."
            )
        return memory

    def memory_state_dict(self, streams: Collection[int] | None = None) -> dict[str, Any]:
        """Copies of what is remembered of all rollouts, for :meth:`load_memory_state_dict`.

        Args:
            streams: those of the rollouts that are meant; by default all.

        Returns:
            The nested dict of tensors of :meth:`StreamTable.state_dict`; where memories restart with
            new weights also ``fingerprint``, the weights last seen.
        """
        state = self._streams.state_dict(streams)
        if self._fingerprint is not None:
            state["fingerprint"] = self._fingerprint.clone()
        return state

    def load_memory_state_dict(
        self, state: Mapping[str, Any], device: torch.device | str | None = None
    ) -> None:
        """Go on with the rollouts of a saved memory, exactly; what is remembered now is forgotten.

        The rollouts' tensordicts must be those that were under way, with their stream.

        Args:
            state: what :meth:`memory_state_dict` gave.
            device: of the rollouts; default: that of the parameters, or the CPU if there are none.

        Raises:
            ValueError: if an encoder of other sizes was saved. All is as before then.
        """
        if device is None:
            device = next((p.device for p in self.parameters()), "cpu")
        self._streams.load_state_dict(
            state, lambda num_rows, dtype: self.new_memory(num_rows, torch.device(device), dtype)
        )
        self._fingerprint = state.get("fingerprint")

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile :meth:`sequence` and :meth:`step` with :func:`torch.compile`, in place.

        Streams are looked up outside of compiled code, so contexts may grow without recompilation.
        Copies run eagerly until they are compiled themselves.

        Args:
            args: of `torch.compile`, likewise `kwargs`.
        """
        self._sequence = torch.compile(self.sequence, *args, **kwargs)
        self._step = torch.compile(self.step, *args, **kwargs)

    def begin_step(
        self, tensordict: TensorDictBase, shape: torch.Size, like: Tensor
    ) -> tuple[Tensor, Memory | None]:
        """Find the rollout's memory and make it ready for one :meth:`step`; write the stream.

        Args:
            tensordict: with `time_idx` and `is_init`.
            shape: `*B` of the step's embeddings.
            like: gives device and dtype of a new memory.

        Returns:
            Positions `[N]` and the memory; None if the encoder has none.
        """
        positions, is_init = self._get_time(tensordict, shape)
        positions_N = positions.reshape(-1)
        self.check_positions(positions_N)
        if not self.has_memory:
            return positions_N, None
        if is_batchedtensor(positions) or is_batchedtensor(like):
            raise RuntimeError(
                f"torch.vmap can't follow a rollout's memory, but {type(self).__name__} was called for a "
                "single step under it. For sequences, put set_recurrent_mode(True) around the call; for "
                "steps, build the loss or value estimator with deactivate_vmap=True."
            )
        if is_init is None:
            raise KeyError(
                f"single steps need {self.in_keys[2]!r}, which says where memory starts empty. "
                "Append torchrl's InitTracker to the environment."
            )
        is_init_N = is_init.reshape(-1)
        stream, memory = self._find_memory(tensordict, is_init_N, positions_N, like)
        memory.clear(is_init_N)
        memory.advance()
        # A new tensor each time: environments zero it in place when they reset.
        number = torch.full(positions.shape, stream, dtype=torch.int64, device=like.device)
        tensordict.set(self.stream_key, number)
        return positions_N, memory

    def _get(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"the trajectory encoder reads {key!r}, but the tensordict holds only "
                f"{sorted(map(str, tensordict.keys(True, True)))}. A timestep encoder writes "
                "the first of its inputs, PreviousStepTransform the second."
            )
        return value

    def _get_timestep(self, tensordict: TensorDictBase) -> Tensor:
        x = self._get(tensordict, self.in_keys[0])
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"{self.in_keys[0]!r} must have input_size={self.input_size} features, got shape "
                f"{tuple(x.shape)}. Build the encoder with the timestep encoder's output_size."
            )
        return x

    def _get_time(
        self, tensordict: TensorDictBase, shape: torch.Size
    ) -> tuple[Tensor, Tensor | None]:
        positions = self._get(tensordict, self.in_keys[1])
        is_init = tensordict.get(self.in_keys[2], None)
        for key, value in zip(self.in_keys[1:], (positions, is_init), strict=False):
            if value is not None and value.shape != (*shape, 1):
                raise ValueError(
                    f"{key!r} must have shape {(*shape, 1)} to go with the other entries of the step, "
                    f"got {tuple(value.shape)}. Keep a last dimension of 1."
                )
        return positions, is_init

    def _forward_sequence(self, tensordict: TensorDictBase, x: Tensor) -> TensorDictBase:
        shape = x.shape[:-1]
        if x.ndim < 2:
            raise ValueError(
                f"in recurrent mode {self.in_keys[0]!r} must have a time dimension, [*B, T, I]; got "
                f"{tuple(x.shape)}. Leave set_recurrent_mode(True) to take single steps."
            )
        positions, is_init = self._get_time(tensordict, shape)
        mask = tensordict.get(self.mask_key, None)
        if mask is not None:
            mask = mask.reshape(*shape, 1)
            if not is_traced(mask):
                self.check_mask(mask)
            x = torch.where(mask, x, 0.0)
            positions = torch.where(mask, positions, 0)
            # What comes after padding on the left begins there, be it in mid-trial.
            begins = mask & ~F.pad(mask, (0, 0, 1, 0), value=True)[..., :-1, :]
            is_init = begins if is_init is None else (is_init & mask) | begins
        if not is_traced(positions):
            self.check_positions(positions)
        x_NTI = x.reshape(-1, *x.shape[-2:])
        rows = x_NTI.shape[:2]
        if is_init is not None:
            is_init = is_init.reshape(rows)
        state_NTD = self._sequence(x_NTI, positions.reshape(rows), is_init)
        return tensordict.set(self.out_keys[0], state_NTD.reshape(*shape, -1))

    # --- the memory of rollouts ---

    def _find_memory(
        self, tensordict: TensorDictBase, is_init_N: Tensor, positions_N: Tensor, x: Tensor
    ) -> tuple[int, Memory]:
        if self.on_weight_update == "restart":
            self._restart_if_weights_changed()
        stream = stream_of(tensordict.get(self.stream_key, None), self.stream_key)
        memory = self._streams.find(stream) if stream else None
        num_rows = is_init_N.numel()
        if memory is not None and memory.batch_size == num_rows and memory.device == x.device:
            return stream, memory
        # Made-up tensordicts, as collectors probe policies with, are all zero: time index included.
        if (~is_init_N & (positions_N > 0)).any():
            self._streams.complain_of_loss(stream, memory, num_rows, self.stream_key)
        memory = self.new_memory(num_rows, x.device, self._memory_dtype(x))
        return self._streams.add(memory), memory

    def _memory_dtype(self, x: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return next((p.dtype for p in self.parameters()), x.dtype)

    def _restart_if_weights_changed(self) -> None:
        # Version counters would miss writes through `.data` and from other processes. An update of
        # weights moves every vector (gains, biases) and every matrix's first row.
        parts = [p.detach().reshape(-1)[: p.shape[-1]] for p in self.parameters() if p.ndim]
        if not parts:
            return
        fingerprint, before = torch.cat(parts), self._fingerprint
        if before is not None and not torch.equal(fingerprint, before.to(fingerprint)):
            self._streams.clear_rows()
        self._fingerprint = fingerprint

    def __getstate__(self) -> dict:
        # A copy must not share memory with a rollout that the original goes on with.
        state = self.__dict__.copy()
        state["_streams"] = StreamTable(self._streams.max_streams)
        state["_fingerprint"] = None
        # Compiled code can't be copied, and bound methods would lead back to the original.
        del state["_sequence"], state["_step"]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._use_eager()

    def _use_eager(self) -> None:
        self._sequence, self._step = self.sequence, self.step
