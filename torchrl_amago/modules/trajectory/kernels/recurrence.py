"""One layer of GRU or LSTM over rows of several trials, as an operator on tensors.

Forward runs PyTorch's own kernel. Backward too, where there is one. Else it is written out: from the
states it computes all gates at once, and only the gradient of the state goes step by step. So there is
no graph of T steps to keep or to walk, weights get their gradients in one product, and `torch.compile`
sees one operator whatever the length, where it would unroll the recurrence.

Legend: T steps, N rows, I input features, H hidden features, K gates, W stretches of rows without a
reset, L steps of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from tensordict import is_batchedtensor
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["gru", "lstm"]


def recurrence(
    kind: Kind, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """Run one recurrent layer over every trial in every row, each from an empty state.

    Computed in the weights' precision also under autocast: a state rounded at every step drifts.

    Args:
        kind: which network.
        x_TNI: inputs.
        is_init_TN: where trials begin; None if every row is a part of one trial.
        weights: input weight, hidden weight, input bias and hidden bias, as in `torch.nn.GRU`.

    Returns:
        Outputs `[T, N, H]`.

    Example:
        >>> rnn = torch.nn.GRU(3, 4)
        >>> x, is_init = torch.randn(6, 2, 3), torch.zeros(6, 2, dtype=torch.bool)
        >>> is_init[4] = True
        >>> out = recurrence("gru", x, is_init, list(rnn.parameters()))
        >>> torch.allclose(out[4:], rnn(x[4:])[0], atol=1e-6)
        True
    """
    x_TNI = x_TNI.to(weights[0].dtype)
    if (
        (x_TNI.is_cuda or kind == "lstm")
        and not torch.compiler.is_compiling()
        and not any(map(is_batchedtensor, (x_TNI, *weights)))
    ):
        # cuDNN, and oneDNN for an LSTM, have a faster backward kernel, which vmap doesn't know.
        return _run_trials(kind, x_TNI, is_init_TN, weights)
    return _recurrence(kind, x_TNI, is_init_TN, weights)


def _run_trials(
    kind: str, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """Cut rows with resets inside there, and run the stretches side by side.

    They are padded, not packed: on CPUs, packed sequences cost PyTorch several times as much.
    """
    if is_init_TN is None or not is_init_TN[1:].any():
        return _run(kind, x_TNI, weights)
    x_MI = x_TNI.flatten(0, 1)
    outputs, places = [], []
    for place_LW, real_LW in _stretches(is_init_TN):
        outputs.append(_run(kind, x_MI[place_LW], weights)[real_LW])
        places.append(place_LW[real_LW])
    order_M = torch.cat(places).argsort()
    return torch.cat(outputs)[order_M].unflatten(0, is_init_TN.shape)


def _run(kind: str, x_TNI: Tensor, weights: list[Tensor]) -> Tensor:
    empty_1NH = x_TNI.new_zeros(1, x_TNI.shape[1], weights[1].shape[1])
    kernel, state = (torch.gru, empty_1NH) if kind == "gru" else (torch.lstm, [empty_1NH] * 2)
    with torch.autocast(x_TNI.device.type, enabled=False):
        return kernel(
            x_TNI,
            state,
            weights,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=torch.is_grad_enabled(),  # whether to keep what a backward pass needs
            bidirectional=False,
            batch_first=False,
        )[0]


def _stretches(is_init_TN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows at resets and group the stretches by length.

    A group's shortest stretch is at least half as long as its longest: at most half of what is
    computed is padding, and there are few groups.

    Yields:
        For every group its steps' places in the flat `[T * N]` batch, `[L, W]`, and which of them are
        real; the others may be anybody's.
    """
    num_steps, num_rows = is_init_TN.shape
    first_NT = is_init_TN.t().clone()
    first_NT[:, 0] = True
    row_W, start_W = first_NT.nonzero().unbind(1)
    begin_W = row_W * num_steps + start_W
    length_W = torch.diff(begin_W, append=begin_W.new_tensor([first_NT.numel()]))
    length_W, order_W = length_W.sort(descending=True)
    row_W, start_W, lengths = row_W[order_W], start_W[order_W], length_W.tolist()
    begin = 0
    while begin < len(lengths):
        longest = lengths[begin]
        size = int((2 * length_W[begin:] >= longest).sum())
        group = slice(begin, begin + size)
        step_L1 = torch.arange(longest, device=start_W.device).unsqueeze(1)
        step_LW = (start_W[group] + step_L1).clamp(max=num_steps - 1)
        yield step_LW * num_rows + row_W[group], step_L1 < length_W[group]
        begin += size


