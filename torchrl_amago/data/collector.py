"""Collector of whole trials: the data of TorchRL's collector, assembled in a few operations.

With 64 short trials, TorchRL's assembly takes as long as stepping the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_amago import keys
from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.data._trials import known_ends
from torchrl_amago.data.replay.buffer import TrialReplayBuffer
from torchrl_amago.data.replay.sampler import TrialSliceSampler

# Options with a fixed value: name, value, reason.
_FIXED_OPTIONS = (
    ("split_trajs", False, "Trials are written whole, without padding."),
    ("set_truncated", False, "It would end each trial with the batch."),
    ("track_traj_ids", True, "Trials are identified by their number."),
    ("extend_buffer", True, "Steps wait until their trial is complete."),
    ("trajs_per_write", None, "The trials that a batch completes are written together."),
)


class TrialCollector(Collector):
    """Collector that writes complete trials into a replay buffer.

    It writes the trials of `Collector(..., trajs_per_batch=1)`, in the same order, only faster.
    Steps wait until their trial is complete. With ``fragment_length``, endless and very long trials
    are written in fragments, stored like trials, with the true ``time_idx``; only the last one of a
    trial ends with ``done``.

    As the ``collector_class`` of `MultiCollector`, `RayCollector` and `Collector(..., backend=...)`
    it writes trials from their workers. `MultiCollector` then needs ``trajs_per_batch=1``, or it
    prepares TorchRL's storages for batches instead of steps.

    Args:
        env: batched environment, or a function that makes one.
        policy: called at every step; or use ``policy_factory``.
        frames_per_batch: environment steps, all rows together, between two writes.
        fragment_length: steps after which a trial is cut; None never cuts. It needs a buffer with a
            :class:`TrialSliceSampler`.
        stagger: give the first fragment of each trial a shorter length of its own, so that trials
            that began together don't all fill their fragments in the same step.
        postproc: transform of complete trials, such as a relabeller: of a batch ``[N, L]``, padded
            on the right with the mask ``("collector", "mask")``. Steps in the resulting mask are
            written.
        options: other arguments of :class:`torchrl.collectors.Collector`. ``reset_at_each_iter``
            drops unfinished trials at the end of each batch; ``trajs_per_batch`` does nothing.

    Raises:
        ValueError: for a ``fragment_length`` below 1 or with another buffer, options that
            contradict whole trials, and, from iterating, if no flag marks the ends of trials.
        TypeError: without a replay buffer.

    Example:
        >>> from torchrl_amago.data import make_trial_buffer
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> buffer = make_trial_buffer(1000, slice_length=18, batch_size=4, warn_short=False)
        >>> collector = TrialCollector(
        ...     env, env.rand_action, replay_buffer=buffer, frames_per_batch=144, total_frames=144)
        >>> list(collector), len(buffer) > 0
        ([None], True)
    """

    def __init__(
        self,
        env: Any,
        policy: Any = None,
        *,
        replay_buffer: Any = None,
        frames_per_batch: int,
        fragment_length: int | None = None,
        stagger: bool = True,
        postproc: Callable[[TensorDictBase], TensorDictBase] | None = None,
        **options: Any,
    ) -> None:
        self.closed = True  # TorchRL's destructor reads it if a check fails
        if fragment_length is not None:
            _check_fragments(fragment_length, replay_buffer)
        if replay_buffer is None:
            raise TypeError("a TrialCollector needs a replay_buffer; see make_trial_buffer.")
        for name, value, reason in _FIXED_OPTIONS:
            check_choice(name, options.get(name), (None, value), reason)
        for name in ("trajs_per_batch", "trajs_per_write", "traj_format"):
            options.pop(name, None)
        self.fragment_length, self.stagger, self._process = fragment_length, stagger, postproc
        # Workers of a MultiCollector share one count of trials: none of them can restore it.
        self._shares_numbers = options.get("traj_pool") is not None
        self._row_trials: Tensor | None = None  # the trial of each row's last step
        self._drop_trials()
        # TorchRL's iterator yields batches then, instead of writing them as they are.
        self._ignore_rb = True
        options |= {"replay_buffer": replay_buffer, "frames_per_batch": frames_per_batch}
        super().__init__(env, policy, **options)

    def iterator(self) -> Iterator[None]:
        """Write the trials that each batch completes; yield None after each batch."""
        for batch in super().iterator():
            self._row_trials = batch.get(keys.TRAJECTORY)[..., -1].clone()
            trials, lengths = self._complete_trials(batch.reshape(-1))
            if self.reset_at_each_iter:
                self._drop_trials()
            if lengths:
                self._write(trials, lengths)
            yield

    def _write(self, trials: TensorDictBase, lengths: list[int]) -> None:
        if self._process is not None:
            trials, lengths = _apply_to_rows(self._process, trials, lengths)
        buffer, options = self.replay_buffer, {}
        # Flags mark the ends of whole trials, and TorchRL's buffers read trajectory numbers.
        takes_lengths = isinstance(buffer, TrialReplayBuffer) or not _is_local(buffer)
        if self.fragment_length is not None and takes_lengths:
            options = {"lengths": lengths}
        buffer.extend(trials, **options)

    def _complete_trials(self, steps: TensorDictBase) -> tuple[TensorDictBase, list[int]]:
        """Return completed trials and fragments, side by side, and their lengths."""
        if self._pending is not None:
            steps = torch.cat((self._pending, steps))
        # Stable: the order of time is kept within each trial.
        trial, order = steps.get(keys.TRAJECTORY).sort(stable=True)
        number, length = trial.unique_consecutive(return_counts=True)
        last = length.cumsum(0) - 1
        is_complete = known_ends(steps)[order[last]].tolist()
        chosen, pending, lengths = [], [], []
        places = order.split(length.tolist())
        for trial, place, complete in zip(number.tolist(), places, is_complete, strict=True):
            cuts = self._cuts(trial, len(place), complete)
            lengths += cuts
            chosen.append(place[: sum(cuts)])
            pending.append(place[sum(cuts) :])
        left = torch.cat(pending)
        self._pending = steps[left] if len(left) else None
        return steps[torch.cat(chosen)], lengths

    def _cuts(self, trial: int, length: int, complete: bool) -> list[int]:
        """Return the lengths of the pieces to write now of a trial's waiting steps."""
        size, cuts = self.fragment_length, []
        if size is not None:
            if self.stagger and trial not in self._begun:
                rows = self.env.batch_size.numel()
                size = -(-size * (trial % rows + 1) // rows)
            while length >= size:
                cuts.append(size)
                length, size = length - size, self.fragment_length
            if cuts:
                self._begun.add(trial)
        if complete:
            self._begun.discard(trial)
            cuts += [length] if length else []
        return cuts

    def reset(self, index: Any = None, **kwargs: Any) -> None:
        """Start new trials in the rows of `index` or in all; drop their unfinished trials."""
        super().reset(index, **kwargs)
        if index is None or self._row_trials is None:
            self._drop_trials()
            return
        trials = self._row_trials.unsqueeze(-1)[index].reshape(-1)
        self._begun -= set(trials.tolist())
        if self._pending is not None:
            self._pending = self._pending[~torch.isin(self._pending.get(keys.TRAJECTORY), trials)]

    def _drop_trials(self) -> None:
        self._pending: TensorDictBase | None = None
        self._begun: set[int] = set()  # trials of which a fragment was written

    def state_dict(self) -> dict[str, Any]:
        """Return TorchRL's state of collector, transforms and policy, and the unfinished trials.

        These are its ``in_progress``: all that the next step depends on besides weights and torch's
        global generator, in tensors and plain values. It is left out unless the environment's class
        sets ``can_save_state``, and in workers of a `MultiCollector`.
        """
        state, env = super().state_dict(), _env_with_state(self.env)
        if env is None or self._shares_numbers:
            return state
        in_progress = {
            "env": env.state_dict(),
            "carrier": self._carrier.to_dict(),
            "begun": torch.tensor(sorted(self._begun), dtype=torch.int64),
            "memories": {},
        }
        for number, encoder in self._encoders():
            streams = self._carrier.get(encoder.stream_key, torch.empty(0)).unique().tolist()
            in_progress["memories"][number] = encoder.memory_state_dict(streams)
        if self._pending is not None:
            in_progress["pending"] = self._pending.to_dict()
        copied = tree_map_only(Tensor, lambda x: x.detach().clone(), in_progress)
        return state | {"in_progress": copied}

    def load_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> None:
        """Load a state of :meth:`state_dict`; the next step is that of the saved collector.

        Without ``in_progress``, unfinished trials are dropped: then call :meth:`reset`, unless the
        collector is new. If this environment can't continue the saved trials, raise ValueError and
        change nothing.
        """
        state, in_progress = dict(state_dict), state_dict.get("in_progress")
        if in_progress is not None:
            saved = in_progress["carrier"]["collector"]["traj_ids"].shape
            if _env_with_state(self.env) is None or saved != self.env.batch_size:
                base = type(getattr(self.env, "base_env", self.env)).__name__
                raise ValueError(
                    "saved trials continue only in an environment that can load its state, of the "
                    f"same batch size {list(saved)}, got {base} with {list(self.env.batch_size)}. "
                    "Remove 'in_progress' to begin new trials."
                )
            # Loading gives a new number to each row, but the rows have theirs.
            num_rows = self.env.batch_size.numel()
            state["traj_pool"] = {k: n - num_rows for k, n in state["traj_pool"].items()}
        super().load_state_dict(state, **kwargs)
        self._drop_trials()
        if in_progress is not None:
            self._load_in_progress(in_progress)

    def _load_in_progress(self, in_progress: Mapping[str, Any]) -> None:
        size, device = self.env.batch_size, self.env.device
        carrier = TensorDict(in_progress["carrier"], batch_size=size, device=device).clone()
        self._carrier = carrier.clear_device_() if self._carrier.device is None else carrier
        self._row_trials = carrier.get(keys.TRAJECTORY).clone()
        self._begun = set(in_progress["begun"].tolist())
        if (pending := in_progress.get("pending")) is not None:
            size = [len(pending["collector"]["traj_ids"])]
            self._pending = TensorDict(pending, size, device=self.storing_device).clone()
        _env_with_state(self.env).load_state_dict(in_progress["env"])
        for number, encoder in self._encoders():
            encoder.load_memory_state_dict(in_progress["memories"][number])

    def _encoders(self) -> list[tuple[str, Any]]:
        """Return the policy's modules with a memory of rollouts, numbered."""
        modules = getattr(self.policy, "modules", tuple)()
        encoders = [module for module in modules if hasattr(module, "load_memory_state_dict")]
        return [(str(number), encoder) for number, encoder in enumerate(encoders)]


def _check_fragments(fragment_length: int, replay_buffer: Any) -> None:
    check_counts("None never cuts a trial.", fragment_length=fragment_length)
    finds_trials = isinstance(getattr(replay_buffer, "sampler", None), TrialSliceSampler)
    if _is_local(replay_buffer) and not finds_trials:
        raise ValueError(
            "fragment_length needs a buffer with a TrialSliceSampler, got "
            f"{type(replay_buffer).__name__}. Make it with make_trial_buffer."
        )


def _is_local(replay_buffer: Any) -> bool:
    """Return whether a buffer is in this process, so that its type is known."""
    return getattr(replay_buffer, "service_backend", None) == "direct"


def _apply_to_rows(
    process: Callable[[TensorDictBase], TensorDictBase], trials: TensorDictBase, lengths: list[int]
) -> tuple[TensorDictBase, list[int]]:
    """Apply a function to trials as padded rows; return the remaining steps side by side."""
    length_N1 = torch.tensor(lengths, device=trials.get(keys.TRAJECTORY).device).unsqueeze(1)
    step_L = torch.arange(max(lengths), device=length_N1.device)
    first_N1 = length_N1.cumsum(0) - length_N1
    # Padding repeats the last step.
    rows = trials[first_N1 + step_L.clamp(max=length_N1 - 1)]
    rows = process(rows.set(keys.MASK, step_L < length_N1))
    mask_NL = rows.get(keys.MASK)
    return rows.exclude(keys.MASK)[mask_NL], mask_NL.sum(1).tolist()


def _env_with_state(env: EnvBase) -> EnvBase | None:
    """Return the environment below the transforms, if its state can be saved."""
    base = env.base_env if isinstance(env, TransformedEnv) else env
    return base if getattr(type(base), "can_save_state", False) else None
