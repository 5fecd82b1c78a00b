"""The compiled loss: one graph for the whole update, none anew, and the eager numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.objectives import test_amago
from tests.objectives.test_amago import FORMS, T, make_batch, make_loss, total
from torchrl_amago.modules import FeedForwardEncoder, TransformerEncoder
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.objectives import amago

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


@pytest.fixture
def no_chance(monkeypatch):
    """Compiled and eager code draw other random numbers: here they are none."""

    def constant(shape, like):  # of any length in one graph, which torch.linspace is not
        return (0.2 + 0.1 * (torch.arange(shape.numel()) % 7)).to(like.dtype).view(shape)

    def first(weights, sample_shape=()):
        return weights.expand(*sample_shape, *weights.shape).argmax(-1)

    for name in ("standard_normal", "gumbel", "uniform", "exponential"):
        monkeypatch.setattr(noise, name, constant)
    monkeypatch.setattr(noise, "categorical", first)
    monkeypatch.setattr(
        amago, "draw_critic_subset", lambda shape, size, device: torch.ones(shape).long()
    )
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "encoder"),
    [
        (FORMS[0], TransformerEncoder),
        (
            FORMS[2],
            lambda width, **_: FeedForwardEncoder(width, d_model=width, normalize_states=True),
        ),
    ],
    ids=["discrete", "continuous, normalised states"],
)
def test_one_graph_with_the_eager_numbers(form, encoder, no_chance, monkeypatch):
    monkeypatch.setattr(test_amago, "TransformerEncoder", encoder)
    actions = form.get("actions", "discrete")
    eager, loss = (make_loss(**form, compact=False, num_layers=1) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    frames = []
    for steps in (T, T - 1, T - 2, T):
        batch = make_batch(actions=actions)[:, :steps]
        outs = []
        for run in (eager, compiled):
            out = run(batch.clone())
            total(out).backward()
            outs.append(out)
        for name, value in outs[0].items(True, True):
            torch.testing.assert_close(outs[1][name], value, rtol=1e-4, atol=1e-4, msg=str(name))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]  # a second length makes lengths dynamic
    for ours, theirs in zip(loss.parameters(), eager.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(loss.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)
