from __future__ import annotations

import signal
import threading

import pytest

from tests.trainers.conftest import no_signal_is_ignored  # noqa: F401
from torchrl_amago._signals import on_signals

PREEMPTION = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", [signal.SIGINT, *PREEMPTION])
def test_the_first_stops_and_the_handler_is_put_back(number):
    stops, before = [], signal.getsignal(number)
    with on_signals(stops.append):
        signal.raise_signal(number)
        # The next one ends the process.
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        assert signal.getsignal(number) is default
    assert stops == ["interrupted" if number == signal.SIGINT else "preempted"]
    assert signal.getsignal(number) is before


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stops = []
        with on_signals(stops.append):
            signal.raise_signal(signal.SIGHUP)
        assert stops == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone():
    seen = []

    def run():
        with on_signals(seen.append):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
