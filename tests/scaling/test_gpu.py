"""Tests that only a GPU can answer: equal numbers, no hidden waits, graphs. `pytest -m gpu` runs all of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu as benchmark
from tests.scaling.test_synchronisations import ROWS, T, make_parts, trainer_of
from torchrl_amago import MetaFrozenLake, make_policy, make_trainer, make_trial_env
from torchrl_amago.scaling import BatchFeed, compile_policy, send
from torchrl_amago.trainers import FiniteOptimizationStepper, Intervals

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)


@pytest.fixture
def no_waits():
    """Raise for whatever makes the host wait, from `enter()` on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def parts_on(device, **options):
    torch.manual_seed(0)
    env, policy, loss, batch = make_parts(dropout_ff=0.0, dropout_emb=0.0, **options)
    loss.to(device)
    return env, policy, loss, loss.check(batch)


@pytest.mark.parametrize("actions", ["categorical", "continuous"])
def test_losses_equal_those_of_a_cpu(actions):
    results = []
    for device in ("cpu", GPU):
        *_, loss, batch = parts_on(device, actions=actions)
        loss.eval()
        out = loss(send(batch, device))
        results.append({name: x.detach().cpu() for name, x in out.items()})
    # Sampled actions differ; what is exact must agree.
    names = ["entropy", "effective_batch", "q_value"]
    for name in names:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_updates(compiled, precision):
    *_, loss, batch = parts_on(GPU)
    stepper, trainer = (
        FiniteOptimizationStepper(precision=precision, compile=compiled),
        trainer_of(loss),
    )
    batch = send(batch, GPU)
    before = [p.clone() for p in loss.parameters()]
    for _ in range(8):
        metrics = stepper.step(trainer, batch)
    assert metrics["grad_norm"].isfinite()
    moved = [not torch.equal(p, q) for p, q in zip(loss.parameters(), before, strict=True)]
    assert any(moved)
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {8}


def test_a_loss_does_not_wait(no_waits):
    *_, loss, batch = parts_on(GPU)
    batch = send(batch, GPU)
    out = loss(batch)
    no_waits()
    out = loss(batch)
    (out["loss_actor"] + out["loss_qvalue"]).backward()


def test_a_step_does_not_wait(no_waits):
    env, policy, *_ = make_parts()
    policy.to(GPU)
    step = env.reset().to(GPU)
    for number in range(4):
        step = policy(step)
        step["is_init"] = torch.rand(ROWS, 1, device=GPU) < 0.5
        if number == 1:
            no_waits()


def test_compiled_steps_equal_eager_ones():
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        env, policy, *_ = make_parts()
        policy.to(GPU)
        policy.select_out_keys("_stream", "state", "action")
        if compiled:
            compile_policy(policy)
        step, found = env.reset().to(GPU), []
        for number in range(3 * T):
            step["observation"] = torch.full((ROWS, 2), float(number), device=GPU)
            step = policy(step)
            found.append(step["state"].clone())
            step["is_init"] = torch.tensor([[number % 7 == 0]] * ROWS, device=GPU)
        states.append(torch.stack(found))
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3)


def test_replayed_batches_arrive_pinned_and_in_order():
    class Numbers:
        number = 0

        def sample(self):
            self.number += 1
            *_, batch = make_parts()
            return batch.set("number", torch.full((ROWS, T), self.number))

    feed = BatchFeed(Numbers().sample, torch.nn.Linear(1, 1).to(GPU))
    for number in range(1, 6):
        batch = feed.sample(ahead=True)
        assert {x.device for x in batch.values(True, True)} == {GPU}
        assert batch["number"].unique().tolist() == [number]


@pytest.mark.parametrize("collect_device", [None, "cpu"])
@pytest.mark.parametrize("env_device", [None, GPU])
def test_a_run(tmp_path, env_device, collect_device):
    lake = MetaFrozenLake(2, batch_size=(8,), seed=0, device=env_device)
    env = make_trial_env(lake, episodes=2)
    policy = make_policy(env, context_length=8, exploration={}, device=GPU)
    trainer = make_trainer(
        env, policy, trial_length=8, total_updates=8, updates_per_round=4, batch_size=8, run_dir=tmp_path,
        device="cuda", collect_device=collect_device, progress_bar=False, intervals=Intervals(checkpoint=4),
    )  # fmt: skip
    assert trainer.train() == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--precision", "bf16"], ["--compile"], ["--collect-device", "cpu"]]
)
def test_an_example(tmp_path, flags):
    command = [sys.executable, "examples/00_meta_frozen_lake.py", "--debug", "--device", "cuda"]
    command += [*flags, "--run-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_benchmark():
    assert "| compiled |" in benchmark.main(["--tiny"])
