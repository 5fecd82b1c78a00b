"""Child processes that start at once, forked from a server with the package; waiting for them."""

from __future__ import annotations

import multiprocessing
import time

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["torchrl_amago.trainers"])


def fork_workers(monkeypatch) -> None:
    """Let TorchRL's collectors start their workers in that way, in place of new interpreters."""
    monkeypatch.setattr("torchrl._utils._get_default_mp_start_method", lambda: "forkserver")
    monkeypatch.setattr(
        "torchrl.collectors._multi_base._set_mp_start_method_if_unset", lambda _: None
    )


def wait_for(condition, seconds: float = 30.0, pause: float = 0.05) -> None:
    """Look again and again until a condition holds; fail if it takes longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)
