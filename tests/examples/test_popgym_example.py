"""The example on POPGym: lengths of trials, and bins for one game or several."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import import_script
from torchrl_amago import TwoHot

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("popgym")
    return import_script(EXAMPLES / "03_popgym.py", monkeypatch)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 51),
        ({"env_ids": ("HigherLowerMedium",)}, 104),
        ({"env_ids": ("ConcentrationEasy", "NoisyPositionOnlyCartPoleEasy"), "episodes": 2}, 400),
        ({"max_episode_steps": 7}, 7),
    ],
)
def test_the_length_of_trials_is_that_of_the_tasks(options, length, example):
    args = example.Args(**options)
    assert args.trial_length == length
    trial = args.make_env(1).rollout(length + 1, break_when_any_done=True)
    assert trial["next", "done"].any()


@pytest.mark.parametrize("several", [False, True])
def test_only_several_games_get_the_wide_range(several, example, tmp_path, monkeypatch):
    given, domain = {}, example.train.__globals__
    run = domain["run"]
    monkeypatch.setitem(
        domain, "run", lambda *x, **options: given.update(options) or run(*x, **options)
    )
    small = dict(num_envs=2, eval_trials=2, total_updates=1, batch_size=2, max_episode_steps=5)
    names = {"loss": "amago2", "multi_domain": several, "run_dir": tmp_path}
    mask = {"action_mask_key": "action_mask"} if several else {}
    example.train(example.Args(d_model=16, **names, **small), **mask)
    assert isinstance(given["loss_options"].get("value_codec"), TwoHot) == several
