"""The timestep encoder for one image, with what else there is as small vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import NestedKey
from torch import nn
from torchrl.data import TensorSpec

from torchrl_amago.modules.timestep._specs import kind_of
from torchrl_amago.modules.timestep.base import Shape
from torchrl_amago.modules.timestep.combined import CombinedTimestepEncoder
from torchrl_amago.modules.timestep.vision import ImageEmbedding


class CNNTimestepEncoder(CombinedTimestepEncoder):
    """An image through a convolutional trunk, merged with the previous action and reward.

    All entries but the image are flattened, joined and brought to scale by symlog. This is
    :class:`CombinedTimestepEncoder` with one image and the sizes that AMAGO has for pixels.

    Args:
        shapes: for each entry of the tensordict, in order, the shape of one step.
        image_key: which of them is the image; default the only one of three dimensions.
        trunk: ``nature`` (DQN's), ``impala``, ``drq``, ``grid`` or a module, see
            :class:`ImageEmbedding`; likewise ``trunk_options``, ``channels_first``,
            ``random_shift`` and ``random_shift_fraction``.
        image_features: features of the image.
        vector_features: features of everything else together.
        output_size: D.
        num_layers: number of hidden layers after merging, of width ``hidden_size``.
        activation: see :func:`~torchrl_amago.modules._layers.make_activation`.
        options: further arguments of :class:`CombinedTimestepEncoder`: norms, switches, keys.

    Raises:
        ValueError: if there isn't one image, or it is smaller than the trunk needs.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> encoder = CNNTimestepEncoder(
        ...     {"pixels": (3, 40, 40), "prev_reward": (1,)}, channels_first=True, random_shift=4)
        >>> pixels = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
        >>> td = TensorDict(pixels=pixels, prev_reward=torch.zeros(2, 1), batch_size=[2])
        >>> encoder(td)["timestep"].shape
        torch.Size([2, 256])
    """

    def __init__(
        self,
        shapes: Mapping[NestedKey, Shape],
        *,
        image_key: NestedKey | None = None,
        trunk: str | nn.Module = "nature",
        trunk_options: dict[str, Any] | None = None,
        channels_first: bool = False,
        random_shift: int = 0,
        random_shift_fraction: float = 0.75,
        image_features: int = 256,
        vector_features: int = 12,
        output_size: int = 256,
        num_layers: int = 0,
        activation: str = "leaky_relu",
        **options: Any,
    ) -> None:
        if image_key not in shapes:
            images = [key for key, shape in shapes.items() if len(shape) == 3]
            if image_key is not None or len(images) != 1:
                raise ValueError(
                    "CNNTimestepEncoder needs one image, an entry of three dimensions, but of the "
                    f"entries {dict(shapes)} that holds for {images}. Name the image with image_key; "
                    "for several images, or none, use the combined or the MLP encoder."
                )
            image_key = images[0]
        image = ImageEmbedding(
            shapes[image_key],
            output_size=image_features,
            trunk=trunk,
            trunk_options=trunk_options,
            channels_first=channels_first,
            random_shift=random_shift,
            random_shift_fraction=random_shift_fraction,
            activation=activation,
        )
        super().__init__(
            {image_key: image},
            {key: shape for key, shape in shapes.items() if key != image_key},
            vector_features=vector_features,
            output_size=output_size,
            num_layers=num_layers,
            activation=activation,
            **{"vector_scale": "symlog", **options},
        )

    @classmethod
    def from_specs(
        cls, specs: Mapping[NestedKey, TensorSpec], **options: Any
    ) -> CNNTimestepEncoder:
        """Build the encoder for observations of which one is an image, see :class:`TimestepEncoder`.

        Raises:
            ValueError: if there isn't one image, or another entry is a category.
        """
        if categories := [key for key, spec in specs.items() if kind_of(spec) == "category"]:
            raise ValueError(
                f"CNNTimestepEncoder reads an image and vectors, but {categories} are categories. "
                "Use the combined encoder, or leave them out with obs_keys."
            )
        return cls({key: tuple(spec.shape) for key, spec in specs.items()}, **options)
