"""Equivariant layer norms (equivariant_norm.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import EquivariantNormStruct, Floats
from fairchem_equiformer.ops.native.loader import fits, together, usable
from fairchem_equiformer.ops.native.sums import add_rows
from fairchem_equiformer.ops.native.together import dense


@dataclass(frozen=True)
class EquivariantNormKernels:
    """Norms of x [N, (lmax + 1)^2, C], l = 0 centred, each group of degrees divided by its RMS."""

    kernels: ctypes.CDLL
    groups: tuple[int, ...]  # the first degree of each
    epsilon: float

    def forward(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor) -> Tensor:
        """Times a weight [C] of each degree, plus a bias [C] on l = 0: as x."""
        x = dense(x)
        out = torch.empty_like(x)
        norm = self._struct(weights, bias)
        self.kernels.equivariant_norm(norm, x, out, len(x), torch.get_num_threads())
        return out

    def backward(
        self, x: Tensor, weights: Sequence[Tensor], bias: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, of the weights [lmax + 1, C], and of the bias."""
        x, grad = dense(x), dense(grad)
        blocks = -(-len(x) // self.kernels.equivariant_norm_block())
        x_grad = torch.empty_like(x)
        sums = x.new_empty(blocks, len(weights) + 1, x.shape[2])
        totals = x.new_zeros(sums.shape[1:])
        with together():
            self.kernels.equivariant_norm_backward(
                self._struct(weights, bias), x, grad, x_grad, sums, len(x), torch.get_num_threads()
            )
            add_rows(totals, None, sums)
        return x_grad, totals[:-1], totals[-1]

    def _struct(self, weights: Sequence[Tensor], bias: Tensor) -> EquivariantNormStruct:
        struct = EquivariantNormStruct(
            bias=Floats.address(bias),
            lmax=len(weights) - 1,
            channels=len(bias),
            num_groups=len(self.groups),
            epsilon=self.epsilon,
        )
        struct.weights[: len(weights)] = list(map(Floats.address, weights))
        bounds = *self.groups, len(weights)
        struct.groups[: len(bounds)] = bounds
        return struct


def equivariant_norm_kernels(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor, groups: tuple[int, ...], epsilon: float
) -> EquivariantNormKernels | None:
    """Kernels for such x [N, K, C] and weights [C] by degree; None where PyTorch has to run."""
    kernels = usable(x, *weights, bias)
    if kernels is None:
        return None
    channels = x.shape[2]
    misfit = kernels.equivariant_norm_misfit(len(weights) - 1, channels)
    if not fits("equivariant norms", channels, misfit):
        return None
    return EquivariantNormKernels(kernels, groups, epsilon)
