"""Embedding of images: convolutional trunks, and random shifts for training.

Legend: M images, C channels, H height, W width, R rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.modules import ConvNet

from torchrl_amago._validation import check_counts, check_fractions, pick
from torchrl_amago.modules._layers import make_activation
from torchrl_amago.modules._settings import Configurable
from torchrl_amago.modules.timestep.embeddings import EntryEmbedding


def _min_size(windows: Sequence[tuple[int, int]]) -> int:
    """Return the smallest height or width for unpadded windows of (kernel, stride)."""
    size = 1
    for kernel, stride in reversed(windows):
        size = (size - 1) * stride + kernel
    return size


class ConvTrunk(Configurable, ConvNet):
    """Convolutions in a row, each with its activation, flattened (channel, height, width)."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        activation: str = "leaky_relu",
    ) -> None:
        layers = dict(num_cells=[*channels], kernel_sizes=[*kernels], strides=[*strides])
        act = partial(make_activation, activation)
        super().__init__(in_features=in_channels, **layers, activation_class=act)
        self.min_size = _min_size(list(zip(kernels, strides, strict=True)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthogonal weights; biases are 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # torch's default shrinks the signal by a third or more at each layer.
                nn.init.orthogonal_(module.weight, nn.init.calculate_gain("leaky_relu"))
                nn.init.zeros_(module.bias)


class _ResidualBlock(nn.Module):
    """``norm(x + conv(act(conv(act(x)))))``, of unchanged size."""

    def __init__(self, channels: int, activation: str, num_groups: int | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.activation = make_activation(activation)
        self.norm = nn.GroupNorm(num_groups, channels) if num_groups else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.conv2(self.activation(self.conv1(self.activation(x)))))


class ImpalaTrunk(Configurable, nn.Module):
    """Residual trunk of IMPALA (arXiv 1802.01561, figure 3), with group norm after each block.

    Each of the ``channels`` is a section: a convolution, pooling by 2, two residual blocks.
    ``num_groups`` must divide all of them; None for no norm.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int] = (16, 32, 32),
        num_groups: int | None = 4,
        activation: str = "leaky_relu",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip([in_channels, *channels], channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.MaxPool2d(3, stride=2)]
            layers += [_ResidualBlock(after, activation, num_groups) for _ in range(2)]
        self.layers = nn.Sequential(*layers)
        self.min_size = _min_size([(3, 2)] * len(channels))

    def forward(self, image_MCHW: Tensor) -> Tensor:
        """Features ``[M, ...]``, flattened (channel, height, width)."""
        return self.layers(image_MCHW).flatten(1)


TRUNKS: dict[str, Callable[..., nn.Module]] = {
    "nature": partial(ConvTrunk, channels=(32, 64, 64), kernels=(8, 4, 3), strides=(4, 2, 1)),
    "impala": ImpalaTrunk,
    "drq": partial(ConvTrunk, channels=(32,) * 4, kernels=(3,) * 4, strides=(2, 1, 1, 1)),
    "grid": partial(ConvTrunk, channels=(16, 32, 48), kernels=(2,) * 3, strides=(1,) * 3),
}
"""Trunks by name, each called with ``(in_channels, activation=..., **options)``: those of DQN (for
84 x 84 pixels), IMPALA and DrQ (arXiv 2107.09645), and a small one for the cells of grid worlds."""


def shift_images(image_MCHW: Tensor, shift_M2: Tensor) -> Tensor:
    """Shift images by whole pixels; edges are repeated. Pad and crop of DrQ (arXiv 2004.13649).

    out[y, x] = image[y + shift_y, x + shift_x], indices clamped to the image
    """
    height, width = image_MCHW.shape[-2:]
    ramp = partial(torch.arange, device=image_MCHW.device)
    y_MH = (ramp(height) + shift_M2[:, :1]).clamp(0, height - 1)
    x_MW = (ramp(width) + shift_M2[:, 1:]).clamp(0, width - 1)
    row_M11 = ramp(image_MCHW.shape[0])[:, None, None]
    shifted_MHWC = image_MCHW.movedim(1, -1)[row_M11, y_MH[:, :, None], x_MW[:, None, :]]
    return shifted_MHWC.movedim(-1, 1)


def sample_shifts(num_rows: int, max_shift: int, fraction: float, device: torch.device) -> Tensor:
    """Sample int64 shifts ``[R, 2]`` in ``[-max_shift, max_shift]``; zero in the other rows.

    ``fraction * num_rows`` rows, rounded up, are shifted: which ones is random.
    """
    shift_R2 = torch.randint(-max_shift, max_shift + 1, (num_rows, 2), device=device)
    rank_R1 = torch.rand(num_rows, 1, device=device).argsort(0)
    # 0.1 * 30 is a little more than 3.
    return torch.where(rank_R1 < math.ceil(fraction * num_rows - 1e-6), shift_R2, 0)


class ImageEmbedding(EntryEmbedding):
    """A trunk and a linear layer. Bytes are scaled to [-1, 1), other dtypes aren't.

    Args:
        shape: of one image, ``[H, W, C]``, or ``[C, H, W]`` with ``channels_first``.
        trunk: a name of :data:`TRUNKS`, or a module ``[M, C, H, W] -> [M, ...]``.
        trunk_options: further arguments of a named trunk, such as ``channels``.
        random_shift: maximal shift of images in training, in pixels; 0 for none, DrQ has 4.
        random_shift_fraction: fraction of the batch's rows to shift; all steps of a row alike.

    Raises:
        ValueError: if the image is smaller than the trunk needs, or an option is out of range.

    Example:
        >>> embedding = ImageEmbedding((84, 84, 3), output_size=16, trunk="impala")
        >>> embedding(torch.zeros(2, 5, 84, 84, 3, dtype=torch.uint8)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        output_size: int = 256,
        trunk: str | nn.Module = "nature",
        trunk_options: dict[str, Any] | None = None,
        channels_first: bool = False,
        random_shift: int = 0,
        random_shift_fraction: float = 0.75,
        activation: str = "leaky_relu",
    ) -> None:
        super().__init__(shape, output_size)
        if len(self.shape) != 3:
            got = f"got shape {self.shape}. Add one to grey images (UnsqueezeTransform)."
            raise ValueError(f"an image has three dimensions, {got}")
        if random_shift:
            check_counts("Use 4, as DrQ does, or 0 for none.", random_shift=random_shift)
        check_fractions("DrQ has 0.75.", random_shift_fraction=random_shift_fraction)
        self.channels_first = channels_first
        self.random_shift, self.random_shift_fraction = random_shift, random_shift_fraction
        channels, height, width = self.shape if channels_first else (self.shape[2], *self.shape[:2])
        if not isinstance(trunk, nn.Module):
            build = pick("trunk", trunk, TRUNKS, "Or pass a module [M, C, H, W] -> [M, ...].")
            trunk = build(channels, activation=activation, **(trunk_options or {}))
        elif trunk_options:
            raise ValueError(f"a trunk that is a module has no trunk_options, got {trunk_options}.")
        if min(height, width) < (size := getattr(trunk, "min_size", 1)):
            sizes = ", ".join(f"{name!r} from {make(1).min_size}" for name, make in TRUNKS.items())
            remedy = f"Correct channels_first={channels_first}, or choose another trunk: {sizes}."
            got = f"got {height} x {width} (shape {self.shape}). {remedy}"
            raise ValueError(f"the trunk needs images of at least {size} x {size} pixels, {got}")
        self.trunk = trunk
        self.features = nn.Linear(_num_features(trunk, (channels, height, width)), output_size)

    def forward(self, value: Tensor) -> Tensor:
        """Embed images ``[*M, *shape]``."""
        batch = value.shape[:-3]
        image_MCHW = self._channels_first(value.reshape(math.prod(batch), *self.shape))
        x = image_MCHW.to(self.features.weight.dtype)
        if value.dtype == torch.uint8:
            x = x / 128.0 - 1.0
        return self.features(self.trunk(x).flatten(1)).reshape(*batch, self.output_size)

    def augment(self, value: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        """Shift all images of a row alike, by a random shift."""
        if not self.random_shift:
            return value
        shifts = (num_rows, self.random_shift, self.random_shift_fraction)
        shift_R2 = sample_shifts(*shifts, value.device)
        image_MCHW = self._channels_first(value.reshape(rows.numel(), *self.shape))
        shifted_MCHW = shift_images(image_MCHW, shift_R2[rows.reshape(-1)])
        shifted = shifted_MCHW if self.channels_first else shifted_MCHW.movedim(1, -1)
        return shifted.reshape(value.shape)

    def _channels_first(self, image: Tensor) -> Tensor:
        return image if self.channels_first else image.movedim(-1, 1)


def _num_features(trunk: nn.Module, shape: tuple[int, ...]) -> int:
    like = next(trunk.parameters(), torch.zeros(()))
    if isinstance(like, nn.UninitializedParameter):  # lazy: this is its first input
        like = torch.zeros(())
    modes = [(module, module.training) for module in trunk.modules()]
    with torch.no_grad():
        features = trunk.eval()(like.new_zeros(1, *shape)).flatten(1).shape[1]
    for module, mode in modes:
        module.training = mode
    return features
