"""Files of weights: those AMAGO writes are read, anything that could run code is not."""

from __future__ import annotations

import builtins
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.compat.recorded import agent_weights, build_policy
from tests.golden_utils import load
from torchrl_amago.compat import (
    describe_amago_weights,
    load_amago_weights,
    read_amago_weights,
)

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
@pytest.mark.parametrize("as_text", [False, True])
def test_files_that_amago_writes(tmp_path, name, as_text):
    path, weights = tmp_path / name, agent_weights(CASE)
    save(path, weights)
    read = read_amago_weights(str(path) if as_text else path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)
    policy = build_policy(CASE)
    load_amago_weights(path, policy)
    bias = policy.actor.module.mlp.out.bias
    assert torch.equal(bias, weights["actor.base.out_layer.bias"])
    assert describe_amago_weights(path) == describe_amago_weights(weights)


class Bomb:
    """Unpickling this would call the function it names."""

    def __reduce__(self):
        return builtins.exec, ("import sys; sys.amago_bomb_exploded = True",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path, weights = tmp_path / "policy.pt", agent_weights(CASE)
    save(path, weights | {"actor.hidden": Bomb()})
    policy = build_policy(CASE)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(ValueError, match="could run code, and isn't read"):
        load_amago_weights(path, policy)
    assert not hasattr(sys, "amago_bomb_exploded")
    assert all(torch.equal(before[name], v) for name, v in policy.state_dict().items())


def test_a_bare_pickle_is_refused(tmp_path):
    path = tmp_path / "policy.pt"
    path.write_bytes(pickle.dumps({"actor.base": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match="tensors and nothing else"):
        read_amago_weights(path)
    assert not hasattr(sys, "amago_bomb_exploded")


@pytest.mark.parametrize("name", ["policy.pt", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_a_file_cut_short_is_refused(tmp_path, name, keep):
    path = tmp_path / name
    save(path, agent_weights(CASE))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=name):
        read_amago_weights(path)


@pytest.mark.parametrize("exists", [False, True])
def test_what_is_no_file_is_told_where_files_are(tmp_path, exists):
    path = tmp_path / "ckpts"
    if exists:
        path.mkdir()
    with pytest.raises(FileNotFoundError, match="policy_weights/policy_epoch_<n>.pt"):
        read_amago_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "got a Tensor"),
        ({"state": {"actor": torch.zeros(2)}, "epoch": 3}, "a dict with state, epoch"),
        ({3: torch.zeros(2)}, "names that are no strings"),
    ],
)
def test_anything_but_tensors_by_name_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=message):
        read_amago_weights(tmp_path / "policy.pt")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(path, agent_weights(CASE))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-amago\[amago\]'"):
        read_amago_weights(path)


def test_weights_of_something_else_are_no_agent():
    with pytest.raises(ValueError, match=r"no \['actor', 'tstep_encoder'\] among \['fc'\]"):
        describe_amago_weights({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="among \\[\\]"):
        describe_amago_weights({})


def test_an_encoder_of_ones_own_cannot_be_described():
    weights = agent_weights(CASE) | {"traj_encoder.lstm.weight_ih_l0": torch.zeros(8, 2)}
    own = {name: value for name, value in weights.items() if "tformer" not in name}
    with pytest.raises(ValueError, match="traj_encoder must be one of.*lstm.weight_ih_l0"):
        describe_amago_weights(own)


def test_incomplete_weights_cannot_be_described():
    weights = agent_weights(CASE)
    del weights["actor.base.out_layer.weight"]
    with pytest.raises(ValueError, match="actor can't be read off.*mlp.out.weight"):
        describe_amago_weights(weights)
