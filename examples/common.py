"""Settings that every example has, its command line, and training with the evaluation at its end."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import math
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torchrl import logger as torchrl_logger

from torchrl_amago import AMAGOTrainer, HeldOutEvaluator, load_policy
from torchrl_amago._files import DamagedError
from torchrl_amago.evaluation import EvaluationResults
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.objectives import LOSSES
from torchrl_amago.trainers import Intervals

# As shells and batch systems expect them: 75 asks for another try (EX_TEMPFAIL).
EXIT_CODES = {"interrupted": 130, "preempted": 75}

# What --debug changes in every script: networks and a run that are over in seconds.
DEBUG = dict(
    total_updates=40,
    updates_per_round=10,
    num_envs=16,
    batch_size=8,
    d_model=32,
    hidden_size=32,
    num_layers=1,
    eval_interval=20,
    eval_trials=64,
    checkpoint_interval=20,
)


@dataclass
class TrainingArgs:
    """Settings of a run, without its task.

    A script subclasses it: fields that it adds are those of its task, and a field without a
    docstring that it repeats gets another default. The docstrings are what `--help` shows.

    Raises:
        ValueError: for numbers outside of their range.

    Example:
        >>> @dataclass
        ... class Args(TrainingArgs):
        ...     corridor: int = 50
        ...     num_layers: int = 2
        >>> args = Args(seq_model="gru")
        >>> args.task_fields()
        {'corridor': 50}
        >>> args.policy_options()["seq_model_options"]
        {'d_model': 64, 'num_layers': 2}
    """

    run_dir: Path = Path("runs/run")
    """Folder for everything this run writes."""
    resume: bool = False
    """Go on from the newest checkpoint in run_dir; start anew if there is none."""
    resume_from: Path | None = None
    """Checkpoint, or folder of a run, to go on from. With --resume, only if run_dir has no checkpoint."""
    debug: bool = False
    """A short run with a small network, to see that everything works (under a minute)."""
    seed: int = 1
    """Seed of everything: networks, tasks, exploration, batches."""

    seq_model: Literal[tuple(SEQ_MODELS)] = "transformer"
    """What remembers: the trajectory encoder."""
    d_model: int = 64
    """Width of the sequence model."""
    num_layers: int = 1
    """Layers of the sequence model."""
    num_heads: int = 4
    """Heads of a sequence model that has attention."""
    hidden_size: int = 64
    """Width of the timestep encoder's, actor's and critics' hidden layers."""

    loss: Literal[tuple(LOSSES)] = "amago"
    """What is trained on: AMAGO's regression and policy gradient, or AMAGO-2's classification and
    filtered imitation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes networks and loss in bfloat16; quick on CPUs with AMX and on GPUs."""

    num_envs: int = 64
    """Environments that are stepped at the same time."""
    total_updates: int = 3000
    """Optimiser steps in all."""
    updates_per_round: int = 20
    """Optimiser steps after each round, in which every environment makes as many steps as a trial has."""
    batch_size: int = 32
    """Trials in a batch."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW; it falls to a tenth by the end."""
    warmup_updates: int = 100
    """Updates over which the learning rate rises."""
    tau: float = 0.01
    """Fraction of the online weights in the targets' soft update."""
    anneal_frames: int = 100_000
    """Environment steps over which exploration fades."""
    capacity: int = 120_000
    """Capacity of the replay buffer in steps; the oldest trials leave first."""

    eval_interval: int = 250
    """Updates between evaluations on held-out seeds, greedy, without exploration."""
    eval_trials: int = 512
    """Trials in the last evaluation; a quarter of it in those before."""
    final_policy: Literal["last", "best"] = "last"
    """Whose trials the last evaluation plays: the policy as training left it, or that of the best evaluation
    before (by mean return), on trials of another seed than it was chosen by."""
    checkpoint_interval: int = 500
    """Updates between checkpoints."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers besides progress.csv."""
    threads: int = 2
    """CPU threads."""

    def __post_init__(self) -> None:
        ranges = {
            "num_envs eval_trials total_updates updates_per_round batch_size capacity anneal_frames "
            "eval_interval checkpoint_interval threads d_model num_layers num_heads hidden_size": (
                "at least 1",
                lambda value: value >= 1,
            ),
            "warmup_updates seed": ("at least 0", lambda value: value >= 0),
            "learning_rate": ("positive and finite", lambda value: 0 < value < math.inf),
            "tau": ("in (0, 1]", lambda value: 0 < value <= 1),
        }
        for names, (rule, holds) in ranges.items():
            for name in names.split():
                value = getattr(self, name)
                if not holds(value):
                    raise ValueError(f"{name} must be {rule}, got {value}.")

    def policy_options(self, **seq_model_options: Any) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_amago.modules.make_policy`: sizes and sequence model.

        Args:
            seq_model_options: further arguments of the sequence model. Each is left out where the
                chosen one has no such argument, as are width, layers and heads.

        Raises:
            ValueError: for an argument that no sequence model has.
        """
        sizes = dict(d_model=self.d_model, num_layers=self.num_layers, num_heads=self.num_heads)
        unknown = set(seq_model_options).difference(*map(_argument_names, SEQ_MODELS.values()))
        if unknown:
            raise ValueError(
                f"seq_model_options must be arguments of a sequence model, and {sorted(unknown)} "
                "belong to none. Look them up in the encoders' docstrings."
            )
        known = _argument_names(SEQ_MODELS[self.seq_model])
        options = {**sizes, **seq_model_options}
        return dict(
            seq_model=self.seq_model,
            seq_model_options={name: value for name, value in options.items() if name in known},
            timestep_options=dict(hidden_size=self.hidden_size, output_size=self.d_model),
            actor_options=dict(hidden_size=self.hidden_size),
        )

    def trainer_options(self, **critic_options: Any) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_amago.trainers.make_trainer`, all that don't need the task.

        Args:
            critic_options: further arguments of :func:`~torchrl_amago.modules.make_critic`.
        """
        return dict(
            total_updates=self.total_updates,
            run_dir=self.run_dir,
            updates_per_round=self.updates_per_round,
            batch_size=self.batch_size,
            capacity=self.capacity,
            learning_rate=self.learning_rate,
            tau=self.tau,
            loss=self.loss,
            precision=self.precision,
            critic_options=dict(hidden_size=self.hidden_size, **critic_options),
            warmup_updates=self.warmup_updates,
            final_lr_fraction=0.1,
            intervals=Intervals(evaluate=self.eval_interval, checkpoint=self.checkpoint_interval),
            loggers=self.logger,
            seed=self.seed,
            **self._record(),
        )

    def _record(self) -> dict[str, dict[str, Any]]:
        """Every field that shapes the run: a checkpoint can't be resumed with other `settings`."""
        fixed = ("seq_model", "d_model", "num_layers", "num_heads", "hidden_size", "loss")
        apart = ("run_dir", "resume", "resume_from", "debug", "seed", "logger", *fixed)
        common = [field.name for field in dataclasses.fields(TrainingArgs)]
        return {
            "settings": {**{name: getattr(self, name) for name in fixed}, **self.task_fields()},
            "options": {name: getattr(self, name) for name in common if name not in apart},
        }

    def task_fields(self) -> dict[str, Any]:
        """The fields that a subclass added."""
        common = {field.name for field in dataclasses.fields(TrainingArgs)}
        names = [field.name for field in dataclasses.fields(self) if field.name not in common]
        return {name: getattr(self, name) for name in names}

    def resume_command(self) -> str:
        """The shell command that goes on with this run."""
        return shlex.join([sys.executable, *sys.argv] + ["--resume"] * (not self.resume))


