"""Devices by name, batches in one block and one ahead, and runs that take the GPU's branches."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from torch import nn

from torchrl_amago import MetaFrozenLake, make_policy, make_trainer, make_trial_env
from torchrl_amago._cpu import cpu_paths
from torchrl_amago.data import TrialSliceSampler
from torchrl_amago.scaling import BatchFeed, collector_devices, pick_device, send
from torchrl_amago.trainers import Intervals

SIZES = dict(
    # Dropout draws other numbers on a GPU.
    seq_model_options={"d_model": 16, "num_heads": 2, "dropout_ff": 0.0, "dropout_emb": 0.0},
    timestep_options={"hidden_size": 16, "output_size": 16},
    actor_options={"hidden_size": 16},
)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return pretend


def test_names_of_devices(gpus):
    gpus(0)
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    gpus(2)
    assert pick_device() == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device(torch.device("cuda", 1)) == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda", 0, r"device must be one of 'auto', 'cpu', got 'cuda'. PyTorch sees no GPU"),
        ("cuda:7", 1, r"one of 'auto', 'cpu', 'cuda', 'cuda:0', got 'cuda:7'"),
        ("gpu", 0, "got 'gpu'. Names are those of torch.device"),
        ("mps", 0, "got 'mps'"),
    ],
)
def test_devices_that_are_not_there(gpus, monkeypatch, name, count, message):
    gpus(count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message) as found:
        pick_device(name)
    assert "\n" not in str(found.value)


def test_a_batch_travels_as_one_block():
    batch = TensorDict(
        a=torch.arange(6, dtype=torch.int16).view(2, 3),
        b={"c": torch.rand(2, 3, 5).transpose(1, 2).transpose(1, 2)},
        d=torch.rand(2, 3, dtype=torch.float64)[:, :1].expand(2, 3),
        e=torch.zeros(2, 3, 0),
        f=torch.tensor([[True, False, True]]).expand(2, 3),
        g=NonTensorData("text", batch_size=[2, 3]),
        batch_size=[2, 3],
    )
    sent = send(batch, "cpu")
    assert sent.batch_size == batch.batch_size
    assert set(sent.keys(True, True)) == {"a", ("b", "c"), "d", "e", "f"}
    for key, value in sent.items(True, True):
        assert value.dtype == batch[key].dtype
        assert torch.equal(value, batch[key])
    blocks = {x.untyped_storage().data_ptr() for x in sent.values(True, True) if x.numel()}
    assert len(blocks) == 1
    assert {x.device.type for x in send(batch, "meta").values(True, True)} == {"meta"}


class Numbers:
    """A buffer of consecutive numbers, which notes the threads that draw."""

    def __init__(self, last: int = 100) -> None:
        self.drawn, self.last, self.threads = 0, last, []

    def sample(self) -> TensorDict:
        self.threads.append(threading.current_thread().name)
        self.drawn += 1
        if self.drawn > self.last:
            raise RuntimeError("no more")
        return TensorDict(x=torch.tensor([self.drawn]), batch_size=[1])


def test_batches_ahead_come_in_order():
    buffer, seen = Numbers(4), []
    loss = nn.Linear(1, 1)
    loss.check = lambda batch: batch.set("checked", torch.ones(1))
    with cpu_paths(False):
        feed = BatchFeed(buffer.sample, loss, lambda batch: seen.append(int(batch["x"])))
    for number, ahead in enumerate([True, True, False, True], 1):
        batch = feed.sample(ahead)
        assert batch["x"].tolist() == [number]
        assert "checked" in batch.keys()  # noqa: SIM118
    assert [name == "MainThread" for name in buffer.threads[:4]] == [True, False, False, True]
    assert seen == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="no more"):  # raised in the thread
        feed.sample()


def test_a_cpu_draws_nothing_ahead():
    buffer = Numbers()
    feed = BatchFeed(buffer.sample, nn.Linear(1, 1), check=pytest.fail)
    assert [feed.sample(ahead=True)["x"].item() for _ in range(3)] == [1, 2, 3]
    assert buffer.drawn == 3


def test_devices_of_a_collector():
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    envs = [SimpleNamespace(device=device) for device in (None, cpu, gpu)]
    assert collector_devices(envs[0], "cpu") == collector_devices(envs[1], "cpu") == {}
    expected = {"env_device": gpu, "policy_device": cpu, "storing_device": gpu}
    assert collector_devices(envs[2], "cpu") == expected


@pytest.mark.parametrize("padding", ["right", "left"])
def test_slices_are_trimmed_to_multiples(padding):
    sampler = TrialSliceSampler(100, padding=padding, trim_padding=16)
    for length, width in ((3, 16), (16, 16), (17, 32), (97, 100), (100, 100)):
        step_BT, mask_BT = sampler.windows(torch.tensor([1, length]))
        assert step_BT.shape == mask_BT.shape == (2, width)
        assert mask_BT.sum(1).tolist() == [1, length]


def run(path, **options):
    """Train a tiny agent on the lake; return its losses and weights."""
    torch.manual_seed(0)
    env = make_trial_env(MetaFrozenLake(2, batch_size=(8,), seed=0), episodes=2)
    policy = make_policy(env, context_length=8, exploration={"anneal_frames": 1000}, **SIZES)
    options |= {"progress_bar": False, "intervals": Intervals(checkpoint=4, evaluate=100)}
    critics = {"hidden_size": 16, "num_critics": 2}
    trainer = make_trainer(
        env, policy, trial_length=8, total_updates=8, updates_per_round=3, batch_size=8,
        run_dir=path, seed=3, critic_options=critics, device="cpu", **options,
    )  # fmt: skip
    seen = []
    trainer.callbacks.append(lambda t: seen.append(t.report.window.state_dict()["loss_qvalue"][0]))
    assert trainer.train() == "finished"
    return seen, {name: p.clone() for name, p in trainer.loss_module.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_by_the_gpus_branches_equals_one_by_the_cpus(tmp_path, precision):
    def train(name):
        # The thread that draws batches and the loss share a generator on a CPU, else not.
        buffer = {"trim_padding": True, "generator": torch.Generator().manual_seed(0)}
        compact = {"compact": False}  # with padding, as many random numbers are drawn
        return run(
            tmp_path / name, precision=precision, buffer_options=buffer, loss_options=compact
        )

    losses, weights = train("cpu")
    with cpu_paths(False):
        found, others = train("gpu")
    rtol = 1e-3 if precision == "fp32" else 0.1
    torch.testing.assert_close(found, losses, rtol=rtol, atol=rtol)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=rtol, atol=1e-3, msg=name)


def test_a_run_with_compiled_updates(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    losses, _ = run(tmp_path / "compiled", compile=True)
    assert len(losses) == 8
    assert [function.__name__ for function in compiled] == ["gradients"]
