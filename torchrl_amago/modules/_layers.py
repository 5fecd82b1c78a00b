"""Small building blocks: sigma-reparametrised linear, norms, MLP, positions.

State (power-iteration vectors) is in buffers that are updated in place, so that
checkpoints, weight synchronisation and functional calls see it.

Legend: B batch, T steps, D features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_amago._validation import check_counts
from torchrl_amago.modules._dropout import check_dropout


class SigmaReparamLinear(nn.Linear):
    """Linear layer whose spectral norm is one learned number (arXiv 2303.06296, eq. 4).

        weight_hat = gamma / sigma * weight,    sigma = u^T weight v

    `u` and `v` track the first singular vectors of `weight`: in training each forward takes one step
    of power iteration, `u` first, before `sigma` is computed. No gradient goes through them.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: add a learned bias.

    Example:
        >>> layer = SigmaReparamLinear(4, 3)
        >>> torch.linalg.svdvals(layer.effective_weight().detach())[0].round(decimals=4)
        tensor(1.)
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.gamma = nn.Parameter(torch.empty(1))
        self.register_buffer("u", torch.empty(out_features))
        self.register_buffer("v", torch.empty(in_features))
        self._reset_spectrum()

    def reset_parameters(self) -> None:
        """Draw the weights anew, with a spectral norm of 1."""
        super().reset_parameters()
        if hasattr(self, "gamma"):  # torch.nn.Linear's constructor calls this as well
            self._reset_spectrum()

    @torch.no_grad()
    def _reset_spectrum(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.gamma.fill_(1.0)
        u_OR, _, v_RI = torch.linalg.svd(at_least_float32(self.weight), full_matrices=False)
        self.u.copy_(u_OR[:, 0])
        self.v.copy_(v_RI[0])

    def scale(self, power_iteration: bool = False) -> Tensor:
        """What multiplies `weight`: `gamma / sigma`, shape `[1]`.

        Args:
            power_iteration: first move `u` and `v` one step towards the singular vectors.
        """
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
        """The matrix that multiplies the input, `[out_features, in_features]`."""
        return self.weight * self.scale(power_iteration)

    def forward(self, x: Tensor, power_iteration: bool | None = None) -> Tensor:
        """Apply the layer to `[..., in_features]`; `power_iteration` defaults to `training`."""
        if power_iteration is None:
            power_iteration = self.training
        if x.ndim < 3:
            # A rollout's step, mostly of few rows: cheaper to scale them than the matrix. (To compare
            # sizes would make torch.compile look at those of sequences.)
            return F.linear(x * self.scale(power_iteration), self.weight, self.bias)
        return F.linear(x, self.effective_weight(power_iteration), self.bias)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension, then scale (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self) -> None:
        """Scale by 1 again."""
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`."""
        return self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class UnitBallNorm(nn.Module):
    """Divide by the Euclidean norm of the last dimension, optionally without its gradient."""

    def __init__(self, detach: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.detach = detach
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + self.eps
        return x / (length.detach() if self.detach else length)


class HypersphereNorm(nn.Module):
    """Project on the sphere of radius sqrt(size)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`."""
        return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


class SimplicialNorm(nn.Module):
    """Softmax over groups of neighbouring features (arXiv 2204.00616)."""

    def __init__(self, group_size: int = 8) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`, size a multiple of `group_size`."""
        return x.unflatten(-1, (-1, self.group_size)).softmax(-1).flatten(-2)


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


def make_norm(name: str, size: int, made_of: str = "") -> nn.Module:
    """Build a norm over a last dimension of `size` features.

    Args:
        name: one of `layer`, `rms`, `unit_ball`, `unit_ball_detached` (no gradient through the
            length), `hypersphere`, `simplicial`, `none`.
        size: number of features.
        made_of: where the size comes from, for the error's text.

    Raises:
        ValueError: if the name is unknown, or `simplicial` groups of 8 do not divide the size.
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {sorted(NORMS)}, got {name!r}. Use 'none' for none.")
    if name == "simplicial" and size % 8:
        raise ValueError(
            f"norm='simplicial' needs a size that is a multiple of 8, got {made_of or size}. "
            "Change the layer's width or choose another norm."
        )
    return NORMS[name](size)


def make_activation(name: str) -> nn.Module:
    """Build an activation: `leaky_relu` (slope 0.01), `relu`, `gelu` or `mish`.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}. "
            "Add yours to torchrl_amago.modules._layers.ACTIVATIONS."
        )
    return ACTIVATIONS[name]()


class MLP(nn.Module):
    """Feed-forward network: `num_layers` x (linear, norm, activation, dropout), then a linear.

    Args:
        input_size: size of the input's last dimension.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers, at least 1.
        output_size: size of the output's last dimension.
        activation: see :func:`make_activation`.
        norm: see :func:`make_norm`.
        dropout: probability of zeroing a hidden feature in training.
        linear: class of the linear layers, called with (inputs, outputs).

    Raises:
        ValueError: if a size or `num_layers` is below 1, or a name is unknown.

    Example:
        >>> MLP(4, 16, 2, 3)(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
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
        check_counts(
            "Sizes and hidden layers are counted; for a single linear map use torch.nn.Linear.",
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            output_size=output_size,
        )
        check_dropout(dropout=dropout)
        sizes = [input_size] + [hidden_size] * num_layers
        self.hidden = nn.ModuleList(linear(i, o) for i, o in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(make_norm(norm, hidden_size) for _ in range(num_layers))
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.out = linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., input_size]` to `[..., output_size]`."""
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = self.dropout(self.activation(norm(linear(x))))
        return self.out(x)


class StreamEmbedding(nn.Linear):
    """Linear layer into a residual stream, which stays in the weights' precision under autocast.

    Example:
        >>> with torch.autocast("cpu"):
        ...     StreamEmbedding(3, 4)(torch.zeros(2, 3)).dtype
        torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        return super().forward(x).to(self.weight.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision numbers in float32, all others as they are.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoidal_positions(
    positions: Tensor, size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fixed position embedding (arXiv 1706.03762, section 3.5).

        out[..., 2i] = sin(p / 10000^(2i/size)),    out[..., 2i+1] = cos(p / 10000^(2i/size))

    Args:
        positions: integers `[...]`, any non-negative value.
        size: number of features, even.
        dtype: that of the computation and of the result.

    Returns:
        `[..., size]`.

    Raises:
        ValueError: if the size is odd.

    Example:
        >>> sinusoidal_positions(torch.tensor([0]), 4)
        tensor([[0., 1., 0., 1.]])
    """
    if size % 2:
        raise ValueError(f"sinusoidal positions need an even size, got {size}. Use an even width.")
    even = torch.arange(0, size, 2, device=positions.device, dtype=dtype)
    angle = positions.unsqueeze(-1) * torch.exp(even * (-math.log(10000.0) / size))
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


def rotate_by_position(x_BHTD: Tensor, positions_BT: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864, eq. 34), first half paired with second half.

    Args:
        x_BHTD: queries or keys of every head; D is even.
        positions_BT: integers.
        base: wavelengths go up to 2 pi base.

    Returns:
        Same shape and dtype as `x_BHTD`; dot products depend on differences of positions only.
    """
    size = x_BHTD.shape[-1]
    wide_BHTD = at_least_float32(x_BHTD)
    even = torch.arange(0, size, 2, device=x_BHTD.device, dtype=wide_BHTD.dtype)
    angle = positions_BT[:, None, :, None] / base ** (even / size)
    cos, sin = angle.cos(), angle.sin()
    first, second = wide_BHTD.chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return rotated.to(x_BHTD.dtype)
