"""Code that the training examples share: settings, command line, evaluation, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from allocator import keep_freed_memory
from torchrl import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_amago import AMAGOTrainer, HeldOutEvaluator, Policy, load_policy, make_trainer
from torchrl_amago._files import DamagedError
from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.evaluation import EvaluationResults
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.modules.build import Preset
from torchrl_amago.objectives import LOSSES
from torchrl_amago.plots import plot_learning_curve, plot_trial_strip
from torchrl_amago.scaling import EXIT_CODES, Ranks, collect, evaluate_run, pick_device
from torchrl_amago.trainers import Intervals

# Changes that --debug makes in every script: networks and a run of seconds.
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
    """Checkpoint, or folder of a run, to go on from; --resume prefers one in run_dir."""
    debug: bool = False
    """A short run with a small network, to see that everything works (under a minute)."""
    seed: int = 1
    """Seed of everything: networks, tasks, exploration, batches."""

    seq_model: Literal[tuple(SEQ_MODELS)] = "transformer"
    """Trajectory encoder, the policy's memory."""
    d_model: int = 64
    """Width of the sequence model."""
    num_layers: int = 1
    """Layers of the sequence model."""
    num_heads: int = 4
    """Heads of a sequence model that has attention."""
    hidden_size: int = 64
    """Width of the timestep encoder's, actor's and critics' hidden layers."""
    preset: Literal[get_args(Preset)] = "robust"
    """Choices that learn more tasks, or those that AMAGO publishes; see docs/training.md."""

    loss: Literal[tuple(LOSSES)] = "amago"
    """AMAGO's regression and policy gradient, or AMAGO-2's classification and filtered
    imitation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes networks and loss in bfloat16; quick on CPUs with AMX and on GPUs."""
    device: str = "auto"
    """Device of networks and batches: cpu, cuda, cuda:1, mps, or auto, a CUDA GPU if there is
    one."""
    collect_device: str | None = None
    """Device that acts, and steps tasks of this package; default that of the networks."""
    compile: bool = False
    """Compile updates, and on a GPU steps; the first ones take minutes."""

    num_envs: int = 64
    """Environments that are stepped at the same time."""
    total_updates: int = 3000
    """Optimiser steps in all."""
    updates_per_round: int = 20
    """Optimiser steps after each round, the collection of one trial's steps per environment."""
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
    final_policy: Literal["last", "best"] = "best"
    """Policy of the last evaluation: the last one, or that of the best evaluation before (by mean
    return), which then plays trials of another seed."""
    checkpoint_interval: int = 500
    """Updates between checkpoints."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers besides progress.csv."""
    threads: int = 2
    """CPU threads."""

    mode: Literal["both", "learn", "collect", "evaluate"] = "both"
    """Role of this process on run_dir, which processes on other machines may share: learn waits for
    trials of collectors, collect plays for a learner, evaluate plays each new policy."""
    workers: int | None = None
    """Collector processes beside the learner; default none, the learner collects by itself."""
    ray: str | None = None
    """With workers: make them actors of the Ray cluster at this address; local starts one."""
    samples_per_insert: float | None = None
    """With workers: steps of batches for each new step; default updates_per_round updates a
    round."""

    def __post_init__(self) -> None:
        counts = (
            "episodes max_episode_steps context_length round_steps slice_length n_step frame_skip "
            "num_envs eval_trials total_updates updates_per_round batch_size capacity "
            "anneal_frames eval_interval checkpoint_interval threads d_model num_layers "
            "num_heads hidden_size workers"
        )
        given = {name: getattr(self, name, None) for name in counts.split()}
        check_counts(**{name: value for name, value in given.items() if value is not None})
        if self.workers is not None:
            check_choice("mode", self.mode, ("both",), "Workers belong to the learner.")
        ranges = {
            "warmup_updates": ("finite and at least 0", 0 <= self.warmup_updates < math.inf),
            "seed": ("finite and at least 0", 0 <= self.seed < math.inf),
            "learning_rate": ("positive and finite", 0 < self.learning_rate < math.inf),
            "tau": ("in (0, 1]", 0 < self.tau <= 1),
        }
        for name, (rule, holds) in ranges.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}.")

    @property
    def task_device(self) -> torch.device | None:
        """Device of this package's own tasks; None is the CPU."""
        device = pick_device(self.collect_device or self.device)
        return None if device.type == "cpu" else device

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
            preset=self.preset,
            device=pick_device(self.device),
        )

    def trainer_options(self, held_out: HeldOutEvaluator, **critic_options: Any) -> dict[str, Any]:
        """Return the arguments of `make_trainer` that don't depend on the task.

        Args:
            held_out: evaluator, which plays a quarter of `eval_trials` during training.
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
            preset=self.preset,
            precision=self.precision,
            device=self.device,
            collect_device=self.collect_device,
            compile=self.compile,
            critic_options=dict(hidden_size=self.hidden_size, **critic_options),
            warmup_updates=self.warmup_updates,
            final_lr_fraction=0.1,
            intervals=Intervals(evaluate=self.eval_interval, checkpoint=self.checkpoint_interval),
            evaluator=lambda: held_out.evaluate(self.eval_trials // 4),
            success_threshold=held_out.success_threshold,
            loggers=self.logger,
            seed=self.seed,
            ranks=Ranks.from_environment(),
            **self._record(),
        )

    def _record(self) -> dict[str, dict[str, Any]]:
        """Every field that shapes the run: a checkpoint can't be resumed with other `settings`."""
        fixed = ("seq_model", "d_model", "num_layers", "num_heads", "hidden_size", "loss")
        own = ("run_dir", "resume", "resume_from", "debug", "seed", "logger", "mode", "ray")
        if self.preset == "paper":  # as in runs from before there was a choice
            own += ("preset",)
        else:
            fixed += ("preset",)
        common = [field.name for field in dataclasses.fields(TrainingArgs)]
        return {
            "settings": {x: getattr(self, x) for x in fixed} | self.task_fields(),
            "options": {x: getattr(self, x) for x in common if x not in own + fixed},
        }

    def task_fields(self) -> dict[str, Any]:
        """The fields that a subclass added."""
        common = {field.name for field in dataclasses.fields(TrainingArgs)}
        names = [field.name for field in dataclasses.fields(self) if field.name not in common]
        return {name: getattr(self, name) for name in names}

    def resume_command(self) -> str:
        """The shell command that goes on with this run."""
        launcher = [sys.executable]
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun doesn't hand on its other flags
            launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
            if (machines := os.environ["GROUP_WORLD_SIZE"]) != "1":
                launcher += ["--nnodes", machines]
        return shlex.join([*launcher, *sys.argv] + ["--resume"] * (not self.resume))