# --- the operator ---


@torch.library.custom_op("torchrl_amago::recurrence", mutates_args=())
def _recurrence(
    kind: str, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]
) -> Tensor:
    return _run_trials(kind, x_TNI, is_init_TN, weights).contiguous()


@_recurrence.register_fake
def _(kind: str, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]) -> Tensor:
    return x_TNI.new_empty(*x_TNI.shape[:2], weights[1].shape[1])


@torch.library.custom_op("torchrl_amago::recurrence_backward", mutates_args=())
def _recurrence_backward(
    kind: str,
    grad_TNH: Tensor,
    out_TNH: Tensor,
    x_TNI: Tensor,
    is_init_TN: Tensor | None,
    weights: list[Tensor],
) -> list[Tensor]:
    w_in, w_hidden = weights[:2]
    goes_on_TN1 = torch.ones_like(out_TNH[..., :1], dtype=torch.bool)
    if is_init_TN is not None:
        goes_on_TN1 = ~is_init_TN.unsqueeze(-1)
    before_TNH = _shift(out_TNH, goes_on_TN1)
    backward = _gru_backward if kind == "gru" else _lstm_backward
    with torch.autocast(x_TNI.device.type, enabled=False):
        gates_in = F.linear(x_TNI, w_in, weights[2])
        gates_hidden = F.linear(before_TNH, w_hidden, weights[3])
        grad_in, grad_hidden = backward(
            grad_TNH, before_TNH, gates_in, gates_hidden, goes_on_TN1, w_hidden
        )
        return [
            grad_in @ w_in,
            grad_in.flatten(0, 1).t() @ x_TNI.flatten(0, 1),
            grad_hidden.flatten(0, 1).t() @ before_TNH.flatten(0, 1),
            grad_in.sum((0, 1)),
            grad_hidden.sum((0, 1)),
        ]


@_recurrence_backward.register_fake
def _(
    kind: str,
    grad_TNH: Tensor,
    out_TNH: Tensor,
    x_TNI: Tensor,
    is_init_TN: Tensor | None,
    weights: list[Tensor],
) -> list[Tensor]:
    return [x_TNI.new_empty(tensor.shape) for tensor in (x_TNI, *weights)]


@_recurrence.register_vmap
def _(
    info: Any,
    in_dims: tuple,
    kind: str,
    x_TNI: Tensor,
    is_init_TN: Tensor | None,
    weights: list[Tensor],
) -> tuple[Tensor, int]:
    """One network after the other: losses that hold several call them all by `torch.vmap`."""
    _, x_dim, is_init_dim, weight_dims = in_dims

    def pick(tensor: Tensor | None, dim: int | None, index: int) -> Tensor | None:
        return tensor if dim is None else tensor.select(dim, index)

    outputs = [
        _recurrence(
            kind,
            pick(x_TNI, x_dim, index),
            pick(is_init_TN, is_init_dim, index),
            [pick(w, dim, index) for w, dim in zip(weights, weight_dims, strict=True)],
        )
        for index in range(info.batch_size)
    ]
    return torch.stack(outputs), 0


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.kind, x_TNI, is_init_TN, weights = inputs
    ctx.save_for_backward(output, x_TNI, is_init_TN, *weights)


def _differentiate(ctx, grad_TNH: Tensor) -> tuple:
    out_TNH, x_TNI, is_init_TN, *weights = ctx.saved_tensors
    grad_x, *grads = _recurrence_backward(
        ctx.kind, grad_TNH, out_TNH, x_TNI, is_init_TN, list(weights)
    )
    return None, grad_x, None, grads


_recurrence.register_autograd(_differentiate, setup_context=_save)


def _shift(x_TNH: Tensor, goes_on_TN1: Tensor) -> Tensor:
    """Values of the step before in the same trial, zero at its start."""
    before_TNH = torch.cat((torch.zeros_like(x_TNH[:1]), x_TNH[:-1]))
    return torch.where(goes_on_TN1, before_TNH, 0.0)


