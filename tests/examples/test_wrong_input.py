"""Examples on other packages' environments: a wrong setting or a missing package ends in one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.scripts import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"


def error_of(name, flags, folder, monkeypatch):
    """Return the one line that a script ends with."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("common.keep_freed_memory", lambda: None)
    done = run_script(EXAMPLES / f"{name}.py", "--debug", "--threads", "1", *flags.split())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("02_gymnax", "gymnax", "jax"),
        ("03_popgym", "popgym", "popgym"),
        ("07_meta_world", "metaworld", "metaworld"),
        ("08_atari", "ale_py", "atari"),
        ("09_procgen", "envpool", "procgen"),
        ("10_babyai", "minigrid", "minigrid"),
        ("11_xland_minigrid", "xminigrid", "jax"),
        ("12_half_cheetah_vel", "mujoco", "mujoco"),
        ("15_pokemon", "poke_env", "pokemon"),
        ("crafter_instructions", "crafter", "crafter"),
        ("retro", "stable_retro", "retro"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name, package, extra, tmp_path, monkeypatch):
    for module in [*sys.modules]:
        if module.split(".")[0] == package or "envs.mujoco" in module or "libs.pokemon" in module:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    line = error_of(name, "", tmp_path, monkeypatch)
    assert f'pip install "torchrl-amago[{extra}]"' in line


@pytest.mark.parametrize(
    ("name", "package", "flags", "message"),
    [
        ("01_basic_gym", "gymnasium", "--env-id nowhere:Foo-v0", "No module .*docs/domains.md"),
        ("01_basic_gym", "shimmy", "--env-id shimmy:dm_control/foo-v0", "`foo` doesn't exist"),
        ("02_gymnax", "gymnax", "--env-id CartPole-v7", "must be one of 'CartPole-v1'"),
        ("02_gymnax", "gymnax", "--params gravitation 1", "one of .*'gravity'.*got 'gravitation'"),
        ("02_gymnax", "craftax", "--env-id Craftax-v7", "one of 'Craftax-Classic-Symbolic-v1'"),
        ("03_popgym", "popgym", "--env-ids Foo", "There are AutoencodeEasy"),
        (
            "03_popgym",
            "popgym",
            "--env-ids PositionOnlyPendulumEasy RepeatFirstEasy",
            "Discrete actions",
        ),
        ("07_meta_world", "metaworld", "--problem reach", "got 'reach'.*reach-v3"),
        ("08_atari", "ale_py", "--games Pon", "--games: .*`Pon` doesn't exist"),
        ("09_procgen", "envpool", "--games coinrum", "one of 'bigfish'"),
        ("10_babyai", "minigrid", "--env-ids CartPole-v1", "one of 178 like .*got 'CartPole-v1'"),
        ("11_xland_minigrid", "xminigrid", "--benchmark foo", "one of 'trivial'.* Or pass a file"),
        ("inverted_actuators", "gymnasium", "--env-id Pendulum-v7", "Pendulum"),
        ("inverted_actuators", "gymnasium", "--env-id CartPole-v1", "bounded numbers, got Disc"),
        ("retro", "stable_retro", "--games Airstriker", "like .*'Airstriker-Genesis-v0'"),
    ],
)
def test_a_wrong_setting_is_explained(name, package, flags, message, tmp_path, monkeypatch):
    pytest.importorskip(package)
    line = error_of(name, flags, tmp_path, monkeypatch)
    assert re.search(message, line), line
