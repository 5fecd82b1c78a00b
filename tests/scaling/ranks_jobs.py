"""Jobs of two processes that are ranks: each returns what its rank saw, for the tests to compare."""

from __future__ import annotations

import os
import shutil
import signal
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from torch import distributed
from torchrl.objectives import SoftUpdate

import torchrl_amago.modules.distributions._noise as noise
import torchrl_amago.objectives.amago as objective
from torchrl_amago import (
    MetaFrozenLake,
    amago2_loss,
    amago_loss,
    make_optimizer,
    make_policy,
    make_trial_buffer,
    make_trial_env,
)
from torchrl_amago import make_trainer as build_trainer
from torchrl_amago.modules import RunningScale
from torchrl_amago.scaling import Ranks
from torchrl_amago.trainers import FiniteOptimizationStepper, Intervals, NonFiniteError

NUM_ROWS, FIRST_ROWS = 6, 2
NUM_UPDATES = {"amago": 20, "amago2": 20, "hooks": 5, "sum": 5, "normalized states": 5}
NUM_UPDATES |= {"relative bins": 5}
DISCOUNTS = (0.9, 0.99)


def small_policy(rows: int = 4, seed: int = 0, **encoder):
    torch.manual_seed(seed)
    env = make_trial_env(MetaFrozenLake(3, batch_size=(rows,)), episodes=2)
    sizes = dict(d_model=16, num_layers=1, num_heads=2, dropout_ff=0.0, dropout_emb=0.0, **encoder)
    options = dict(discounts=DISCOUNTS, timestep_options=dict(hidden_size=16, output_size=16))
    return env, make_policy(env, context_length=18, seq_model_options=sizes, **options)


def unequal_batches() -> list[TensorDict]:
    """Batches of 6 slices; the first two, the first rank's, are a third as long as the others."""
    env, policy = small_policy(NUM_ROWS, seed=5)
    env.set_seed(5)
    batches, length = [], torch.tensor([3, 5, 18, 11, 16, 9]).unsqueeze(-1)
    with torch.no_grad():
        for _ in range(4):
            batch = env.rollout(18, policy, break_when_any_done=False)
            batch.set(("collector", "mask"), torch.arange(18) < length)
            batch.set("priority_weight", torch.rand(NUM_ROWS, 1).expand(NUM_ROWS, 18))
            batches.append(batch)
    return batches