def run_command_line(
    args_class: type[TrainingArgs],
    train: Callable[[Any], Any],
    debug: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Read the command line, train, and leave with the exit code.

    That is 0 after a whole run, 130 after Ctrl-C, 75 after a signal of a batch system, and 2 with one
    line for what a user can put right (`RL_LOGGING_LEVEL=DEBUG` shows where it was raised). With
    `--debug` other defaults hold, those of :data:`DEBUG`, and results land in a folder of their own;
    flags that are given win over both.

    Args:
        args_class: what the command line is read into; its docstring is the help's first line.
        train: called with it.
        debug: further defaults under `--debug`.
    """
    import tyro  # here, since processes of several runs import this file

    defaults = args_class()
    if "--debug" in sys.argv[1:]:
        changes = dict(debug=True, run_dir=Path(f"{defaults.run_dir}_debug"))
        defaults = dataclasses.replace(defaults, **{**changes, **DEBUG, **(debug or {})})
    try:
        args = tyro.cli(args_class, default=defaults)
        torch.set_num_threads(args.threads)
        keep_freed_memory()
        train(args)
    except (ValueError, OSError, DamagedError) as error:
        torchrl_logger.debug("raised here", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def train_and_evaluate(
    args: TrainingArgs, trainer: AMAGOTrainer, held_out: HeldOutEvaluator
) -> EvaluationResults:
    """Train, from a checkpoint where the flags ask for it; then play and keep the held-out trials.

    Args:
        args: says whether to resume, where results go and how many trials to play.
        trainer: of this run.
        held_out: the trials, and whose they are.

    Raises:
        SystemExit: if a signal ended the training.
    """
    has_checkpoint = trainer.checkpoints.latest() is not None
    if args.resume_from is not None and not (args.resume and has_checkpoint):
        trainer.resume(args.resume_from)
    elif args.resume:
        trainer.resume(missing_ok=True)
    outcome = trainer.train()
    if outcome != "finished":
        print(f"To go on: {args.resume_command()}")
        sys.exit(EXIT_CODES[outcome])
    if args.final_policy == "best":
        load_policy(trainer.policy_files.best, held_out.policy)
        # A choice among noisy figures favours the lucky ones: other trials tell how good it is.
        held_out.seed += 2
    results = held_out.evaluate_greedy_and_sampled(args.eval_trials)
    results.save(args.run_dir)
    return results


def _argument_names(encoder: Callable[..., Any]) -> set[str]:
    # Of __init__: the signature of a tensordict module's class shows __new__, which takes anything.
    return set(inspect.signature(encoder.__init__).parameters)


# Numbers of glibc's malloc.h; the threshold is the largest that it takes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_THRESHOLD, _LARGEST_INT = 32 * 2**20, 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for this process, for the rest of its life.

    By default glibc gives large blocks back to the system as soon as they are freed; each update then
    touches hundreds of megabytes of fresh pages, which costs a tenth of its time. The process
    keeps its largest size instead. For scripts: a library shouldn't decide this for its users.

    Returns:
        Whether anything changed: False where the C library isn't glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = (
        (_MMAP_THRESHOLD, _LARGEST_THRESHOLD),
        (_TRIM_THRESHOLD, _LARGEST_INT),
        (_TOP_PAD, 64 * 2**20),
    )
    accepted = [mallopt(option, value) for option, value in wanted]
    return all(accepted)
