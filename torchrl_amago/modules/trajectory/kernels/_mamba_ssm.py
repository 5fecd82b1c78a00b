"""The CUDA kernels of `mamba-ssm` and `causal-conv1d`, used when they are installed.

They read whole sequences of one trial per row; they can't cut the state at a trial's start.

Legend: B batch, T steps, E inner channels, N state size per channel, K convolution width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from torchrl_amago._validation import check_choice

# Sizes that the kernels are compiled for.
_CONV_WIDTHS = (2, 3, 4)
_MAX_STATE = 256


class MambaKernels(NamedTuple):
    """The two functions of the kernels, under their own names."""

    causal_conv1d_fn: Callable[..., Tensor]
    selective_scan_fn: Callable[..., Tensor]

    def convolve(self, x_BTE: Tensor, weight_E1K: Tensor, bias_E: Tensor) -> Tensor:
        """Convolve every channel causally and apply SiLU: `[B, T, E]`."""
        x_BET = self.causal_conv1d_fn(
            x_BTE.transpose(1, 2).contiguous(),
            weight_E1K.squeeze(1).to(x_BTE.dtype),
            bias_E.to(x_BTE.dtype),
            activation="silu",
        )
        return x_BET.transpose(1, 2)

    def scan(
        self,
        x_BTE: Tensor,
        delta_BTE: Tensor,
        rate_EN: Tensor,
        write_BTN: Tensor,
        read_BTN: Tensor,
        skip_E: Tensor,
        gate_BTE: Tensor,
        delta_bias_E: Tensor,
    ) -> Tensor:
        """Compute `(scan + skip x) silu(gate)`, with step sizes `softplus(delta + bias)`."""
        x_BET, delta_BET, write_BNT, read_BNT, gate_BET = (
            z.to(x_BTE.dtype).transpose(1, 2).contiguous()
            for z in (x_BTE, delta_BTE, write_BTN, read_BTN, gate_BTE)
        )
        y_BET = self.selective_scan_fn(
            x_BET,
            delta_BET,
            rate_EN.float().contiguous(),
            write_BNT,
            read_BNT,
            skip_E.float(),
            z=gate_BET,
            delta_bias=delta_bias_E.float(),
            delta_softplus=True,
        )
        return y_BET.transpose(1, 2)


def load_kernels(backend: str, conv_width: int, state_size: int) -> MambaKernels | None:
    """Import the kernels, or return None without them.

    Args:
        backend: `torch` for None, `mamba_ssm` for the kernels, `auto` for the kernels if possible.
        conv_width: K, which must be 2, 3 or 4 for the kernels.
        state_size: N, at most 256 for the kernels.

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
