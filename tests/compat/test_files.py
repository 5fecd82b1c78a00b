"""AMAGO's weight files are read; nothing that could run code is."""

from __future__ import annotations

import builtins
import pickle
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.compat.recorded import agent_weights, build_policy
from tests.golden_utils import load
from torchrl_amago.compat import load_amago_weights, read_amago_weights

CASE = load("agents/agent_discrete_3_updates")


def save(path, weights) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    else:
        torch.save(weights, path)


@pytest.mark.parametrize(
    "name",
    [
        "policy_weights/policy_epoch_20.pt",
        "latest/policy.pt",
        "training_states/run_epoch_20/model.safetensors",
    ],
)
def test_files_that_amago_writes(tmp_path, name):
    path, weights = tmp_path / name, agent_weights(CASE)
    save(path, weights)
    for source in (path, str(path)):
        read = read_amago_weights(source)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], weights[key]) for key in weights)
    policy = build_policy(CASE)
    load_amago_weights(path, policy)
    assert torch.equal(policy.actor.module.mlp.out.bias, weights["actor.base.out_layer.bias"])


class Bomb:
    """Object whose unpickling would call a function."""

    def __reduce__(self):
        return builtins.exec, ("import sys; sys.amago_bomb_exploded = True",)


@pytest.mark.parametrize("bare", [False, True])
def test_a_pickle_that_would_run_code_is_not_read(tmp_path, bare):
    path, weights = tmp_path / "policy.pt", {"actor.hidden": Bomb()}
    if bare:
        path.write_bytes(pickle.dumps(weights, protocol=2))
    else:
        save(path, agent_weights(CASE) | weights)
    policy = build_policy(CASE)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(ValueError, match="a dict of tensors and nothing else"):
        load_amago_weights(path, policy)
    assert not hasattr(sys, "amago_bomb_exploded")
    assert all(torch.equal(before[name], v) for name, v in policy.state_dict().items())


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_a_truncated_file(tmp_path, keep):
    for name, error in (("policy.pt", ValueError), ("model.safetensors", SafetensorError)):
        path = tmp_path / name
        save(path, agent_weights(CASE))
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(error):
            read_amago_weights(path)


@pytest.mark.parametrize("name", ["policy.pt", "model.safetensors"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_amago_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "a dict of tensors and nothing else"),
        ({"state": {"actor": torch.zeros(2)}, "epoch": 3}, r"entries \['state', 'epoch'\] are not"),
        ({3: torch.zeros(2)}, r"entries \[3\] are not"),
    ],
)
def test_anything_but_tensors_by_name(tmp_path, content, message):
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=message):
        read_amago_weights(tmp_path / "policy.pt")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(path, agent_weights(CASE))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-amago\[amago\]'"):
        read_amago_weights(path)
