"""Ray actors are workers, too; without Ray, the extra is named."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.scaling.lakes import LENGTH, make_buffer, make_env, small_policy, small_trainer
from torchrl_amago.scaling import RayPool
from torchrl_amago.trainers import read_progress


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    parts = (make_env, small_policy(), make_buffer(), tmp_path)
    with pytest.raises(ImportError, match=r"torchrl-amago\[ray\]"):
        RayPool(*parts, num_workers=1, round_steps=LENGTH, total_updates=1)


@pytest.mark.filterwarnings("ignore")
def test_a_killed_actor_is_replaced(tmp_path):
    pytest.importorskip("ray")
    trainer = small_trainer(tmp_path, workers=2, ray="local", total_updates=10**6)
    deadline, killed = time.monotonic() + 300.0, []

    def callback(t):
        pids = t.collector.pids()
        if len(pids) == 2 and not killed:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)
        is_back = killed and len(pids) == 2 and killed[0] not in pids
        if (is_back and t.counts.updates % 10 == 0) or time.monotonic() > deadline:
            t.request_stop()

    trainer.callbacks.append(callback)
    trainer.train()
    assert killed
    assert killed[0] not in trainer.collector.pids()
    trainer.online_buffer.storage.verify()
    table = read_progress(tmp_path)
    assert table["workers/restarted"][-1] >= 1
    assert table["workers/alive"][-1] == 2
