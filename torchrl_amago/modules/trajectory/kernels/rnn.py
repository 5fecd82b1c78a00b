"""One layer of GRU or LSTM over rows of several trials, by PyTorch's own kernels.

A GRU on a CPU has none for its backward pass, which would walk a graph of T steps. `torch.compile`
would unroll the recurrence, and `torch.vmap` has no rule for the kernels. They get the layer as one
operator, in which a GRU's gradient is written out.

Legend: T steps, N rows, I input features, H hidden features, G gates, M = T * N, W stretches of
rows without a reset, L steps of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import functional as F

from torchrl_amago._cpu import is_traced
from torchrl_amago.modules.trajectory.kernels._operators import make_operator

Cell = Literal["gru", "lstm"]


def recurrence(
    cell: Cell, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """Run one recurrent layer over every trial in every row, each from an empty state.

    Computed in the weights' precision also under autocast: a state rounded at every step drifts.
    Returns `[T, N, H]`.

    Args:
        is_init_TN: bool, True at first steps of trials; None if every row is a part of one trial.
        weights: in the order of a `torch.nn.GRU`'s parameters.
    """
    x_TNI = x_TNI.to(weights[0].dtype)
    has_kernels = cell == "lstm" or x_TNI.is_cuda  # oneDNN's or cuDNN's, backwards too
    if not has_kernels or any(map(is_traced, (x_TNI, *weights))):
        return _OPERATORS[cell](x_TNI, *weights, is_init_TN)
    return _run_trials(cell, is_init_TN, x_TNI, *weights)


def _run_trials(cell: Cell, is_init_TN: Tensor | None, x_TNI: Tensor, *weights: Tensor) -> Tensor:
    """Cut rows at resets and run the stretches side by side."""
    # Padded, not packed: on CPUs, packed sequences cost PyTorch several times as much.
    if is_init_TN is None or not is_init_TN[1:].any():
        return _run(cell, x_TNI, weights)
    x_MI = x_TNI.flatten(0, 1)
    outputs, places = [], []
    for place_LW, real_LW in _stretches(is_init_TN):
        outputs.append(_run(cell, x_MI[place_LW], weights)[real_LW])
        places.append(place_LW[real_LW])
    return torch.cat(outputs)[torch.cat(places).argsort()].unflatten(0, is_init_TN.shape)


def _run(cell: Cell, x_TNI: Tensor, weights: Sequence[Tensor]) -> Tensor:
    empty_1NH = x_TNI.new_zeros(1, x_TNI.shape[1], weights[1].shape[1])
    kernel, state = (torch.gru, empty_1NH) if cell == "gru" else (torch.lstm, [empty_1NH] * 2)
    with torch.autocast(x_TNI.device.type, enabled=False):
        # With biases, one layer, no dropout, kept for a backward pass, one direction, time first.
        return kernel(
            x_TNI, state, list(weights), True, 1, 0.0, torch.is_grad_enabled(), False, False
        )[0]


def _stretches(is_init_TN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows at resets and group the stretches by length, so that at most half is padding.

    Yields every group's places in the flat `[T * N]` batch, `[L, W]`, and a mask of the real ones.
    """
    num_steps, num_rows = is_init_TN.shape
    first_NT = is_init_TN.t().clone()
    first_NT[:, 0] = True
    row_W, start_W = first_NT.nonzero().unbind(1)
    place_W = row_W * num_steps + start_W
    length_W = torch.diff(place_W, append=place_W.new_tensor([first_NT.numel()]))
    length_W, order_W = length_W.sort(descending=True)
    row_W, start_W, lengths = row_W[order_W], start_W[order_W], length_W.tolist()
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        size = int((2 * length_W[first:] >= longest).sum())
        group = slice(first, first + size)
        step_L1 = torch.arange(longest, device=start_W.device).unsqueeze(1)
        step_LW = (start_W[group] + step_L1).clamp(max=num_steps - 1)
        yield step_LW * num_rows + row_W[group], step_L1 < length_W[group]
        first += size


