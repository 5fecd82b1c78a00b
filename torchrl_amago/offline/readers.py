"""Trajectories from datasets: Minari, D4RL-style arrays, AMAGO's files, TorchRL's datasets.

Readers read numbers: no code that a dataset holds or names (a pickle, an entry point) is run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDictBase
from torchrl.data import ReplayBuffer

from torchrl_amago import keys
from torchrl_amago.data.replay.buffer import TrialReplayBuffer
from torchrl_amago.offline import trajectory as arrays_of
from torchrl_amago.offline.trajectory import ActionForm, Trajectory, TrajectoryError

_D4RL_ARRAYS = ["observations", "actions", "rewards", "terminals"]
_AMAGO_ARRAYS = ["rl2s", "time_idxs", "rews", "dones", "actions"]
# Errors of numpy, zipfile and zlib for damaged archives and for files that are none.
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error)


@dataclass(frozen=True)
class TrajectorySource:
    """A sequence of trajectories, each read by ``load(number)`` when it is needed."""

    num_trajectories: int
    num_steps: int | None  # None if unknown
    load: Callable[[int], Trajectory]

    def __len__(self) -> int:
        return self.num_trajectories

    def __getitem__(self, number: int) -> Trajectory:
        return self.load(range(self.num_trajectories)[number])

    def __iter__(self) -> Iterator[Trajectory]:
        # Not a generator, which would end with the first trajectory that can't be read.
        return map(self.load, range(self.num_trajectories))


def read_minari(dataset: str | Any, *, download: bool = False) -> TrajectorySource:
    """Read the episodes of a Minari dataset (https://minari.farama.org).

    Args:
        dataset: a loaded one, or the id of one in ``$MINARI_DATASETS_PATH``.
        download: let Minari download it.

    Raises:
        ImportError: without Minari. FileNotFoundError: without the dataset.
    """
    try:
        import minari
    except ImportError as error:
        install = "pip install 'torchrl-amago[offline]'"
        raise ImportError(f"read_minari needs minari and h5py: {install}") from error
    if isinstance(dataset, str):
        dataset = minari.load_dataset(dataset, download=download)
    arrays, sizes = attrgetter(*arrays_of.ARRAYS), (dataset.total_episodes, dataset.total_steps)
    return TrajectorySource(*sizes, lambda number: Trajectory(*arrays(dataset[number])))


def read_d4rl(arrays: Mapping[str, ArrayLike]) -> TrajectorySource:
    """Read trajectories that lie end to end in D4RL-style arrays ``[N, ...]``.

    A terminal, a timeout or the end of the arrays ends one. Without ``next_observations`` its last
    step is dropped if a value would bootstrap there, see :class:`Trajectory`.

    Args:
        arrays: ``observations``, ``actions``, ``rewards``, ``terminals`` and, where known,
            ``timeouts`` and ``next_observations``; for example an open ``h5py.File``.

    Raises:
        TrajectoryError: for a missing array, other lengths, or flags that are neither 0 nor 1.

    Example:
        >>> source = read_d4rl({
        ...     "observations": np.zeros((5, 3)), "actions": np.zeros(5), "rewards": np.ones(5),
        ...     "terminals": np.arange(5) == 1, "timeouts": np.arange(5) == 4})
        >>> [len(trajectory) for trajectory in source]
        [2, 3]
    """
    arrays_of.require_names("D4RL-style arrays", _D4RL_ARRAYS, [*arrays], "Rename yours.")
    known = {*_D4RL_ARRAYS, "timeouts", "next_observations"}
    lengths = {name: np.shape(arrays[name])[0] for name in known & {*arrays}}
    is_alike = len({*lengths.values()}) == 1
    arrays_of.require(is_alike, f"D4RL-style arrays must be of one length, got {lengths}.")
    after = arrays.get("next_observations")
    terminal = arrays_of.flags("terminals", arrays["terminals"]).numpy()
    timeout = arrays_of.flags("timeouts", arrays.get("timeouts", 0 * terminal)).numpy()
    spans = _spans(terminal | timeout)
    if after is None:  # a lone step that leads nowhere known is no trajectory
        spans = [one for one in spans if one.stop - one.start > 1 or terminal[one.start]]

    def load(number: int) -> Trajectory:
        steps = spans[number]
        observation = arrays["observations"][steps]
        if after is not None:
            observation = np.concatenate([observation, after[steps][-1:]])
        given = arrays["actions"][steps], arrays["rewards"][steps], terminal[steps], timeout[steps]
        return Trajectory(observation, *given)

    return TrajectorySource(len(spans), sum(span.stop - span.start for span in spans), load)


def _spans(is_last: np.ndarray) -> list[slice]:
    stops = np.union1d(np.flatnonzero(is_last) + 1, len(is_last)).tolist()
    return [slice(*span) for span in pairwise([0, *stops])]


def read_amago(source: str | Path | Iterable[str | Path]) -> TrajectorySource:
    """Read trajectories that AMAGO 3.x saved (``save_trajs_as="npz"``).

    ``source`` is a run's folder ``buffer/fifo`` or ``buffer/protected``, or a list of files; a
    missing one raises FileNotFoundError.

    Example:
        >>> np.savez(
        ...     "0.npz", _OBS_KEY_observation=np.zeros((3, 4)), rl2s=np.zeros((3, 3)),
        ...     time_idxs=np.arange(3), rews=np.ones(2), actions=np.eye(2), dones=[False, True])
        >>> read_amago(".").num_steps
        2
    """
    is_folder = isinstance(source, str | Path)
    files = sorted(Path(source).rglob("*.npz")) if is_folder else [Path(file) for file in source]
    if absent := [file for file in files or [Path(source, "*.npz")] if not file.is_file()]:
        raise FileNotFoundError(f"no trajectories of AMAGO: {absent[0]} isn't there.")
    sizes = len(files), sum(map(_count_steps, files))
    return TrajectorySource(*sizes, lambda number: _load_amago(files[number]))


def _read_npz(file: Path, *names: str) -> dict[str, np.ndarray]:
    try:
        # Opened here, because numpy leaves the file of a damaged archive open.
        with file.open("rb") as stream, np.load(stream) as archive:
            return {name: archive[name] for name in names or archive}
    except (*_UNREADABLE, KeyError) as error:
        rule = f"{file} must be a whole .npz file without pickles, and can't be read"
        raise TrajectoryError(f"{rule} ({error}). Copy it again.") from error


def _count_steps(file: Path) -> int:
    try:
        return len(_read_npz(file, "actions")["actions"])
    except (TrajectoryError, TypeError):
        return 0  # raises when it is loaded


def _load_amago(file: Path) -> Trajectory:
    arrays, remedy = _read_npz(file), "Give files that AMAGO wrote with save_trajs_as='npz'."
    arrays_of.require_names(str(file), _AMAGO_ARRAYS, arrays, remedy)
    before, time = arrays["rl2s"], arrays["time_idxs"]
    rule = f"rl2s of {file} must hold previous reward and action, [S, 1 + A], got {before.shape}"
    arrays_of.require(before.ndim == 2, f"{rule}. {remedy}")
    prefix = "_OBS_KEY_"
    entries = {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}
    entries |= {keys.PREV_REWARD: before[:, :1], keys.PREV_ACTION: before[:, 1:]}
    entries |= {keys.TIME_IDX: time, keys.IS_INIT: time == 0}
    terminated = arrays_of.flags(f"dones of {file}", arrays["dones"])
    steps = entries, arrays["actions"], arrays["rews"], terminated, torch.zeros_like(terminated)
    return Trajectory(*steps, "vector")


def read_torchrl(
    dataset: ReplayBuffer | TensorDictBase,
    *,
    action_form: ActionForm | None = None,
    action_key: NestedKey = keys.ACTION,
    reward_key: NestedKey = "reward",
) -> TrajectorySource:
    """Read the trajectories of one of TorchRL's datasets, such as ``D4RLExperienceReplay``.

    TorchRL 0.14.1's ``MinariExperienceReplay`` holds zeros: use :func:`read_minari`.

    Args:
        dataset: the dataset, a buffer of whole trials, or steps ``[N]``, one trajectory after the
            other; ``("next", "done")`` marks the last step of each.
        action_form: see :class:`Trajectory`; by default ``"policy"`` for a ``TrialReplayBuffer``
            and for steps that hold ``"prev_action"``, as our collectors write them, else ``"env"``.
        action_key: action; ``reward_key`` is the reward under ``next``.

    Raises:
        TrajectoryError: if ``done`` is never set, or neither 0 nor 1.

    Example:
        >>> from tensordict import TensorDict
        >>> after = {"observation": [1, 2, 4, 5], "reward": [0] * 4, "done": [0, 1, 0, 1]}
        >>> root = {"observation": [0, 1, 3, 4], "action": [0] * 4}
        >>> source = read_torchrl(TensorDict({**root, "next": TensorDict(after, [4])}, [4]))
        >>> [trajectory.observation["observation"].tolist() for trajectory in source]
        [[0, 1, 2], [3, 4, 5]]
    """
    steps = dataset if isinstance(dataset, TensorDictBase) else dataset[:]
    done = arrays_of.flags("'done'", steps["next", "done"]).numpy()
    arrays_of.require(done.any(), "('next', 'done') must mark the last step of each trajectory.")
    if action_form is None:
        has_past = steps.get(keys.PREV_ACTION, None) is not None
        action_form = "policy" if has_past or isinstance(dataset, TrialReplayBuffer) else "env"
    spans, options = _spans(done), (action_key, reward_key, action_form)
    sizes = len(spans), len(steps)
    return TrajectorySource(*sizes, lambda n: arrays_of.from_steps(steps[spans[n]], *options))
