"""How this process' allocator treats freed memory.

A forward pass frees and asks again for the same few dozen megabytes with each chunk of edges. glibc
hands them back to the system in between, and the system clears every page anew: 10% of the time.
So the first forward pass changes two settings of glibc, for all of the process. The variable
``FAIRCHEM_EQUIFORMER_ALLOCATOR`` decides otherwise: ``system`` leaves them as they are, ``keep`` is
the default.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

VARIABLE = "FAIRCHEM_EQUIFORMER_ALLOCATOR"
CHOICES = ("keep", "system")

_KEPT_BYTES = 256 * 2**20
_LARGEST_HEAP_BYTES = 32 * 2**20  # glibc's own limit; what is larger is mapped by itself

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@cache
def keep_freed_memory() -> None:
    """Let this process keep up to 256 MiB of freed memory. Does nothing without glibc.

    Raises:
        ValueError: for another value of the variable than those above.
    """
    choice = os.environ.get(VARIABLE, CHOICES[0])
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} is {choice!r}, it must be {' or '.join(CHOICES)}")
    if choice == "system":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BYTES)
