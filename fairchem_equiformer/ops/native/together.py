"""Several kernels in one parallel region (together.cpp).

At the end of a parallel region all threads wait for the slowest, and on cores that something else
uses, too, for the scheduler. Kernels that are called while they are deferred run later, one after
the other in a single region; between kernels of the same edges no thread waits for another.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _State(threading.local):
    kernels: ctypes.CDLL | None = None  # where they are deferred
    kept: list[Any]  # what those that wait will read or write


_state = _State()


@contextmanager
def deferred(kernels: ctypes.CDLL) -> Iterator[None]:
    """Within, kernels wait; they run at the end, or at :func:`flush`."""
    if _state.kernels is not None:  # the one around it has them run
        yield
        return
    _state.kernels, _state.kept = kernels, []
    kernels.begin_together()
    try:
        yield
        flush()
    finally:
        kernels.end_together()
        _state.kernels, _state.kept = None, []


def flush() -> None:
    """Run the kernels that wait, in one parallel region."""
    if _state.kernels is not None:
        _state.kernels.run_together(torch.get_num_threads())
        _state.kept.clear()


def keep(*values: Any) -> None:
    """Have values live until the kernels that wait have run."""
    if _state.kernels is not None:
        _state.kept += values


def dense(x: Tensor) -> Tensor:
    """``x.contiguous()``, also of what kernels that wait will write."""
    if x.is_contiguous():
        return x
    flush()
    return x.contiguous()
