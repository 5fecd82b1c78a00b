"""Battles of Pokemon parsed from their logs, one player's decisions at a time."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import numpy as np
from poke_env.battle import Battle
from poke_env.data import to_id_str
from poke_env.environment import SinglesEnv
from poke_env.player import Player

from torchrl_amago import keys
from torchrl_amago.envs.libs.pokemon import BothSides, observe
from torchrl_amago.offline.trajectory import Trajectory, require

# Besides what poke-env's players ignore: chat, ratings, requests, and results, which are read here.
_IGNORED = {*Player.MESSAGES_TO_IGNORE, "c:", "raw", "title", "request", "showteam", "win", "tie"}
# Offsets of the actions that do more than a move; others hide the move's name.
_EXTRAS = {"-mega": 4, "-terastallize": 16}


def _messages(file: Path) -> list[list[str]]:
    """Split a log into the fields of its messages."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        log = json.loads(text)["log"]
        text = log if isinstance(log, str) else "\n".join(log)
    elif found := re.search(r'class="battle-log-data">(.*?)</script>', text, re.DOTALL):
        text = found[1]
    return [line.strip().split("|") for line in text.splitlines() if line.strip().startswith("|")]


class BattleReplay:
    """A battle seen by one player, with the requests for decisions that a server would send."""

    def __init__(self, file: Path, player: str, env: BothSides) -> None:
        self.messages, self.env = _messages(file), env
        require(["", "gametype", "singles"] in self.messages, "it must be a battle of singles.")
        users = {x[2]: x[3] for x in self.messages if x[1] == "player" and len(x) > 3 and x[3]}
        roles = [
            role for role, name in users.items() if to_id_str(player) in (role, to_id_str(name))
        ]
        require(bool(roles), f"player must be p1, p2 or one of {users}, got {player!r}.")
        self.role, self.user = roles[0], users[roles[0]]
        self.battle, self.details = self._new_battle(), {}
        for message in self.messages:
            if message[1] in ("switch", "drag") and message[2].startswith(self.role):
                self.details.setdefault(_identifier(message), message[3])
            self._parse(message)
        self.moves = {x: [*one.base_moves][:4] for x, one in self.battle.team.items()}
        self.battle = self._new_battle()
        self.total, self.skipped, self.extra = 0.0, 0, 0
        self.rows, self.actions = [], []
        self.turn_row = self.switch_row = None  # before a decision that no message has shown yet

    def _new_battle(self) -> Battle:
        gen = next(int(message[2]) for message in self.messages if message[1] == "gen")
        battle = Battle("battle", self.user, logger=None, gen=gen)
        battle.player_role = self.role
        return battle

    def trajectory(self) -> Trajectory:
        for message in self.messages:
            kind = message[1]
            if kind == "" and self.battle.turn:  # what follows may answer a request to switch
                self.switch_row = self._row(force_switch=True)
            if kind in ("switch", "move", "cant", *_EXTRAS) and message[2].startswith(self.role):
                self._decide(message)
            self._parse(message)
            if kind == "start":
                self._request(force_switch=False)  # the own team, before the first one appears
            elif kind == "turn":
                self.skipped += self.turn_row is not None
                self.turn_row, self.extra = self._row(force_switch=False), 0
        self.skipped += self.turn_row is not None
        require(bool(self.actions), "the log must show a decision of the player.")
        rows = [*self.rows, self._row(force_switch=False)]
        observation, mask, total = (np.stack(x) for x in zip(*rows, strict=True))
        is_last = np.arange(len(self.actions)) == len(self.actions) - 1
        won = np.zeros(len(rows), bool)
        won[-1] = bool(self.battle.won)
        return Trajectory(
            {"observation": observation, "action_mask": mask, keys.SUCCESS: won},
            np.array(self.actions),
            np.diff(total).astype(np.float32),
            terminated=is_last & self.battle.finished,
            truncated=is_last & (not self.battle.finished),
        )

    def _decide(self, message: list[str]) -> None:
        """Note the action that a message shows, with the row before the decision."""
        kind, active = message[1], self.battle.active_pokemon
        if kind in _EXTRAS:
            self.extra = _EXTRAS[kind]
            return
        is_forced = self.turn_row is None or active.fainted
        row = self.switch_row if is_forced else self.turn_row
        if kind == "switch":
            choices, choice, first = [*self.moves], _identifier(message), 0
        else:
            # The log says what caused a move, and not always what a Pokemon failed to do.
            is_caused = any(x.startswith("[from]") for x in message[4:])
            if is_forced or is_caused or (kind == "cant" and len(message) < 5):
                return
            choice = to_id_str(message[4 if kind == "cant" else 3])
            choices, first = [*active.moves][:4], 6 + self.extra
        if row is None:
            return  # the lead
        if is_forced:
            self.switch_row = None
        else:
            self.turn_row = None
        if choice not in choices:
            self.skipped += 1
            return
        self.actions.append(first + choices.index(choice))
        row[1][self.actions[-1]] = 1
        self.rows.append(row)

    def _row(self, force_switch: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """Return observation, mask and the sum of rewards so far."""
        self._request(force_switch)
        self.total += self.env.calc_reward(self.battle)
        mask = np.array(SinglesEnv.get_action_mask(self.battle), np.int8)
        return observe(self.battle), mask, self.total

    def _request(self, force_switch: bool) -> None:
        """Give poke-env the request that a server would send, as far as it is known."""
        active = self.battle.active_pokemon
        request = {"side": {"pokemon": [*map(self._member, self.moves)]}}
        if active is not None and not force_switch:
            moves = [{"id": move} for move in [*active.moves][:4]]
            can_terastallize = self.battle.gen == 9 and not self.battle.used_tera
            request["active"] = [{"moves": moves, "canTerastallize": can_terastallize}]
        self.battle.parse_request({**request, "forceSwitch": [force_switch]})

    def _member(self, identifier: str) -> dict[str, object]:
        """Return a Pokemon's entry in a request."""
        one = self.battle.team.get(identifier)
        condition = "100/100" if one is None else f"{one.current_hp}/{one.max_hp}"
        if one is not None and one.status is not None:
            condition = "0 fnt" if one.fainted else f"{condition} {one.status.name.lower()}"
        return {
            "ident": identifier,
            "details": self.details[identifier],
            "condition": condition,
            "active": one is not None and one.active,
            "moves": self.moves[identifier],
            "baseAbility": (one and one.ability) or "",
            "item": one and one.item,
        }

    def _parse(self, message: list[str]) -> None:
        if message[1] == "win":
            self.battle.won_by(message[2])
        elif message[1] == "tie":
            self.battle.tied()
        elif message[1] not in _IGNORED:
            with contextlib.suppress(NotImplementedError):  # not a message that poke-env needs
                self.battle.parse_message(message)


def _identifier(message: list[str]) -> str:
    """Return a Pokemon's name without its place: ``p1: Mew`` of ``p1a: Mew``."""
    return message[2][:2] + message[2][message[2].index(":") :]
