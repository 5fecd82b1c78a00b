"""Train on Pokemon battles: a trial is several battles against one opponent, with new teams.

    pip install "torchrl-amago[pokemon]"
    npm install --prefix showdown pokemon-showdown               # once; needs node 20
    python examples/15_pokemon.py                                # three opponents, generation 1
    python examples/15_pokemon.py --opponents random --run-dir runs/pokemon_random
    python examples/15_pokemon.py --battle-format gen1ou --team team.txt --run-dir runs/ou
    python examples/15_pokemon.py --debug                        # a test of the setup

The script starts a Showdown server, which only this machine reaches, for training and evaluation,
and stops it at the end, after Ctrl-C and after errors. An agent that knows its opponent from the
first battles of a trial can exploit it in the last. The run's folder gets `progress.csv`, curves,
`evaluation.npz`, weights and checkpoints.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from common import command_line
from domain import DomainArgs, train
from torchrl.envs import EnvBase

from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import ShowdownServer


@dataclass
class Args(DomainArgs):
    """Pokemon, with AMAGO."""

    showdown: Path = Path("showdown")
    """Folder where npm installed pokemon-showdown."""
    battle_format: str = "gen1randombattle"
    """A format of single battles, such as gen9randombattle."""
    opponents: tuple[Literal["random", "max_power", "heuristics"], ...] = (
        "random",
        "max_power",
        "heuristics",
    )
    """Opponents, one of which each trial draws."""
    team: Path | None = None
    """File with the team of both sides in Showdown's text format, if teams aren't random."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/pokemon")
    loss: str = "amago2"
    max_episode_steps: int = 150
    round_steps: int = 100
    n_step: int = 3
    num_envs: int = 8
    hidden_size: int = 128
    total_updates: int = 10_000
    anneal_frames: int = 100_000
    capacity: int = 500_000
    eval_interval: int = 1000
    eval_trials: int = 128

    draws: ClassVar[bool] = False

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        """Make trials against the opponents; evaluation meets the same ones."""
        from torchrl_amago.envs.libs.pokemon import PokemonBattles

        make = partial(
            PokemonBattles,
            self.server.port,
            self.battle_format,
            opponents=self.opponents,
            team=None if self.team is None else self.team.read_text(),
            max_episode_steps=self.max_episode_steps,
            **options,
        )
        rows = gymnasium_rows(
            make, num_envs, success_key="success", task_key="task_id", task_names=self.opponents
        )
        # Battles end before the server does.
        self.stack.callback(rows.close, raise_if_closed=False)
        return make_trial_env(
            rows, episodes=self.episodes, repeat="options", options=PokemonBattles.SAME_TASK
        )

    def run(self) -> None:
        """Train with a server that lives as long."""
        import torchrl_amago.envs.libs.pokemon  # noqa: F401 - before a server starts

        with ShowdownServer(self.showdown) as self.server, contextlib.ExitStack() as self.stack:
            train(self, action_mask_key="action_mask")


if __name__ == "__main__":
    small = dict(max_episode_steps=10, num_envs=2, eval_trials=8, context_length=20)
    with command_line(Args, debug=small) as args:
        args.run()
