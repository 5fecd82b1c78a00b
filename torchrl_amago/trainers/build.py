"""From an environment and a policy to a trainer: loss, replay, collector and optimiser that fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate

from torchrl_amago import _validation as valid
from torchrl_amago.data import TrialCollector, make_trial_buffer
from torchrl_amago.data.mixture import TrialMixture, online_part
from torchrl_amago.modules import Policy
from torchrl_amago.modules.build import Preset, is_robust
from torchrl_amago.objectives import LOSSES, AMAGOLoss
from torchrl_amago.scaling import Ranks, RayPool, WorkerPool, devices
from torchrl_amago.trainers.amago import AMAGOTrainer
from torchrl_amago.trainers.optim import FiniteOptimizationStepper, make_optimizer, make_schedule


def make_trainer(
    env: EnvBase | Callable[[], EnvBase],
    policy: Policy,
    *,
    trial_length: int,
    total_updates: int,
    run_dir: str | Path,
    round_steps: int | None = None,
    slice_length: int | None = None,
    updates_per_round: int = 20,
    batch_size: int = 32,
    capacity: int = 120_000,
    replay_buffer: ReplayBuffer | TrialMixture | None = None,
    buffer_options: dict[str, Any] | None = None,
    fragment_length: int | None = None,
    workers: int | None = None,
    ray: str | None = None,
    samples_per_insert: float | None = None,
    worker_options: dict[str, Any] | None = None,
    learning_rate: float = 5e-4,
    warmup_updates: int = 500,
    final_lr_fraction: float = 1.0,
    clip_norm: float | None = 1.0,
    clip_each: bool | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str | torch.device | None = None,
    collect_device: str | torch.device | None = None,
    compile: bool = False,
    tau: float = 0.01,
    preset: Preset = "robust",
    loss: str | Callable[..., AMAGOLoss] = "amago",
    critic_options: dict[str, Any] | None = None,
    loss_options: dict[str, Any] | None = None,
    ranks: Ranks = Ranks(),
    **trainer_options: Any,
) -> AMAGOTrainer:
    """Make a trainer and its parts.

    Args:
        env: batched environment with trial and previous-step transforms; with ``workers``, a
            picklable function that makes one.
        trial_length: largest number of steps in a trial.
        round_steps: steps of each environment in a round; default ``trial_length``.
        slice_length: steps of a slice in a batch; default ``trial_length``. All steps of a longer
            trial are equally likely; slices near its ends are shorter.
        batch_size: whole trials, or slices of them, in a batch, of all ranks together.
        capacity: capacity of the replay buffer in steps; the oldest trials leave first.
        replay_buffer: a buffer of your own, such as a mixture with offline data, instead of one
            made with `slice_length`, `batch_size`, `capacity` and `buffer_options`.
        buffer_options: further arguments of :func:`~torchrl_amago.data.make_trial_buffer`.
        fragment_length: see :class:`~torchrl_amago.data.TrialCollector`.
        workers: number of collector processes, each with its own environment; 0 for collectors
            that are started elsewhere (`docs/scaling.md`); None collects in this process.
        ray: make the workers actors of the Ray cluster at this address; ``"local"`` starts one.
        samples_per_insert: with workers, real steps of batches for each step that is written;
            default ``updates_per_round`` updates for the frames of each worker's round.
        worker_options: further arguments of :class:`~torchrl_amago.scaling.WorkerPool` or
            :class:`~torchrl_amago.scaling.RayPool`.
        learning_rate, warmup_updates, final_lr_fraction: of AdamW, see :func:`make_schedule`.
        clip_norm, clip_each, precision: see :class:`FiniteOptimizationStepper`; `clip_each` is
            True by default if the preset is "robust".
        device: of the loss and its batches, to which the policy is moved; default the policy's.
        collect_device: where the collector acts, with a copy of the policy if it is another one.
        compile: compile updates, and on a GPU the policy's steps (docs/scaling.md).
        tau: fraction of the online weights in the targets' soft update, in (0, 1].
        preset: of a loss given by name, see :func:`~torchrl_amago.amago_loss`, and of the clipping:
            "robust" is one set of choices that learns more tasks (`docs/training.md`), "paper" what
            AMAGO publishes. Give it to :func:`~torchrl_amago.make_policy`, too.
        loss: a name of :data:`~torchrl_amago.objectives.LOSSES`, or a function called with
            ``(policy, critic_options=..., **loss_options)``.
        critic_options: arguments of :func:`~torchrl_amago.modules.make_critic`.
        ranks: processes that make each update together, see :class:`~torchrl_amago.scaling.Ranks`.
        trainer_options: further arguments of :class:`AMAGOTrainer`, which documents the others.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> policy = make_policy(env, context_length=18, seq_model_options={"d_model": 16})
        >>> make_trainer(env, policy, trial_length=18, total_updates=4, run_dir="run").train()
        'finished'
    """
    lengths = dict(trial_length=trial_length, round_steps=round_steps, slice_length=slice_length)
    _check_options(replay_buffer is not None, buffer_options, tau, **lengths)
    here = next(policy.parameters()).device if device is None else devices.pick_device(device)
    policy.to(here)
    if compile and here.type == "cuda":
        devices.compile_policy(policy)
    clips = dict(clip_each=is_robust(preset) if clip_each is None else clip_each, compile=compile)
    named = {"preset": preset} if isinstance(loss, str) else {}
    make_loss = partial(valid.pick("loss", loss, LOSSES), policy, **named)
    loss_module = make_loss(critic_options=critic_options, **(loss_options or {}))
    buffer, in_place = replay_buffer, workers is not None and replay_buffer is None
    if buffer is None:
        # Without crop, a long trial's end would be in one of hundreds of windows.
        trim = 64 if compile or here.type != "cpu" else True  # few shapes, many kernels' unit
        options = dict(trim_padding=trim, crop="both", warn_short=False) | (buffer_options or {})
        options = ranks.buffer_options(run_dir, in_place) | options
        sizes = (capacity, slice_length or trial_length, batch_size)
        with ranks.leaders_first():
            buffer = make_trial_buffer(*sizes, **options)
    rounds = {"round_steps": round_steps or trial_length, "fragment_length": fragment_length}
    if workers is None:
        if ray or samples_per_insert:
            raise ValueError("ray and samples_per_insert are for workers: give workers, too.")
        rounds["frames_per_batch"] = env.batch_size.numel() * rounds.pop("round_steps")
        rounds |= devices.collector_devices(env, collect_device or here)
        collector = TrialCollector(env, policy, replay_buffer=online_part(buffer), **rounds)
    else:
        rounds |= dict(total_updates=total_updates, publish_interval=updates_per_round)
        rounds |= dict(samples_per_insert=samples_per_insert, keeps_replay=in_place)
        rounds |= dict(num_learners=ranks.size, settings=trainer_options.get("settings"))
        make_pool = partial(RayPool, address=ray) if ray else WorkerPool
        # The other ranks read what the first one takes in.
        rounds |= dict(num_workers=workers * ranks.is_first, **(worker_options or {}))
        collector = make_pool(env, policy, online_part(buffer), run_dir, **rounds)
    optimizer = make_optimizer(loss_module, learning_rate=learning_rate)
    parts = (collector, loss_module, optimizer, buffer)
    return AMAGOTrainer(
        *parts,
        target_updater=SoftUpdate(loss_module, tau=tau),
        scheduler=make_schedule(optimizer, warmup_updates, total_updates, final_lr_fraction),
        stepper=FiniteOptimizationStepper(clip_norm, precision, **clips),
        exploration=policy.exploration,
        policy=policy,
        total_updates=total_updates,
        updates_per_round=updates_per_round,
        run_dir=run_dir,
        ranks=ranks,
        **trainer_options,
    )


def _check_options(
    has_buffer: bool, buffer_options: object, tau: float, **lengths: int | None
) -> None:
    valid.check_counts(**{name: steps for name, steps in lengths.items() if steps is not None})
    valid.check_positive("0.01 is usual.", tau=tau)
    valid.check_fractions("0.01 is usual.", tau=tau)
    if has_buffer and (lengths["slice_length"] or buffer_options):
        raise ValueError(
            "slice_length and buffer_options are for the buffer that make_trainer makes, got them "
            "beside a replay_buffer. Make that one with them."
        )