class SharedDraws:
    """Random numbers of the whole batch, of which a rank takes those of its own real steps."""

    def __init__(self, monkey: dict) -> None:
        self.originals, self.seed = monkey, 0

    def begin(self, seed: int, own: int, offset: int, total: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.own, self.offset, self.total = own, offset, total

    def draw(self, function, shape) -> torch.Tensor:
        shape = list(shape)
        place = shape.index(self.own)
        shape[place] = self.total
        return function(shape).narrow(place, self.offset, self.own)

    def exponential(self, shape, like):
        return self.draw(
            lambda s: -torch.rand(s, generator=self.generator).clamp(1e-9).log(), shape
        )

    def subset(self, shape, num_critics, device=None):
        return self.draw(lambda s: torch.randint(num_critics, s, generator=self.generator), shape)

    def __enter__(self):
        self.originals = noise.exponential, objective.draw_critic_subset
        noise.exponential, objective.draw_critic_subset = self.exponential, self.subset
        return self

    def __exit__(self, *_):
        noise.exponential, objective.draw_critic_subset = self.originals


def hide_some(batch, loss, mask):
    """A mask hook that leaves out more of some rows than of others."""
    return mask & (torch.arange(mask.shape[1]) % 3 > 0).view(1, -1, *[1] * (mask.ndim - 2))


LOSSES = {
    "amago": lambda policy: amago_loss(policy, preset="paper", use_prioritized_weights=False),
    "amago2": lambda policy: amago2_loss(policy, preset="paper", use_prioritized_weights=False),
    "relative bins": lambda policy: amago2_loss(policy, use_prioritized_weights=False),
    "hooks": lambda policy: amago_loss(
        policy,
        value_codec=RunningScale(len(DISCOUNTS)),
        actor_mask=hide_some,
        critic_mask=hide_some,
    ),
    "sum": lambda policy: amago_loss(policy, reduction="sum", use_prioritized_weights=False),
    "normalized states": amago_loss,
}


def updates(ranks: Ranks, name: str) -> dict:
    """Make updates; return weights, targets, statistics, and the last metrics."""
    loss = LOSSES[name](small_policy(normalize_states=name == "normalized states")[1])
    dtype = torch.float32 if name in ("amago", "amago2") else torch.float64
    loss.to(dtype)
    stepper, optimizer = FiniteOptimizationStepper(), make_optimizer(loss, learning_rate=3e-4)
    parts = dict(loss_module=loss, optimizer=optimizer, replay_buffer=None, ranks=ranks)
    targets, metrics = SoftUpdate(loss, tau=0.05), []
    ranks.attach(loss)
    first = slice(0, NUM_ROWS if ranks.size == 1 else FIRST_ROWS)
    rows = (first, slice(FIRST_ROWS, NUM_ROWS))[ranks.rank]
    with SharedDraws({}) as draws:
        for update in range(NUM_UPDATES[name]):
            batch = unequal[update % len(unequal)].apply(
                lambda x: x.to(dtype) if x.is_floating_point() else x
            )
            counts = batch["collector", "mask"].sum(1)
            own, total = int(counts[rows].sum()), int(counts.sum())
            draws.begin(update, own, int(counts[: rows.start].sum()), total)
            metrics.append(dict(stepper.step(SimpleNamespace(**parts), batch[rows].clone())))
            targets.step()
    Ranks().attach(loss)
    return {"state": loss.state_dict(), "metrics": metrics[-1], "first": metrics[0]}


unequal: list[TensorDict] = []


def prepare() -> None:
    unequal[:] = unequal_batches()


def nonfinite(ranks: Ranks, folder: Path) -> dict:
    """A batch with NaN on the second rank, then a loss that is infinite there."""
    loss = LOSSES["amago"](small_policy()[1])
    parts = dict(loss_module=loss, optimizer=make_optimizer(loss), replay_buffer=None, ranks=ranks)
    stepper = FiniteOptimizationStepper(dump_dir=ranks.folder(folder / "nonfinite"))
    ranks.attach(loss)
    before, found = {k: v.clone() for k, v in loss.state_dict().items()}, {}
    for kind in ("data", "loss"):
        batch = unequal[0][:2].clone()
        if kind == "data" and ranks.rank == 1:
            batch["next", "reward"][0, 1] = float("nan")
        if kind == "loss" and ranks.rank == 1:
            loss.critic_coeff = float("inf")
        try:
            stepper.step(SimpleNamespace(**parts), batch)
        except NonFiniteError as error:
            found[kind] = str(error)
        if kind == "data":
            after = loss.state_dict()
            found["unchanged"] = all(v.equal(after[k]) for k, v in before.items())
    found["weights"] = all(v.equal(before[k]) for k, v in loss.named_parameters())
    return found


def make_trainer(ranks: Ranks, run_dir: Path, **options):
    env, policy = small_policy(seed=1)
    defaults = dict(
        trial_length=18,
        total_updates=8,
        updates_per_round=2,
        batch_size=5,
        capacity=2000,
        seed=3,
        intervals=Intervals(2, 4, 4),
        evaluator=lambda: {"x": float(ranks.is_first)},
        progress_bar=False,
    )
    return build_trainer(env, policy, run_dir=run_dir, ranks=ranks, **(defaults | options))


def seen(trainer, outcome: str) -> dict:
    return {
        "outcome": outcome,
        "updates": trainer.counts.updates,
        "frames": trainer.counts.frames,
        "loss": trainer.loss_module.state_dict(),
        "moments": trainer.optimizer.state_dict()["state"],
        "rows": trainer.sizes,
        "draw": torch.rand(()),
    }


def train(ranks: Ranks, run_dir: Path, resume: bool = False, **options) -> dict:
    trainer = make_trainer(ranks, run_dir, **options)
    step, trainer.sizes = trainer.stepper.step, []

    def note(trainer, batch):
        trainer.sizes.append((len(batch), batch["index"][:, 0].tolist()))
        return step(trainer, batch)

    trainer.stepper.step = note
    if resume:
        trainer.resume()
    return seen(trainer, trainer.train())


def machines(rank: int, run_dir: Path) -> dict:
    """A run whose ranks count as two machines, and its end as resumed; the second starts empty."""
    ranks = Ranks(rank, 2, leader=rank, machines=2)
    first = train(ranks, run_dir, capacity=300)
    if rank == 1:
        shutil.rmtree(run_dir / "replay_1")
    resumed = train(ranks, run_dir, capacity=300, resume=True, total_updates=12)
    stored = make_trial_buffer(None, 4, 4, path=run_dir / ("replay", "replay_1")[rank], mode="read")
    trials = stored.sampler.trials(stored.storage)
    path = run_dir / ("replay", "copy")[rank]
    copy = make_trial_buffer(300, 4, 4, path=path, mode="continue")
    ranks.copy_trials(copy)
    content = {
        "copy": copy.storage[:],
        "number": trials.number,
        "length": trials.length,
        "steps": stored.storage[:],
    }
    return {"first": first, "resumed": resumed, **content}


def preempted(ranks: Ranks, run_dir: Path) -> dict:
    """A run of which the second rank alone gets SIGTERM, twice, behind update 3."""

    def signal_once(trainer):
        if ranks.rank == 1 and trainer.counts.updates == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    return train(ranks, run_dir, total_updates=10_000, callbacks=[signal_once])


def errors(ranks: Ranks, folder: Path) -> dict:
    found = {}
    for name, attempt in {
        "rows": lambda: make_trainer(ranks, folder / "rows", batch_size=1),
        "used": lambda: train(ranks, folder / "run"),
        "missing": lambda: make_trainer(ranks, folder / "none").resume(),
        "folders": lambda: make_trainer(
            ranks, folder / "folders", replay_buffer=make_trial_buffer(100, 4, 4)
        ),
    }.items():
        try:
            attempt()
        except (ValueError, OSError) as error:
            found[name] = (type(error).__name__, str(error))
    return found


def run_rank(rank: int, folder: Path) -> None:
    """Run all jobs as one of two ranks, and write what they return."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    # A file in place of a port that others may use.
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    ranks, results = Ranks.from_environment(), {}
    prepare()
    jobs = {
        **{name: lambda name=name: updates(ranks, name) for name in LOSSES},
        "nonfinite": lambda: nonfinite(ranks, folder),
        "run": lambda: train(ranks, folder / "run"),
        "resumed": lambda: train(ranks, folder / "run", resume=True, total_updates=12),
        "machines": lambda: machines(rank, folder / "machines"),
        "preempted": lambda: preempted(ranks, folder / "preempted"),
        "errors": lambda: errors(ranks, folder),
    }
    try:
        for name, job in jobs.items():
            results[name] = job()
    except BaseException:  # noqa: BLE001 the test shows it
        results["error"] = traceback.format_exc()
    torch.save(results, folder / f"rank_{rank}.pt")
