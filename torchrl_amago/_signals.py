"""Signals as requests to stop after the running update."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Literal

Outcome = Literal["finished", "interrupted", "preempted"]

#: Codes that shells and batch systems expect; 75 asks for another try (EX_TEMPFAIL).
EXIT_CODES = {"finished": 0, "interrupted": 130, "preempted": 75}

# SIGHUP and SIGUSR1 do not exist on Windows.
_PREEMPTION = [x for x in signal.Signals if x.name in ("SIGTERM", "SIGHUP", "SIGUSR1")]


@contextlib.contextmanager
def on_signals(request_stop: Callable[[Outcome], None], may_repeat: bool = False) -> Iterator[None]:
    """Turn the first of each signal into a call of ``request_stop``; the next has its usual effect.

    Its argument is ``"interrupted"`` for SIGINT (Ctrl-C), else ``"preempted"``. Ignored signals
    stay ignored. Only the main thread receives signals; in others nothing changes. With
    ``may_repeat``, preemption may be announced any number of times.
    """

    def handle(number: int, _: object) -> None:
        is_interrupt = number == signal.SIGINT
        if is_interrupt or not may_repeat:
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
        request_stop("interrupted" if is_interrupt else "preempted")

    is_main = threading.current_thread() is threading.main_thread()
    before = {x: signal.getsignal(x) for x in (signal.SIGINT, *_PREEMPTION) if is_main}
    handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            # None is a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, before[number] or signal.SIG_DFL)
