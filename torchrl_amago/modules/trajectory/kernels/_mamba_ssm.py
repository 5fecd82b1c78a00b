"""The CUDA kernels of `mamba-ssm` and `causal-conv1d`.

They read whole sequences of one trial per row; they can't cut the state at a trial's start.

Legend: B batch, T steps, E inner channels, N state size per channel, K convolution width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from torchrl_amago._validation import check_choice

# Sizes that the kernels are compiled for.
_CONV_WIDTHS = (2, 3, 4)
_MAX_STATE = 256


class MambaKernels(NamedTuple):
    """The kernels, under their own names."""

    causal_conv1d_fn: Callable[..., Tensor]
    selective_scan_fn: Callable[..., Tensor]

    def convolve(self, x_BTE: Tensor, weight_E1K: Tensor, bias_E: Tensor) -> Tensor:
        """Convolve every channel causally and apply SiLU: `[B, T, E]`."""
        x_BET = x_BTE.transpose(1, 2).contiguous()
        weights = (weight_E1K.squeeze(1).to(x_BET.dtype), bias_E.to(x_BET.dtype))
        return self.causal_conv1d_fn(x_BET, *weights, activation="silu").transpose(1, 2)

    def scan(
        self,
        sequences: Sequence[Tensor],
        gate_BTE: Tensor,
        rate_EN: Tensor,
        skip_E: Tensor,
        delta_bias_E: Tensor,
    ) -> Tensor:
        """Compute `(scan + skip x) silu(gate)`, `[B, T, E]`, in the dtype of x.

        `sequences` are the inputs x, the step sizes before bias and softplus, and the paper's B and
        C; `rate_EN` is its A, `skip_E` its D.
        """
        x, delta, write, read, gate = (
            z.to(sequences[0].dtype).transpose(1, 2).contiguous() for z in (*sequences, gate_BTE)
        )
        rate, skip, bias = (z.float().contiguous() for z in (rate_EN, skip_E, delta_bias_E))
        options = {"z": gate, "delta_bias": bias, "delta_softplus": True}
        return self.selective_scan_fn(x, delta, rate, write, read, skip, **options).transpose(1, 2)


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
