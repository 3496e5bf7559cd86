"""The radial function but for its later matrix products (radial.cpp)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.loader import NormStruct, pointer, usable


class _GaussiansStruct(ctypes.Structure):
    """``struct Gaussians`` of radial.cpp."""

    _fields_ = (
        ("centers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "window")),
        *((name, ctypes.c_float) for name in ("spacing", "coefficient", "reach")),
    )


class _TablesStruct(ctypes.Structure):
    """``struct Tables`` of radial.cpp."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_void_p * 2) for name in ("rows", "index")),
        ("count", ctypes.c_int64),
    )


class GaussianKernels:
    """Gaussians at equal spacing times a matrix [B, H], without those that are nothing."""

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
        self.struct = _GaussiansStruct(self._centers.data_ptr(), *sizes)

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
        distance, matrix, bias = distance.contiguous(), matrix.contiguous(), bias.contiguous()
        lookups = [(table.contiguous(), index.contiguous()) for table, index in lookups]
        tables = _TablesStruct(bias.data_ptr(), count=len(lookups))
        for i, (table, index) in enumerate(lookups):
            tables.rows[i], tables.index[i] = table.data_ptr(), index.data_ptr()
        out = matrix.new_empty(len(distance), matrix.shape[1])
        self._kernels.gaussians_times(
            ctypes.byref(self.struct),
            *map(pointer, (distance, matrix)),
            ctypes.c_int64(matrix.shape[1]),
            ctypes.byref(tables),
            pointer(out),
            ctypes.c_int64(len(distance)),
            torch.get_num_threads(),
        )
        return out

    def backward(self, distance: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the matrix [B, H], given that of the product [E, H]."""
        distance, grad = distance.contiguous(), grad.contiguous()
        matrix_grad = grad.new_zeros(self.struct.count, grad.shape[1])
        self._kernels.gaussians_times_backward(
            ctypes.byref(self.struct),
            *map(pointer, (distance, grad)),
            ctypes.c_int64(grad.shape[1]),
            pointer(matrix_grad),
            ctypes.c_int64(len(distance)),
            torch.get_num_threads(),
        )
        return matrix_grad


def gaussian_kernels(
    distance: Tensor, matrix: Tensor, centers: Tensor, coefficient: float, least_exponent: float
) -> GaussianKernels | None:
    """Kernels for Gaussians that are nothing below an exponent; None where the reference runs."""
    kernels = usable(distance, centers, matrix)
    if kernels is None or len(centers) < 2:  # no spacing
        return None
    found = GaussianKernels(kernels, centers, coefficient, least_exponent)
    width = ctypes.c_int64(matrix.shape[1])
    return found if kernels.gaussians_fit(ctypes.byref(found.struct), width) else None


@dataclass(frozen=True)
class NormSiLUKernels:
    """SiLU of a layer norm over the channels of x [B, C]."""

    kernels: ctypes.CDLL
    epsilon: float

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[B, C]."""
        x, norm = x.contiguous(), NormStruct(weight.data_ptr(), bias.data_ptr(), self.epsilon)
        out = torch.empty_like(x)
        self.kernels.layer_norm_silu(
            ctypes.byref(norm),
            ctypes.c_int64(x.shape[1]),
            *map(pointer, (x, out)),
            ctypes.c_int64(len(x)),
            torch.get_num_threads(),
        )
        return out

    def backward(
        self, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        x, grad = x.contiguous(), grad.contiguous()
        norm = NormStruct(weight.data_ptr(), bias.data_ptr(), self.epsilon)
        blocks = -(-len(x) // int(self.kernels.norm_block()))
        x_grad, sums = torch.empty_like(x), x.new_zeros(blocks, 2, x.shape[1])
        self.kernels.layer_norm_silu_backward(
            ctypes.byref(norm),
            ctypes.c_int64(x.shape[1]),
            *map(pointer, (x, grad, x_grad, sums)),
            ctypes.c_int64(len(x)),
            torch.get_num_threads(),
        )
        weight_grad, bias_grad = sums.sum(0)
        return x_grad, weight_grad, bias_grad


def norm_silu_kernels(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> NormSiLUKernels | None:
    """Kernels for such x [B, C] and weights; None where the reference has to run."""
    kernels = usable(x, weight, bias)
    if kernels is None or not kernels.norm_fits(ctypes.c_int64(x.shape[1])):
        return None
    return NormSiLUKernels(kernels, epsilon)
