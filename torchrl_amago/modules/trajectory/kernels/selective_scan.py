"""The recurrence of Mamba in plain PyTorch: a diagonal linear system whose coefficients follow the data.

The states of all steps, `[B, T, E, N]`, would be 2 N times as large as everything else together, so
they are never held at once: steps are taken in segments that fit a core's cache, only the state at
each segment's start is kept, and the backward pass computes a segment's states again. Both passes are
operators of their own, so that `torch.compile` sees one node and no loop whose length it must fix.

Legend: B batch, T steps, E inner channels, N state size per channel, K steps of one segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_amago._cpu import skip_empty_cuts

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
    """Selective state space over whole sequences (arXiv 2312.00752, eq. 2 and 4, algorithm 2).

        h[t] = exp(delta[t] rate) h[t-1] + delta[t] x[t] write[t],    y[t] = read[t] . h[t]

    Every channel has N states; `h[-1] = 0`, and `h[t-1]` counts as zero where `is_init[t]`. Time and
    memory are linear in T. Differentiable once.

    Args:
        x_BTE: input of every channel.
        delta_BTE: step sizes, positive.
        rate_EN: the paper's A, negative.
        write_BTN: the paper's B.
        read_BTN: the paper's C.
        is_init_BT: bool, True where a trial begins; None if none begins within a row.

    Returns:
        `[B, T, E]`, in the dtype of `x_BTE`, which all of them share.

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> selective_scan(one, one, torch.tensor([[-0.6931]]), one, one).flatten()
        tensor([1.0000, 1.5000, 1.7500])
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
    """One step of :func:`selective_scan`; moves `state_BNE` on in place and returns `[B, E]`."""
    state_BNE.mul_((delta_BE.unsqueeze(1) * rate_EN.t()).exp())
    state_BNE.addcmul_((delta_BE * x_BE).unsqueeze(1), write_BN.unsqueeze(2))
    # Not a matrix product: autocast would round the state to bfloat16 for it.
    return (read_BN.unsqueeze(2) * state_BNE).sum(1)


