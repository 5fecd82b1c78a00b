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
    env = args.make_env(1)
    # The one action that all tasks have.
    first = lambda td: td.set("action", env.full_action_spec.zero()["action"])  # noqa: E731
    trial = env.rollout(length + 1, first, break_when_any_done=True)
    assert trial["next", "done"].any()


def test_an_action_is_a_cell_of_a_board(example):
    board = example.Args().make_one("BattleshipEasy")
    assert board.action_space.n == 64
    board.reset(seed=3)
    board.step(8 + 2)
    assert board.unwrapped.guesses.nonzero() == ([1], [2])


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
