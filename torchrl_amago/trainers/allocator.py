"""Memory of a CPU run: keep what was freed for the next update instead of giving it back."""

from __future__ import annotations

import ctypes

# Numbers of glibc's malloc.h; the threshold is the largest that it takes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_THRESHOLD, _LARGEST_INT = 32 * 2**20, 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for this process, for the rest of its life.

    By default glibc gives large blocks back to the system as soon as they are freed; each update then
    touches hundreds of megabytes of fresh pages, which costs a tenth of its time. The process
    keeps its largest size instead. For scripts: a library shouldn't decide this for its users.

    Returns:
        Whether anything changed: False where the C library isn't glibc.

    Example:
        >>> changed = keep_freed_memory()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = (
        (_MMAP_THRESHOLD, _LARGEST_THRESHOLD),
        (_TRIM_THRESHOLD, _LARGEST_INT),
        (_TOP_PAD, 64 * 2**20),
    )
    accepted = [mallopt(option, value) for option, value in wanted]
    return all(accepted)
