"""Sums of rows (sums.cpp)."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.loader import usable
from fairchem_equiformer.ops.native.together import flush

# Less is added before a second thread has begun; as PyTorch has it.
_LEAST = 32_768


def add_rows(total: Tensor, index: Tensor | None, rows: Tensor) -> bool:
    """Add rows [E, ...] to those of ``total`` [N, ...] that the index [E] names, in their order.

    Without an index all are added to ``total`` [...].

    Returns:
        Whether it is done; if not, PyTorch has to do it.
    """
    kernels = usable(total, rows)
    if kernels is None or not _dense(total, index, rows):
        flush()
        return False
    width = math.prod(rows.shape[1:])
    threads = torch.get_num_threads() if rows.numel() >= _LEAST else 1
    kernels.add_rows(rows, rows.stride(0), index, total, width, len(rows), threads)
    return True


def _dense(total: Tensor, index: Tensor | None, rows: Tensor) -> bool:
    """Whether the numbers of each row lie one after the other, and of one shape."""
    if index is not None and not index.is_contiguous():
        return False
    shape = total.shape if index is None else total.shape[1:]
    alike = shape == rows.shape[1:] and total.is_contiguous()
    return alike and len(rows) > 0 and rows[0].is_contiguous()


def sum_and_difference(kernels: ctypes.CDLL, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b and a - b of matrices [E, C] in float32 that lie alike, with dense rows.

    Raises:
        ValueError: if they do not.
    """
    if a.stride() != b.stride() or a.stride(1) != 1 or a.shape[1] % 16:
        raise ValueError(f"{tuple(a.shape)} at strides {a.stride()} and {b.stride()}")
    total, difference = a.new_empty(a.shape), a.new_empty(a.shape)
    threads = torch.get_num_threads() if a.numel() >= _LEAST else 1
    kernels.sum_and_difference(a, b, a.stride(0), total, difference, a.shape[1], len(a), threads)
    return total, difference
