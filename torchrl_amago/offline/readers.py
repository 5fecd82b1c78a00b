"""Trajectories from datasets: Minari, D4RL-style arrays, AMAGO's files, TorchRL's datasets.

Readers read numbers: no code that a dataset holds or names (a pickle, an entry point) is run.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDictBase
from torchrl.data import ReplayBuffer

from torchrl_amago import keys
from torchrl_amago.data.replay.buffer import TrialReplayBuffer
from torchrl_amago.offline import trajectory as plain
from torchrl_amago.offline.trajectory import ActionForm, Trajectory, TrajectoryError

if TYPE_CHECKING:
    from minari import MinariDataset

# What numpy, zipfile and zlib raise for damaged archives and for files that are none.
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error)
_AMAGO_ARRAYS = ("rl2s", "time_idxs", "rews", "dones", "actions")


@dataclass(frozen=True)
class TrajectorySource:
    """A sequence of trajectories, each read by ``load(number)`` when it is needed.

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
        dataset: a loaded one, or the id of one in ``$MINARI_DATASETS_PATH``.
        download: let Minari download it.

    Raises:
        ImportError: without Minari; the message names the extra.
        FileNotFoundError: if there is no such dataset.

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
    ``next_observations`` the last observation is a placeholder for what a terminal led to, and any
    other trajectory's last step is dropped.

    Args:
        arrays: ``observations``, ``actions``, ``rewards``, ``terminals`` and, where known,
            ``timeouts`` and ``next_observations``; for example an open ``h5py.File``.

    Raises:
        ValueError: if an array is missing, lengths differ, or a flag is neither 0 nor 1.

    Example:
        >>> import numpy as np
        >>> source = read_d4rl({
        ...     "observations": np.zeros((5, 3)), "actions": np.zeros((5, 1)), "rewards": np.ones(5),
        ...     "terminals": np.arange(5) == 1, "timeouts": np.arange(5) == 4})
        >>> [len(trajectory) for trajectory in source]
        [2, 2]
    """
    names = ["observations", "actions", "rewards", "terminals"]
    remedy = "Rename yours, or give load_trials mappings."
    plain.require_names("D4RL-style arrays", names, [*arrays], remedy)
    names += [name for name in ("timeouts", "next_observations") if name in arrays]
    lengths = {name: np.shape(arrays[name])[0] for name in names}
    is_alike = len({*lengths.values()}) == 1
    plain.require(is_alike, f"D4RL-style arrays must be of one length, got {lengths}.")
    after = arrays.get("next_observations")
    terminal = plain.flags("terminals", arrays["terminals"]).numpy()
    timeout = plain.flags("timeouts", arrays.get("timeouts", np.zeros(len(terminal)))).numpy()
    first, last = _spans(terminal | timeout)
    drops_last = ~terminal[last] & (after is None)
    length = last - first + 1 - drops_last
    first, last, drops_last = (x[length > 0] for x in (first, last, drops_last))

    def load(number: int) -> Trajectory:
        begin, end, drops = first[number], last[number], bool(drops_last[number])
        observation = np.asarray(arrays["observations"][begin : end + 1])
        if not drops:
            final = observation[-1:] if after is None else after[end : end + 1]
            observation = np.concatenate([observation, final])
        steps = slice(begin, end + 1 - drops)
        truncated = timeout[steps].copy()
        truncated[-1] = timeout[end] or not terminal[end]
        given = arrays["actions"][steps], arrays["rewards"][steps], terminal[steps], truncated
        is_cut = drops or not (terminal[end] or timeout[end])
        has_final = after is not None or not terminal[end]
        return Trajectory(observation, *given, is_cut=is_cut, has_final_observation=has_final)

    return TrajectorySource("D4RL-style arrays", len(last), int(length.sum()), load)


def _spans(is_last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last step of each trajectory; the end of the arrays ends one too."""
    last = np.union1d(np.flatnonzero(is_last), len(is_last) - 1)
    return np.concatenate([[0], last[:-1] + 1]), last


def read_amago(source: str | Path | Iterable[str | Path]) -> TrajectorySource:
    """Read trajectories that AMAGO 3.x saved (``save_trajs_as="npz"``).

    Args:
        source: a folder (a run's ``buffer/fifo`` or ``buffer/protected``), searched with its
            folders, or the files themselves.

    Raises:
        FileNotFoundError: if there are no such files.

    Example:
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
        got = f"{[*absent, '*.npz'][0]} isn't there. Give the run's folder buffer/fifo."
        raise FileNotFoundError(f"there must be trajectories of AMAGO in {name}, and {got}")
    steps = sum(_count_steps(file) for file in files)
    return TrajectorySource(name, len(files), steps, lambda number: _load_amago(files[number]))


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
        return 0  # an error when it is loaded


def _load_amago(file: Path) -> Trajectory:
    arrays = _read_npz(file)
    remedy = "Give files that AMAGO wrote with save_trajs_as='npz'."
    plain.require_names(str(file), _AMAGO_ARRAYS, arrays, remedy)
    time = plain.numbers(f"time_idxs of {file}", arrays["time_idxs"]).reshape(-1).numpy()
    counts_up = time[0] >= 0 and np.array_equal(time, time[0] + np.arange(len(time)))
    rule = f"time_idxs of {file} must count up by 1, from 0 or more"
    plain.require(counts_up, f"{rule}, got {time[:8].tolist()}. {remedy}")
    before = arrays["rl2s"]
    rule = f"rl2s of {file} must hold previous reward and action of each step, [S, 1 + A]"
    is_right = before.ndim == 2 and len(before) == len(time)
    plain.require(is_right, f"{rule}, got {list(before.shape)}. {remedy}")
    prefix = "_OBS_KEY_"
    shown = {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}
    shown |= {keys.PREV_REWARD: before[:, :1], keys.PREV_ACTION: before[:, 1:]}
    shown |= {keys.TIME_IDX: time, keys.IS_INIT: time == 0}
    terminated = plain.flags(f"dones of {file}", arrays["dones"]).numpy()
    truncated = np.zeros_like(terminated)
    truncated[-1] = is_cut = not terminated[-1]
    steps = shown, arrays["actions"], arrays["rews"], terminated, truncated
    return Trajectory(*steps, action_form="vector", is_cut=is_cut)


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
        dataset: it, any buffer of whole trials, or steps ``[N]``, one trajectory after the other.
            ``("next", "done")`` marks the last step of each.
        action_form: see :class:`Trajectory`; default: ``"policy"`` for a :class:`TrialReplayBuffer`
            and for steps that hold ``"prev_action"``, as our collectors write them, else ``"env"``.
        action_key: of the action.
        reward_key: of the reward, under ``next``.

    Raises:
        ValueError: if ``done`` is neither 0 nor 1.

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
    done = plain.flags("'done'", steps.get(("next", "done"), np.zeros(len(steps)))).numpy()
    first, last = _spans(done)
    if action_form is None:
        has_past = steps.get(keys.PREV_ACTION, None) is not None
        action_form = "policy" if has_past or isinstance(dataset, TrialReplayBuffer) else "env"

    def load(number: int) -> Trajectory:
        piece = steps[first[number] : last[number] + 1]
        trajectory = plain.as_trajectory(piece, action_key, reward_key)
        return dataclasses.replace(trajectory, action_form=action_form)

    return TrajectorySource(type(dataset).__name__, len(last), len(steps), load)
