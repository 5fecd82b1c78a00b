"""The recurrence of Mamba in plain PyTorch: a diagonal linear system that depends on the data.

The states of all steps, `[B, T, E, N]`, would be 2 N times as large as everything else together, so
they are never held at once: steps are taken in segments that fit a core's cache, only the state at
each segment's start is kept, and the backward pass computes a segment's states again.

Legend: B batch, T steps, E inner channels, N state size per channel, K steps of one segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_amago._cpu import skip_empty_cuts
from torchrl_amago.modules.trajectory.kernels._operators import make_operator

# Elements of one segment's states on CPUs: four such tensors in float32 fit the caches of a core.
_SEGMENT_ELEMENTS = 2**18


def selective_scan(
    x_BTE: Tensor,
    delta_BTE: Tensor,
    rate_EN: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    is_init_BT: Tensor | None = None,
) -> Tensor:
    """Scan whole sequences by a selective state space (arXiv 2312.00752, eq. 2, 4, algorithm 2).

        h[t] = exp(delta[t] rate) h[t-1] + delta[t] x[t] write[t],    y[t] = read[t] . h[t]

    Every channel has N states; `h[-1] = 0`, and `h[t-1]` counts as zero where `is_init[t]`. Time
    and memory are linear in T. Differentiable once. Returns `[B, T, E]`.

    Args:
        x_BTE: input of every channel, in the dtype of all tensors.
        delta_BTE: step sizes, positive.
        rate_EN: the paper's A, negative; `write_BTN` and `read_BTN` are its B and C.
        is_init_BT: bool, True at first steps of trials; None if none starts within a row.
    """
    return _scan(x_BTE, delta_BTE, rate_EN, write_BTN, read_BTN, is_init_BT)[0]


def selective_step(
    x_BE: Tensor,
    delta_BE: Tensor,
    rate_EN: Tensor,
    write_BN: Tensor,
    read_BN: Tensor,
    state_BNE: Tensor,
) -> Tensor:
    """Take one step of :func:`selective_scan` into `state_BNE`, in place: `[B, E]`."""
    state_BNE.mul_((delta_BE.unsqueeze(1) * rate_EN.t()).exp())
    state_BNE.addcmul_((delta_BE * x_BE).unsqueeze(1), write_BN.unsqueeze(2))
    # Not a matrix product: autocast would round the state to bfloat16 for it.
    return (read_BN.unsqueeze(2) * state_BNE).sum(1)


def _swap(z: Tensor) -> Tensor:
    return z.transpose(0, 1).contiguous()


class _Segments:
    """The scan's arguments with time first, where one step's tensors are contiguous."""

    def __init__(
        self, x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, is_init: Tensor
    ) -> None:
        self.x_TBE, self.delta_TBE, self.rate_NE = _swap(x), _swap(delta), _swap(rate)
        self.write_TBN, self.read_TBN = _swap(write), _swap(read)
        self.is_init_TB = None if is_init is None else _swap(is_init)
        self.input_TBE = self.delta_TBE * self.x_TBE
        per_step, num_steps = max(1, x.shape[0] * rate.numel()), x.shape[1]
        self.segment_steps = min(max(_SEGMENT_ELEMENTS // per_step, 4), 64, num_steps)
        starts = range(0, num_steps, self.segment_steps)
        self.segments = [slice(start, start + self.segment_steps) for start in starts]
        self.shape_BNE = (x.shape[0], *self.rate_NE.shape)
        # Made once: fresh memory would cost more than the computation in it.
        self._decay_KBNE = x.new_empty(self.segment_steps, *self.shape_BNE)
        self._state_KBNE = x.new_empty(self.segment_steps + 1, *self.shape_BNE)

    def states(self, steps: slice, start_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute decays `[K, B, N, E]`, states `[K + 1, B, N, E]` from the start on, and cuts."""
        cut_KB11 = None if self.is_init_TB is None else self.is_init_TB[steps][..., None, None]
        if cut_KB11 is not None and skip_empty_cuts(cut_KB11) and not cut_KB11.any():
            cut_KB11 = None
        delta_KB1E = self.delta_TBE[steps].unsqueeze(2)
        decay_KBNE = self._decay_KBNE[: len(delta_KB1E)]
        torch.mul(delta_KB1E, self.rate_NE, out=decay_KBNE).exp_()
        state_KBNE = self._state_KBNE[: len(delta_KB1E) + 1]
        state_KBNE[0] = start_BNE
        written = (self.input_TBE[steps].unsqueeze(2), self.write_TBN[steps].unsqueeze(3))
        torch.mul(*written, out=state_KBNE[1:])
        state = state_KBNE.unbind(0)
        for k, decay_BNE in enumerate(decay_KBNE.unbind(0)):
            before = state[k] if cut_KB11 is None else state[k].masked_fill(cut_KB11[k], 0.0)
            state[k + 1].addcmul_(decay_BNE, before)
        return decay_KBNE, state_KBNE, cut_KB11


