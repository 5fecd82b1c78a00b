"""Settings of training scripts: defaults, flags, help, and where each of them arrives."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchrl_amago.modules import SEQ_MODELS, make_policy
from torchrl_amago.trainers import AMAGOTrainer, TrainingArgs, make_trainer, run_command_line
from torchrl_amago.trainers.command_line import DEBUG

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
    assert Args(corridor=7).trainer_options()["task"] == {"corridor": 7, "oracle": False}


@pytest.mark.parametrize("name", ["num_envs", "eval_trials"])
@pytest.mark.parametrize("value", [0, -2])
def test_counts_of_the_script_are_checked_before_anything_is_built(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
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


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2
    return {"transformer": "gru", "last": "best", (): ("wandb",)}.get(value, Path("elsewhere"))


# Read by scripts themselves, where they make environments and evaluate, and by run_command_line.
READ_ELSEWHERE = {
    "num_envs",
    "anneal_frames",
    "eval_trials",
    "final_policy",
    "debug",
    "threads",
}


def test_no_field_is_ignored():
    def everything(args):
        return args.policy_options(), args.trainer_options()

    ignored = {
        field.name
        for field in dataclasses.fields(Args)
        if everything(Args(**{field.name: changed(field.default)})) == everything(Args())
    }
    assert ignored == READ_ELSEWHERE


def test_options_are_arguments_of_what_they_are_for():
    trainer = {*inspect.signature(make_trainer).parameters, *inspect.signature(AMAGOTrainer).parameters}  # fmt: skip
    assert set(Args().trainer_options()) <= trainer
    assert set(Args().policy_options()) <= set(inspect.signature(make_policy).parameters)


def test_resume_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--run-dir", "my runs/a"])
    assert shlex.split(Args().resume_command()) == [sys.executable, *sys.argv, "--resume"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    assert shlex.split(Args(resume=True).resume_command()) == [sys.executable, *sys.argv]


# --- the command line ---


@pytest.fixture
def run(monkeypatch):
    """Give a command line; get what arrived in `train`, and the exit code."""
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)

    def run(*command, results="results", **options):
        arrived = []

        def train(args):
            assert threads == [args.threads]
            arrived.append(args)
            return results

        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        with pytest.raises(SystemExit) as leaving:
            run_command_line(Args, train, **options)
        threads.clear()
        return (arrived or [None])[0], leaving.value.code

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


def test_an_interrupted_run_leaves_with_130(run):
    assert run(results=None)[1] == 130


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
