"""Child processes that start at once: forked from a server that has imported the package."""

from __future__ import annotations

import multiprocessing

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["torchrl_amago.trainers"])
