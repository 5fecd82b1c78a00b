"""Freed memory stays with the process, where the C library can be told so."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# How many blocks are mapped for one of 24 MB, and how many bytes stay once it is freed.
SCRIPT = """
import ctypes, torch
from torchrl_amago.trainers.allocator import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info

changed = keep_freed_memory()
before = mallinfo()
block = torch.ones(6_000_000)
mapped = mallinfo().hblks - before.hblks
del block
print(changed, mapped, mallinfo().fordblks - before.fordblks)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only glibc can be told, and asked since 2.33",
)
def test_blocks_stay_with_the_process_once_memory_is_kept():
    # Otherwise the block is mapped, and nothing of it stays.
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    changed, mapped, stays = out.stdout.split()
    assert (changed, mapped) == ("True", "0")
    assert int(stays) > 20_000_000
