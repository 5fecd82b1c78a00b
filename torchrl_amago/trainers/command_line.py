"""The command line of a training script: the settings that every task has, and what becomes of them."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from torchrl_amago.choice import check_counts
from torchrl_amago.evaluation import BothResults, HeldOut
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.objectives import LOSSES
from torchrl_amago.trainers.allocator import keep_freed_memory
from torchrl_amago.trainers.amago import AMAGOTrainer
from torchrl_amago.trainers.policy_files import load_policy

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
        ValueError: for `num_envs` or `eval_trials` smaller than 1.

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
    """Go on from the newest checkpoint in run_dir."""
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
    """Share of the online weights that the targets take over at each update."""
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
        # What the trainer doesn't see; it checks the others.
        check_counts("Give a larger number.", num_envs=self.num_envs, eval_trials=self.eval_trials)

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
            final_lr_share=0.1,
            eval_interval=self.eval_interval,
            checkpoint_interval=self.checkpoint_interval,
            loggers=self.logger,
            seed=self.seed,
            task=self.task_fields(),
            resume_command=self.resume_command(),
        )

    def task_fields(self) -> dict[str, Any]:
        """The fields that a subclass added: a checkpoint of other values can't be resumed."""
        common = {field.name for field in dataclasses.fields(TrainingArgs)}
        names = [field.name for field in dataclasses.fields(self) if field.name not in common]
        return {name: getattr(self, name) for name in names}

    def resume_command(self) -> str:
        """The shell command that goes on with this run."""
        return shlex.join([sys.executable, *sys.argv] + ["--resume"] * (not self.resume))


def run_command_line(
    args_class: type[TrainingArgs],
    train: Callable[[Any], BothResults | None],
    debug: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Read the command line, train, and leave with the exit code: 0 finished, 130 interrupted.

    With `--debug` other defaults hold, those of :data:`DEBUG`, and results land in a folder of
    their own; flags that are given win over both.

    Args:
        args_class: what the command line is read into; its docstring is the help's first line.
        train: called with it; returns what :func:`train_and_evaluate` does.
        debug: further defaults under `--debug`.
    """
    import tyro  # here, so that importing the package stays quick

    defaults = args_class()
    if "--debug" in sys.argv[1:]:
        changes = dict(debug=True, run_dir=Path(f"{defaults.run_dir}_debug"))
        defaults = dataclasses.replace(defaults, **{**changes, **DEBUG, **(debug or {})})
    args = tyro.cli(args_class, default=defaults)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    sys.exit(130 if train(args) is None else 0)


def train_and_evaluate(
    args: TrainingArgs, trainer: AMAGOTrainer, held_out: HeldOut
) -> BothResults | None:
    """Train, from the newest checkpoint with `--resume`; then play the held-out trials and keep the results.

    Args:
        args: says whether to resume, where results go and how many trials to play.
        trainer: of this run.
        held_out: the trials, and whose they are.

    Returns:
        The results; None if training was interrupted.
    """
    if args.resume:
        trainer.resume()
    if trainer.train() == "interrupted":
        return None
    if args.final_policy == "best":
        load_policy(trainer.policy_files.best, held_out.policy)
        # A choice among noisy figures favours the lucky ones: other trials tell how good it is.
        held_out.seed += 2
    results = held_out.evaluate_both(args.eval_trials)
    results.save(args.run_dir)
    return results


def _argument_names(encoder: Callable[..., Any]) -> set[str]:
    # Of __init__: the signature of a tensordict module's class shows __new__, which takes anything.
    return set(inspect.signature(encoder.__init__).parameters)
