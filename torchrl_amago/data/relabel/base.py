"""The contract of every relabeller: whole trials in, the entries that replace theirs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_amago import keys


class Relabel(ABC):
    """Base of all relabellers: what a batch shows of stored trials, changed as they are drawn.

    To write your own, say in ``in_keys`` what it reads, and implement :meth:`relabel`. The buffer
    draws trials, reads these entries of all their steps, calls the relabeller, and only then cuts
    out slices; the entries that it didn't replace come from storage, which is never written to.

    Args:
        in_keys: entries to read: those of the root, and those of ``next`` as ``("next", ...)``.

    Raises:
        KeyError: when called, if the trials lack an entry.

    Example:
        >>> from tensordict import TensorDict
        >>> class ScaledReward(Relabel):
        ...     def __init__(self, factor):
        ...         super().__init__([("next", "reward")])
        ...         self.factor = factor
        ...     def relabel(self, trials, generator):
        ...         reward = self.factor * trials["next", "reward"]
        ...         return TensorDict({"next": {"reward": reward}}, trials.batch_size)
        >>> mask = torch.tensor([[True, True, False]])
        >>> trials = TensorDict(
        ...     {"next": {"reward": torch.ones(1, 3, 1)}, "collector": {"mask": mask}}, [1, 3])
        >>> ScaledReward(0.5)(trials)["next", "reward"].flatten().tolist()
        [0.5, 0.5, 0.5]
    """

    def __init__(self, in_keys: Sequence[NestedKey]) -> None:
        self.in_keys = list(in_keys)

    @abstractmethod
    def relabel(self, trials: TensorDictBase, generator: torch.Generator | None) -> TensorDictBase:
        """Relabel a batch of whole trials.

        Args:
            trials: ``[B, L]``, the entries of ``in_keys`` and the mask ``("collector", "mask")``, bool
                ``[B, L]``; a trial shorter than L is padded on the right, with anything. Not to be
                changed in place.
            generator: source of randomness; None for torch's global one.

        Returns:
            ``[B, L]``, the entries that take the place of stored ones. Where an entry of the root
            that comes from the environment is replaced, so is the one in ``next``. With it the mask, if
            trials end sooner now: True on what is left, which is each trial's beginning.
        """

    def __call__(
        self, trials: TensorDictBase, generator: torch.Generator | None = None
    ) -> TensorDictBase:
        """Relabel a batch, and add the mask if it didn't change; see :meth:`relabel`."""
        missing = [key for key in (*self.in_keys, keys.MASK) if trials.get(key, None) is None]
        if missing:
            raise KeyError(
                f"{type(self).__name__} reads {missing}, but the trials hold only "
                f"{sorted(map(str, trials.keys(True, True)))}. Name the environment's entries in its "
                "constructor."
            )
        out = self.relabel(trials, generator)
        if out.get(keys.MASK, None) is None:
            out.set(keys.MASK, trials.get(keys.MASK))
        return out


def uniform(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Numbers from U[0, 1), float32, drawn where the generator lives."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)
