"""Two-hot and HL-Gauss codecs against recorded numbers."""

from __future__ import annotations

import pytest
import torch

from tests.golden_utils import GoldenCase, assert_close, cases, load
from tests.golden_weights import popart_buffers
from torchrl_amago.modules import HLGauss, TwoHot

BINS = load("functional/value_bins")
SETTINGS = range(len(BINS.hyperparameters["settings"]))
REACH = {"num_bins": "output_bins", "min_return": "min_return", "max_return": "max_return"}


def _make(hp: dict, hl_gauss: bool) -> TwoHot | HLGauss:
    options = {ours: hp[theirs] for ours, theirs in REACH.items() if theirs in hp}
    options["symlog"] = hp.get("use_symlog", True)
    if not hl_gauss:
        return TwoHot(3, **options)
    return HLGauss(3, **options, sigma=hp.get("sigma", 0.75))


def _setting(index: int, hl_gauss: bool) -> tuple[TwoHot | HLGauss, dict[str, torch.Tensor]]:
    codec = _make(BINS.hyperparameters["settings"][index], hl_gauss)
    return codec, BINS.starting(f"s{index}/")


@pytest.mark.parametrize("index", SETTINGS)
def test_bins_and_decode(index):
    codec, recorded = _setting(index, hl_gauss=False)
    assert_close(codec.bins, recorded["bin_vals"])
    assert_close(codec.decode(recorded["logits"]), recorded["out/raw_vals"].squeeze(-1))


@pytest.mark.parametrize("index", SETTINGS)
def test_two_hot_labels(index):
    codec, recorded = _setting(index, hl_gauss=False)
    label = codec.encode(recorded["target"].squeeze(-1))
    # Where a target is on a bin, the last float bit decides which neighbour gets nothing.
    assert_close(label, recorded["out/twohot"], atol=1e-4)
    assert_close(codec.decode((label + 1e-12).log()), recorded["out/twohot_decoded"].squeeze(-1))


@pytest.mark.parametrize("index", SETTINGS)
def test_hl_gauss_labels(index):
    """Inside of the range; outside, where the reference's labels vanish, ours are the end's."""
    codec, recorded = _setting(index, hl_gauss=True)
    target = recorded["target"].squeeze(-1)
    low, high = target.flatten()[:2]  # the range's ends, by the case's layout
    inside, below, above = (target > low) & (target < high), target < low, target > high
    assert inside.sum() > inside.numel() / 2
    assert below.any()
    assert above.any()
    label = codec.encode(target)
    assert_close(label[inside], recorded["out/hlgauss"][inside])
    decoded = codec.decode((label + 1e-12).log())
    assert_close(decoded[inside], recorded["out/hlgauss_decoded"].squeeze(-1)[inside])
    torch.testing.assert_close(label.sum(-1), torch.ones_like(target))
    assert_close(label[below], codec.encode(low).expand_as(label[below]))
    assert_close(label[above], codec.encode(high).expand_as(label[above]))


def test_initial_bias():
    codec = TwoHot(2, num_bins=64, min_return=-100.0, max_return=100.0, init_value=5.0)
    assert_close(codec.bins, BINS["init_value/bin_vals"])
    assert_close(codec.initial_bias(), BINS["init_value/out/bias"][0, 0, 0])


@pytest.mark.parametrize("case", cases("modules/ncritics_twohot_*"), ids=str)
def test_recorded_predictions(case: GoldenCase):
    codec = _make(case.hyperparameters, hl_gauss=False)
    assert_close(codec.bins, case["bin_vals"])
    assert_close(codec.decode(case["out/logits"]), case["out/raw_vals"].squeeze(-1))


@pytest.mark.parametrize(
    "case", cases("agents/multitask_discrete_*", "agents/multitask_continuous_[!3]*"), ids=str
)
def test_a_whole_update(case: GoldenCase):
    """Statistics, loss and normalised values of recorded critics for recorded targets."""
    head = {name.split(".")[-1]: value for name, value in case.hyperparameters["head"].items()}
    codec = _make(head, hl_gauss=head.get("label_type") == "hlgauss")
    assert_close(codec.bins, case["bin_vals"])
    for name, value in popart_buffers(case, "w/popart.").items():
        codec.popart.get_buffer(name).copy_(value)
    target = case["mid/td_target"].squeeze(2, -1)
    mask = case["mid/td_mask"].squeeze(2, -1)[..., :1]
    codec.update(target, mask)
    for name, value in popart_buffers(case, "after_forward/popart.").items():
        assert_close(codec.popart.get_buffer(name), value, msg=name)
    loss = codec.loss(case["mid/critics_out_0"][0, :, :-1], target)
    real = mask.unsqueeze(-2).expand_as(loss)
    assert_close(loss[real], case["mid/critic_loss_unmasked"].squeeze(-1)[real])
    next_value = codec.decode(case["mid/target_critics_out_0"]).mean(0)
    assert_close(next_value, case["mid/q_target_next"].squeeze(-1))
