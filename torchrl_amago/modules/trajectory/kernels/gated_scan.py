"""Linear attention with a decay per head, over whole sequences by chunks and over single steps.

Within a chunk everything is a masked matrix product; a small loop carries the state from chunk to
chunk. Decays are exponentials of differences of summed log-decays, later minus earlier, so never
above 1: nothing overflows and nothing is divided. The backward pass computes the chunks' products
again instead of keeping them.

Legend: B batch, T steps, H heads, K features of a key, V features of a value, C chunks, L steps of
a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrl_amago.modules.trajectory.kernels._operators import make_operator

# A chunk costs L numbers per step for its scores and K V / L for its state: about even at 32.
_CHUNK_STEPS = 32


def gated_linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    is_init_BT: Tensor | None = None,
) -> Tensor:
    """Attend linearly with a decaying state (arXiv 2312.06635, section 4; 2405.21060, section 6).

        S[t] = decay[t] S[t-1] + k[t] v[t]^T,    out[t] = S[t]^T q[t]

    One decay per head and step; `S[-1] = 0`, and `S[t-1]` counts as zero where `is_init[t]`. Time
    and memory are linear in T. Differentiable once. Returns `[B, T, H, V]`.

    Args:
        q_BTHK: queries; then keys and values, all in the dtype of the matrix products.
        log_decay_BTH: logarithm of the decay, at most 0, in the dtype of the state and the output.
        is_init_BT: bool, True at first steps of trials; None if none starts within a row.
    """
    return _attend(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, is_init_BT)[0]


def gated_linear_attention_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor, state_BHKV: Tensor
) -> Tensor:
    """Take one step of :func:`gated_linear_attention` into the state, in place: `[B, H, V]`."""
    k_BHK1, v_BH1V, q_BHK1 = k_BHK.unsqueeze(-1), v_BHV.unsqueeze(-2), q_BHK.unsqueeze(-1)
    state_BHKV.mul_(log_decay_BH.exp()[..., None, None])
    state_BHKV.addcmul_(k_BHK1.to(state_BHKV.dtype), v_BH1V.to(state_BHKV.dtype))
    # Not a matrix product: autocast would round the state to bfloat16 for it.
    return (state_BHKV * q_BHK1).sum(-2)


class _Chunks:
    """The arguments cut into chunks, `[B, C, H, L, ...]`, and the fractions that decays leave.

    `within_BCHLL` is left of step j's write at step i, `write_BCHL` of each write at the chunk's
    end, `read_BCHL` of the state at its start at each step, `carry_BCH` of that state at its end.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, is_init: Tensor | None
    ) -> None:
        self.steps = q.shape[1]
        self.length = min(_CHUNK_STEPS, self.steps)
        self.q, self.k, self.v = self.split(q), self.split(k), self.split(v)
        log_BCHL = self.split(log_decay.unsqueeze(-1)).squeeze(-1)
        # In float64: a sum that one strong decay has made large would round the weak ones away.
        sum_BCHL = log_BCHL.cumsum(-1, dtype=torch.float64)
        within = log_BCHL.new_empty(*log_BCHL.shape, self.length)
        torch.sub(sum_BCHL.unsqueeze(-1), sum_BCHL.unsqueeze(-2), out=within)
        # No -inf: its exponential takes a slow path. Steps to come are clamped, then cut.
        within.clamp_(max=0.0).exp_()
        write = (sum_BCHL[..., -1:] - sum_BCHL).to(log_BCHL.dtype).exp_()
        read = sum_BCHL.to(log_BCHL.dtype).exp_()
        keep = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).tril()
        if is_init is not None:
            # Trials begun since the chunk did: equal counts belong to one trial.
            trial_BC1L = self.split(is_init.long()[..., None, None]).squeeze(-1).cumsum(-1)
            keep = keep & (trial_BC1L.unsqueeze(-1) == trial_BC1L.unsqueeze(-2))
            read.masked_fill_(trial_BC1L > 0, 0.0)
            write.masked_fill_(trial_BC1L < trial_BC1L[..., -1:], 0.0)
        self.within_BCHLL = within.masked_fill_(~keep, 0.0)
        self.read_BCHL, self.write_BCHL, self.carry_BCH = read, write, read[..., -1]

    def split(self, x_BTHX: Tensor) -> Tensor:
        """Cut time into chunks, padded with zeros: `[B, C, H, L, X]`."""
        padded = F.pad(x_BTHX, (0, 0, 0, 0, 0, -x_BTHX.shape[1] % self.length))
        return padded.unflatten(1, (-1, self.length)).transpose(2, 3).contiguous()

    def join(self, x_BCHLX: Tensor) -> Tensor:
        """Invert `split`."""
        return x_BCHLX.transpose(2, 3).flatten(1, 2)[:, : self.steps].contiguous()

    def starts(self) -> Tensor:
        """Compute the states at chunks' starts: `S[0] = 0`, `S[c+1] = carry[c] S[c] + added[c]`."""
        added_BCHKV = self._scaled(self.k, self.write_BCHL).transpose(-1, -2) @ self.v
        return self._carried(added_BCHKV, range(added_BCHKV.shape[1]))

    def outputs(self, start_BCHKV: Tensor) -> Tensor:
        """Compute `S[t]^T q[t]`, from the state before the chunk and from steps within it."""
        before_BCHLV = self._scaled(self.q, self.read_BCHL) @ start_BCHKV.to(self.q.dtype)
        within_BCHLV = self._score()[0] @ self.v
        return within_BCHLV.to(start_BCHKV.dtype).add_(before_BCHLV)

    def gradients(self, grad_BCHLV: Tensor, start_BCHKV: Tensor) -> tuple[Tensor, ...]:
        """Compute gradients of `q, k, v [B, C, H, L, X]` and `log_decay [B, C, H, L, 1]`."""
        wide, grad_BCHLV = start_BCHKV.dtype, grad_BCHLV.to(self.v.dtype)
        # Gradient of every chunk's last state: `g[c-1] = dL/dS[c] + carry[c] g[c]`.
        end_BCHKV = self._scaled(self.q, self.read_BCHL).transpose(-1, -2) @ grad_BCHLV
        end_BCHKV = self._carried(end_BCHKV, reversed(range(end_BCHKV.shape[1])))
        end = end_BCHKV.to(self.v.dtype)
        score_BCHLL, weight_BCHLL = self._score()
        v = score_BCHLL.transpose(-1, -2) @ grad_BCHLV
        v += self._scaled(self.k, self.write_BCHL) @ end
        score_BCHLL = (grad_BCHLV @ self.v.transpose(-1, -2)).mul_(weight_BCHLL)
        start = start_BCHKV.to(self.v.dtype).transpose(-1, -2)
        q = (score_BCHLL @ self.k).to(wide)
        q.addcmul_((grad_BCHLV @ start).to(wide), self.read_BCHL.unsqueeze(-1))
        ended_BCHLK = (self.v @ end.transpose(-1, -2)).to(wide) * self.write_BCHL.unsqueeze(-1)
        k = (score_BCHLL.transpose(-1, -2) @ self.q).to(wide).add_(ended_BCHLK)
        # The exponential of a step's summed log-decay multiplies its query and divides its key, so
        # that their gradients give its own; a chunk's last one multiplies all that leaves it.
        sum_BCHL = (self.q * q).sum(-1) - (self.k * k).sum(-1)
        sum_BCHL[..., -1] += (self.k * ended_BCHLK).sum((-1, -2))
        sum_BCHL[..., -1] += (end_BCHKV * start_BCHKV).sum((-1, -2)) * self.carry_BCH
        log_decay_BCHL = sum_BCHL.flip(-1).cumsum(-1).flip(-1)
        return q, k, v, log_decay_BCHL.unsqueeze(-1)

    def _carried(self, added_BCHKV: Tensor, order: Iterable[int]) -> Tensor:
        """Exclusive decayed sum over chunks, in the given order."""
        carry_BCH11 = self.carry_BCH[..., None, None]
        added_BCHKV = added_BCHKV.to(carry_BCH11.dtype)
        before_BCHKV = torch.empty_like(added_BCHKV)
        state_BHKV = torch.zeros_like(added_BCHKV[:, 0])
        for c in order:
            before_BCHKV[:, c] = state_BHKV
            state_BHKV = torch.addcmul(added_BCHKV[:, c], carry_BCH11[:, c], state_BHKV)
        return before_BCHKV

    def _score(self) -> tuple[Tensor, Tensor]:
        """Decayed products of queries and keys, and the decays, in the products' dtype."""
        weight_BCHLL = self.within_BCHLL.to(self.q.dtype)
        return (self.q @ self.k.transpose(-1, -2)).mul_(weight_BCHLL), weight_BCHLL

    def _scaled(self, x_BCHLX: Tensor, by_BCHL: Tensor) -> Tensor:
        return x_BCHLX * by_BCHL.unsqueeze(-1).to(x_BCHLX.dtype)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, is_init: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, T, H, V]` and the states at chunks' starts, `[B, C, H, K, V]`."""
    with torch.autocast(q.device.type, enabled=False):
        chunks = _Chunks(q, k, v, log_decay, is_init)
        start_BCHKV = chunks.starts()
        return chunks.join(chunks.outputs(start_BCHKV)), start_BCHKV


def _backward(saved: list[Tensor | None], grad_out: Tensor) -> list[Tensor]:
    *inputs, start = saved
    with torch.autocast(grad_out.device.type, enabled=False):
        chunks = _Chunks(*inputs)
        grads = chunks.gradients(chunks.split(grad_out), start)
        pairs = zip(map(chunks.join, grads), inputs[:4], strict=True)
        return [z.view_as(like).to(like.dtype) for z, like in pairs]


def _fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, is_init: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(v, dtype=log_decay.dtype, memory_format=torch.contiguous_format)
    chunks = torch.library.get_ctx().new_dynamic_size()
    return out, log_decay.new_empty(q.shape[0], chunks, q.shape[2], q.shape[3], v.shape[3])


_attend = make_operator("gated_linear_attention", _forward, _backward, _fake)
