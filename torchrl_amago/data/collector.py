"""Collect whole trials: the same data as TorchRL's collector writes, put together in a few operations.

TorchRL's way takes as long as stepping the environment with 64 short trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_map
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_amago import keys
from torchrl_amago.data._trial_ends import trial_ends
from torchrl_amago.data.replay.buffer import TrialReplayBuffer
from torchrl_amago.data.replay.sampler import TrialSliceSampler

_TRIAL = ("collector", "traj_ids")


class TrialCollector(Collector):
    """Collector that writes complete trials into a replay buffer, one after another.

    It writes what `Collector(..., trajs_per_batch=1)` does, in the same order, only faster. Steps of
    trials under way wait until their trial is complete, or, with ``fragment_length``, until there are so
    many: endless and very long trials are written in fragments then. A fragment is stored like a trial,
    with its steps' true ``time_idx``; only the last fragment ends with ``done``.

    It is a ``collector_class`` of `MultiCollector`, `RayCollector` and `Collector(..., backend=...)`
    too, whose workers write their own trials. `MultiCollector` needs ``trajs_per_batch=1`` beside it, or
    it prepares TorchRL's storages for batches instead of steps.

    Args:
        env: batched environment, or what makes one.
        policy: called at every step; or give ``policy_factory``.
        replay_buffer: what trials are written to; with ``fragment_length`` one with a
            :class:`TrialSliceSampler`.
        frames_per_batch: environment steps, all rows together, between two writes.
        fragment_length: steps after which a trial is cut; None never cuts.
        stagger: cut the first fragment of each trial early, by a length of its own, so that trials that
            began together don't all fill their fragments in the same step.
        postproc: called on complete trials, a batch ``[N, L]`` padded on the right with the mask
            ``("collector", "mask")``, such as a relabeller; what its mask leaves is written.
        options: further arguments of :class:`torchrl.collectors.Collector`. ``reset_at_each_iter``
            drops the trials under way at the end of each batch; ``trajs_per_batch`` does nothing.

    Raises:
        ValueError: for a ``fragment_length`` below 1 or with another buffer, options that contradict
            whole trials, and, from iterating, if no flag says where trials end.
        TypeError: without a replay buffer.

    Example:
        >>> from torchrl_amago.data import make_trial_buffer
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> buffer = make_trial_buffer(1000, slice_length=18, batch_size=4, warn_short=False)
        >>> collector = TrialCollector(
        ...     env, env.rand_action, replay_buffer=buffer, frames_per_batch=8 * 18, total_frames=8 * 18)
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
        # In case that a check fails: TorchRL's destructor looks at it.
        self.closed = True
        _check_fragments(fragment_length, replay_buffer)
        _check_options(replay_buffer, options)
        self.fragment_length, self.stagger, self._process = fragment_length, stagger, postproc
        # Workers of a MultiCollector count trials together, so that no single one can go back.
        self._shares_numbers = options.get("traj_pool") is not None
        self._row_trials: Tensor | None = None  # of each row, the trial of its last step
        self._drop_trials()
        # Batches come out of TorchRL's iterator then, instead of being written as they are.
        self._ignore_rb = True
        options |= {"replay_buffer": replay_buffer, "frames_per_batch": frames_per_batch}
        super().__init__(env, policy, **options)

    def iterator(self) -> Iterator[None]:
        """Write the trials that each batch completes; yields None after each batch."""
        for batch in super().iterator():
            self._row_trials = batch.get(_TRIAL)[..., -1].clone()
            trials, lengths = self._complete_trials(batch.reshape(-1))
            if self.reset_at_each_iter:
                self._drop_trials()
            if lengths:
                self._write(trials, lengths)
            yield

    def _write(self, trials: TensorDictBase, lengths: list[int]) -> None:
        if self._process is not None:
            trials, lengths = _apply_to_rows(self._process, trials, lengths)
        # Ends say it all where nothing is cut, and numbers of trials in TorchRL's buffers.
        buffer = self.replay_buffer
        counts = isinstance(buffer, TrialReplayBuffer) or not _is_local(buffer)
        is_told = self.fragment_length is not None and counts
        buffer.extend(trials, **({"lengths": lengths} if is_told else {}))

    def _complete_trials(self, steps: TensorDictBase) -> tuple[TensorDictBase, list[int]]:
        """Trials and fragments that these steps complete, side by side, and their lengths."""
        if self._pending is not None:
            steps = torch.cat((self._pending, steps))
        # Stable: the order of time is kept within each trial.
        trial, order = steps.get(_TRIAL).sort(stable=True)
        number, length = trial.unique_consecutive(return_counts=True)
        last = length.cumsum(0) - 1
        ends = trial_ends(steps)
        if ends is None:
            held = sorted(map(str, steps["next"].keys(True, True)))
            rule = "trials end where 'done', 'terminated' or 'truncated' is True under 'next'"
            raise ValueError(
                f"{rule}, and the steps have none of them, only {held}. Add one there."
            )
        is_complete = ends[order[last]].tolist()
        chosen, pending, lengths = [], [], []
        pieces = zip(number.tolist(), order.split(length.tolist()), is_complete, strict=True)
        for trial_number, steps_of, complete in pieces:
            cuts = self._cuts(trial_number, len(steps_of), complete)
            lengths += cuts
            chosen.append(steps_of[: sum(cuts)])
            pending.append(steps_of[sum(cuts) :])
        left = torch.cat(pending)
        self._pending = steps[left] if len(left) else None
        return steps[torch.cat(chosen)], lengths

    def _cuts(self, trial: int, length: int, complete: bool) -> list[int]:
        """Lengths of what is written now of a trial's waiting steps."""
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

    # --- trials under way ---

    def reset(self, index: Any = None, **kwargs: Any) -> None:
        """Start new trials, in the rows that `index` selects or in all; what they had begun is dropped."""
        super().reset(index, **kwargs)
        if index is None or self._row_trials is None:
            self._drop_trials()
            return
        trials = self._row_trials.unsqueeze(-1)[index].reshape(-1)
        self._begun -= set(trials.tolist())
        if self._pending is not None:
            self._pending = self._pending[~torch.isin(self._pending.get(_TRIAL), trials)]

    def _drop_trials(self) -> None:
        self._pending: TensorDictBase | None = None
        self._begun: set[int] = set()  # trials of which a fragment was written

    def state_dict(self) -> dict[str, Any]:
        """TorchRL's state of collector, transforms and policy, and the trials under way.

        Returns:
            A nested dict of tensors and plain values. It has ``in_progress``, all that the next step
            depends on besides weights and torch's global generator, where the environment's class says
            ``can_save_state`` and the collector is no worker of a `MultiCollector`.
        """
        state = super().state_dict()
        env = _env_with_state(self.env)
        if env is not None and not self._shares_numbers:
            in_progress = {
                "env": env.state_dict(),
                "carrier": self._carrier.to_dict(),
                "begun": torch.tensor(sorted(self._begun), dtype=torch.int64),
                "memories": {
                    str(i): module.memory_state_dict(self._streams_of(module))
                    for i, module in enumerate(self._encoders())
                },
            }
            if self._pending is not None:
                in_progress["pending"] = self._pending.to_dict()
            state["in_progress"] = tree_map(_copy, in_progress)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> None:
        """Take over what :meth:`state_dict` gave.

        With ``in_progress`` the next step is the one that the saved collector would have taken. Without
        it trials under way are dropped: call :meth:`reset` then, unless the collector is new.

        Args:
            state_dict: the state.
            kwargs: for TorchRL's collector: ``strict``.

        Raises:
            ValueError: for trials that this environment can't go on with; all is as before then.
        """
        state, in_progress = dict(state_dict), state_dict.get("in_progress")
        if in_progress is not None:
            saved = in_progress["carrier"]["collector"]["traj_ids"].shape
            if _env_with_state(self.env) is None or saved != self.env.batch_size:
                base = type(getattr(self.env, "base_env", self.env)).__name__
                raise ValueError(
                    "trials under way go on only in an environment that can load its state, with the "
                    f"rows {list(saved)} that they were saved from; got {base} with "
                    f"{list(self.env.batch_size)}. Take 'in_progress' out to begin new trials."
                )
            # Loading hands out a number to each row, but the rows have theirs.
            num_rows = self.env.batch_size.numel()
            state["traj_pool"] = {k: n - num_rows for k, n in state["traj_pool"].items()}
        super().load_state_dict(state, **kwargs)
        self._drop_trials()
        if in_progress is not None:
            self._go_on(in_progress)

    def _go_on(self, in_progress: Mapping[str, Any]) -> None:
        """Take over the trials under way."""
        size, device = self.env.batch_size, self.env.device
        carrier = TensorDict(in_progress["carrier"], batch_size=size, device=device).clone()
        self._carrier = carrier.clear_device_() if self._carrier.device is None else carrier
        self._row_trials = carrier.get(_TRIAL).clone()
        self._begun = set(in_progress["begun"].tolist())
        if "pending" in in_progress:
            pending = in_progress["pending"]
            size = [len(pending["collector"]["traj_ids"])]
            self._pending = TensorDict(pending, size, device=self.storing_device).clone()
        _env_with_state(self.env).load_state_dict(in_progress["env"])
        for i, encoder in enumerate(self._encoders()):
            encoder.load_memory_state_dict(in_progress["memories"][str(i)])

    def _encoders(self) -> list[Any]:
        """The policy's modules that remember rollouts."""
        modules = getattr(self.policy, "modules", tuple)()
        return [module for module in modules if hasattr(module, "load_memory_state_dict")]

    def _streams_of(self, encoder: Any) -> list[int]:
        """What an encoder calls the rollout of these trials; it may remember others' too."""
        streams = self._carrier.get(encoder.stream_key, None)
        return [] if streams is None else streams.unique().tolist()


