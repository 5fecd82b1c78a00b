"""Other attention kernels: their calls, against the numbers of `window_attention`."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from tests.modules.trajectory.helpers import needs_compiler
from tests.modules.trajectory.test_attention import naive, trials
from torchrl_amago.modules.trajectory import TransformerEncoder
from torchrl_amago.modules.trajectory.kernels import _attention_backends as attention_backends
from torchrl_amago.modules.trajectory.kernels._attention_backends import backend_attention
from torchrl_amago.modules.trajectory.kernels.attention import AttentionPattern

SIZES = {"context_length": 8, "d_model": 16, "num_heads": 2, "num_layers": 1}


def inputs(dtype, device="cpu", heads=2, features=16, steps=70):
    q, k, v = torch.randn(3, 2, heads, steps, features, dtype=dtype, device=device).unbind(0)
    positions, is_init = (z.to(device) for z in trials(2, steps, 0.05))
    return q, k, v, positions, is_init


@pytest.fixture
def flash_attn(monkeypatch):
    """A package with flash-attn's two functions, by the definitions in its documentation."""

    def dense(q, k, v, trial, dropout_p, causal, window_size):
        assert (dropout_p, causal, window_size[1]) == (0.0, True, 0)
        pattern = AttentionPattern(None if window_size[0] < 0 else window_size[0] + 1)
        is_init = torch.cat((torch.ones_like(trial[:, :1]), trial.diff()), 1).bool()
        q, k, v = (z.transpose(1, 2).double() for z in (q, k, v))
        out = naive(q, k, v, pattern, torch.zeros_like(trial), is_init)
        return out.transpose(1, 2)

    def flash_attn_func(q, k, v, **options):
        trial = torch.zeros(q.shape[:2], dtype=torch.int64)
        return dense(q, k, v, trial, **options).to(q.dtype)

    def flash_attn_varlen_func(q, k, v, starts_q, starts_k, longest_q, longest_k, **options):
        assert starts_q is starts_k
        assert starts_q.dtype == torch.int32
        assert longest_q == longest_k == starts_q.diff().max()
        trial = torch.repeat_interleave(starts_q.diff()).unsqueeze(0)
        return dense(q[None], k[None], v[None], trial, **options)[0].to(q.dtype)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention_backends, "_is_installed", lambda: True)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("several", [False, True])
def test_flash_computes_the_same(flash_attn, window, several):
    q, k, v, positions, is_init = inputs(torch.bfloat16)
    options = {"positions_BT": positions, "is_init_BT": is_init if several else None}
    pattern = AttentionPattern(window)
    found = backend_attention("flash", q, k, v, pattern, **options)
    expected = backend_attention("sdpa", q, k, v, pattern, **options)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_flash_lacks(flash_attn):
    with pytest.raises(ValueError, match="neither sinks nor logit_clip"):
        TransformerEncoder(4, **SIZES, attention="flash", logit_clip=3.0)
    q, k, v, _, _ = inputs(torch.float32)
    # On a CPU 'auto' leaves it alone even where it is installed.
    backend_attention("auto", q, k, v, AttentionPattern())


class CudaTensor:
    """The attributes of a tensor that choose a kernel."""

    device = torch.device("cuda")

    def __init__(self, dtype=torch.bfloat16, features=16):
        self.dtype, self.shape = dtype, (2, 2, 70, features)


@pytest.mark.parametrize(
    ("q", "pattern", "capability", "chosen"),
    [
        (CudaTensor(), AttentionPattern(9), (8, 0), True),
        (CudaTensor(torch.float16, 256), AttentionPattern(), (9, 0), True),
        (CudaTensor(), AttentionPattern(), (7, 5), False),
        (CudaTensor(torch.float32), AttentionPattern(), (8, 0), False),
        (CudaTensor(features=512), AttentionPattern(), (8, 0), False),
        (CudaTensor(), AttentionPattern(9, num_sinks=1), (8, 0), False),
        (CudaTensor(), AttentionPattern(logit_clip=1.0), (8, 0), False),
    ],
)
def test_auto_takes_flash_where_it_can_run(flash_attn, monkeypatch, q, pattern, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_backends, "is_batchedtensor", lambda q: False)
    monkeypatch.setattr(attention_backends, "_flash_attention", lambda *_: "flash")
    monkeypatch.setattr(attention_backends, "window_attention", lambda *_, **__: "sdpa")
    found = backend_attention("auto", q, q, q, pattern)
    assert found == ("flash" if chosen else "sdpa")


def test_missing_backends():
    if not attention_backends._is_installed():
        with pytest.raises(
            ImportError, match=r"needs the package flash-attn.*torchrl_amago\[flash\]"
        ):
            TransformerEncoder(4, **SIZES, attention="flash")
    with pytest.raises(ValueError, match="attention must be one of .* got 'xformers'"):
        TransformerEncoder(4, **SIZES, attention="xformers")
    with pytest.raises(ValueError, match="'flex' has no dropout_attn, got 0.1"):
        TransformerEncoder(4, **SIZES, attention="flex", dropout_attn=0.1)


PATTERNS = [
    AttentionPattern(),
    AttentionPattern(9),
    AttentionPattern(9, num_sinks=2, sink_bias=0.5, logit_clip=1.0),
]


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("pattern", PATTERNS[1:])
@torch.no_grad()
def test_flex_gives_the_same_on_a_cpu(pattern):
    q, k, v, positions, is_init = inputs(torch.float32)
    options = {"positions_BT": positions, "is_init_BT": is_init}
    found = backend_attention("flex", q, k, v, pattern, **options)
    expected = backend_attention("sdpa", q, k, v, pattern, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["flex", "flash"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("several", [False, True])
def test_gradients_on_a_gpu(backend, pattern, several):
    if backend == "flash":
        pytest.importorskip("flash_attn")
        if not attention_backends._flash_fits(pattern):
            pytest.skip("flash-attn has no sinks or clipping")
    q, k, v, positions, is_init = inputs(torch.bfloat16, "cuda", features=64, steps=300)
    options = {"positions_BT": positions, "is_init_BT": is_init if several else None}
    weight, results = torch.randn_like(q), []
    for name in (backend, "sdpa"):
        leaves = [z.detach().clone().requires_grad_() for z in (q, k, v)]
        out = backend_attention(name, *leaves, pattern, **options)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
