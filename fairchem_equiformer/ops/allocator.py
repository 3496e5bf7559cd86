"""How this process' allocator treats freed memory.

A forward pass frees and asks again for the same few dozen megabytes with each chunk of edges. glibc
hands them back to the system in between, and the system clears every page anew: 10% of the time.
"""

from __future__ import annotations

import ctypes
from functools import cache

_KEPT_BYTES = 256 * 2**20
_LARGEST_HEAP_BYTES = 32 * 2**20  # glibc's own limit; what is larger is mapped by itself

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@cache
def keep_freed_memory() -> None:
    """Let this process keep up to 256 MiB of freed memory. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BYTES)
