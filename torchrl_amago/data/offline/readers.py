"""Trajectories from datasets: Minari, D4RL-style arrays, AMAGO's files, TorchRL's datasets."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDictBase
from torchrl.data import ReplayBuffer

from torchrl_amago import keys
from torchrl_amago.data.offline.arrays import flags, numbers
from torchrl_amago.data.offline.trajectory import (
    ActionForm,
    Trajectory,
    TrajectoryError,
    as_trajectory,
)
from torchrl_amago.data.replay.buffer import TrialReplayBuffer

if TYPE_CHECKING:
    from minari import MinariDataset

_AMAGO_OBSERVATION = "_OBS_KEY_"
_AMAGO_ARRAYS = ("rl2s", "time_idxs", "rews", "dones", "actions")

# What numpy, zipfile and zlib raise for damaged archives and for files that are none.
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class TrajectorySource:
    """Trajectories that are read when they are asked for.

    Args:
        name: what they are called in messages.
        num_trajectories: how many there are.
        num_steps: steps of all together.
        load: gives the trajectory of a number from 0.

    Example:
        >>> one = Trajectory([[0.0], [1.0]], [1], [0.5], [True], [False])
        >>> source = TrajectorySource("twice the same", 2, 2, lambda number: one)
        >>> [len(trajectory) for trajectory in source]
        [1, 1]
    """

    name: str
    num_trajectories: int
    num_steps: int
    load: Callable[[int], Trajectory] = field(repr=False)

    def __len__(self) -> int:
        return self.num_trajectories

    def __getitem__(self, number: int) -> Trajectory:
        if not 0 <= number < self.num_trajectories:
            raise IndexError(number)
        return self.load(number)

    def __iter__(self) -> Iterator[Trajectory]:
        return map(self.load, range(self.num_trajectories))


def read_minari(dataset: str | MinariDataset, *, download: bool = False) -> TrajectorySource:
    """The episodes of a Minari dataset (https://minari.farama.org).

    Args:
        dataset: its id, such as ``"mujoco/hopper/medium-v0"``; Minari looks for it in
            ``$MINARI_DATASETS_PATH``, by default ``~/.minari/datasets``. Or one that is loaded.
        download: whether Minari may download it.

    Raises:
        ImportError: without Minari; the message names the extra.
        FileNotFoundError: where there is no such dataset.

    Example:
        >>> len(read_minari("pendulum/none-v0"))  # doctest: +SKIP
        200
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(
            "read_minari needs the packages minari and h5py, which are not installed. Install them "
            "with: pip install 'torchrl-amago[offline]'"
        ) from error
    if isinstance(dataset, str):
        dataset = minari.load_dataset(dataset, download=download)

    def load(number: int) -> Trajectory:
        episode = dataset[number]
        return Trajectory(
            episode.observations,
            episode.actions,
            episode.rewards,
            episode.terminations,
            episode.truncations,
        )

    return TrajectorySource(dataset.id, dataset.total_episodes, dataset.total_steps, load)


def read_d4rl(arrays: Mapping[str, ArrayLike]) -> TrajectorySource:
    """Trajectories that lie end to end in D4RL-style arrays ``[N, ...]``.

    ``observations``, ``actions``, ``rewards`` and ``terminals`` are needed; ``timeouts`` and
    ``next_observations`` are used where they exist. A trajectory ends with a terminal, a timeout or
    the arrays; where the arrays end it, it is cut off, and its value bootstraps. Without
    ``next_observations`` nothing tells what the last step led to. After a terminal the last
    observation stands in for it, and :func:`load_trials` gives the step up where the trial isn't
    terminated by it. Otherwise the last step is given up here: the trajectory is cut off before it,
    its observation is what the one before led to, and a trajectory of that step alone is left out.

    Args:
        arrays: by name, for example an open ``h5py.File``.

    Raises:
        ValueError: where an array is missing, lengths or shapes differ, or a flag is neither 0 nor 1.

    Example:
        >>> import numpy as np
        >>> source = read_d4rl({
        ...     "observations": np.zeros((5, 3)), "actions": np.zeros((5, 1)), "rewards": np.ones(5),
        ...     "terminals": np.arange(5) == 1, "timeouts": np.arange(5) == 4})
        >>> [len(trajectory) for trajectory in source]
        [2, 2]
    """
    needed = ("observations", "actions", "rewards", "terminals")
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(
            f"D4RL-style arrays are called {', '.join(needed)}, got {sorted(arrays)} without "
            f"{', '.join(missing)}. Rename yours, or give load_trials one mapping per trajectory."
        )
    terminal = flags("terminals", arrays["terminals"]).numpy()
    size = len(terminal)
    timeout = np.zeros(size, dtype=bool)
    if "timeouts" in arrays:
        timeout = flags("timeouts", arrays["timeouts"]).numpy()
    known = [name for name in (*needed, "timeouts", "next_observations") if name in arrays]
    lengths = {name: len(arrays[name]) for name in known}
    if set(lengths.values()) != {size} or not size:
        raise ValueError(
            f"D4RL-style arrays must be of one length, at least 1, got {lengths}. Cut them alike."
        )
    last = np.union1d(np.flatnonzero(terminal | timeout), size - 1)
    first = np.concatenate([[0], last[:-1] + 1])
    following = arrays.get("next_observations")
    if following is not None:
        shape, other = (np.shape(x)[1:] for x in (arrays["observations"], following))
        if shape != other:
            raise ValueError(
                f"observations and next_observations must be of one shape, got {shape} and {other}. "
                "Take both from one dataset, or leave next_observations out."
            )
    is_shortened = ~terminal[last] if following is None else np.zeros(len(last), dtype=bool)
    length = last - first + 1 - is_shortened
    first, last, is_shortened = (x[length > 0] for x in (first, last, is_shortened))

    def load(number: int) -> Trajectory:
        begin, end = first[number], last[number]
        rows = slice(begin, end + 1)
        observation = np.asarray(arrays["observations"][rows])
        if is_shortened[number]:
            rows = slice(begin, end)
        else:
            after = observation[-1:] if following is None else np.asarray(following[end : end + 1])
            observation = np.concatenate([observation, after])
        truncated = timeout[rows].copy()
        truncated[-1:] = timeout[end] or not terminal[end]
        return Trajectory(
            observation,
            arrays["actions"][rows],
            arrays["rewards"][rows],
            terminal[rows],
            truncated,
            is_cut=bool(is_shortened[number]) or not (terminal[end] or timeout[end]),
            last_is_stand_in=following is None and bool(terminal[end]),
        )

    return TrajectorySource("D4RL-style arrays", len(last), int(length.sum()), load)


def read_amago(source: str | Path | Iterable[str | Path]) -> TrajectorySource:
    """The trajectories that AMAGO 3.x writes, one ``.npz`` file each.

    Its files don't tell a time limit from a fragment's end: either is read as cut off, whose value
    bootstraps. A fragment's first step remembers, as there, what came before it. Pickled
    ``.traj`` files aren't read: they could run code.

    Args:
        source: a folder, such as ``<run>/buffer/fifo``, searched with all below it, or the files.

    Raises:
        FileNotFoundError: where there is no such file.

    Example:
        >>> import numpy as np
        >>> np.savez(
        ...     "0.npz", _OBS_KEY_observation=np.zeros((3, 4)), rl2s=np.zeros((3, 3)),
        ...     time_idxs=np.arange(3)[:, None], rews=np.ones((2, 1)), actions=np.eye(2),
        ...     dones=np.array([[False], [True]]))
        >>> read_amago(".").num_steps
        2
    """
    if isinstance(source, str | Path):
        name, files = str(source), sorted(Path(source).rglob("*.npz"))
    else:
        files = [Path(file) for file in source]
        name = f"{len(files)} files"
    if not files or not all(file.is_file() for file in files):
        absent = [str(file) for file in files if not file.is_file()] or ["*.npz"]
        raise FileNotFoundError(
            f"there must be trajectories of AMAGO in {name}, and {absent[0]} isn't there. Give the "
            "folder that holds the run's .npz files, <run>/buffer/fifo or protected."
        )
    steps = sum(_count_steps(file) for file in files)
    return TrajectorySource(name, len(files), steps, lambda number: _load_amago(files[number]))


def read_torchrl(
    dataset: ReplayBuffer | TensorDictBase,
    *,
    action_form: ActionForm | None = None,
    action_key: NestedKey = keys.ACTION,
    reward_key: NestedKey = "reward",
) -> TrajectorySource:
    """The trajectories of one of TorchRL's datasets, such as ``D4RLExperienceReplay``.

    Not of ``MinariExperienceReplay``, which in TorchRL 0.14.1 holds nothing but zeros: that is what
    :func:`read_minari` is for.

    Args:
        dataset: it, or its steps ``[N]``, those of a trajectory side by side, the last one marked by
            ``("next", "done")``. Any buffer of whole trials will do.
        action_form: see :class:`Trajectory`; default: ``"policy"`` for a :class:`TrialReplayBuffer` and
            for steps that hold ``"prev_action"``, as our collectors write them, else ``"env"``.
        action_key: of the action; likewise ``reward_key``, under ``next``.

    Raises:
        ValueError: where the steps have no ends, or ``done`` is neither 0 nor 1.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([0, 1, 0, 1], dtype=torch.bool).unsqueeze(-1)
        >>> after = {"observation": torch.tensor([1, 2, 4, 5]), "done": done}
        >>> steps = TensorDict({"observation": torch.tensor([0, 1, 3, 4]), "next": after}, [4])
        >>> [trajectory.observation["observation"].tolist() for trajectory in read_torchrl(
        ...     steps.set("action", torch.zeros(4)).set(("next", "reward"), torch.zeros(4)))]
        [[0, 1, 2], [3, 4, 5]]
    """
    steps = dataset if isinstance(dataset, TensorDictBase) else dataset[:]
    done = steps.get(("next", "done"), None)
    done = None if done is None else flags("'done'", done)
    if done is None or not done.any():
        raise ValueError(
            "a dataset's steps must mark the last one of each trajectory in ('next', 'done'), and "
            "none is marked. Set it, or give load_trials the trajectories one by one; of Minari's data, "
            "which TorchRL 0.14.1 reads as zeros, with read_minari."
        )
    last = done.nonzero().squeeze(-1).tolist()
    if last[-1] != len(steps) - 1:
        last.append(len(steps) - 1)
    first = [0, *(end + 1 for end in last[:-1])]
    if action_form is None:
        remembers = steps.get(keys.PREV_ACTION, None) is not None
        action_form = "policy" if remembers or isinstance(dataset, TrialReplayBuffer) else "env"

    def load(number: int) -> Trajectory:
        piece = steps[first[number] : last[number] + 1]
        trajectory = as_trajectory(piece, action_key, reward_key)
        return dataclasses.replace(trajectory, action_form=action_form)

    return TrajectorySource(type(dataset).__name__, len(last), len(steps), load)


def _count_steps(file: Path) -> int:
    try:
        with file.open("rb") as stream, np.load(stream) as arrays:
            return len(arrays["actions"])
    except (*_UNREADABLE, KeyError):
        return 0  # told, with its number, when it is loaded


def _load_amago(file: Path) -> Trajectory:
    try:
        # Opened here, because numpy leaves the file of a damaged archive open.
        with file.open("rb") as stream, np.load(stream) as archive:
            arrays: dict[str, Any] = dict(archive)
    except _UNREADABLE as error:
        raise TrajectoryError(
            f"{file} must be a whole .npz file without pickled objects, and can't be read ({error}). "
            "Copy it again."
        ) from error
    missing = [name for name in _AMAGO_ARRAYS if name not in arrays]
    if missing:
        raise TrajectoryError(
            f"{file} must hold {', '.join(_AMAGO_ARRAYS)}, got {sorted(arrays)}. Give files that "
            "AMAGO wrote with save_trajs_as='npz'."
        )
    time = numbers(f"time_idxs of {file}", arrays["time_idxs"]).reshape(-1).numpy()
    if not len(time) or not np.array_equal(time, time[0] + np.arange(len(time))):
        raise TrajectoryError(
            f"the time index of {file} must count up by 1, got {time[:8].tolist()}, ... Give each "
            "trajectory a file of its own."
        )
    before = arrays["rl2s"]
    if before.ndim != 2 or not before.size:
        raise TrajectoryError(
            f"rl2s of {file} must hold the previous reward and action of each step, [S, 1 + A], got "
            f"{list(before.shape)}. Give files that AMAGO wrote with save_trajs_as='npz'."
        )
    terminated = flags(f"dones of {file}", arrays["dones"]).numpy()
    truncated = np.zeros_like(terminated)
    truncated[-1:] = ~terminated[-1:]
    return Trajectory(
        {
            name.removeprefix(_AMAGO_OBSERVATION): value
            for name, value in arrays.items()
            if name.startswith(_AMAGO_OBSERVATION)
        },
        arrays["actions"],
        arrays["rews"],
        terminated,
        truncated,
        action_form="vector",
        first_time=time[0],
        first_prev_action=before[0, 1:],
        first_prev_reward=before[0, 0],
        is_cut=not terminated[-1:].any(),
    )
