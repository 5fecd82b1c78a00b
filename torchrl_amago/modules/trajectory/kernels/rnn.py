"""One layer of GRU or LSTM over rows of several trials, forwards by PyTorch's own kernels.

Backwards too, except for a GRU on a CPU, which would walk a graph of T steps; its gradient is
written out below. That is also what `torch.compile`, which would unroll the recurrence, and
`torch.vmap`, which has no rule for the kernels, get: the layer as one operator.

Legend: T steps, N rows, I input features, H hidden features, G gates, M = T * N, W stretches of
rows without a reset, L steps of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from tensordict import is_batchedtensor
from torch import Tensor
from torch.nn import functional as F

Cell = Literal["gru", "lstm"]


def recurrence(
    cell: Cell, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """Run one recurrent layer over every trial in every row, each from an empty state.

    Computed in the weights' precision also under autocast: a state rounded at every step drifts.

    Args:
        cell: `gru` or `lstm`.
        x_TNI: inputs.
        is_init_TN: bool, True at first steps of trials; None if every row is a part of one trial.
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
    opaque = torch.compiler.is_compiling() or any(map(is_batchedtensor, (x_TNI, *weights)))
    # cuDNN, and oneDNN for an LSTM, have backward kernels.
    opaque = opaque or (cell == "gru" and not x_TNI.is_cuda)
    return (_recurrence if opaque else _run_trials)(cell, x_TNI, is_init_TN, weights)


def _run_trials(
    cell: str, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """Cut rows at resets and run the stretches side by side.

    They are padded, not packed: on CPUs, packed sequences cost PyTorch several times as much.
    """
    if is_init_TN is None or not is_init_TN[1:].any():
        return _run(cell, x_TNI, weights)
    x_MI = x_TNI.flatten(0, 1)
    outputs, places = [], []
    for place_LW, real_LW in _stretches(is_init_TN):
        outputs.append(_run(cell, x_MI[place_LW], weights)[real_LW])
        places.append(place_LW[real_LW])
    order_M = torch.cat(places).argsort()
    return torch.cat(outputs)[order_M].unflatten(0, is_init_TN.shape)


def _run(cell: str, x_TNI: Tensor, weights: list[Tensor]) -> Tensor:
    empty_1NH = x_TNI.new_zeros(1, x_TNI.shape[1], weights[1].shape[1])
    kernel, state = (torch.gru, empty_1NH) if cell == "gru" else (torch.lstm, [empty_1NH] * 2)
    with torch.autocast(x_TNI.device.type, enabled=False):
        # With biases, one layer, no dropout, kept for a backward pass, one direction, time first.
        return kernel(x_TNI, state, weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)[0]


def _stretches(is_init_TN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows at resets and group the stretches by length.

    A group's shortest stretch is at least half as long as its longest: at most half of what is
    computed is padding, and there are few groups.

    Yields:
        For every group its steps' places in the flat `[T * N]` batch, `[L, W]`, and a mask of the
        real ones; padding points to any step.
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


# --- the operator ---


@torch.library.custom_op("torchrl_amago::recurrence", mutates_args=())
def _recurrence(
    cell: str, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]
) -> Tensor:
    return _run_trials(cell, x_TNI, is_init_TN, weights).contiguous()


@torch.library.custom_op("torchrl_amago::recurrence_backward", mutates_args=())
def _recurrence_backward(cell: str, inputs: list[Tensor | None], grad_TNH: Tensor) -> list[Tensor]:
    """Gradients of the inputs and the weights."""
    out_TNH, x_TNI, is_init_TN, *weights = inputs
    if cell == "gru":
        with torch.autocast(x_TNI.device.type, enabled=False):
            return _gru_gradients(grad_TNH, out_TNH, x_TNI, is_init_TN, weights)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        return _run_trials(cell, x, is_init_TN, list(weights))

    with torch.enable_grad():  # without it kernels keep nothing for a backward pass
        _, differentiate = torch.func.vjp(layer, x_TNI, *weights)
        # An LSTM's two biases share their gradient, which an operator may not return twice.
        return [grad.clone() for grad in differentiate(grad_TNH)]


def _gru_gradients(
    grad_TNH: Tensor, out_TNH: Tensor, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list
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
    grad_in, grad_hidden = (
        (by_gate * d_TNH.unsqueeze(-2)).flatten(0, 1).flatten(1) for by_gate in (by_in, by_hidden)
    )
    return [
        (grad_in @ w_in).view(x_TNI.shape),
        grad_in.t() @ x_TNI.flatten(0, 1),
        grad_hidden.t() @ before_TNH.flatten(0, 1),
        grad_in.sum(0),
        grad_hidden.sum(0),
    ]


@_recurrence.register_fake
def _(cell: str, x_TNI: Tensor, is_init_TN: Tensor | None, weights: list[Tensor]) -> Tensor:
    return x_TNI.new_empty(*x_TNI.shape[:2], weights[1].shape[1])


@_recurrence_backward.register_fake
def _(cell: str, inputs: list[Tensor | None], grad_TNH: Tensor) -> list[Tensor]:
    _, x_TNI, _, *weights = inputs
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x_TNI, *weights)]


@_recurrence.register_vmap
def _(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
    """Run one network after the other: losses that hold several call them all by `torch.vmap`."""

    def select(value: Any, dim: Any, index: int) -> Any:
        if isinstance(value, list):
            return [select(z, d, index) for z, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, index)

    outputs = [
        _recurrence(*(select(z, dim, i) for z, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return torch.stack(outputs), 0


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.cell, x_TNI, is_init_TN, weights = inputs
    ctx.save_for_backward(output, x_TNI, is_init_TN, *weights)


def _differentiate(ctx, grad_TNH: Tensor) -> tuple:
    grad_x, *grads = _recurrence_backward(ctx.cell, list(ctx.saved_tensors), grad_TNH)
    return None, grad_x, None, grads


_recurrence.register_autograd(_differentiate, setup_context=_save)
