"""Signals as an interactive shell leaves them, whatever the tests were started by."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """Undo `nohup` and `&`: children inherit ignored signals, which stay ignored."""
    defaults = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