def _check_fragments(fragment_length: int | None, replay_buffer: Any) -> None:
    if fragment_length is None:
        return
    if fragment_length < 1:
        rule = f"fragment_length must be at least 1 or None, got {fragment_length}"
        raise ValueError(f"{rule}. It is the number of steps after which an endless trial is cut.")
    is_known = isinstance(getattr(replay_buffer, "sampler", None), TrialSliceSampler)
    if _is_local(replay_buffer) and not is_known:
        rule = "fragments need a buffer that knows which steps belong together"
        got = f"one with a TrialSliceSampler, got {type(replay_buffer).__name__}"
        raise ValueError(f"{rule}, {got}. Make it with make_trial_buffer.")


def _is_local(replay_buffer: Any) -> bool:
    """Whether it is in this process, so that its kind can be seen."""
    return getattr(replay_buffer, "service_backend", None) == "direct"


# What contradicts that whole trials are written: option, the value that is meant, why.
_FIXED_OPTIONS = (
    ("split_trajs", False, "trials are written whole, without padding"),
    ("set_truncated", False, "it would end each trial with the batch"),
    ("track_traj_ids", True, "trials are told apart by their number"),
    ("extend_buffer", True, "steps wait until their trial is complete"),
    ("trajs_per_write", None, "the trials that a batch completes are written together"),
)


