"""Selecting real steps, and the way back."""

from __future__ import annotations

import pytest
import torch

from torchrl_amago._masking import Steps

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.bool])
def test_there_and_back(compact, dtype):
    x = torch.ones(3, 3, 2).to(dtype)
    steps = Steps(MASK, compact)
    selected = steps.select(x, fill=0)
    assert selected.shape == ((3, 2) if compact else (3, 3, 2))
    assert steps.mask.shape == selected.shape[:-1]
    assert steps.mask.sum() == 3
    restored = steps.restore(selected)
    assert restored.dtype == dtype
    assert torch.equal(restored, MASK.unsqueeze(-1).expand(3, 3, 2).to(dtype))


def test_without_a_fill_padding_stays_as_it_is():
    x = torch.full((3, 3), float("nan"))
    assert Steps(MASK, compact=False).select(x) is x
    assert not Steps(MASK, compact=False).select(x, fill=0)[~MASK].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("compact", [False, True, None])
def test_masks_must_be_bool(dtype, compact):
    with pytest.raises(ValueError, match=f"a mask must be bool, got {dtype}"):
        Steps(MASK.to(dtype), compact)


def test_one_row_on_cpu_outside_of_compilation(monkeypatch):
    assert Steps(MASK).compact
    assert not Steps(MASK.to("meta")).compact
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not Steps(MASK).compact
    assert Steps(MASK, compact=True).compact
