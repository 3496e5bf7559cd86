"""Depth-wise tensor products (depthwise_tensor_product.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import (
    FeaturesStruct,
    Floats,
    Indices,
    ProductStruct,
)
from fairchem_equiformer.ops.native.loader import fits, usable
from fairchem_equiformer.ops.native.together import dense, flush
from fairchem_equiformer.so3.depthwise import DepthwisePaths


@dataclass(frozen=True)
class DepthwiseKernels:
    """Products of features, channels last, with each path's matrix and weights."""

    kernels: ctypes.CDLL
    paths: DepthwisePaths

    def forward(
        self,
        rows: Sequence[Tensor],
        index: Sequence[Tensor | None],
        matrices: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Weights times matrices times features.

        Args:
            rows: one or two tensors [N, features], whose rows are added.
            index: [E], the row of each that an edge has; None where it has that of its own number.
            matrices: [E, entries].
            weights: [E, weights], or [weights] for all edges.

        Returns:
            [E, outs].
        """
        matrices, weights = dense(matrices), dense(weights)
        rows, index = [dense(part) for part in rows], _contiguous(index)
        out = matrices.new_empty(len(matrices), self.paths.irreps_out.dim)
        self.kernels.depthwise_product(
            _layout(self.paths).struct,
            _features(rows, index),
            matrices,
            weights,
            _apart(weights),
            out,
            len(matrices),
            torch.get_num_threads(),
        )
        return out

    def backward(
        self,
        rows: Sequence[Tensor],
        index: Sequence[Tensor | None],
        matrices: Tensor,
        weights: Tensor,
        grad: Tensor,
        *,
        of_matrices: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients, given that of :meth:`forward`.

        Args:
            of_matrices: whether that of the matrices is wanted.

        Returns:
            Of each edge's features [E, features], of the matrices, and of the weights.
        """
        matrices, weights, grad = dense(matrices), dense(weights), dense(grad)
        rows, index = [dense(part) for part in rows], _contiguous(index)
        shared = weights.dim() == 1
        blocks = -(-len(matrices) // self.kernels.depthwise_block()) if shared else 1
        x_grad = matrices.new_zeros(len(matrices), self.paths.irreps_in.dim)
        # Where it is not wanted, nothing: its address is null.
        matrices_grad = torch.empty_like(matrices) if of_matrices else matrices.new_empty(0)
        weights_grad = weights.new_zeros(blocks, *weights.shape)
        self.kernels.depthwise_product_backward(
            _layout(self.paths).struct,
            _features(rows, index),
            matrices,
            weights,
            _apart(weights),
            grad,
            x_grad,
            matrices_grad,
            weights_grad,
            len(matrices),
            torch.get_num_threads(),
        )
        weights_grad = weights_grad.sum(0) if shared else weights_grad[0]
        return x_grad, matrices_grad if of_matrices else None, weights_grad


def depthwise_kernels(paths: DepthwisePaths, *tensors: Tensor) -> DepthwiseKernels | None:
    """Kernels for such paths and tensors; None where the reference has to run."""
    kernels = usable(*tensors)
    if kernels is None or not paths.paths:
        flush()
        return None
    misfit = kernels.depthwise_misfit(_layout(paths).struct)
    kind = f"depth-wise tensor products of {paths.irreps_in}"
    fit = fits(kind, paths.irreps_in.num_irreps, misfit)
    return DepthwiseKernels(kernels, paths) if fit else None


@dataclass(frozen=True)
class _Layout:
    table: Tensor  # [8, paths], which must outlive the pointers
    struct: ProductStruct


@cache
def _layout(paths: DepthwisePaths) -> _Layout:
    """Where the kernels find what each path reads and writes."""
    starts_in = [columns.start for columns in paths.irreps_in.slices()]
    starts_out = [columns.start for columns in paths.irreps_out.slices()]
    table = []
    for path, weight, entry in zip(
        paths.paths, paths.weight_slices, paths.coupling_slices, strict=True
    ):
        (mul, ir), (mul_out, ir_out) = paths.irreps_in[path.feature], paths.irreps_out[path.out]
        out = starts_out[path.out] + path.channel
        table.append(
            (
                starts_in[path.feature],
                ir.dim,
                mul,
                out,
                ir_out.dim,
                mul_out,
                weight.start,
                entry.start,
            )
        )
    columns = torch.tensor(table).t().contiguous()
    widths = paths.irreps_in.dim, paths.irreps_out.dim, paths.weight_numel
    counts = len(paths.paths), *widths, paths.coupling_slices[-1].stop
    return _Layout(columns, ProductStruct(*map(Indices.address, columns), *counts))


def _contiguous(index: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if own is None else own.contiguous() for own in index]


def _features(rows: Sequence[Tensor], index: Sequence[Tensor | None]) -> FeaturesStruct:
    """Addresses of tensors, which must outlive it."""
    struct = FeaturesStruct(count=len(rows))
    for place, (part, own) in enumerate(zip(rows, index, strict=True)):
        struct.tensor[place] = Floats.address(part)
        struct.index[place] = None if own is None else Indices.address(own)
    return struct


def _apart(weights: Tensor) -> int:
    return 0 if weights.dim() == 1 else weights.shape[1]