def _check_options(replay_buffer: Any, options: dict[str, Any]) -> None:
    """Check options, and take out what only TorchRL's assembly reads."""
    if replay_buffer is None:
        problem = "a TrialCollector must have a replay_buffer to write trials to, got None"
        raise TypeError(f"{problem}. Make one with make_trial_buffer.")
    for name, value, reason in _FIXED_OPTIONS:
        if options.get(name) not in (None, value):
            rule = f"{name} must be {value} in a TrialCollector, got {options[name]!r}"
            raise ValueError(f"{rule}: {reason}. Leave it out, or use TorchRL's Collector.")
    for name in ("trajs_per_batch", "trajs_per_write", "traj_format"):
        options.pop(name, None)


def _apply_to_rows(
    process: Callable[[TensorDictBase], TensorDictBase], trials: TensorDictBase, lengths: list[int]
) -> tuple[TensorDictBase, list[int]]:
    """Show trials as padded rows, and put what is left of them side by side again."""
    length_N1 = torch.tensor(lengths, device=trials.get(_TRIAL).device).unsqueeze(1)
    step_L = torch.arange(max(lengths), device=length_N1.device)
    first_N1 = length_N1.cumsum(0) - length_N1
    # Padding repeats the last step.
    rows = trials[first_N1 + step_L.clamp(max=length_N1 - 1)]
    rows = process(rows.set(keys.MASK, step_L < length_N1))
    mask_NL = rows.get(keys.MASK)
    return rows.exclude(keys.MASK)[mask_NL], mask_NL.sum(1).tolist()


def _env_with_state(env: EnvBase) -> EnvBase | None:
    """The environment below the transforms, if its state can be saved."""
    base = env.base_env if isinstance(env, TransformedEnv) else env
    return base if getattr(type(base), "can_save_state", False) else None


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
