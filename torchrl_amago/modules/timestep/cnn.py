"""The timestep encoder for one image, with all other entries as small vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import NestedKey
from torchrl.data import TensorSpec

from torchrl_amago.modules.timestep.base import Shape
from torchrl_amago.modules.timestep.combined import CombinedTimestepEncoder, default_kind
from torchrl_amago.modules.timestep.vision import ImageEmbedding

_OF_IMAGE = ("trunk", "trunk_options", "channels_first", "random_shift", "random_shift_fraction")


class CNNTimestepEncoder(CombinedTimestepEncoder):
    """An image through a convolutional trunk, merged with the previous action and reward.

    All entries but the image are flattened, joined and scaled by symlog. This is
    :class:`CombinedTimestepEncoder` with one image and AMAGO's sizes for pixels.

    Args:
        image_key: entry of the image; by default the only one of three dimensions.
        image_features: features of the image.
        vector_features: features of all other entries together.
        num_layers: number of hidden layers after merging.
        options: arguments of :class:`ImageEmbedding` (``trunk``, ``trunk_options``,
            ``channels_first``, ``random_shift``, ``random_shift_fraction``) and of
            :class:`CombinedTimestepEncoder`.

    Raises:
        ValueError: if there isn't one image, or it is smaller than the trunk needs.

    Example:
        >>> encoder = CNNTimestepEncoder({"pixels": (40, 40, 3), "prev_reward": (1,)})
        >>> encoder.out_keys, encoder.output_size
        (['timestep'], 256)
    """

    def __init__(
        self,
        shapes: Mapping[NestedKey, Shape],
        *,
        image_key: NestedKey | None = None,
        image_features: int = 256,
        vector_features: int = 12,
        output_size: int = 256,
        num_layers: int = 0,
        **options: Any,
    ) -> None:
        images = [key for key, shape in shapes.items() if len(shape) == 3]
        if image_key not in images and (image_key is not None or len(images) != 1):
            rule = "CNNTimestepEncoder needs one image, an entry of three dimensions"
            remedy = "Choose it by image_key, or use the combined encoder."
            raise ValueError(f"{rule}, got {images} among {dict(shapes)}. {remedy}")
        image_key = images[0] if image_key is None else image_key
        of_image = {name: options.pop(name) for name in _OF_IMAGE if name in options}
        if "activation" in options:
            of_image["activation"] = options["activation"]
        image = ImageEmbedding(shapes[image_key], output_size=image_features, **of_image)
        super().__init__(
            {image_key: image},
            {key: shape for key, shape in shapes.items() if key != image_key},
            vector_features=vector_features,
            output_size=output_size,
            num_layers=num_layers,
            **{"vector_scale": "symlog", **options},
        )

    @classmethod
    def from_specs(
        cls, specs: Mapping[NestedKey, TensorSpec], **options: Any
    ) -> CNNTimestepEncoder:
        """Build the encoder from specs, see :class:`TimestepEncoder`; none may be a category."""
        if categories := [key for key, spec in specs.items() if default_kind(spec) == "category"]:
            rule = f"CNNTimestepEncoder reads an image and vectors, but {categories} are categories"
            raise ValueError(f"{rule}. Use the combined encoder, or leave them out with obs_keys.")
        return cls({key: tuple(spec.shape) for key, spec in specs.items()}, **options)
