"""Signals as an interactive shell leaves them, whatever the tests were started by."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True)
def hangups_are_heard():
    """Undo `nohup`: signals that a process ignores stay ignored, and children inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
