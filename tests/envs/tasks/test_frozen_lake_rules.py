"""Look-up tables against rules written out."""

from __future__ import annotations

import pytest
import torch

from torchrl_amago.envs.tasks.frozen_lake._rules import move_table, position_table


def test_moves_from_the_middle_and_the_corners():
    moves = move_table(3)
    assert moves.shape == (2, 5, 9)
    # Cell 4 is (1, 1): stay, +x, -x, +y, -y.
    assert moves[0, :, 4].tolist() == [4, 7, 1, 5, 3]
    assert moves[1, :, 4].tolist() == [4, 5, 1, 7, 3]
    assert moves[0, :, 0].tolist() == [0, 3, 0, 1, 0]
    assert moves[0, :, 8].tolist() == [8, 8, 5, 8, 7]


def test_exact_positions():
    assert position_table(3, noisy=False)[5].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_noisy_positions_are_neighbours_then_the_exact_one():
    table = (position_table(4, noisy=True).view(16, 10, 2) * 4).round().long()
    middle = table[5]  # (1, 1)
    assert middle[-1].tolist() == [1, 1]
    assert len({tuple(seen) for seen in middle[:9].tolist()}) == 9
    assert ((middle[:9] - 1).abs() <= 1).all()
    corner = table[0, :9]
    # Clipped: each coordinate is 0 in two cases of three.
    assert (corner == 0).float().mean(0).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert torch.equal(table.amax((0, 1)), torch.tensor([3, 3]))