def _gru_gradients(
    grad_TNH: Tensor, out_TNH: Tensor, is_init_TN: Tensor | None, x_TNI: Tensor, *weights: Tensor
) -> list[Tensor]:
    """Compute all gates at once from the known states, then the states' gradient step by step.

    With d the gradient of the state h, and (R, Z, N) the gates' part from the state before::

        h = (1 - z) n + z h_before,    n = tanh(gate_in + r N)
        d_before += z d + (dR, dZ, dN) w_hidden
    """
    w_in, w_hidden, bias_in, bias_hidden = weights
    gates = (3, w_hidden.shape[1])
    before_TNH = torch.cat((torch.zeros_like(out_TNH[:1]), out_TNH[:-1]))
    if is_init_TN is not None:
        before_TNH.masked_fill_(is_init_TN.unsqueeze(-1), 0.0)
    in_r, in_z, in_n = F.linear(x_TNI, w_in, bias_in).unflatten(-1, gates).unbind(-2)
    hidden_TNGH = F.linear(before_TNH, w_hidden, bias_hidden).unflatten(-1, gates)
    hidden_r, hidden_z, hidden_n = hidden_TNGH.unbind(-2)
    r, z = (in_r + hidden_r).sigmoid(), (in_z + hidden_z).sigmoid()
    n = (in_n + r * hidden_n).tanh()
    by_n = (1 - z) * (1 - n.square())
    by_z = (before_TNH - n) * z * (1 - z)
    by_r = by_n * hidden_n * r * (1 - r)
    by_hidden = back = torch.stack((by_r, by_z, by_n * r), -2)
    if is_init_TN is not None:  # nothing goes back from a trial's start
        z = z.masked_fill(is_init_TN[..., None], 0.0)
        back = back.masked_fill(is_init_TN[..., None, None], 0.0)
    d_TNH = grad_TNH.clone(memory_format=torch.contiguous_format)
    d, z, back = d_TNH.unbind(), z.unbind(), back.unbind()
    for t in range(len(d) - 1, 0, -1):
        d_gates = (back[t] * d[t].unsqueeze(1)).flatten(1)
        d[t - 1].addcmul_(z[t], d[t]).addmm_(d_gates, w_hidden)
    by_in = torch.stack((by_r, by_z, by_n), -2)
    by_gates = (by_gate.mul_(d_TNH.unsqueeze(-2)) for by_gate in (by_in, by_hidden))
    grad_in, grad_hidden = (by_gate.flatten(2).flatten(0, 1) for by_gate in by_gates)
    return [
        (grad_in @ w_in).view(x_TNI.shape),
        grad_in.t() @ x_TNI.flatten(0, 1),
        grad_hidden.t() @ before_TNH.flatten(0, 1),
        grad_in.sum(0),
        grad_hidden.sum(0),
    ]


def _make_operator(cell: Cell) -> CustomOpDef:
    def forward(
        x: Tensor, w_in: Tensor, w_hid: Tensor, b_in: Tensor, b_hid: Tensor, is_init: Tensor | None
    ) -> Tensor:
        return _run_trials(cell, is_init, x, w_in, w_hid, b_in, b_hid).contiguous()

    def backward(saved: list[Tensor | None], grad: Tensor) -> list[Tensor]:
        *inputs, is_init, out = saved
        if cell == "gru":
            with torch.autocast(grad.device.type, enabled=False):
                return _gru_gradients(grad, out, is_init, *inputs)
        with torch.enable_grad():  # without it kernels keep nothing for a backward pass
            _, differentiate = torch.func.vjp(partial(_run_trials, cell, is_init), *inputs)
            # An LSTM's two biases share their gradient, which an operator may not return twice.
            return [z.clone() for z in differentiate(grad)]

    def fake(x: Tensor, w_in: Tensor, w_hid: Tensor, *_: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:2], w_hid.shape[1])

    operator = make_operator(cell, forward, backward, fake)

    @operator.register_vmap
    def _(info: Any, in_dims: tuple, *inputs: Tensor | None) -> tuple[Tensor, int]:
        """Run one network after the other: losses that hold several call them by `torch.vmap`."""
        outputs = [
            operator(
                *(z if d is None else z.select(d, i) for z, d in zip(inputs, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(outputs), 0

    return operator


_OPERATORS = {cell: _make_operator(cell) for cell in get_args(Cell)}
