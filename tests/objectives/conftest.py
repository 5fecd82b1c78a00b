"""The reference's choices for tests of recorded numbers, where ours differ on purpose."""

from __future__ import annotations

import pytest
from torchrl.modules import recurrent_mode

from torchrl_amago.modules import TimestepEncoder
from torchrl_amago.objectives import AMAGOLoss


@pytest.fixture(autouse=True)
def statistics_of_the_reference(request, monkeypatch):
    """Move PopArt's statistics in evaluation too, and inputs' ones without gradient.

    The public code does the former; a test of recorded estimates does the latter by hand. All other
    tests see our own rule, training mode with gradient alone.
    """
    if not request.path.name.endswith("_golden.py"):
        return
    monkeypatch.setattr(AMAGOLoss, "_moves_statistics", True)
    moves = property(lambda encoder: encoder.training and recurrent_mode())
    monkeypatch.setattr(TimestepEncoder, "moves_statistics", moves)
