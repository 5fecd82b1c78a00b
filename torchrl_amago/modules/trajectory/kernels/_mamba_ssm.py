"""The CUDA kernels of `mamba-ssm` and `causal-conv1d`.

They read whole sequences of one trial per row; they can't cut the state at a trial's start.

Legend: B batch, T steps, E inner channels, N state size per channel, K convolution width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from torchrl_amago._validation import check_choice

if TYPE_CHECKING:
    from torchrl_amago.modules.trajectory.mamba import MambaBlock

# Sizes that the kernels are compiled for.
_CONV_WIDTHS = (2, 3, 4)
_MAX_STATE = 256


class MambaKernels(NamedTuple):
    """The kernels, under their own names."""

    causal_conv1d_fn: Callable[..., Tensor]
    selective_scan_fn: Callable[..., Tensor]

    def mix(self, block: MambaBlock, x_BTE: Tensor, gate_BTE: Tensor) -> Tensor:
        """Compute a block's convolution, scan and gate: `[B, T, E]`, in the dtype of x."""
        x_BET, dtype = x_BTE.transpose(1, 2).contiguous(), x_BTE.dtype
        weights = (block.conv1d.weight.squeeze(1).to(dtype), block.conv1d.bias.to(dtype))
        x_BET = self.causal_conv1d_fn(x_BET, *weights, activation="silu")
        sequences = (*block.select(x_BET.transpose(1, 2)), gate_BTE)
        delta, write, read, gate = (z.to(dtype).transpose(1, 2).contiguous() for z in sequences)
        own = (block.rate(), block.D, block.dt_proj.bias)
        rate, skip, bias = (z.float().contiguous() for z in own)
        options = {"z": gate, "delta_bias": bias, "delta_softplus": True}
        y_BET = self.selective_scan_fn(x_BET, delta, rate, write, read, skip, **options)
        return y_BET.transpose(1, 2)


def load_kernels(backend: str, conv_width: int, state_size: int) -> MambaKernels | None:
    """Import the kernels, or return None where `backend` allows it.

    Raises:
        ImportError: if they are chosen by name but not installed.
        ValueError: if the backend is unknown, or the kernels don't have these sizes.
    """
    check_choice("backend", backend, ("auto", "torch", "mamba_ssm"))
    fits = conv_width in _CONV_WIDTHS and state_size <= _MAX_STATE
    if backend == "mamba_ssm" and not fits:
        raise ValueError(
            f"backend='mamba_ssm' needs d_conv in {_CONV_WIDTHS} and d_state up to {_MAX_STATE}, "
            f"got d_conv={conv_width}, d_state={state_size}. Use backend='torch' for these sizes."
        )
    if backend == "torch" or not fits:
        return None
    try:
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        conv = importlib.import_module("causal_conv1d")
    except ImportError as error:
        if backend == "auto":
            return None
        raise ImportError(
            "backend='mamba_ssm' needs the packages mamba-ssm and causal-conv1d, and importing "
            f"them failed: {error}. Install them on a CUDA machine with "
            "`pip install --no-build-isolation torchrl-amago[mamba]`, or use backend='auto'."
        ) from error
    return MambaKernels(conv.causal_conv1d_fn, scan.selective_scan_fn)