def _forward(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, is_init: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, T, E]`, and the states at segments' starts."""
    scan = _Segments(x, delta, rate, write, read, is_init)
    y_TBE = torch.empty_like(scan.delta_TBE)
    start_SBNE = x.new_zeros(len(scan.segments) + 1, *scan.shape_BNE)
    with torch.autocast(x.device.type, enabled=False):
        for i, steps in enumerate(scan.segments):
            _, state_KBNE, _ = scan.states(steps, start_SBNE[i])
            y_TBE[steps] = (scan.read_TBN[steps].unsqueeze(2) @ state_KBNE[1:]).squeeze(2)
            start_SBNE[i + 1] = state_KBNE[-1]
    return _swap(y_TBE), start_SBNE[:-1].clone()


def _backward(saved: list[Tensor | None], grad_y: Tensor) -> list[Tensor]:
    """Gradients of the inputs, from the last segment to the first.

    With `g[t]` the loss's gradient with respect to `h[t]`:

        g[t] = read[t] dL/dy[t] + exp(delta[t+1] rate) g[t+1]
        dL/d(delta[t] rate) = g[t] exp(delta[t] rate) h[t-1] =: w[t]
    """
    *inputs, start = saved
    scan, grad_y_TBE = _Segments(*inputs), _swap(grad_y)
    forward = (scan.input_TBE, scan.delta_TBE, scan.rate_NE, scan.write_TBN, scan.read_TBN)
    grads = [torch.zeros_like(z) for z in forward]
    input_TBE, delta_TBE, rate_NE, write_TBN, read_TBN = grads
    carry_BNE = grad_y.new_zeros(scan.shape_BNE)
    buffer_KBNE = grad_y.new_empty(scan.segment_steps, *scan.shape_BNE)
    with torch.autocast(grad_y.device.type, enabled=False):
        for i, steps in reversed(list(enumerate(scan.segments))):
            decay_KBNE, state_KBNE, cut_KB11 = scan.states(steps, start[i])
            before_KBNE, grad_y_KBE = state_KBNE[:-1], grad_y_TBE[steps]
            if cut_KB11 is not None:
                decay_KBNE.masked_fill_(cut_KB11, 0.0)
                before_KBNE = before_KBNE.masked_fill(cut_KB11, 0.0)
            g_KBNE = buffer_KBNE[: len(decay_KBNE)]
            torch.mul(grad_y_KBE.unsqueeze(2), scan.read_TBN[steps].unsqueeze(3), out=g_KBNE)
            g, decay = g_KBNE.unbind(0), decay_KBNE.unbind(0)
            g[-1].add_(carry_BNE)
            for k in range(len(g) - 2, -1, -1):
                g[k].addcmul_(decay[k + 1], g[k + 1])
            torch.mul(decay[0], g[0], out=carry_BNE)
            read_TBN[steps] = (state_KBNE[1:] @ grad_y_KBE.unsqueeze(3)).squeeze(3)
            write_TBN[steps] = (g_KBNE @ scan.input_TBE[steps].unsqueeze(3)).squeeze(3)
            input_TBE[steps] = (scan.write_TBN[steps].unsqueeze(2) @ g_KBNE).squeeze(2)
            w_KBNE = decay_KBNE.mul_(before_KBNE).mul_(g_KBNE)
            rate_NE += torch.mul(w_KBNE, scan.delta_TBE[steps].unsqueeze(2), out=g_KBNE).sum((0, 1))
            torch.sum(w_KBNE.mul_(scan.rate_NE), 2, out=delta_TBE[steps])
    delta_TBE.addcmul_(input_TBE, scan.x_TBE)
    x_TBE = input_TBE.mul_(scan.delta_TBE)
    return [_swap(z) for z in (x_TBE, delta_TBE, rate_NE, write_TBN, read_TBN)]


def _fake(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, is_init: Tensor | None
) -> tuple[Tensor, Tensor]:
    segments = torch.library.get_ctx().new_dynamic_size()
    start = x.new_empty(segments, x.shape[0], rate.shape[1], rate.shape[0])
    return torch.empty_like(x, memory_format=torch.contiguous_format), start


_scan = make_operator("selective_scan", _forward, _backward, _fake)
