"""The migration page: its example runs, and the arguments it names exist."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compat.reference_names import agent_state_dict
from torchrl_amago import MetaFrozenLake, amago_loss, make_policy, make_trial_env

PAGE = (Path(__file__).parents[2] / "docs" / "migrating_from_amago.md").read_text("utf-8")
# `Class(argument)` or `function(argument=value)`.
NAMED = sorted(set(re.findall(r"`(\w+)\((\w+)(?:=[^`]*)?\)`", PAGE)))
PLACES = ("", ".modules", ".modules.distributions", ".objectives", ".trainers", ".data", ".compat")


def find(name: str) -> Any:
    for place in PLACES:
        module = importlib.import_module(f"torchrl_amago{place}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"torchrl_amago has no {name}")


def arguments(named: Any) -> set[str]:
    """Return the arguments of a function, or of a class and its bases."""
    calls = [c.__init__ for c in named.__mro__] if isinstance(named, type) else [named]
    return {name for call in calls for name in inspect.signature(call).parameters}


def test_the_page_names_arguments():
    assert len(NAMED) > 60


@pytest.mark.parametrize(("name", "argument"), NAMED)
def test_arguments_exist(name, argument):
    assert argument in arguments(find(name))


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_the_example_loads_an_agent(tmp_path, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=2)
    gammas = (0.9, 0.99)
    small = {"d_model": 8, "num_heads": 2, "num_layers": 1}
    options = {"discounts": gammas, "obs_keys": ["observation"], "seq_model_options": small}
    policy = make_policy(env, context_length=9, preset="paper", **options)
    saved = agent_state_dict(policy, amago_loss(policy, preset="paper"))
    torch.save(saved, tmp_path / "policy.pt")
    loaded = namespace["policy_from_amago"](
        tmp_path / "policy.pt", env, 9, gammas, seq_model_options=small
    )
    assert " loaded\n" in capsys.readouterr().out
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
