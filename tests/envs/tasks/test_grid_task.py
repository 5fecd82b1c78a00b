"""Look-up tables against rules written out."""

from __future__ import annotations

import pytest
import torch

from torchrl_amago.envs.tasks.grid_task import check_size, move_table, position_table


def test_moves_from_the_middle_and_the_corners():
    moves = move_table(3)
    assert moves.shape == (5, 9)
    # Cell 4 is (1, 1): stay, +x, -x, +y, -y.
    assert moves[:, 4].tolist() == [4, 7, 1, 5, 3]
    assert moves[:, 0].tolist() == [0, 3, 0, 1, 0]
    assert moves[:, 8].tolist() == [8, 8, 5, 8, 7]


def test_exact_positions():
    assert position_table(3)[5].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_positions_after_offsets_stay_on_the_grid():
    offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    table = (position_table(4, [*offsets, (0, 0)]).view(16, 10, 2) * 4).round().long()
    middle = table[5]  # (1, 1)
    assert middle[-1].tolist() == [1, 1]
    assert (middle[:9] - 1).tolist() == [list(offset) for offset in offsets]
    corner = table[0, :9]
    # Clipped: each coordinate is 0 in two cases of three.
    assert (corner == 0).float().mean(0).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert torch.equal(table.amax((0, 1)), torch.tensor([3, 3]))


@pytest.mark.parametrize(
    ("size", "options", "match"),
    [
        (1, {}, "size must be an integer of at least 2, got 1. It is the number of cells"),
        (3.0, {}, "size must be an integer .* got 3.0"),
        (8, {"smallest": 7, "odd": True}, "size must be an odd integer of at least 7, got 8"),
        (5, {"smallest": 7, "odd": True}, "size must be an odd integer of at least 7, got 5"),
    ],
)
def test_a_size_out_of_range(size, options, match):
    with pytest.raises(ValueError, match=match):
        check_size(size, **options)
