"""Contract of relabellers: whole trials in, replaced entries out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NoReturn

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, Transform

from torchrl_amago import keys

# Not is_init: SliceSampler sets it wherever a slice begins.
_NEEDED = (keys.MASK, keys.TIME_IDX, ("next", "done"))
_PLACES = (
    "Whole trials are found in make_trial_buffer(relabel=...), in the padded batches of "
    "Collector(..., trajs_per_batch=n), and in the postproc of a collector with split_trajs=True "
    "whose batches hold whole trials. docs/hindsight.md shows it for other buffers."
)


class Relabel(Transform, ABC):
    """Transform of whole trials that changes their goals, rewards or ends.

    A subclass names the entries it reads in ``in_keys`` and implements :meth:`relabel`. A buffer of
    trials takes it as ``relabel=`` or by ``append_transform``: drawn trials are relabelled whole,
    then cut into slices; the storage stays as it is. Called on a padded batch ``[B, L]`` of whole
    trials, as the ``postproc`` of a collector is, it returns a relabelled copy.

    Args:
        in_keys: entries to read: those of the root, and those of ``next`` as ``("next", ...)``.
        out_keys: entries that may be replaced.
        generator: source of random numbers unless the buffer has one; None for torch's global one.

    Raises:
        TypeError: when it is put into an environment, where no trial is complete.
        KeyError: when called, if the trials lack an entry.
        ValueError: when called, if rows aren't whole trials, or the new mask isn't the beginning of
            each trial.

    Example:
        >>> from tensordict import TensorDict
        >>> class ScaledReward(Relabel):
        ...     def __init__(self, factor):
        ...         super().__init__([("next", "reward")])
        ...         self.factor = factor
        ...     def relabel(self, trials, generator):
        ...         reward = self.factor * trials["next", "reward"]
        ...         return TensorDict({"next": {"reward": reward}}, trials.batch_size)
        >>> step = torch.arange(3).view(1, 3, 1)
        >>> trials = TensorDict({
        ...     "time_idx": step, "collector": {"mask": torch.tensor([[True, True, False]])},
        ...     "next": {"reward": torch.ones(1, 3, 1), "done": step == 1}}, [1, 3])
        >>> ScaledReward(0.5)(trials)["next", "reward"].flatten().tolist()
        [0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_keys=list(in_keys), out_keys=list(out_keys))
        self.generator = generator

    @abstractmethod
    def relabel(self, trials: TensorDictBase, generator: torch.Generator | None) -> TensorDictBase:
        """Return the entries ``[B, L]`` that replace those of a batch of whole trials.

        The batch has the entries of ``in_keys`` and the mask; shorter trials are padded on the
        right with arbitrary values. Don't change it in place. An environment's entry must be
        replaced in root and ``next`` alike. If trials end sooner now, return also the mask: True
        on each trial's remaining first steps.
        """

    def relabel_trials(
        self, trials: TensorDictBase, generator: torch.Generator | None = None
    ) -> TensorDictBase:
        """Call :meth:`relabel` with checks; the result always has the mask."""
        missing = [key for key in (*self.in_keys, keys.MASK) if trials.get(key, None) is None]
        if missing:
            got = f"the trials hold only {_names(trials)}. Name others in its constructor."
            raise KeyError(f"{type(self).__name__} reads {missing}, but {got}")
        out = self.relabel(trials, self.generator if generator is None else generator)
        mask_BL, new_BL = trials.get(keys.MASK), out.get(keys.MASK, None)
        if new_BL is None:
            return out.set(keys.MASK, mask_BL)
        is_prefix = (new_BL <= mask_BL).all() & (new_BL[:, 1:] <= new_BL[:, :-1]).all()
        if not (is_prefix & new_BL[:, 0].all()):
            raise ValueError(
                "relabelling may shorten a trial to at least one step, got lengths "
                f"{new_BL.sum(-1).tolist()} from {mask_BL.sum(-1).tolist()}. Return the mask of "
                "each trial's remaining first steps."
            )
        return out

    def set_rng(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Relabel a padded batch ``[B, L]`` of whole trials; the one given stays as it is."""
        if not _are_whole_trials(tensordict):
            raise ValueError(
                f"{type(self).__name__} must get whole trials [B, L] with {_NEEDED}, padded on the "
                f"right, from the first step, {keys.TIME_IDX!r} 0, to the last, the only one that "
                f"is done, got rows that are something else: a batch {list(tensordict.shape)} with "
                f"{_names(tensordict)}. {_PLACES}"
            )
        return tensordict.clone(recurse=False).update(self.relabel_trials(tensordict))

    def set_container(self, container: Transform | EnvBase) -> None:
        super().set_container(container)
        try:
            env = self.container
        except ValueError:  # raised in a Compose that is in no environment
            return
        if env is not None:
            self.reset_parent()
            self._raise_in_env()

    def _raise_in_env(self, *_: TensorDictBase) -> NoReturn:
        problem = "was put into an environment, where they are under way, or inverted"
        raise TypeError(f"{type(self).__name__} must get whole trials, and {problem}. {_PLACES}")

    _reset = _step = _call = _raise_in_env


def uniform(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw numbers from U[0, 1), float32, on the generator's device, and move them."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


def _are_whole_trials(batch: TensorDictBase) -> bool:
    """Compare time indices and done flags with the mask."""
    found = [batch.get(key, None) for key in _NEEDED]
    if batch.ndim != 2 or any(value is None for value in found):
        return False
    mask_BL, time_BL, done_BL = (value.reshape(batch.shape) for value in found)
    step_L = torch.arange(batch.shape[1], device=mask_BL.device)
    length_B1 = mask_BL.sum(-1, keepdim=True).clamp(min=1)
    is_right_BL = (time_BL == step_L) & (done_BL == (step_L == length_B1 - 1))
    return bool(((mask_BL == (step_L < length_B1)) & (is_right_BL | ~mask_BL)).all())


def _names(steps: TensorDictBase) -> list[str]:
    return sorted(map(str, steps.keys(True, True)))
