"""Images: shifts that every step of a row shares, trunks, scaling, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F
from torchrl.modules import set_recurrent_mode

from torchrl_amago.modules import CNNTimestepEncoder, ImageEmbedding
from torchrl_amago.modules.timestep import TRUNKS, ImpalaTrunk, sample_shifts, shift_images

CPU = torch.device("cpu")
SMALL = {"trunk": "grid", "image_features": 8, "output_size": 6, "channels_first": True}


def test_a_shift_is_pad_and_crop():
    image = torch.randint(0, 256, (81, 3, 7, 9), dtype=torch.uint8)
    shift = torch.cartesian_prod(torch.arange(-4, 5), torch.arange(-4, 5))
    moved = shift_images(image, shift)
    assert moved.dtype == torch.uint8
    padded = F.pad(image.float(), (4, 4, 4, 4), "replicate").to(torch.uint8)
    for row, (y, x) in enumerate(shift.tolist()):
        assert torch.equal(moved[row], padded[row, :, 4 + y : 11 + y, 4 + x : 13 + x])


def test_a_shift_is_what_drq_samples_on_a_grid():
    """Written as in DrQ-v2's paper: bilinear sampling of the padded image at whole pixels."""
    image, shift = torch.randn(5, 3, 8, 8), torch.randint(-4, 5, (5, 2))
    padded = F.pad(image, (4, 4, 4, 4), "replicate")
    pixel = torch.arange(8) + 4 + shift.unsqueeze(-1)  # [M, (y, x), 8]
    y, x = ((2 * pixel + 1) / 16 - 1).unbind(1)
    grid = torch.stack((x[:, None, :].expand(-1, 8, -1), y[:, :, None].expand(-1, -1, 8)), -1)
    sampled = F.grid_sample(padded, grid, align_corners=False)
    torch.testing.assert_close(shift_images(image, shift), sampled, rtol=0, atol=1e-5)


