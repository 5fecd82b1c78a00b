"""The off-policy examples: every encoder acts, and a run goes on only with the task it began with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.scripts import import_script
from torchrl_amago import make_policy
from torchrl_amago.modules import SEQ_MODELS

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = (
    "00_meta_frozen_lake",
    "01_basic_gym",
    "04_tmaze",
    "05_dark_key_door",
    "06_alchemy",
    "12_half_cheetah_vel",
    "13_mazerunner_relabeling",
)
NEEDS = {"12_half_cheetah_vel": "mujoco"}
TINY = {
    "total_updates": 2,
    "updates_per_round": 2,
    "num_envs": 4,
    "batch_size": 2,
    "d_model": 16,
    "hidden_size": 8,
    "num_layers": 1,
    "eval_trials": 3,
    "eval_interval": 2,
}
SHORT = {
    "00_meta_frozen_lake": {"size": 2, "episodes": 2},
    "01_basic_gym": {"max_episode_steps": 6, "episodes": 2, "seq_model": "feedforward"},
    "04_tmaze": {"corridor": 3, "seq_model": "gru"},
    "05_dark_key_door": {"size": 2, "horizon": 5, "max_episode_steps": 8},
    "06_alchemy": {"max_episode_steps": 3, "episodes": 2},
    "12_half_cheetah_vel": {"episodes": 2, "max_episode_steps": 4, "loss": "amago2"},
    "13_mazerunner_relabeling": {"max_episode_steps": 6},
}
OTHER = {
    "00_meta_frozen_lake": {"slip_chance": 0.1},
    "01_basic_gym": {"n_step": 1},
    "04_tmaze": {"oracle": True},
    "05_dark_key_door": {"randomize_actions": True},
    "06_alchemy": {"num_stones": 2},
    "12_half_cheetah_vel": {"max_velocity": 1.0},
    "13_mazerunner_relabeling": {"relabel": "none"},
}
# Pictures that a run leaves besides the learning curve, whatever else is installed.
PICTURES = {
    "00_meta_frozen_lake": {"adaptation_curve.png", "trial.png"},
    "01_basic_gym": set(),
    "04_tmaze": {"trial.png"},
    "05_dark_key_door": {"adaptation_curve.png", "trial.png"},
    "06_alchemy": {"adaptation_curve.png", "trial.png"},
    "12_half_cheetah_vel": {"adaptation_curve.png"},
    "13_mazerunner_relabeling": {"trial.png"},
}
# Checkpoints hold these: with another entry, folders of earlier runs couldn't be resumed.
TASK = {
    "00_meta_frozen_lake": {
        "size": 3,
        "episodes": 5,
        "hard_mode": False,
        "recover_mode": False,
        "slip_chance": 0.0,
        "show_progress": True,
        "hold_out_layouts": False,
    },
    "01_basic_gym": {
        "env_id": "CartPole-v1",
        "mask_velocities": False,
        "keep": (),
        "episodes": 1,
        "max_episode_steps": None,
        "hide_prev_step": None,
        "noise_steps": 32.0,
        "final_noise": 0.3,
        "timestep_encoder": "auto",
        "context_length": 16,
        "slice_length": 16,
        "round_steps": 25,
        "discounts": (),
        "reward_scale": 1.0,
        "n_step": 10,
    },
    "04_tmaze": {
        "corridor": 50,
        "max_episode_steps": None,
        "ambiguous_position": True,
        "penalty": None,
        "penalize": "dawdling",
        "show_time": False,
        "oracle": False,
    },
    "05_dark_key_door": {
        "size": 5,
        "max_episode_steps": 20,
        "horizon": 100,
        "dark": True,
        "randomize_actions": False,
        "show_progress": True,
    },
    "06_alchemy": {
        "bottleneck": "none",
        "num_stones": 1,
        "max_episode_steps": 6,
        "episodes": 6,
        "colour_actions": True,
        "shaping": True,
        "show_chemistry": False,
        "discounts": (0.5, 0.8, 0.9),
        "reward_scale": 0.2,
    },
    "12_half_cheetah_vel": {
        "episodes": 3,
        "max_episode_steps": 200,
        "min_velocity": 0.0,
        "max_velocity": 3.0,
        "context_length": 64,
        "round_steps": 100,
        "discounts": (0.1, 0.9, 0.95, 0.97, 0.99),
        "reward_scale": 1.0,
        "n_step": 5,
    },
    "13_mazerunner_relabeling": {
        "maze_size": 7,
        "goals": 2,
        "max_episode_steps": 20,
        "randomize_actions": False,
        "relabel": "some",
    },
}


@pytest.fixture(params=NAMES)
def example(request, monkeypatch, tmp_path):
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings where it runs
    module = import_script(EXAMPLES / f"{request.param}.py", monkeypatch)
    module.short = SHORT[request.param]
    module.other = OTHER[request.param]
    module.task = TASK[request.param]
    module.pictures = PICTURES[request.param]
    return module


def test_the_task_is_what_earlier_checkpoints_hold(example):
    assert example.Args().task_fields() == example.task


def test_every_encoder_acts(example):
    for name in SEQ_MODELS:
        args = example.Args(**{**TINY, **example.short, "seq_model": name})
        layouts = ("all",) if hasattr(args, "hold_out_layouts") else ()
        make_env = getattr(example, "make_env", None) or example.Args.make_env
        env = make_env(args, 2, *layouts)
        policy = make_policy(env, context_length=20, **args.policy_options())
        assert env.rollout(5, policy)["action"].shape[0] == 2


@pytest.mark.filterwarnings("ignore:.*constrained_layout")
def test_runs_and_resumes_the_same_task_only(example, tmp_path, capsys):
    args = example.Args(run_dir=tmp_path / "run", **{**TINY, **example.short})
    assert len(example.train(args).greedy) == 3
    printed = capsys.readouterr().out
    assert re.search(r"On 3 held-out trials: greedy .*; sampled \(as trained, without eps", printed)
    written = {"evaluation.npz", "evaluation_sampled.npz", "learning_curve.png"}
    assert written | example.pictures <= {path.name for path in args.run_dir.iterdir()}
    more = {**TINY, **example.short, "total_updates": 4, "resume": True, "run_dir": args.run_dir}
    with pytest.raises(ValueError, match=f"entries: .*{next(iter(example.other))}: "):
        example.train(example.Args(**{**more, **example.other}))
    assert example.train(example.Args(**more)) is not None