@contextlib.contextmanager
def command_line(
    args_class: type[TrainingArgs], debug: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Yield the settings of the command line; turn a user's error into one line and exit code 2.

    With `--debug`, :data:`DEBUG` replaces the defaults and results go to a folder of their own;
    flags on the command line win over both. `RL_LOGGING_LEVEL=DEBUG` shows where an error was
    raised.

    Args:
        args_class: dataclass to fill; its docstring is the first line of the help.
        debug: further defaults under `--debug`.
    """
    import tyro  # here, since the processes of several runs import this file

    defaults = args_class()
    if "--debug" in sys.argv[1:]:
        changes = dict(debug=True, run_dir=Path(f"{defaults.run_dir}_debug"))
        defaults = dataclasses.replace(defaults, **{**changes, **DEBUG, **(debug or {})})
    try:
        args = tyro.cli(args_class, default=defaults)
        Ranks.from_environment()  # before anything is on a GPU: each rank has its own
        torch.set_num_threads(args.threads)
        keep_freed_memory()
        yield args
    except (ImportError, ValueError, OSError, DamagedError, gym.error.Error) as error:
        torchrl_logger.debug("raised here", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(
    args: TrainingArgs,
    make_env: Callable[[], EnvBase],
    env: EnvBase,
    policy: Policy,
    held_out: HeldOutEvaluator,
    *measures: str,
    critic_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> EvaluationResults:
    """Do this process's part of a run: train and return the last evaluation, or collect, or
    evaluate until the learner has finished.

    Args:
        args: settings; `args.mode` is the part.
        make_env: made `env`; workers make theirs with it. It must be picklable.
        env: environment of this process, if it collects.
        policy: policy to train.
        held_out: evaluator of this policy.
        measures: entries of the summary to print; all by default.
        critic_options: further arguments of :func:`~torchrl_amago.modules.make_critic`.
        options: further arguments of :func:`~torchrl_amago.make_trainer`.

    Raises:
        SystemExit: with the code of :data:`EXIT_CODES`, at the end of another role than a learner's
            and after a signal.
    """
    common = args.trainer_options(held_out, **(critic_options or {}))
    if args.mode in ("collect", "evaluate"):
        shared = {"run_dir": args.run_dir, "settings": common["settings"]}
        if args.mode == "evaluate":
            sys.exit(EXIT_CODES[evaluate_run(policy, common["evaluator"], **shared)])
        steps = options.get("round_steps") or options["trial_length"]
        cut = {"fragment_length": options.get("fragment_length")}
        sys.exit(EXIT_CODES[collect(make_env, policy, round_steps=steps, **cut, **shared)])
    workers = 0 if args.mode == "learn" else args.workers
    source = env if workers is None else make_env
    remote = {"workers": workers, "samples_per_insert": args.samples_per_insert, "ray": args.ray}
    trainer = make_trainer(source, policy, **remote, **options, **common)
    resume_if_asked(args, trainer)
    return final_evaluation(args, trainer.train(), trainer, held_out, *measures)


def resume_if_asked(args: TrainingArgs, trainer: AMAGOTrainer) -> None:
    """Load the checkpoint that `--resume` and `--resume-from` ask for."""
    has_checkpoint = trainer.checkpoints.latest() is not None
    if args.resume_from is not None and not (args.resume and has_checkpoint):
        trainer.resume(args.resume_from)
    elif args.resume:
        trainer.resume(missing_ok=True)


def final_evaluation(
    args: TrainingArgs,
    outcome: str,
    trainer: AMAGOTrainer,
    held_out: HeldOutEvaluator,
    *measures: str,
) -> EvaluationResults:
    """Play and save the held-out trials of a finished run, and print their summary.

    Args:
        args: number of trials, policy to play, and folder for the results.
        outcome: return value of `trainer.train()`.
        trainer: of this run.
        held_out: evaluator of this run's policy.
        measures: entries of the summary to print; all by default.

    Raises:
        SystemExit: if a signal ended the training; with the code of :data:`EXIT_CODES`. Of several
            ranks, on all but the first.
    """
    if not trainer.ranks.is_first:
        sys.exit(EXIT_CODES.get(outcome, 0))
    if outcome != "finished":
        print(f"To go on: {args.resume_command()}")
        sys.exit(EXIT_CODES[outcome])
    if args.final_policy == "best":
        load_policy(trainer.policy_files.best, held_out.policy)
        # The best of several noisy figures is too good: other trials give an unbiased one.
        held_out.seed += 2
    results = held_out.evaluate_greedy_and_sampled(args.eval_trials)
    results.save(args.run_dir)
    print(results.describe(*measures))
    return results


def both(measure: str) -> dict[str, str]:
    """Return the columns and labels of a panel that shows a measure in training and evaluation."""
    return {f"train/{measure}": "training", f"eval/{measure}": "evaluation"}


def draw_progress(args: TrainingArgs, title: str, panels: Mapping | None = None, **options) -> None:
    """Draw `learning_curve.png` from `progress.csv`; by default the return per trial."""
    plot_learning_curve(
        args.run_dir / "progress.csv",
        args.run_dir / "learning_curve.png",
        panels=panels or {"return per trial": both("trial_return")},
        title=title,
        **options,
    )


def draw_steps(args: TrainingArgs, episode: Sequence[np.ndarray], num_steps: int = 8) -> None:
    """Draw `trial.png`, one row of evenly spaced steps of an episode, its last two included."""
    even = np.linspace(0, len(episode) - 2, num_steps - 1, dtype=int)
    steps = np.unique([*even, len(episode) - 1])
    plot_trial_strip(
        [[episode[step] for step in steps]],
        args.run_dir / "trial.png",
        headings=[f"step {step}" for step in steps],
        titles=["trial"],
        picture_inches=1.3,
    )


@contextlib.contextmanager
def drawing(name: str) -> Iterator[None]:
    """Print why there is no `trial.png` if the environment of this name can't be drawn."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the results are there
        remedy = " Without a screen: MUJOCO_GL=egl." if "OpenGL" in str(error) else ""
        print(f"No trial.png, since {name} can't be drawn here: {error}{remedy}")


def _argument_names(encoder: type) -> set[str]:
    # Of __init__: the signature of a tensordict module's class shows __new__, which takes anything.
    signatures = [inspect.signature(base.__init__) for base in encoder.__mro__[:-1]]
    return {name for signature in signatures for name in signature.parameters}
