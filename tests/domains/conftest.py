"""Marks: every test here is a `domain` test, and warnings of other packages are theirs."""

from __future__ import annotations

import os
from ctypes.util import find_library
from pathlib import Path

import pytest

# Before anything imports dm_control, which chooses how it draws at once, and aborts without a screen.
if find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.domain)
            item.add_marker(pytest.mark.filterwarnings("default"))
