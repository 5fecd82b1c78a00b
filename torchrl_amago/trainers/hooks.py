"""Pieces of the training loop: one optimiser step, and what is read off newly collected trials."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from torchrl_amago import keys
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.trainers.logging import MetricWindow
from torchrl_amago.trainers.nonfinite import check_data, stop_on_loss
from torchrl_amago.trainers.optim import parameters_of


class AMAGOOptimizationStepper(OptimizationStepper):
    """Loss, backward, clipping and optimiser step; nothing changes if anything is not finite.

    The entries of the loss whose names begin with ``loss`` are added up. The batch is checked
    before the forward (which updates running statistics), loss and gradient norm before the step.
    The norm's check reads one number from the device: the only synchronisation of an update.

    Args:
        clip_norm: largest gradient norm, None for no clipping.
        precision: ``"bf16"`` computes forward and loss in bfloat16 where autocast says so; weights
            stay as they are.
        run_dir: where the batch goes if it has to be looked at.
    """

    def __init__(
        self, clip_norm: float | None, precision: Literal["fp32", "bf16"], run_dir: Path
    ) -> None:
        self.clip_norm, self.precision, self.run_dir = clip_norm, precision, run_dir
        self._parameters: list[torch.nn.Parameter] | None = None
        self._parts: dict[str, list[torch.nn.Parameter]] = {}

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """One update; gives losses, metrics and gradient norms (of all and by part), detached."""
        if self._parameters is None:
            self._parameters = list(parameters_of(trainer.optimizer))
            self._parts = _by_network(trainer.loss_module, self._parameters)
            self._device_type = self._parameters[0].device.type
        with self._autocast():
            losses = trainer.compute_loss(sub_batch)
        trainer._post_loss_hook(sub_batch)
        total = sum(value for key, value in losses.items() if key.startswith("loss"))
        total.backward()
        losses = losses.detach()
        gradients = {
            part: [p.grad for p in params if p.grad is not None]
            for part, params in self._parts.items()
        }
        norms = {
            part: torch.nn.utils.get_total_norm(grads) for part, grads in gradients.items() if grads
        }
        norm = torch.stack([*norms.values()]).norm()
        checked, grad_norm = torch.stack([total.detach().float() + norm, norm]).tolist()
        if not math.isfinite(checked):
            trainer.optimizer.zero_grad()
            stop_on_loss(losses, grad_norm, sub_batch, self.run_dir)
        # As clip_grad_norm_, which also multiplies where there is nothing to clip.
        if self.clip_norm is not None and grad_norm + 1e-6 > self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip_norm, norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.update({f"grad_norm_{part}": value for part, value in norms.items()})
        return losses.set("grad_norm", norm)

    def _autocast(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=torch.bfloat16)


def _by_network(
    loss_module: nn.Module, parameters: list[nn.Parameter]
) -> dict[str, list[nn.Parameter]]:
    """Parameters by the network they belong to, of those that are optimised."""
    parts: dict[str, list[nn.Parameter]] = {}
    optimised = set(parameters)
    for name, p in loss_module.named_parameters():
        if p in optimised:
            optimised.remove(p)
            parts.setdefault(name.partition("_network_params")[0], []).append(p)
    if optimised:
        parts["other"] = list(optimised)
    return parts


def evaluation_metrics(results: Mapping[str, float] | TrialResults) -> dict[str, float]:
    """Columns of an evaluation: named numbers as they are, ``TrialResults`` by their summary."""
    if isinstance(results, TrialResults):
        results = results.summary()
    return {f"eval/{name}": float(value) for name, value in results.items()}


class TrialMonitor:
    """Looks once at every step the collector has written to the replay buffer.

    Counts trials, feeds returns and successes to the metrics, and stops on NaN and infinity before
    anything is trained on them. A trial that is written in fragments counts once, as a whole, when its
    last one is there.

    Args:
        replay_buffer: the buffer the collector writes to; its ``write_count`` counts steps, and
            ``newest(count)`` gives the last of them.
        window: where the metrics go: ``train/trial_return``, ``train/trial_length``,
            ``train/success_first`` and ``train/success_last`` (of the attempts in which a trial
            began and ended), from exploring behaviour.
        run_dir: where steps go if they have to be looked at.
        success_threshold: an attempt succeeds if its return is larger.
        reward_key: reward under ``next``.
        end_key: end of a trial.
        time_key: steps since the trial began, by which fragments are put together; where there is none,
            trials follow one another.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_amago.data import make_trial_buffer
        >>> rb = make_trial_buffer(capacity=10, slice_length=2, batch_size=1)
        >>> monitor = TrialMonitor(rb, MetricWindow(), Path("run"))
        >>> done = torch.tensor([[False], [True]])
        >>> _ = rb.extend(TensorDict({"next": {"reward": torch.ones(2, 1), "done": done}}, [2]))
        >>> monitor()
        >>> monitor.trials, monitor.window.means()
        (1, {'train/trial_return': 2.0, 'train/trial_length': 2.0})
    """

    def __init__(
        self,
        replay_buffer: TrialReplayBuffer,
        window: MetricWindow,
        run_dir: Path,
        success_threshold: float = 0.0,
        reward_key: NestedKey = ("next", "reward"),
        end_key: NestedKey = ("next", "done"),
        time_key: NestedKey = keys.TIME_IDX,
    ) -> None:
        self.replay_buffer, self.window, self.run_dir = replay_buffer, window, run_dir
        self.success_threshold = success_threshold
        self.reward_key, self.end_key, self.time_key = reward_key, end_key, time_key
        self.seen = self.trials = 0
        # Of the trials that go on, by the time at which they do: return and length of what is written.
        self._begun: dict[int, list[tuple[float, int]]] = {}

    def skip_existing(self) -> None:
        """Count the trials that are there already, without logging them as collected."""
        self.seen = self.replay_buffer.write_count
        self.trials = self.replay_buffer.num_trials

    def __call__(self) -> None:
        """Read what is new."""
        steps = self._new_steps()
        if steps is None:
            return
        check_data(steps, self.run_dir, "collected observations and rewards")
        ends = steps.get(self.end_key).reshape(-1)
        ended = self._ended_trials(steps, ends)
        self.trials += len(ended)
        self.window.add("train/trial_return", sum(gain for gain, _ in ended), len(ended))
        self.window.add("train/trial_length", sum(length for _, length in ended), len(ended))
        self._add_successes(steps, ends)

    def trials_restarted(self) -> None:
        """Forget the trials that go on: they were ended, and the rest of them won't be written."""
        self._begun.clear()

    def _ended_trials(self, steps: TensorDictBase, ends: torch.Tensor) -> list[tuple[float, int]]:
        """Return and length of each trial that ended, of all its fragments; those of others wait."""
        time = steps.get(self.time_key, None)
        is_last = ends.clone()
        is_last[-1] = True
        if time is not None:
            time = time.reshape(-1)
            is_last[:-1] |= time[1:] != time[:-1] + 1
        fragment = is_last.cumsum(0) - is_last.long()
        lengths = fragment.bincount()
        reward = steps.get(self.reward_key).reshape(len(ends), -1).sum(1, dtype=torch.float64)
        gains = reward.new_zeros(len(lengths)).index_add(0, fragment, reward)
        # Without times there is one trial at a time, and what waits is of that one.
        after = torch.zeros_like(lengths) if time is None else time[is_last] + 1
        first = after if time is None else after - lengths
        ended = []
        columns = (first, after, gains, lengths, ends[is_last])
        for begin, end, gain, length, is_over in zip(*(c.tolist() for c in columns), strict=True):
            # Of trials that are equally old, the order of writing tells which one goes on.
            waiting = self._begun.get(begin)
            gain_before, length_before = waiting.pop(0) if waiting else (0.0, 0)
            total = (gain_before + gain, length_before + length)
            (ended if is_over else self._begun.setdefault(end, [])).append(total)
        return ended

    def _add_successes(self, steps: TensorDictBase, ends: torch.Tensor) -> None:
        attempt = steps.get(keys.EPISODE_IDX, None)
        attempt_return = steps.get(("next", keys.ATTEMPT_RETURN), None)
        soft_reset = steps.get(("next", keys.SOFT_RESET), None)
        if attempt is None or attempt_return is None or soft_reset is None:
            return  # not a task of attempts
        success = (attempt_return > self.success_threshold).reshape(-1)
        over = ends | soft_reset.reshape(-1)
        for name, chosen in (
            ("train/success_first", over & (attempt.reshape(-1) == 0)),
            ("train/success_last", ends),
        ):
            self.window.add(name, success[chosen].sum().item(), int(chosen.sum()))

    def _new_steps(self) -> TensorDictBase | None:
        written = self.replay_buffer.write_count
        count, self.seen = written - self.seen, written
        return self.replay_buffer.newest(count) if count > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Counters; trials that go on are ended where a run resumes."""
        return {"seen": self.seen, "trials": self.trials}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.seen, self.trials = int(state["seen"]), int(state["trials"])
        self.trials_restarted()
