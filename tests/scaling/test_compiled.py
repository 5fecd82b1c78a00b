"""Compiled updates, and functions replayed as graphs: the eager numbers, in one graph."""

from __future__ import annotations

import shutil
import weakref
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.scaling.test_synchronisations import ROWS, make_parts, trainer_of
from torchrl_amago._cpu import cpu_paths
from torchrl_amago.modules.trajectory.memory import Memory
from torchrl_amago.scaling import CudaGraphs, compile_policy, devices
from torchrl_amago.trainers import FiniteOptimizationStepper, make_schedule, optim


class OnCPU(CudaGraphs):
    """Graphs whose replay runs the function again on the inputs that were there at the recording."""

    recordings = 0

    @staticmethod
    def serve(x):
        return True

    def __call__(self, *inputs):
        out = super().__call__(*inputs)
        return out["replayed"] if isinstance(out, dict) and "replayed" in out else out

    def aside(self, inputs):
        return self.function(*inputs)

    def record(self, inputs):
        type(self).recordings += 1
        inputs = tree_map_only(Memory, weakref.proxy, inputs)
        out = {}

        def replay():  # a recording itself computes nothing
            new = self.function(*inputs)
            if not out:
                out["replayed"] = new
            for old, x in zip(tree_leaves(out["replayed"]), tree_leaves(new), strict=True):
                old.copy_(x)

        return replay, out


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Record and replay on a CPU, without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for module in (devices, optim):
        monkeypatch.setattr(module, "CudaGraphs", OnCPU)
    OnCPU.recordings = 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_one_graph_with_the_eager_update(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    results = []
    for options in ({}, {"compile": True}):
        torch.manual_seed(0)
        *_, loss, batch = make_parts(seq_model="feedforward")
        stepper, trainer = FiniteOptimizationStepper(0.5, **options), trainer_of(loss)
        for width in (12, 12, 12):
            torch.manual_seed(1)
            with cpu_paths(False):  # as many random numbers in both
                metrics = stepper.step(trainer, loss.check(batch[:, :width].clone()))
            trainer.optimizer.param_groups[0]["lr"] *= 0.5  # compiles nothing
        results.append((dict(metrics.items()), dict(loss.named_parameters())))
    assert counter.frame_count == 1
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


@pytest.mark.usefixtures("graphs_on_cpu")
def test_updates_by_graphs_equal_those_without():
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        *_, loss, batch = make_parts(dropout_ff=0.0, dropout_emb=0.0)
        stepper, trainer = FiniteOptimizationStepper(0.5, compile=compile), trainer_of(loss)
        schedule = make_schedule(trainer.optimizer, 6)
        torch.manual_seed(1)
        with cpu_paths(False):
            for number in range(8):
                given = loss.check(batch.clone())
                given["next", "reward"] += number
                metrics = stepper.step(trainer, given)
                schedule.step()
        assert given["td_error"].shape == (ROWS, 12)  # a graph's own batch has them, too
        results.append((dict(metrics.items()), dict(loss.named_parameters()), given["td_error"]))
    assert OnCPU.recordings == 1
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_loaded_state_is_not_that_of_the_old_graph():
    *_, loss, batch = make_parts()
    stepper, trainer = FiniteOptimizationStepper(0.5, compile=True), trainer_of(loss)
    batch = loss.check(batch)
    with cpu_paths(False):
        for _ in range(2):
            stepper.step(trainer, batch)
        first = stepper._run
        trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
        stepper.step(trainer, batch)
    assert stepper._run is not first
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}


def test_graphs_replay_on_new_inputs():
    calls, total = [], torch.zeros(())

    def function(x, rest):
        calls.append(1)
        total.add_(x.sum())
        return {"sum": x + rest["y"], "total": total}

    graphs, OnCPU.recordings = OnCPU(function, warmup=2), 0
    kept = []
    for number in range(6):
        x = torch.full((3,), float(number))
        out = graphs(x, {"y": torch.ones(3)})
        assert out["sum"].tolist() == [number + 1.0] * 3
        kept.append(out["sum"])
    assert OnCPU.recordings == 1
    assert [x[0].item() for x in kept[3:]] == [4.0, 5.0, 6.0]  # copies, not the graph's memory
    graphs(torch.zeros(2), {"y": torch.ones(2)})
    assert OnCPU.recordings == 1


def test_a_graph_of_tensordicts():
    graphs = OnCPU(lambda td: (TensorDict(y=td["x"] + 1), td["a", "b"].sum()), warmup=1)
    for number in range(4):
        batch = TensorDict(x=torch.full((2,), number), a={"b": torch.ones(2) * number})
        out, total = graphs(batch)
        assert out["y"].tolist() == [number + 1] * 2
        assert total == 2 * number


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_policy_by_graphs():
    """One graph for each memory and each 64 slots that a step reads; the eager actions."""
    torch.manual_seed(0)
    env, policy, *_ = make_parts()
    policy.encoder.trajectory.context_length = 100
    graphs = compile_policy(policy).compiled_step
    eager = graphs.function

    def play(step):
        policy.compiled_step, states = step, []
        torch.manual_seed(1)
        policy.select_out_keys(*policy._all_keys)
        td = env.reset()
        td["observation"] = torch.randn(ROWS, 2)
        for number in range(70):
            td = policy(td)
            states.append(td["state"].clone())
            td["is_init"] = torch.rand(ROWS, 1) < 0.05
            td["time_idx"] = torch.full((ROWS, 1), number)
            td["observation"] = torch.randn(ROWS, 2)
        return torch.stack(states)

    with cpu_paths(False):
        torch.testing.assert_close(play(graphs), play(eager))
        assert OnCPU.recordings == 2
        assert len(graphs._by_memory) == 1
        policy.encoder.trajectory.reset_streams()
    assert len(graphs._by_memory) == 0