def _gru_backward(
    grad_TNH: Tensor,
    before_TNH: Tensor,
    gates_in: Tensor,
    gates_hidden: Tensor,
    goes_on_TN1: Tensor,
    w_hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of a GRU's gates before their nonlinearity, the inputs' and the states' part.

    With d the gradient of the state and (R, Z, N) the gates of the states' part::

        h = (1 - z) n + z h_before,    n = tanh(gate_in + r N)
        d_before += z d + (dR, dZ, dN) w_hidden
    """
    num_gates = (3, before_TNH.shape[-1])
    in_r, in_z, in_n = gates_in.unflatten(-1, num_gates).unbind(-2)
    hidden_r, hidden_z, hidden_n = gates_hidden.unflatten(-1, num_gates).unbind(-2)
    r, z = (in_r + hidden_r).sigmoid(), (in_z + hidden_z).sigmoid()
    n = (in_n + r * hidden_n).tanh()
    by_n = (1 - z) * (1 - n.square())
    by_z = (before_TNH - n) * z * (1 - z)
    by_r = by_n * hidden_n * r * (1 - r)
    by_gate = torch.stack((by_r, by_z, by_n * r), -2)

    # What goes from a step to the one before, nothing at a trial's start.
    keep = torch.where(goes_on_TN1, z, 0.0).unbind()
    back = torch.where(goes_on_TN1.unsqueeze(-1), by_gate, 0.0).unbind()
    d_TNH = grad_TNH.clone(memory_format=torch.contiguous_format)
    d = d_TNH.unbind()
    for t in range(len(d) - 1, 0, -1):
        d_gates = (back[t] * d[t].unsqueeze(1)).flatten(1)
        d[t - 1].addcmul_(keep[t], d[t]).addmm_(d_gates, w_hidden)
    d_TN1H = d_TNH.unsqueeze(-2)
    grad_in = torch.stack((by_r, by_z, by_n), -2).mul_(d_TN1H).flatten(-2)
    return grad_in, by_gate.mul_(d_TN1H).flatten(-2)


def _lstm_backward(
    grad_TNH: Tensor,
    before_TNH: Tensor,
    gates_in: Tensor,
    gates_hidden: Tensor,
    goes_on_TN1: Tensor,
    w_hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of an LSTM's gates before their nonlinearity; the same for inputs and states.

    With d and e the gradients of the state and of the cell::

        c = f c_before + i g,    h = o tanh(c)
        e += d o (1 - tanh(c)^2),    e_before += f e,    d_before += (di, df, dg, do) w_hidden
    """
    gates = (gates_in + gates_hidden).unflatten(-1, (4, before_TNH.shape[-1]))
    i, f, g, o = gates.unbind(-2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    kept_TNH = torch.where(goes_on_TN1, f, 0.0)
    kept = kept_TNH.unbind()
    cell_TNH = i * g
    cell = cell_TNH.unbind()
    for t in range(1, len(cell)):
        cell[t].addcmul_(kept[t], cell[t - 1])
    shown = cell_TNH.tanh()
    by_cell = torch.stack(
        (g * i * (1 - i), _shift(cell_TNH, goes_on_TN1) * f * (1 - f), i * (1 - g.square())), -2
    )
    by_o = (shown * o * (1 - o)).unsqueeze(-2)
    to_cell = (o * (1 - shown.square())).unbind()

    by_gate = torch.where(goes_on_TN1.unsqueeze(-1), torch.cat((by_cell, by_o), -2), 0.0)
    back_cell, back_o = by_gate[..., :3, :].unbind(), by_gate[..., 3, :].unbind()
    d_TNH = grad_TNH.clone(memory_format=torch.contiguous_format)
    e_TNH = torch.zeros_like(d_TNH)
    d, e = d_TNH.unbind(), e_TNH.unbind()
    for t in range(len(d) - 1, -1, -1):
        e[t].addcmul_(to_cell[t], d[t])
        if t:
            d_ifg = (back_cell[t] * e[t].unsqueeze(1)).flatten(1)
            d_gates = torch.cat((d_ifg, back_o[t] * d[t]), 1)
            e[t - 1].addcmul_(kept[t], e[t])
            d[t - 1].addmm_(d_gates, w_hidden)
    by_cell.mul_(e_TNH.unsqueeze(-2))
    grad = torch.cat((by_cell, by_o.mul_(d_TNH.unsqueeze(-2))), -2).flatten(-2)
    return grad, grad