@torch.library.custom_op("torchrl_amago::selective_scan", mutates_args=())
def _scan(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, is_init: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, T, E]` and the states at segments' starts, `[segments, B, N, E]`."""
    inputs = _TimeMajor(x, delta, rate, write, read, is_init)
    y_TBE = torch.empty_like(inputs.delta_TBE)
    start_SBNE = x.new_zeros(inputs.num_segments + 1, x.shape[0], *inputs.rate_NE.shape)
    with torch.autocast(x.device.type, enabled=False):
        for i, steps in enumerate(inputs.segments()):
            _, state_KBNE, _ = inputs.states(steps, start_SBNE[i])
            _read(inputs.read_TBN[steps], state_KBNE[1:], out=y_TBE[steps])
            start_SBNE[i + 1] = state_KBNE[-1]
    return y_TBE.transpose(0, 1).contiguous(), start_SBNE[:-1].clone()


@torch.library.custom_op("torchrl_amago::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    is_init: Tensor | None,
    start: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x, delta, rate, write, read`, from the last segment to the first."""
    inputs = _TimeMajor(x, delta, rate, write, read, is_init)
    grads = _Gradients(inputs, grad_y.transpose(0, 1).contiguous())
    with torch.autocast(x.device.type, enabled=False):
        for i, steps in reversed(list(enumerate(inputs.segments()))):
            grads.add_segment(steps, start[i])
    return grads.batch_major()


class _TimeMajor:
    """The scan's arguments with time first, where one step's tensors are contiguous."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        rate: Tensor,
        write: Tensor,
        read: Tensor,
        is_init: Tensor | None,
    ) -> None:
        def swap(z: Tensor) -> Tensor:
            return z.transpose(0, 1).contiguous()

        self.x_TBE, self.delta_TBE, self.rate_NE = swap(x), swap(delta), rate.t().contiguous()
        self.write_TBN, self.read_TBN = swap(write), swap(read)
        self.is_init_TB = None if is_init is None else swap(is_init)
        self.input_TBE = self.delta_TBE * self.x_TBE
        per_step = max(1, x.shape[0] * rate.numel())
        self.segment_steps = min(max(_SEGMENT_ELEMENTS // per_step, 4), 64, x.shape[1])
        shape = (x.shape[0], *self.rate_NE.shape)
        # Made once: fresh memory would cost more than what is computed in it.
        self._decay_KBNE = x.new_empty(self.segment_steps, *shape)
        self._state_KBNE = x.new_empty(self.segment_steps + 1, *shape)

    @property
    def num_segments(self) -> int:
        return -(-self.x_TBE.shape[0] // self.segment_steps)

    def segments(self) -> list[slice]:
        starts = range(0, self.x_TBE.shape[0], self.segment_steps)
        return [slice(start, start + self.segment_steps) for start in starts]

    def states(self, steps: slice, start_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decays `[K, B, N, E]`, states `[K + 1, B, N, E]` from the start's on, and the cuts."""
        cut_KB11 = self._cuts(steps)
        delta_KB1E = self.delta_TBE[steps].unsqueeze(2)
        decay_KBNE = self._decay_KBNE[: len(delta_KB1E)]
        torch.mul(delta_KB1E, self.rate_NE, out=decay_KBNE).exp_()
        state_KBNE = self._state_KBNE[: len(delta_KB1E) + 1]
        state_KBNE[0] = start_BNE
        torch.mul(
            self.input_TBE[steps].unsqueeze(2),
            self.write_TBN[steps].unsqueeze(3),
            out=state_KBNE[1:],
        )
        state = state_KBNE.unbind(0)
        for k, decay_BNE in enumerate(decay_KBNE.unbind(0)):
            before = state[k] if cut_KB11 is None else state[k].masked_fill(cut_KB11[k], 0.0)
            state[k + 1].addcmul_(decay_BNE, before)
        return decay_KBNE, state_KBNE, cut_KB11

    def _cuts(self, steps: slice) -> Tensor | None:
        if self.is_init_TB is None:
            return None
        cut_KB = self.is_init_TB[steps]
        # Most segments hold no start of a trial. On a GPU, asking would cost more than cutting.
        if skip_empty_cuts(cut_KB) and not cut_KB.any():
            return None
        return cut_KB[:, :, None, None]


class _Gradients:
    """Gradients of the scan, filled segment by segment, last one first.

    With `g[t]` the loss's gradient with respect to `h[t]`:

        g[t] = read[t] dL/dy[t] + exp(delta[t+1] rate) g[t+1]
        dL/d(delta[t] rate) = g[t] exp(delta[t] rate) h[t-1] =: w[t]
    """

    def __init__(self, inputs: _TimeMajor, grad_y_TBE: Tensor) -> None:
        self.inputs, self.grad_y_TBE = inputs, grad_y_TBE
        self.input_TBE = torch.empty_like(inputs.input_TBE)
        self.delta_TBE = torch.empty_like(inputs.delta_TBE)
        self.write_TBN = torch.empty_like(inputs.write_TBN)
        self.read_TBN = torch.empty_like(inputs.read_TBN)
        self.rate_NE = torch.zeros_like(inputs.rate_NE)
        batch = grad_y_TBE.shape[1]
        self.carry_BNE = grad_y_TBE.new_zeros(batch, *inputs.rate_NE.shape)
        self._grad_KBNE = grad_y_TBE.new_empty(inputs.segment_steps, *self.carry_BNE.shape)

    def add_segment(self, steps: slice, start_BNE: Tensor) -> None:
        inputs = self.inputs
        decay_KBNE, state_KBNE, cut_KB11 = inputs.states(steps, start_BNE)
        before_KBNE = state_KBNE[:-1]
        if cut_KB11 is not None:
            decay_KBNE.masked_fill_(cut_KB11, 0.0)
            before_KBNE = before_KBNE.masked_fill(cut_KB11, 0.0)
        grad_KBNE = self._state_gradient(steps, decay_KBNE)
        _sum_channels(state_KBNE[1:], self.grad_y_TBE[steps], out=self.read_TBN[steps])
        _sum_channels(grad_KBNE, inputs.input_TBE[steps], out=self.write_TBN[steps])
        _read(inputs.write_TBN[steps], grad_KBNE, out=self.input_TBE[steps])
        w_KBNE = decay_KBNE.mul_(before_KBNE).mul_(grad_KBNE)
        self.rate_NE += torch.mul(w_KBNE, inputs.delta_TBE[steps].unsqueeze(2), out=grad_KBNE).sum(
            (0, 1)
        )
        torch.sum(w_KBNE.mul_(inputs.rate_NE), 2, out=self.delta_TBE[steps])

    def _state_gradient(self, steps: slice, decay_KBNE: Tensor) -> Tensor:
        grad_KBNE = self._grad_KBNE[: len(decay_KBNE)]
        torch.mul(
            self.grad_y_TBE[steps].unsqueeze(2),
            self.inputs.read_TBN[steps].unsqueeze(3),
            out=grad_KBNE,
        )
        grad, decay = grad_KBNE.unbind(0), decay_KBNE.unbind(0)
        grad[-1].add_(self.carry_BNE)
        for k in range(len(grad) - 2, -1, -1):
            grad[k].addcmul_(decay[k + 1], grad[k + 1])
        torch.mul(decay[0], grad[0], out=self.carry_BNE)
        return grad_KBNE

    def batch_major(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        inputs = self.inputs
        self.delta_TBE.addcmul_(self.input_TBE, inputs.x_TBE)
        x_TBE = self.input_TBE.mul_(inputs.delta_TBE)
        x, delta, write, read = (
            z.transpose(0, 1).contiguous()
            for z in (x_TBE, self.delta_TBE, self.write_TBN, self.read_TBN)
        )
        return x, delta, self.rate_NE.t().contiguous(), write, read


def _read(weight_KBN: Tensor, state_KBNE: Tensor, out: Tensor) -> None:
    """Sum over N of weight times state, into `out` `[K, B, E]`."""
    torch.bmm(
        weight_KBN.flatten(0, 1).unsqueeze(1),
        state_KBNE.flatten(0, 1),
        out=out.view(-1, 1, out.shape[-1]),
    )


def _sum_channels(state_KBNE: Tensor, channel_KBE: Tensor, out: Tensor) -> None:
    """Sum over E of state times channel, into `out` `[K, B, N]`."""
    torch.bmm(
        state_KBNE.flatten(0, 1),
        channel_KBE.flatten(0, 1).unsqueeze(2),
        out=out.view(-1, out.shape[-1], 1),
    )


@_scan.register_fake
def _(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, is_init: Tensor | None
) -> tuple[Tensor, Tensor]:
    segments = torch.library.get_ctx().new_dynamic_size()
    start = x.new_empty(segments, x.shape[0], rate.shape[1], rate.shape[0])
    return torch.empty_like(x, memory_format=torch.contiguous_format), start


@_scan_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    is_init: Tensor | None,
    start: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty_like(z, memory_format=torch.contiguous_format)
        for z in (x, delta, rate, write, read)
    )


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, is_init = inputs
    ctx.save_for_backward(*tensors, is_init, output[1])


def _differentiate(ctx, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, start = ctx.saved_tensors
    return (*_scan_backward(grad_y.contiguous(), *inputs, start), None)


_scan.register_autograd(_differentiate, setup_context=_save)
