"""The radial function except its later matrix products (radial.cpp)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import (
    Floats,
    GaussiansStruct,
    Indices,
    NormStruct,
    TablesStruct,
)
from fairchem_equiformer.ops.native.loader import fits, together, usable
from fairchem_equiformer.ops.native.sums import add_rows
from fairchem_equiformer.ops.native.together import dense, flush


class GaussianKernels:
    """Gaussians at equal spacing times a matrix [B, H], without those that are negligible."""

    def __init__(
        self, kernels: ctypes.CDLL, centers: Tensor, coefficient: float, least_exponent: float
    ) -> None:
        self._kernels = kernels
        self._centers = centers.contiguous()  # must outlive the pointer
        count = len(centers)
        spacing = (centers[-1].item() - centers[0].item()) / (count - 1)
        reach = math.sqrt(least_exponent / coefficient)
        window = min(count, math.ceil(2 * reach / spacing) + 2)
        sizes = (count, window, spacing, coefficient, reach)
        self.struct = GaussiansStruct(Floats.address(self._centers), *sizes)

    def forward(
        self,
        distance: Tensor,
        matrix: Tensor,
        bias: Tensor,
        lookups: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Gaussians times matrix, plus bias, plus rows of tables.

        Args:
            distance: [E].
            matrix: [B, H].
            bias: [H].
            lookups: none or two of a table [., H] and its row for each edge [E].

        Returns:
            [E, H].
        """
        distance, matrix, bias = dense(distance), dense(matrix), dense(bias)
        lookups = [(dense(table), dense(index)) for table, index in lookups]
        tables = TablesStruct(Floats.address(bias), count=len(lookups))
        for i, (table, index) in enumerate(lookups):
            tables.rows[i], tables.index[i] = Floats.address(table), Indices.address(index)
        out = matrix.new_empty(len(distance), matrix.shape[1])
        self._kernels.gaussians_times(
            self.struct,
            distance,
            matrix,
            matrix.shape[1],
            tables,
            out,
            len(distance),
            torch.get_num_threads(),
        )
        return out

    def backward(self, distance: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the matrix [B, H], given that of the product [E, H]."""
        matrix_grad = grad.new_zeros(self.struct.count, grad.shape[1])
        self.add_backward(distance, grad, matrix_grad)
        return matrix_grad

    def add_backward(self, distance: Tensor, grad: Tensor, matrix_grad: Tensor) -> None:
        """Add to it."""
        distance, grad = dense(distance), dense(grad)
        self._kernels.gaussians_times_backward(
            self.struct,
            distance,
            grad,
            grad.shape[1],
            matrix_grad,
            len(distance),
            torch.get_num_threads(),
        )


def gaussian_kernels(
    distance: Tensor,
    centers: Tensor,
    coefficient: float,
    least_exponent: float,
    matrix: Tensor,
    *terms: Tensor,
) -> GaussianKernels | None:
    """Kernels for Gaussians that are negligible below an exponent; None where the reference runs.

    Args:
        terms: bias and tables, which are added to the product with the matrix.
    """
    kernels = usable(distance, centers, matrix, *terms)
    if kernels is None or len(centers) < 2:  # no spacing
        flush()
        return None
    found = GaussianKernels(kernels, centers, coefficient, least_exponent)
    width = matrix.shape[1]
    misfit = kernels.gaussians_misfit(found.struct, width)
    return found if fits("radial functions' first layers", width, misfit) else None


@dataclass(frozen=True)
class NormSiLUKernels:
    """SiLU of a layer norm over the channels of x [B, C]."""

    kernels: ctypes.CDLL
    epsilon: float

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[B, C]."""
        x, norm = dense(x), self.norm(weight, bias)
        out = torch.empty_like(x)
        self.kernels.layer_norm_silu(norm, x.shape[1], x, out, len(x), torch.get_num_threads())
        return out

    def backward(
        self, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        x, grad = dense(x), dense(grad)
        totals = x.new_zeros(2, x.shape[1])
        x_grad = self.add_backward(x, weight, bias, grad, *totals)
        return x_grad, *totals

    def add_backward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        grad: Tensor,
        weight_total: Tensor,
        bias_total: Tensor,
    ) -> Tensor:
        """Gradient of x; those of weight and bias are added to the last two. All dense."""
        blocks = -(-len(x) // self.kernels.norm_block())
        x_grad, sums = torch.empty_like(x), x.new_zeros(blocks, 2, x.shape[1])
        with together():
            self.kernels.layer_norm_silu_backward(
                self.norm(weight, bias),
                x.shape[1],
                x,
                grad,
                x_grad,
                sums,
                len(x),
                torch.get_num_threads(),
            )
            add_rows(weight_total, None, sums[:, 0])
            add_rows(bias_total, None, sums[:, 1])
        return x_grad

    def norm(self, weight: Tensor, bias: Tensor) -> NormStruct:
        """Weight and bias, which must outlive it."""
        return NormStruct(Floats.address(weight), Floats.address(bias), self.epsilon)


def norm_silu_kernels(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> NormSiLUKernels | None:
    """Kernels for such x [B, C] and weights; None where the reference has to run."""
    kernels = usable(x, weight, bias)
    if kernels is None:
        return None
    channels = x.shape[1]
    fit = fits("radial functions' layer norms", channels, kernels.norm_misfit(channels))
    return NormSiLUKernels(kernels, epsilon) if fit else None
