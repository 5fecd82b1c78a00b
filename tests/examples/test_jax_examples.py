"""The examples on JAX environments, as commands."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.scripts import run_script, start_script
from torchrl_amago.trainers import read_progress

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "flags"),
    [
        ("02_gymnax", "gymnax", ["--env-id", "MemoryChain-bsuite", "--params", "memory_length", "3"]),
        ("02_gymnax", "gymnax", ["--env-id", "Breakout-MinAtar", "--timestep-encoder", "cnn"]),
        ("11_xland_minigrid", "xminigrid", ["--episodes", "2", "--max-episode-steps", "8"]),
    ],
    ids=["chain", "breakout", "xland"],
)  # fmt: skip
def test_debug_run(name, package, flags, tmp_path):
    pytest.importorskip(package, reason='pip install "torchrl-amago[jax]"')
    command = ["--debug", "--threads", "1", *flags, "--run-dir", "run"]
    drivers = {"SDL_AUDIODRIVER": "dummy", "SDL_VIDEODRIVER": "dummy"}
    script = EXAMPLES / f"{name}.py"
    done = start_script(script, *command, folder=tmp_path, timeout=600, **drivers)
    assert done.returncode == 0, done.stderr
    assert "On 16 held-out trials: greedy" in done.stdout
    progress = read_progress(tmp_path / "run")
    assert progress["update"][-1] == 40
    assert np.isfinite(progress["loss_actor"]).all()
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"learning_curve.png", "trial.png", "evaluation.npz"} <= written
    assert ("adaptation_curve.png" in written) == (package == "xminigrid")


@pytest.mark.parametrize("name", ["02_gymnax", "11_xland_minigrid"])
def test_help_shows_the_tasks_flags(name):
    done = run_script(EXAMPLES / f"{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    for flag in ("--env-id", "--episodes", "--context-length", "--discounts", "--seq-model"):
        assert flag in done.stdout


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    if any((Path(p) / "gymnax").is_dir() for p in sys.path):
        pytest.skip("gymnax is installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.keep_freed_memory", lambda: None)
    done = run_script(EXAMPLES / "02_gymnax.py", "--debug", "--threads", "1")
    assert done.returncode != 0
    assert 'pip install "torchrl-amago[jax]"' in done.stderr
