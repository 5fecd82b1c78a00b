"""Settings of training scripts: defaults, flags, help, and where each of them arrives."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import inspect
import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import DEBUG, TrainingArgs, command_line, final_evaluation, resume_if_asked

from torchrl_amago import (
    AMAGOTrainer,
    HeldOutEvaluator,
    MetaFrozenLake,
    make_policy,
    make_trainer,
    make_trial_env,
)
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.scaling import Ranks
from torchrl_amago.trainers.checkpoint import PolicyFiles

EXAMPLES = Path(__file__).parents[2] / "examples"

HELD_OUT = SimpleNamespace(evaluate=None, success_threshold=0.5)
SIZES = {"d_model": 64, "num_layers": 2}
HEADS = {**SIZES, "num_heads": 4}


@dataclass
class Args(TrainingArgs):
    """A maze with AMAGO."""

    corridor: int = 50
    """Steps from the start to the junction."""
    oracle: bool = False
    """Show the goal at every step."""

    run_dir: Path = Path("runs/maze")
    num_layers: int = 2


def test_a_subclass_adds_fields_and_changes_defaults():
    args = Args()
    assert (args.run_dir, args.num_layers, args.batch_size) == (Path("runs/maze"), 2, 32)
    assert TrainingArgs().num_layers == 1
    assert TrainingArgs().task_fields() == {}
    assert Args(corridor=7).task_fields() == {"corridor": 7, "oracle": False}
    settings = Args(corridor=7, seq_model="gru").trainer_options(HELD_OUT)["settings"]
    assert {"corridor": 7, "oracle": False, "seq_model": "gru"}.items() <= settings.items()
    assert Args(batch_size=7).trainer_options(HELD_OUT)["options"]["batch_size"] == 7
    # Runs from before there were presets have no such setting, and can be resumed with the paper's.
    assert settings["preset"] == "robust"
    older = Args(preset="paper").trainer_options(HELD_OUT)["settings"]
    assert settings.keys() - older.keys() == {"preset"}


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        *((name, [0, -2], "at least 1") for name in (
            "num_envs", "eval_trials", "total_updates", "updates_per_round", "batch_size", "capacity",
            "anneal_frames", "eval_interval", "checkpoint_interval", "threads", "d_model",
            "num_layers", "num_heads", "hidden_size")),
        ("num_envs", [math.inf, 2.5], "an integer of at least 1"),
        ("seed", [-1, math.inf], "finite and at least 0"),
        ("warmup_updates", [-1, math.inf], "finite and at least 0"),
        ("learning_rate", [0.0, -1.0, math.inf, math.nan], "positive and finite"),
        ("tau", [0.0, 5.0, -0.1, math.nan], r"in \(0, 1\]"),
    ],
)  # fmt: skip
def test_numbers_are_checked_before_anything_is_built(name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be {rule}, got {value}"):
            Args(**{name: value})


# --- policies ---


@pytest.mark.parametrize(
    ("seq_model", "expected"),
    [
        ("feedforward", SIZES),
        ("gru", {**SIZES, "longest_memory": 9}),
        ("identity", {}),
        ("linear_attention", HEADS),
        ("lstm", {**SIZES, "longest_memory": 9}),
        ("mamba", SIZES),
        ("transformer", HEADS),
    ],
)
def test_sequence_models_get_the_arguments_they_have(seq_model, expected):
    options = Args(seq_model=seq_model).policy_options(longest_memory=9)
    assert (options["seq_model"], options["seq_model_options"]) == (seq_model, expected)


def test_no_sequence_model_is_left_out():
    (mark,) = test_sequence_models_get_the_arguments_they_have.pytestmark
    assert {name for name, _ in mark.args[1]} == set(SEQ_MODELS)


def test_arguments_of_a_sequence_model_win_over_fields():
    assert Args().policy_options(num_heads=2)["seq_model_options"]["num_heads"] == 2


def test_an_argument_that_no_sequence_model_has_is_refused():
    with pytest.raises(ValueError, match=r"\['longest_memry'\] belong to none\. Look them up in"):
        Args().policy_options(longest_memry=9)


# --- trainers ---


def changed(name, value):
    """Another value of the same type."""
    if value is None and name != "resume_from":
        return 2
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2
    if isinstance(value, Path):
        return Path("elsewhere")
    return {"transformer": "gru", "last": "best", (): ("wandb",), None: Path("a")}.get(
        value, "amago2"
    )


# Read by scripts themselves, where they make environments and evaluate, and by command_line.
READ_ELSEWHERE = {
    "num_envs",
    "anneal_frames",
    "eval_trials",
    "final_policy",
    "debug",
    "threads",
    "mode",
    "workers",
    "ray",
    "samples_per_insert",
    "resume",
    "resume_from",
}


OTHERS = {"device": "cpu", "collect_device": "cpu"}


def test_no_field_is_ignored():
    def everything(args):
        options = args.trainer_options(HELD_OUT)
        # Recorded, but not used; a new function each time.
        recorded = ("options", "evaluator")
        return args.policy_options(), {key: options[key] for key in options if key not in recorded}

    ignored = {
        field.name
        for field in dataclasses.fields(Args)
        if everything(
            Args(**{field.name: OTHERS.get(field.name) or changed(field.name, field.default)})
        )
        == everything(Args())
    }
    assert ignored == READ_ELSEWHERE


def test_options_are_arguments_of_what_they_are_for():
    trainer = {*inspect.signature(make_trainer).parameters, *inspect.signature(AMAGOTrainer).parameters}  # fmt: skip
    assert set(Args().trainer_options(HELD_OUT)) <= trainer
    assert set(Args().policy_options()) <= set(inspect.signature(make_policy).parameters)


def test_resume_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--run-dir", "my runs/a"])
    assert shlex.split(Args().resume_command()) == [sys.executable, *sys.argv, "--resume"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    assert shlex.split(Args(resume=True).resume_command()) == [sys.executable, *sys.argv]
    ranks = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    command = shlex.split(Args(resume=True).resume_command())
    assert command == ["torchrun", "--nproc-per-node", "8", "--nnodes", "2", *sys.argv]


# --- the command line ---


@pytest.fixture
def run(monkeypatch):
    """Run a command line; return the settings and the exit code."""
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)

    def run(*command, error=None, **options):
        arrived = []

        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        code = 0
        try:
            with command_line(Args, **options) as args:
                assert threads == [args.threads]
                arrived.append(args)
                if error is not None:
                    raise error
        except SystemExit as leaving:
            code = leaving.code
        threads.clear()
        return (arrived or [None])[0], code

    return run


def test_without_flags_the_defaults_hold(run):
    assert run(debug=dict(corridor=10)) == (Args(), 0)


def test_flags_are_read(run):
    args, _ = run("--corridor", "7", "--seq-model", "gru", "--logger", "tensorboard", "wandb",
                  "--threads", "3", "--oracle", "--resume")  # fmt: skip
    assert args == Args(
        corridor=7,
        seq_model="gru",
        logger=("tensorboard", "wandb"),
        threads=3,
        oracle=True,
        resume=True,
    )


def test_debug_replaces_defaults_and_flags_win(run):
    args, code = run("--debug", "--batch-size", "3", debug=dict(corridor=10, num_envs=2))
    changes = {**DEBUG, "corridor": 10, "num_envs": 2, "batch_size": 3}
    assert args == Args(debug=True, run_dir=Path("runs/maze_debug"), **changes)
    assert code == 0
    args, _ = run("--debug", "--run-dir", "elsewhere", "--corridor", "6", debug=dict(corridor=10))
    assert (args.run_dir, args.corridor) == (Path("elsewhere"), 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tau", "5"], "tau must be in (0, 1], got 5.0."),
        (["--hidden-size", "0"], "hidden_size must be at least 1, got 0."),
        (["--threads", "0"], "threads must be at least 1, got 0."),
        (["--learning-rate", "nan"], "learning_rate must be positive and finite, got nan."),
    ],
)
def test_numbers_out_of_range_are_told_without_a_traceback(run, capsys, flags, message):
    assert run(*flags) == (None, 2)
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_what_else_a_user_can_put_right_is_one_line(run, capsys):
    assert run(error=ValueError("--env-id must be known"))[1] == 2
    assert capsys.readouterr().err == "error: --env-id must be known\n"
    with pytest.raises(KeyError):  # a fault of the program keeps its traceback
        run(error=KeyError("x"))


def test_help_explains_inherited_added_and_changed_fields(run, capsys):
    assert run("--help") == (None, 0)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "A maze with AMAGO." in shown
    for explained in (
        "--corridor INT Steps from the start to the junction. (default: 50)",
        "--num-layers INT Layers of the sequence model. (default: 2)",
        "--run-dir PATH Folder for everything this run writes. (default: runs/maze)",
        "Heads of a sequence model that has attention. (default: 4)",
    ):
        assert explained in shown


def test_every_field_is_explained():
    from docstring_parser import parse_from_object

    explained = {param.arg_name for param in parse_from_object(TrainingArgs).params}
    assert explained == {field.name for field in dataclasses.fields(TrainingArgs)}


def test_an_unknown_sequence_model_is_refused(run, capsys):
    assert run("--seq-model", "elman")[1] == 2
    assert "elman" in capsys.readouterr().err


# --- training and evaluating ---

SMALL = {"seq_model": "gru", "seq_model_options": {"d_model": 8}}


class FakeTrainer:
    """Record of how it was called."""

    def __init__(self, policy_files=None, latest=None, ranks=None):
        self.policy_files, self.calls, self.ranks = policy_files, [], ranks or Ranks()
        self.checkpoints = SimpleNamespace(latest=lambda: latest)

    def resume(self, path=None, missing_ok=False):
        self.calls.append((path, missing_ok))


@pytest.mark.parametrize(("outcome", "code"), [("interrupted", 130), ("preempted", 75)])
def test_a_stopped_run_leaves_with_its_exit_code(tmp_path, capsys, outcome, code):
    with pytest.raises(SystemExit) as leaving:
        final_evaluation(TrainingArgs(run_dir=tmp_path), outcome, FakeTrainer(), None)
    assert leaving.value.code == code
    assert "To go on: " in capsys.readouterr().out


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("preempted", 75)])
def test_ranks_but_the_first_leave_in_silence(tmp_path, capsys, outcome, code):
    trainer = FakeTrainer(ranks=Ranks(1, 2))
    with pytest.raises(SystemExit) as leaving:
        final_evaluation(TrainingArgs(run_dir=tmp_path), outcome, trainer, None)
    assert leaving.value.code == code
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "latest", "expected"),
    [
        ({}, None, []),
        ({"resume": True}, None, [(None, True)]),
        ({"resume_from": Path("a")}, "own", [(Path("a"), False)]),
        # The command of a batch job that is started again and again.
        ({"resume": True, "resume_from": Path("a")}, None, [(Path("a"), False)]),
        ({"resume": True, "resume_from": Path("a")}, "own", [(None, True)]),
    ],
)
def test_where_a_run_goes_on(tmp_path, flags, latest, expected):
    trainer = FakeTrainer(latest=latest)
    resume_if_asked(TrainingArgs(run_dir=tmp_path, **flags), trainer)
    assert trainer.calls == expected


@pytest.mark.parametrize(("final_policy", "seed"), [("last", 5), ("best", 7)])
def test_a_script_s_last_evaluation_is_the_chosen_policy_s(tmp_path, final_policy, seed):
    """Of the best one on other trials than those that it was chosen by."""
    env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
    policy = make_policy(env, context_length=18, **SMALL)
    files, best = PolicyFiles(tmp_path, policy), copy.deepcopy(policy.state_dict())
    files.save_if_best({"eval/trial_return": 1.0})
    for p in policy.parameters():
        p.data.normal_()
    expected = {"last": copy.deepcopy(policy.state_dict()), "best": best}[final_policy]

    trainer = FakeTrainer(files)
    args = TrainingArgs(run_dir=tmp_path, eval_trials=8, final_policy=final_policy)
    results = final_evaluation(args, "finished", trainer, HeldOutEvaluator(policy, env, seed=5))

    assert all(
        torch.equal(x, expected[name])
        for name, x in policy.state_dict().items()
        if isinstance(x, torch.Tensor)
    )
    again = HeldOutEvaluator(policy, env, seed=seed).evaluate(8)
    assert torch.equal(results.greedy.trial_return, again.trial_return)


# --- memory ---

# How many blocks are mapped for one of 24 MB, and how many bytes stay once it is freed.
SCRIPT = """
import ctypes, torch
from allocator import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info

changed = keep_freed_memory()
before = mallinfo()
block = torch.ones(6_000_000)
mapped = mallinfo().hblks - before.hblks
del block
print(changed, mapped, mallinfo().fordblks - before.fordblks)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only glibc can be told, and asked since 2.33",
)
def test_blocks_stay_with_the_process_once_memory_is_kept():
    # Otherwise the block is mapped, and nothing of it stays.
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    changed, mapped, stays = out.stdout.split()
    assert (changed, mapped) == ("True", "0")
    assert int(stays) > 20_000_000
