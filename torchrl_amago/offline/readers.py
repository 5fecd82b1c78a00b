"""Trajectories from datasets: Minari, D4RL-style arrays, AMAGO's files, TorchRL's datasets.

Readers read numbers: no code that a dataset holds or names (pickles, an environment's entry point) is run.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDictBase
from torchrl.data import ReplayBuffer

from torchrl_amago import keys
from torchrl_amago.data.replay.buffer import TrialReplayBuffer
from torchrl_amago.offline import trajectory as arrays_of
from torchrl_amago.offline.trajectory import ActionForm, Trajectory, TrajectoryError

if TYPE_CHECKING:
    from minari import MinariDataset

# What numpy, zipfile and zlib raise for damaged archives and for files that are none.
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error)


@dataclass(frozen=True)
class TrajectorySource:
    """Trajectories that ``load`` reads by number, when they are asked for.

    Example:
        >>> one = Trajectory([[0.0], [1.0]], [1], [0.5], [True], [False])
        >>> len(TrajectorySource("twice the same", 2, 2, lambda number: one)[0])
        1
    """

    name: str
    num_trajectories: int
    num_steps: int
    load: Callable[[int], Trajectory] = field(repr=False)

    def __len__(self) -> int:
        return self.num_trajectories

    def __getitem__(self, number: int) -> Trajectory:
        return self.load(range(self.num_trajectories)[number])

    def __iter__(self) -> Iterator[Trajectory]:
        # Not a generator, which would end with the first trajectory that can't be read.
        return map(self.load, range(self.num_trajectories))


def read_minari(dataset: str | MinariDataset, *, download: bool = False) -> TrajectorySource:
    """Read the episodes of a Minari dataset (https://minari.farama.org).

    Args:
        dataset: its id, which Minari looks for in ``$MINARI_DATASETS_PATH``; or one that is loaded.
        download: whether Minari may download it.

    Raises:
        ImportError: without Minari; the message names the extra.
        FileNotFoundError: where there is no such dataset.

    Example:
        >>> len(read_minari("mujoco/hopper/medium-v0"))  # doctest: +SKIP
        200
    """
    try:
        import minari
    except ImportError as error:
        missing = "read_minari needs the packages minari and h5py, which are not installed."
        raise ImportError(f"{missing} Run pip install 'torchrl-amago[offline]'.") from error
    if isinstance(dataset, str):
        dataset = minari.load_dataset(dataset, download=download)

    def load(number: int) -> Trajectory:
        one = dataset[number]
        ends = one.terminations, one.truncations
        return Trajectory(one.observations, one.actions, one.rewards, *ends)

    return TrajectorySource(dataset.id, dataset.total_episodes, dataset.total_steps, load)


def read_d4rl(arrays: Mapping[str, ArrayLike]) -> TrajectorySource:
    """Read trajectories that lie end to end in D4RL-style arrays ``[N, ...]``.

    A trajectory ends with a terminal, a timeout or the arrays; the last cut it off. Without
    ``next_observations`` the last observation stands in for what a terminal led to, and any other
    trajectory's last step is given up.

    Args:
        arrays: ``observations``, ``actions``, ``rewards``, ``terminals`` and, where known, ``timeouts``
            and ``next_observations``; for example an open ``h5py.File``.

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
    remedy = "Rename yours, or give load_trials mappings."
    arrays_of.require("D4RL-style arrays", needed, [*arrays], remedy)
    names = [name for name in (*needed, "timeouts", "next_observations") if name in arrays]
    shapes = {name: np.shape(arrays[name]) for name in names}
    size, following = shapes["terminals"][0], arrays.get("next_observations")
    is_same = shapes.get("next_observations", shapes["observations"]) == shapes["observations"]
    if {shape[0] for shape in shapes.values()} != {size} or not size or not is_same:
        rule = (
            "must be of one length, at least 1, and observations and next_observations of one shape"
        )
        raise ValueError(f"D4RL-style arrays {rule}, got {shapes}. Take all from one dataset.")
    terminal = arrays_of.flags("terminals", arrays["terminals"]).numpy()
    timeout = arrays_of.flags("timeouts", arrays.get("timeouts", np.zeros(size))).numpy()
    first, last = _spans(terminal | timeout)
    is_shortened = ~terminal[last] & (following is None)
    length = last - first + 1 - is_shortened
    first, last, is_shortened = (x[length > 0] for x in (first, last, is_shortened))

    def load(number: int) -> Trajectory:
        begin, end, shortened = first[number], last[number], bool(is_shortened[number])
        observation = np.asarray(arrays["observations"][begin : end + 1])
        if not shortened:
            after = observation[-1:] if following is None else following[end : end + 1]
            observation = np.concatenate([observation, after])
        rows = slice(begin, end + 1 - shortened)
        truncated = timeout[rows].copy()
        truncated[-1] = timeout[end] or not terminal[end]
        ends = terminal[rows], truncated
        return Trajectory(
            *(observation, arrays["actions"][rows], arrays["rewards"][rows], *ends),
            is_cut=shortened or not (terminal[end] or timeout[end]),
            last_is_stand_in=following is None and bool(terminal[end]),
        )

    return TrajectorySource("D4RL-style arrays", len(last), int(length.sum()), load)


def _spans(is_last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last step of each trajectory; the arrays' end is one, too."""
    last = np.union1d(np.flatnonzero(is_last), len(is_last) - 1)
    return np.concatenate([[0], last[:-1] + 1]), last


def read_amago(source: str | Path | Iterable[str | Path]) -> TrajectorySource:
    """Read the trajectories that AMAGO 3.x writes, one ``.npz`` file each.

    Its files don't tell a time limit from a fragment's end: either is read as cut off. A fragment's
    first step remembers what came before it. Pickled ``.traj`` files aren't read: they could run code.

    Args:
        source: a folder, such as ``<run>/buffer/fifo``, searched with all below it, or the files.

    Raises:
        FileNotFoundError: where there is no such file.

    Example:
        >>> import numpy as np
        >>> np.savez(
        ...     "0.npz", _OBS_KEY_observation=np.zeros((3, 4)), rl2s=np.zeros((3, 3)),
        ...     time_idxs=np.arange(3), rews=np.ones(2), actions=np.eye(2), dones=[False, True])
        >>> read_amago(".").num_steps
        2
    """
    is_folder = isinstance(source, str | Path)
    files = sorted(Path(source).rglob("*.npz")) if is_folder else [Path(file) for file in source]
    name = str(source) if is_folder else f"{len(files)} files"
    absent = [str(file) for file in files if not file.is_file()]
    if absent or not files:
        got = (
            f"{[*absent, '*.npz'][0]} isn't there. Give the run's folder buffer/fifo or protected."
        )
        raise FileNotFoundError(f"there must be trajectories of AMAGO in {name}, and {got}")
    steps = sum(_count_steps(file) for file in files)
    return TrajectorySource(name, len(files), steps, lambda number: _load_amago(files[number]))


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
        rule = f"{file} must be a whole .npz file without pickles, and can't be read"
        raise TrajectoryError(f"{rule} ({error}). Copy it again.") from error
    remedy = "Give files that AMAGO wrote with save_trajs_as='npz'."
    needed = ("rl2s", "time_idxs", "rews", "dones", "actions")
    arrays_of.require(str(file), needed, arrays, remedy)
    time = arrays_of.numbers(f"time_idxs of {file}", arrays["time_idxs"]).reshape(-1).numpy()
    if not len(time) or time[0] < 0 or not np.array_equal(time, time[0] + np.arange(len(time))):
        rule = f"time_idxs of {file} must count up by 1, from 0 or more"
        raise TrajectoryError(f"{rule}, got {time[:8].tolist()}. {remedy}")
    before = arrays["rl2s"]
    if before.shape[:1] != time.shape or before.ndim != 2:
        rule = f"rl2s of {file} must hold previous reward and action of each step, [S, 1 + A]"
        raise TrajectoryError(f"{rule}, got {list(before.shape)}. {remedy}")
    prefix = "_OBS_KEY_"
    shown = {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}
    shown |= {keys.PREV_REWARD: before[:, :1], keys.PREV_ACTION: before[:, 1:]}
    shown |= {keys.TIME_IDX: time, keys.IS_INIT: time == 0}
    terminated = arrays_of.flags(f"dones of {file}", arrays["dones"]).numpy()
    truncated = np.zeros_like(terminated)
    truncated[-1:] = ~terminated[-1:]
    steps = shown, arrays["actions"], arrays["rews"], terminated, truncated
    return Trajectory(*steps, action_form="vector", is_cut=not terminated[-1:].any())


def read_torchrl(
    dataset: ReplayBuffer | TensorDictBase,
    *,
    action_form: ActionForm | None = None,
    action_key: NestedKey = keys.ACTION,
    reward_key: NestedKey = "reward",
) -> TrajectorySource:
    """Read the trajectories of one of TorchRL's datasets, such as ``D4RLExperienceReplay``.

    Not of ``MinariExperienceReplay``, which in TorchRL 0.14.1 holds zeros: use :func:`read_minari`.

    Args:
        dataset: it, any buffer of whole trials, or steps ``[N]``, those of a trajectory side by side,
            the last one marked by ``("next", "done")``.
        action_form: see :class:`Trajectory`; default: ``"policy"`` for a :class:`TrialReplayBuffer` and
            for steps that hold ``"prev_action"``, as our collectors write them, else ``"env"``.
        action_key: of the action; likewise ``reward_key``, under ``next``.

    Raises:
        ValueError: where the steps have no ends, or ``done`` is neither 0 nor 1.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> done, zero = torch.tensor([False, True, False, True]), torch.zeros(4)
        >>> after = {"observation": torch.tensor([1, 2, 4, 5]), "done": done, "reward": zero}
        >>> root = {"observation": torch.tensor([0, 1, 3, 4]), "action": zero}
        >>> [trajectory.observation["observation"].tolist()
        ...     for trajectory in read_torchrl(TensorDict({**root, "next": after}, [4]))]
        [[0, 1, 2], [3, 4, 5]]
    """
    steps = dataset if isinstance(dataset, TensorDictBase) else dataset[:]
    done = arrays_of.flags("'done'", steps.get(("next", "done"), np.zeros(len(steps)))).numpy()
    if not done.any():
        rule = "a dataset's steps must mark each trajectory's last one in ('next', 'done')"
        raise ValueError(f"{rule}, and none is marked. Set it; read Minari's data by read_minari.")
    first, last = _spans(done)
    if action_form is None:
        remembers = steps.get(keys.PREV_ACTION, None) is not None
        action_form = "policy" if remembers or isinstance(dataset, TrialReplayBuffer) else "env"

    def load(number: int) -> Trajectory:
        piece = steps[first[number] : last[number] + 1]
        trajectory = arrays_of.as_trajectory(piece, action_key, reward_key)
        return dataclasses.replace(trajectory, action_form=action_form)

    return TrajectorySource(type(dataset).__name__, len(last), len(steps), load)
