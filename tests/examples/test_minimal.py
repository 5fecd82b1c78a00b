"""The minimal example: short, with its loop in sight, the README's first code, and running."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
CORE = SOURCE[SOURCE.index("import torch\n") :]


def test_the_loop_is_in_sight():
    assert len(SOURCE.splitlines()) <= 60
    assert ".backward()" in SOURCE
    assert "def " not in SOURCE


def test_the_readme_begins_with_it():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert first[1] == CORE


def test_it_trains(capsys):
    short, count = re.subn(
        r"(NUM_ENVS, ROUNDS, UPDATES_PER_ROUND) = 1, 64, 120, 20",
        r"\1 = 1, 8, 3, 2",
        CORE,
    )
    assert count == 1
    # Enough trials for one batch come after a few rounds.
    namespace: dict = {}
    exec(compile(short, "minimal.py", "exec"), namespace)
    assert re.search(
        r"^trial return -?\d\.\d\d, the exact optimum is 4\.50$", capsys.readouterr().out
    )
    assert namespace["optimizer"].state
    assert all(torch.isfinite(value).all() for value in namespace["losses"].values())
