"""Mamba trajectory encoder: a state of constant size with data-dependent decay and writes.

Legend: N rows, T steps, I input features, D width, E inner channels, S state size per channel,
R rank of the step size's projection, K convolution width; `*` stands for N or N, T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_amago._cpu import is_traced
from torchrl_amago._validation import check_choice
from torchrl_amago.modules._layers import StreamEmbedding, at_least_float32, make_norm
from torchrl_amago.modules.trajectory.base import TrajectoryEncoder, check_sizes
from torchrl_amago.modules.trajectory.kernels.mamba_scan import selective_scan, selective_step
from torchrl_amago.modules.trajectory.memory import StateMemory

# Step sizes at initialisation, log-uniform (arXiv 2312.00752, section 3.6). With rates of 1 to 16,
# a state forgets over 0.6 to 1000 steps.
_DELTA_RANGE = (1e-3, 1e-1)
# Sizes that the kernels of `mamba-ssm` are compiled for.
_CONV_WIDTHS = (2, 3, 4)
_MAX_STATE = 256


class MambaKernels(NamedTuple):
    """CUDA kernels of `causal-conv1d` and `mamba-ssm`, for sequences of one trial per row."""

    causal_conv1d_fn: Callable[..., Tensor]
    selective_scan_fn: Callable[..., Tensor]


class MambaBlock(nn.Module):
    """Mamba's mixer (arXiv 2312.00752, figure 3): convolution, selective scan, gate.

        x, z = in_proj(input)
        x = silu(conv1d(x))
        delta, B, C = x_proj(x),    delta = softplus(dt_proj(delta))
        out = out_proj((scan(x, delta, -exp(A_log), B, C) + D x) silu(z))

    Parameters have the names and shapes of `mamba_ssm.Mamba`, so that state dicts fit both.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.d_state, self.d_conv = d_state, d_conv
        self.d_inner, self.dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rates, skips and step sizes as in Mamba's paper; layers reset themselves."""
        self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32).log())
        self.D.fill_(1.0)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = (math.log(delta) for delta in _DELTA_RANGE)
        delta_E = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp()
        # The inverse of softplus.
        self.dt_proj.bias.copy_(delta_E + (-torch.expm1(-delta_E)).log())

    def forward(
        self, x_NTD: Tensor, is_init_NT: Tensor | None = None, kernels: MambaKernels | None = None
    ) -> Tensor:
        """Mix whole sequences, with gradient; `kernels` take those of one trial per row."""
        x_NTE, gate_NTE = self.in_proj(x_NTD).chunk(2, -1)
        if kernels is not None:
            return self.out_proj(self._mix(kernels, x_NTE, gate_NTE))
        x_NTE = F.silu(self._convolve(at_least_float32(x_NTE), is_init_NT))
        y_NTE = selective_scan(x_NTE, *self._coefficients(x_NTE), is_init_NT)
        return self._out(y_NTE, x_NTE, gate_NTE)

    def step(self, x_ND: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Take one step `[N, D]`; update the two tensors of `state` in place."""
        window_NKE, state_NSE = state
        x_NE, gate_NE = self.in_proj(x_ND).chunk(2, -1)
        newest_N1E = x_NE.to(window_NKE.dtype).unsqueeze(1)
        window_NKE.copy_(torch.cat((window_NKE[:, 1:], newest_N1E), 1))
        weight_KE = self.conv1d.weight.squeeze(1).t()
        x_NE = F.silu((window_NKE * weight_KE).sum(1) + self.conv1d.bias)
        y_NE = selective_step(x_NE, *self._coefficients(x_NE), state_NSE)
        return self._out(y_NE, x_NE, gate_NE)

    def _mix(self, kernels: MambaKernels, x_NTE: Tensor, gate_NTE: Tensor) -> Tensor:
        x_NET, dtype = x_NTE.transpose(1, 2).contiguous(), x_NTE.dtype
        weights = (self.conv1d.weight.squeeze(1).to(dtype), self.conv1d.bias.to(dtype))
        x_NET = kernels.causal_conv1d_fn(x_NET, *weights, activation="silu")
        sequences = (*self._select(x_NET.transpose(1, 2)), gate_NTE)
        delta, write, read, gate = (z.to(dtype).transpose(1, 2).contiguous() for z in sequences)
        own = (self._rate(), self.D, self.dt_proj.bias)
        rate, skip, bias = (z.float().contiguous() for z in own)
        options = {"z": gate, "delta_bias": bias, "delta_softplus": True}
        y_NET = kernels.selective_scan_fn(x_NET, delta, rate, write, read, skip, **options)
        return y_NET.transpose(1, 2)

    def _convolve(self, x_NTE: Tensor, is_init_NT: Tensor | None) -> Tensor:
        """Convolve every channel causally, within trials."""
        # Sums of shifted sequences: each lag can be cut, and no library's reduced precision for
        # convolutions sets it apart from `step`.
        steps, padding = x_NTE.shape[1], (0, 0, self.d_conv - 1, 0)
        lag_NTE, out_NTE = F.pad(x_NTE, padding), self.conv1d.bias.expand_as(x_NTE)
        if is_init_NT is not None:
            trial_NT1 = is_init_NT.cumsum(1).unsqueeze(-1)
            lag_NT1 = F.pad(trial_NT1, padding)
        for k, weight_E in enumerate(self.conv1d.weight.squeeze(1).unbind(1)):
            past_NTE = lag_NTE[:, k : k + steps]
            if is_init_NT is not None and k < self.d_conv - 1:
                past_NTE = torch.where(lag_NT1[:, k : k + steps] == trial_NT1, past_NTE, 0.0)
            out_NTE = torch.addcmul(out_NTE, past_NTE, weight_E)
        return out_NTE

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to step sizes before bias and softplus, `[*, E]`, and to B and C, `[*, S]`."""
        x = x.to(self.x_proj.weight.dtype)
        low, write, read = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), -1)
        return F.linear(low, self.dt_proj.weight), write, read

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step sizes `[*, E]`, rates `[E, S]`, B and C, in the state's precision."""
        delta, write, read = (at_least_float32(z) for z in self._select(x))
        return F.softplus(delta + self.dt_proj.bias), self._rate(), write, read

    def _rate(self) -> Tensor:
        """The paper's A, `[E, S]`."""
        return -at_least_float32(self.A_log).exp()

    def _out(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(((y + self.D * x) * F.silu(gate)).to(gate.dtype))


class MambaEncoder(TrajectoryEncoder):
    """Mamba over the steps of a trial (arXiv 2312.00752): pre-norm residual blocks.

    A step costs the same at any time, and a rollout's memory is a :class:`StateMemory`. Runs in
    plain PyTorch on any device; on CUDA the kernels of `mamba-ssm` compute the same from the same
    weights, except under `torch.compile` and `torch.vmap`, for rows where a trial starts after the
    first step, and for single steps.

    Args:
        d_state: states per inner channel; ``expand`` is inner channels per feature of the width.
        d_conv: number of steps that the convolution sees.
        backend: `torch`, `mamba_ssm`, or `auto` for the kernels where they are installed.
        options: `d_model`, `num_layers` and others: see :class:`TrajectoryEncoder`.

    Raises:
        ImportError: if the kernels are chosen by name but not installed.

    Example:
        >>> MambaEncoder(4, d_model=16).sequence(torch.zeros(3, 5, 4), None, None).shape
        torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        input_size: int,
        *,
        d_model: int = 256,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        num_layers: int = 3,
        norm: str = "layer",
        backend: Literal["auto", "torch", "mamba_ssm"] = "auto",
        **options: Any,
    ) -> None:
        check_sizes(num_layers=num_layers)
        super().__init__(input_size, d_model, **options)
        self.backend = backend
        self._kernels = load_kernels(backend, d_conv, d_state)
        self.embed = StreamEmbedding(input_size, d_model)
        self.norms = nn.ModuleList(make_norm(norm, d_model) for _ in range(num_layers))
        sizes = (d_model, d_state, d_conv, expand)
        self.blocks = nn.ModuleList(MambaBlock(*sizes) for _ in range(num_layers))
        self.norm = make_norm(norm, d_model)

    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        kernels = self._kernels_for(x_NTI, is_init_NT)
        x_NTD = self.embed(x_NTI)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x_NTD = x_NTD + block(norm(x_NTD), is_init_NT, kernels)
        return self.norm(x_NTD)

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: StateMemory) -> Tensor:
        x_ND = self.embed(x_NI)
        for norm, block, state in zip(self.norms, self.blocks, memory.layers, strict=True):
            x_ND = x_ND + block.step(norm(x_ND), state)
        return self.norm(x_ND)

    def new_memory(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> StateMemory:
        shapes = [[(b.d_conv, b.d_inner), (b.d_state, b.d_inner)] for b in self.blocks]
        return StateMemory(num_rows, shapes, device, dtype)

    def _kernels_for(self, x: Tensor, is_init_NT: Tensor | None) -> MambaKernels | None:
        fits = self.backend == "mamba_ssm" or (x.is_cuda and x.dtype != torch.float64)
        return self._kernels if fits and is_init_NT is None and not is_traced(x) else None


def load_kernels(backend: str, conv_width: int, state_size: int) -> MambaKernels | None:
    """Import the kernels, or return None if `backend` allows it."""
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
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        if backend == "auto":
            return None
        raise ImportError(
            "backend='mamba_ssm' needs the packages mamba-ssm and causal-conv1d, and importing "
            f"them failed: {error}. Install them on a CUDA machine with "
            "`pip install --no-build-isolation torchrl-amago[mamba]`, or use backend='auto'."
        ) from error
    return MambaKernels(causal_conv1d_fn, selective_scan_fn)
