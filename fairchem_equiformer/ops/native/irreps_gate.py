"""Gate of irreps (irreps_gate.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import Indices, IrrepsGateStruct
from fairchem_equiformer.ops.native.loader import fits, usable
from fairchem_equiformer.ops.native.together import dense

Gated = tuple[tuple[int, int], ...]  # channels and components of each irrep


@dataclass(frozen=True)
class IrrepsGateKernels:
    """Scaled SiLU and sigmoids, see ops/irreps_gate.py."""

    kernels: ctypes.CDLL
    layout: _Layout

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] to [n, out]."""
        x = dense(x)
        out = x.new_empty(len(x), self.layout.struct.out)
        self.kernels.irreps_gate(self.layout.struct, x, out, len(x), torch.get_num_threads())
        return out

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of x, given that of the result."""
        x, grad = dense(x), dense(grad)
        out = torch.empty_like(x)
        threads = torch.get_num_threads()
        self.kernels.irreps_gate_backward(self.layout.struct, x, grad, out, len(x), threads)
        return out


@dataclass(frozen=True)
class _Layout:
    table: Tensor  # [2, irreps], which must outlive the pointers
    struct: IrrepsGateStruct


@cache
def _layout(scalars: int, gated: Gated, scales: tuple[float, float]) -> _Layout:
    columns = torch.tensor(gated, dtype=torch.int64).view(-1, 2).t().contiguous()
    out = scalars + sum(channels * components for channels, components in gated)
    counts = len(gated), scalars, out + sum(channels for channels, _ in gated), out
    return _Layout(columns, IrrepsGateStruct(*map(Indices.address, columns), *counts, *scales))


def irreps_gate_kernels(
    x: Tensor, scalars: int, gated: Gated, scales: tuple[float, float]
) -> IrrepsGateKernels | None:
    """Kernels for such rows; None where the reference has to run."""
    kernels = usable(x)
    if kernels is None:
        return None
    layout = _layout(scalars, gated, scales)
    misfit = kernels.irreps_gate_misfit(layout.struct)
    fit = fits("gates of irreps", x.shape[1], misfit)
    return IrrepsGateKernels(kernels, layout) if fit else None
