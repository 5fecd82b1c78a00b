"""Environments in processes that start within a second."""

from __future__ import annotations

import warnings

from torchrl.envs import ParallelEnv


def forked(num: int, make) -> ParallelEnv:
    """Fork the workers: each one that is spawned imports torch first, which takes seconds."""
    env = ParallelEnv(num, make, mp_start_method="fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads may be lost
        env.start()
    return env
