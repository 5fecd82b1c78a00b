"""Settings shared by all tests: one compute thread, fixed seeds, no display, GPU tests only where there is a GPU."""

from __future__ import annotations

import logging
import os

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")

# The tensors in tests are tiny: more threads cost more in hand-over than they win, and change summation order.
torch.set_num_threads(1)

# pytest listens to every logger, for which the compiler would write out each of its graphs.
logging.getLogger("torch.__trace").propagate = False

# No deadline: the first call of a torch function may take a second. Derandomised: a red test must stay red.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
# `HYPOTHESIS_PROFILE=explore pytest` searches further, with new examples at each run.
settings.register_profile("explore", deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run `slow` tests first, so that no core ends with one alone; skip `gpu` ones without a GPU."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """Skip `fsync`: files outlive a killed process without it, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed the global generators before each test, so that its outcome doesn't depend on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    return 0
