"""Freed memory stays with the process, where the C library can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# A block that is below the threshold, touched and freed again and again.
SCRIPT = """
import resource, torch
from torchrl_amago.trainers.allocator import keep_freed_memory
changed = {call}
for _ in range(3):
    x = torch.ones(5_000_000); del x
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x = torch.ones(5_000_000); y = torch.ones(5_000_000); del x, y
print(changed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_no_fresh_pages_once_memory_is_kept():
    faults = {}
    for call in ("False", "keep_freed_memory()"):
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(call=call)], capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        changed, count = out.stdout.split()
        assert changed == str(call != "False")
        faults[call] = int(count)
    assert faults["keep_freed_memory()"] < 0.2 * faults["False"], faults
