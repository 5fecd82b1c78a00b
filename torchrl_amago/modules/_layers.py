"""Layers that several networks share: linear layers, norms, activations, MLP."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_amago._validation import check_counts, pick
from torchrl_amago.modules._dropout import check_dropout


class SigmaReparamLinear(nn.Linear):
    """Linear layer whose spectral norm is one learned number (arXiv 2303.06296, eq. 4).

        weight_hat = gamma / sigma * weight,    sigma = u^T weight v

    `u` and `v` track the first singular vectors of `weight`: in training each forward takes a step
    of power iteration, `u` first, before `sigma` is computed. No gradient goes through them.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.gamma = nn.Parameter(torch.empty(1))
        self.register_buffer("u", torch.empty(out_features))
        self.register_buffer("v", torch.empty(in_features))
        self._reset_spectrum()

    def reset_parameters(self) -> None:
        """Draw new weights with a spectral norm of 1."""
        super().reset_parameters()
        if hasattr(self, "gamma"):  # torch.nn.Linear's constructor calls this too
            self._reset_spectrum()

    @torch.no_grad()
    def _reset_spectrum(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.gamma.fill_(1.0)
        u_OR, _, v_RI = torch.linalg.svd(at_least_float32(self.weight), full_matrices=False)
        self.u.copy_(u_OR[:, 0])
        self.v.copy_(v_RI[0])

    def scale(self, power_iteration: bool = False) -> Tensor:
        """Return `gamma / sigma`, shape `[1]`, after a step of power iteration if asked for."""
        u, v = self.u, self.v
        if power_iteration:
            with torch.no_grad():
                u = F.normalize(torch.mv(self.weight, v), dim=0)
                v = F.normalize(torch.mv(self.weight.t(), u), dim=0)
                self.u.copy_(u)
                self.v.copy_(v)
        elif torch.is_grad_enabled():
            # Autograd keeps them, and the next training forward writes into the buffers.
            u, v = u.clone(), v.clone()
        return self.gamma / torch.dot(u, torch.mv(self.weight, v))

    def effective_weight(self, power_iteration: bool = False) -> Tensor:
        """Return the matrix that multiplies the input, `[out_features, in_features]`."""
        return self.weight * self.scale(power_iteration)

    def forward(self, x: Tensor, power_iteration: bool | None = None) -> Tensor:
        """Apply the layer to `[..., in_features]`; `power_iteration` defaults to `training`."""
        power_iteration = self.training if power_iteration is None else power_iteration
        if x.ndim < 3:
            # A rollout's step, mostly of few rows: cheaper to scale them than the matrix.
            # (Comparing sizes would specialise torch.compile to those of sequences.)
            return F.linear(x * self.scale(power_iteration), self.weight, self.bias)
        return F.linear(x, self.effective_weight(power_iteration), self.bias)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension, scale (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(size)), eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class UnitBallNorm(nn.Module):
    """Divide by the Euclidean norm of the last dimension, optionally without its gradient."""

    def __init__(self, detach: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.detach, self.eps = detach, eps

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + self.eps
        return x / (length.detach() if self.detach else length)


class HypersphereNorm(nn.Module):
    """Project on the sphere of radius sqrt(size)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


class SimplicialNorm(nn.Module):
    """Softmax over groups of 8 neighbouring features (arXiv 2204.00616)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": RMSNorm,
    "unit_ball": lambda size: UnitBallNorm(),
    "unit_ball_detached": lambda size: UnitBallNorm(detach=True),
    "hypersphere": lambda size: HypersphereNorm(),
    "simplicial": lambda size: SimplicialNorm(),
    "none": lambda size: nn.Identity(),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}


def make_norm(name: str, size: int) -> nn.Module:
    """Build a norm of :data:`NORMS` over a last dimension of `size` features."""
    if name == "simplicial" and size % 8:
        raise ValueError(f"norm='simplicial' needs a size that is a multiple of 8, got {size}.")
    return pick("norm", name, NORMS, "Use 'none' for none.")(size)


def make_activation(name: str) -> nn.Module:
    """Build an activation of :data:`ACTIVATIONS`."""
    return pick("activation", name, ACTIVATIONS, "Or pass a class, such as torch.nn.SiLU.")()


class MLP(nn.Module):
    """Feed-forward network: `num_layers` x (linear, norm, activation, dropout), then a linear.

    Args:
        num_layers: number of hidden layers, of `hidden_size`, at least 1.
        linear: class of the linear layers, called with (inputs, outputs).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        output_size: int,
        activation: str = "leaky_relu",
        norm: str = "none",
        dropout: float = 0.0,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        sizes = dict(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        check_counts("For one linear map use torch.nn.Linear.", **sizes, num_layers=num_layers)
        check_dropout(dropout=dropout)
        inputs = [input_size, *[hidden_size] * (num_layers - 1)]
        self.hidden = nn.ModuleList(linear(size, hidden_size) for size in inputs)
        self.norms = nn.ModuleList(make_norm(norm, hidden_size) for _ in range(num_layers))
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.out = linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = self.dropout(self.activation(norm(linear(x))))
        return self.out(x)


class StreamEmbedding(nn.Linear):
    """Linear layer into a residual stream, in the weights' precision under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.weight.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half-precision numbers to float32; return others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
