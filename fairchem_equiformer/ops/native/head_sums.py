"""Sums over an atom's edges for each head, and what their gradients are made of (head_sums.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.loader import fits, usable
from fairchem_equiformer.ops.native.together import dense


@dataclass(frozen=True)
class HeadSumKernels:
    """The three products of ops/head_sums.py, for edges sorted by target."""

    kernels: ctypes.CDLL
    target: Tensor  # [e], ascending
    target_ptr: Tensor  # [n + 1]

    def sum(self, alpha: Tensor, x: Tensor) -> Tensor:
        """[e, heads] and [e, F] to [n, heads, F]."""
        alpha, x, target_ptr = dense(alpha), dense(x), dense(self.target_ptr)
        atoms, sizes = len(target_ptr) - 1, (alpha.shape[1], x.shape[1])
        out = x.new_empty(atoms, *sizes)
        threads = torch.get_num_threads()
        self.kernels.head_sum(alpha, x, target_ptr, *sizes, out, atoms, threads)
        return out

    def dot(self, x: Tensor, atoms: Tensor) -> Tensor:
        """[e, F] and [n, heads, F] to [e, heads]."""
        x, atoms, target = dense(x), dense(atoms), dense(self.target)
        out = x.new_empty(len(x), atoms.shape[1])
        threads = torch.get_num_threads()
        self.kernels.head_dot(x, atoms, target, *atoms.shape[1:], out, len(x), threads)
        return out

    def spread(self, alpha: Tensor, atoms: Tensor) -> Tensor:
        """[e, heads] and [n, heads, F] to [e, F]."""
        alpha, atoms, target = dense(alpha), dense(atoms), dense(self.target)
        out = alpha.new_empty(len(alpha), atoms.shape[2])
        threads = torch.get_num_threads()
        self.kernels.head_spread(alpha, atoms, target, *atoms.shape[1:], out, len(alpha), threads)
        return out


def head_sum_kernels(
    target: Tensor, target_ptr: Tensor, channels: int, *tensors: Tensor
) -> HeadSumKernels | None:
    """Kernels for such edges and tensors; None where the reference has to run."""
    kernels = usable(*tensors)
    if kernels is None:
        return None
    misfit = kernels.head_sums_misfit(channels)
    fit = fits("sums over edges by heads", channels, misfit)
    return HeadSumKernels(kernels, target, target_ptr) if fit else None
