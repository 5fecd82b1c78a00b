"""Offline data from logs of Pokemon battles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from torchrl_amago.offline.readers import TrajectorySource
from torchrl_amago.offline.trajectory import Trajectory, TrajectoryError

# What poke-env raises for messages that contradict each other.
_UNPARSABLE = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class ShowdownLogs(TrajectorySource):
    """Battles of one player; ``skipped[n]`` counts decisions left out of battle n, once read."""

    skipped: dict[int, int] = dataclasses.field(default_factory=dict)


def read_showdown_logs(
    paths: str | Path | Iterable[str | Path], *, player: str = "p1", task_id: int = 0
) -> ShowdownLogs:
    """Read battle logs of Pokemon Showdown as trajectories of ``PokemonBattles``, one a battle.

    A row is what the player knew before a decision, as far as the log says it: its entries are
    ``observation``, ``action_mask``, ``success`` and ``task_id``. The own team are the Pokemon and
    moves that the whole log shows, in the order in which they appear; the opponent's are those
    shown before the decision. The mask allows all of the own ones that haven't fainted. Decisions
    that the log hides, and those without a choice, are left out; docs/domains.md says which.

    Args:
        paths: a file, or several: the site's ``.log`` and ``.json``, a server's ``.log.json``, and
            ``.html`` of poke-env's ``save_replays``.
        player: ``"p1"``, ``"p2"``, or a user name.
        task_id: entry of that name, for environments with an opponent's number.

    Raises:
        ImportError: without poke-env.
        FileNotFoundError: for a missing file.
        TrajectoryError: when a battle is read, if it can't be parsed or lacks the player.

    Example:
        >>> source = read_showdown_logs(Path("logs").glob("*.log"))  # doctest: +SKIP
        >>> report = load_trials(buffer, source, env, on_error="skip")  # doctest: +SKIP
    """
    from torchrl_amago.envs.libs.pokemon import BothSides  # says what is missing
    from torchrl_amago.offline._showdown_replay import BattleReplay

    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"no log of a battle: {absent[0]} isn't there.")
    env, skipped = BothSides(start_listening=False), {}

    def load(number: int) -> Trajectory:
        try:
            replay = BattleReplay(files[number], player, env)
            trajectory = replay.trajectory()
        except _UNPARSABLE as error:
            rule = "must be the log of a battle that poke-env can parse"
            raise TrajectoryError(f"{files[number]} {rule}, got {error!r}.") from error
        skipped[number] = replay.skipped
        task = {"task_id": np.full(len(trajectory) + 1, task_id)}
        return dataclasses.replace(trajectory, observation={**trajectory.observation, **task})

    return ShowdownLogs(len(files), None, load, skipped)