@given(
    rows=st.integers(0, 40),
    reach=st.integers(0, 6),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.75, 1.0]),
)
def test_a_fraction_of_the_rows_is_shifted(rows, reach, fraction):
    shift = sample_shifts(rows, reach, fraction, CPU)
    assert shift.shape == (rows, 2)
    assert not rows or int(shift.abs().max()) <= reach
    moved = int(shift.any(-1).sum())
    assert moved <= -(-rows * round(100 * fraction) // 100)


def test_every_shift_is_as_likely_and_every_row():
    shift = torch.stack([sample_shifts(8, 1, 0.75, CPU) for _ in range(2000)])
    counts = shift[..., 0].unique(return_counts=True)[1] / shift[..., 0].numel()
    # 0.25 of the rows stay, the others go to -1, 0, 1 alike.
    torch.testing.assert_close(counts, torch.tensor([0.25, 0.5, 0.25]), rtol=0, atol=0.02)
    per_row = shift.any(-1).float().mean(0)
    torch.testing.assert_close(per_row, torch.full((8,), 0.75 * 8 / 9), rtol=0, atol=0.04)


def shifted_images(mask: torch.Tensor, pixels: torch.Tensor, **options) -> torch.Tensor:
    """Return the trunk's inputs of real steps, in training."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, image):
            seen.append(image)
            return image.flatten(1)

    encoder = CNNTimestepEncoder(
        {"pixels": tuple(pixels.shape[2:])}, **{**SMALL, "trunk": Spy()}, **options
    )
    td = TensorDict(pixels=pixels, collector=TensorDict(mask=mask), batch_size=mask.shape)
    with set_recurrent_mode(True):
        encoder(td)
    return seen[-1]


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 2**16))
def test_all_steps_of_a_row_move_alike(lengths, seed):
    torch.manual_seed(seed)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    # Every pixel holds its place, so that the picture says where it came from.
    place = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij"))
    pixels = place.expand(len(lengths), 5, 2, 6, 6)
    seen = shifted_images(mask, pixels, random_shift=2, random_shift_fraction=0.75)
    if seen.shape[0] == mask.numel():
        seen = seen.unflatten(0, mask.shape)[mask]
    centre = seen[:, :, 3, 3] - 3
    start = 0
    moved = 0
    for length in lengths:
        of_row = centre[start : start + length]
        assert torch.equal(of_row, of_row[:1].expand_as(of_row))
        moved += bool(of_row[:1].any())
        start += length
    assert moved <= -(-3 * len(lengths) // 4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
def test_shifts_in_training_on_sequences_only(training, recurrent):
    encoder = CNNTimestepEncoder({"pixels": (2, 6, 6)}, random_shift=3, **SMALL).train(training)
    td = TensorDict(
        pixels=torch.randint(0, 256, (64, 1, 2, 6, 6), dtype=torch.uint8), batch_size=[64, 1]
    )
    with set_recurrent_mode(recurrent):
        one, other = (encoder(td.clone())["timestep"] for _ in range(2))
    assert torch.equal(one, other) != (training and recurrent)


def test_channels_last_is_channels_first_permuted():
    first = ImageEmbedding((3, 8, 10), output_size=5, trunk="grid", channels_first=True)
    last = ImageEmbedding((8, 10, 3), output_size=5, trunk="grid")
    last.load_state_dict(first.state_dict())
    image = torch.randint(0, 256, (4, 2, 3, 8, 10), dtype=torch.uint8)
    torch.testing.assert_close(first(image), last(image.movedim(-3, -1)))
    rows = torch.arange(4)[:, None].expand(4, 2)
    for embedding in (first, last):
        embedding.random_shift = 2
    torch.manual_seed(1)
    moved_first = first.augment(image, rows, 4)
    torch.manual_seed(1)
    moved_last = last.augment(image.movedim(-3, -1), rows, 4)
    assert torch.equal(moved_first.movedim(-3, -1), moved_last)


def test_bytes_are_scaled_and_floats_are_not():
    embedding = ImageEmbedding((4, 4, 1), output_size=3, trunk=torch.nn.Flatten())
    image = torch.tensor([0, 128, 255, 64], dtype=torch.uint8).expand(2, 4, 4).unsqueeze(-1)
    torch.testing.assert_close(embedding(image), embedding(image.float() / 128 - 1))


@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 3)])
@pytest.mark.parametrize("trunk", sorted(TRUNKS))
def test_any_batch_shape(batch, trunk):
    embedding = ImageEmbedding((36, 40, 1), output_size=3, trunk=trunk)
    images = torch.randint(0, 256, (*batch, 36, 40, 1), dtype=torch.uint8)
    out = embedding(images)
    assert out.shape == (*batch, 3)
    if batch:
        one_by_one = [embedding(image) for image in images.reshape(-1, 36, 40, 1)]
        flat = out.reshape(-1, 3)
        torch.testing.assert_close(flat, torch.stack(one_by_one) if one_by_one else flat)


def test_a_trunk_takes_its_least_size_and_names_it():
    for name, least in {"nature": 36, "impala": 15, "drq": 15, "grid": 4}.items():
        ImageEmbedding((least, least, 1), trunk=name)
        with pytest.raises(ValueError, match=f"at least {least} x {least} pixels, got {least} x "):
            ImageEmbedding((least, least - 1, 1), trunk=name)
    with pytest.raises(ValueError, match=r"got 84 x 3 .*channels_first=True.*'grid' from 4"):
        ImageEmbedding((84, 84, 3), channels_first=True)


def test_a_trunk_that_is_a_module_has_no_options():
    with pytest.raises(ValueError, match="has no trunk_options"):
        ImageEmbedding((9, 9, 3), trunk=nn.Flatten(), trunk_options={"channels": [4]})


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"trunk must be one of \['drq'.* got 'resnet'"):
        ImageEmbedding((84, 84, 3), trunk="resnet")
    with pytest.raises(ValueError, match=r"three dimensions, got shape \(84, 84\).*grey"):
        ImageEmbedding((84, 84))
    with pytest.raises(ValueError, match=r"random_shift_fraction must be in \[0, 1\], got 1.5"):
        ImageEmbedding((84, 84, 3), random_shift=4, random_shift_fraction=1.5)
    with pytest.raises(ValueError, match="num_channels .6. must be divisible by num_groups .4."):
        ImpalaTrunk(3, channels=[6])
    with pytest.raises(ValueError, match=r"needs one image.* got \[\]"):
        CNNTimestepEncoder({"observation": (4,)})
    with pytest.raises(ValueError, match=r"needs one image.* got \['a', 'b'\]"):
        CNNTimestepEncoder({"a": (8, 8, 3), "b": (8, 8, 3)})
    with pytest.raises(ValueError, match=r"needs one image.*image_key"):
        CNNTimestepEncoder({"a": (8, 8, 3)}, image_key="b")


def test_nature_is_the_published_network():
    embedding = ImageEmbedding((84, 84, 4), trunk="nature", output_size=8, activation="relu")
    published = nn.Sequential(
        nn.Conv2d(4, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 8),
    )
    for ours, theirs in zip(embedding.parameters(), published.parameters(), strict=True):
        theirs.data.copy_(ours)
    image = torch.randint(256, (2, 84, 84, 4), dtype=torch.uint8)
    torch.testing.assert_close(embedding(image), published(image.movedim(-1, 1).float() / 128 - 1))


def test_a_trunk_of_lazy_layers():
    trunk = nn.Sequential(nn.LazyConv2d(5, 3), nn.ReLU())
    embedding = ImageEmbedding((9, 9, 3), trunk=trunk, output_size=4)
    assert embedding.features.in_features == 5 * 7 * 7
    assert embedding(torch.rand(2, 9, 9, 3)).shape == (2, 4)
