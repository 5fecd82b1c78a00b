"""Tasks and methods of the suite, and methods of a user's own file."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Task:
    """A task: an example with its horizon, its size and its number of environments.

    Attributes:
        title: name in tables and figures.
        command: example and arguments; everything else is the example's default.
        chance: mean return of uniformly random actions.
        reference: return that counts as 1.
        threshold: return from which the task counts as learned.
        seeds: number of seeds by default.
    """

    title: str
    command: str
    chance: float
    reference: float
    threshold: float
    seeds: int = 3

    def normalized(self, score: float) -> float:
        """Return a score on the scale where chance is 0 and the reference is 1."""
        return (score - self.chance) / (self.reference - self.chance)


LAKE, MAZE = "00_meta_frozen_lake.py", "04_tmaze.py --corridor"
GYM, POPGYM = "01_basic_gym.py --env-id", "03_popgym.py --env-ids"
CHEETAH, OFFLINE = "12_half_cheetah_vel.py", "14_offline_to_online.py"

# Chance: 64 to 6,144 trials of uniformly random actions (Mountain Car: never there).
# References: the exact optimum (lake-3), that of an agent that knows the room (key-door), RL Zoo's
# DQN (acrobot), the best of docs/results.md (pendulum), the return that Gymnasium calls solved
# (lunar-lander, mountain-car); elsewhere the most that rewards allow, which may be out of reach.
TASKS = {
    "lake-3": Task("Frozen lake 3x3", LAKE, 0.35, 4.496, 4.4, 5),
    "lake-5": Task("Frozen lake 5x5", f"{LAKE} --size 5 --episodes 10", 0.11, 10, 7, 5),
    "lake-held-out": Task("Lake, new layouts", f"{LAKE} --hold-out-layouts", 0.24, 5, 4, 5),
    "tmaze-50": Task("T-Maze 50", f"{MAZE} 50", -0.75, 1, 0.9),
    "tmaze-100": Task("T-Maze 100", f"{MAZE} 100", -0.75, 1, 0.9),
    "tmaze-200": Task("T-Maze 200", f"{MAZE} 200", -0.75, 1, 0.9),
    "key-door": Task("Dark Key-to-Door", "05_dark_key_door.py", 2.02, 36, 20),
    "maze-runner": Task("MazeRunner", "13_mazerunner_relabeling.py", 0.21, 2, 1.6),
    "cart-pole": Task(
        "CartPole, positions", f"{GYM} CartPole-v1 --mask-velocities", 23.2, 500, 475
    ),
    "pendulum": Task("Pendulum", f"{GYM} Pendulum-v1", -1206, -150, -200),
    "acrobot": Task("Acrobot", f"{GYM} Acrobot-v1", -500, -72.1, -110),
    "lunar-lander": Task("LunarLander", f"{GYM} LunarLander-v3 --batch-size 128", -194, 200, 200),
    "mountain-car": Task("Mountain Car", f"{GYM} MountainCar-v0", -200, -110, -110),
    "half-cheetah-vel": Task("Half-Cheetah velocity", CHEETAH, -947, 0, -300),
    "offline-pendulum": Task("Pendulum, offline first", OFFLINE, -1206, -150, -200),
    "repeat-first": Task("RepeatFirst", f"{POPGYM} RepeatFirstEasy", -0.49, 1, 0.9),
    "repeat-previous": Task("RepeatPrevious", f"{POPGYM} RepeatPreviousEasy", -0.502, 1, 0.9),
    "autoencode": Task("Autoencode", f"{POPGYM} AutoencodeEasy", -0.517, 1, 0.5),
    "count-recall": Task("CountRecall", f"{POPGYM} CountRecallEasy", -0.919, 1, 0.2),
    "higher-lower": Task("HigherLower", f"{POPGYM} HigherLowerEasy", -0.001, 1, 0.5),
    "minesweeper": Task("Minesweeper", f"{POPGYM} MineSweeperEasy", -0.229, 1, 0.3),
    "battleship": Task("Battleship", f"{POPGYM} BattleshipEasy", -0.435, 1, 0.1),
    "noisy-cart-pole": Task(
        "CartPole, noisy positions", f"{POPGYM} NoisyPositionOnlyCartPoleEasy", 0.112, 1, 0.9
    ),
}


@dataclass(frozen=True)
class Method:
    """An agent's command and the table that it writes.

    Attributes:
        name: name of its folders.
        command: shell words with `{task}`, `{seed}`, `{run_dir}` and `{seconds}`; own methods have
            `{python}`, `{examples}` (a folder), `{example}` (the task's command) and `{options}`
            (without its file), too.
        title: name in tables and figures; default `name`.
        tasks: tasks that it can play; default all.
        table: CSV file in `run_dir`, a row for each evaluation or more.
        time: column of seconds that count; a cell stops when it reaches the limit.
        frames: column of environment steps.
        score: column of the return per trial; empty cells are no evaluations.
        resume: words that go on with an interrupted run; without them it begins anew.
        finish: words that end a run after the limit by its last evaluation, with `{updates}`.
        debug: words of a run of seconds.
    """

    name: str
    command: str
    title: str = ""
    tasks: tuple[str, ...] = tuple(TASKS)
    table: str = "progress.csv"
    time: str = "seconds"
    frames: str = "frames"
    score: str = "return"
    resume: str = ""
    finish: str = ""
    debug: str = ""

    @property
    def keeps_time(self) -> bool:
        """The command is given the limit, and ends by itself."""
        return "{seconds}" in self.command


def _own_methods() -> Iterator[Method]:
    ends = "--threads 1 --seed {seed} --run-dir {run_dir}"
    common = dict(time="seconds_training", score="eval/trial_return", debug="--debug")
    losses = {"amago": "AMAGO", "amago2": "AMAGO-2"}
    models = {"transformer": "Transformer", "gru": "GRU", "feedforward": "without memory"}
    for loss, model in itertools.product(losses, models):
        yield Method(
            f"{loss}-{model}",
            f"{{python}} {{examples}}/{{example}} --loss {loss} --seq-model {model} {ends}",
            f"{losses[loss]} {models[model]}",
            resume="--resume",
            finish="--resume --total-updates {updates}",
            **common,
        )
    for model in ("transformer", "gru"):
        yield Method(
            f"ppo-{model}",
            f"{{python}} {{examples}}/ppo_with_memory.py {{options}} --seq-model {model} {ends}",
            f"PPO {models[model]}",
            tasks=tuple(task for task in TASKS if task.startswith("lake")),
            **common,
        )


METHODS = {method.name: method for method in _own_methods()}


@dataclass(frozen=True)
class Cell:
    """A method with a seed at a task, and the folder of its run."""

    root: Path
    task: str
    method: Method
    seed: int
    minutes: float
    debug: bool = False

    def __str__(self) -> str:
        return f"{self.task}/{self.method.name}/{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the cell; its run writes into `run` inside."""
        return self.root / str(self)

    def command(self, python: str = "python", more: str = "") -> list[str]:
        """Return the words of the command, the last of them being `more`."""
        values = dict(
            python=shlex.quote(python),
            example=TASKS[self.task].command,
            options=TASKS[self.task].command.partition(" ")[2],
            examples=shlex.quote(os.path.relpath(ROOT / "examples")),
            task=self.task,
            seed=self.seed,
            run_dir=shlex.quote(str(self.folder / "run")),
            seconds=round(60 * self.minutes),
        )
        words = shlex.split(self.method.command.format(**values))
        return [*words, *shlex.split(self.method.debug if self.debug else ""), *shlex.split(more)]


def read_peers(path: Path) -> dict[str, Method]:
    """Read methods from a TOML file of `[[peer]]` tables, or a JSON file of such a list.

    Raises:
        ValueError: if an entry isn't a :class:`Method`, or has a name that is taken.
    """
    peers = {}
    for entry in _read_entries(path):
        try:
            peer = Method(**{**entry, "tasks": tuple(entry.get("tasks", TASKS))})
        except TypeError as error:
            raise ValueError(f"{path}: a peer has the fields of Method, but {error}.") from error
        check_known("tasks", peer.tasks, TASKS)
        if peer.name in METHODS or peer.name in peers:
            raise ValueError(f"{path}: the name of a peer must be new, got {peer.name!r}.")
        peers[peer.name] = peer
    return peers


def _read_entries(path: Path) -> Sequence[Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)["peer"]
    try:
        import tomllib
    except ImportError as error:
        raise ValueError(f"{path}: TOML needs Python 3.11; JSON works, too.") from error
    return tomllib.loads(text)["peer"]


def check_known(name: str, chosen: Sequence[str], known: Mapping[str, Any]) -> None:
    """Raise ValueError if a chosen name isn't known."""
    if unknown := [choice for choice in chosen if choice not in known]:
        raise ValueError(f"{name} must be of {', '.join(known)}, got {', '.join(unknown)}.")
