"""Sum over each atom's edges (aggregate.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.loader import fits, usable
from fairchem_equiformer.ops.native.rows import Rows, rows
from fairchem_equiformer.ops.native.together import dense
from fairchem_equiformer.so3.layout import Layout


@dataclass(frozen=True)
class AggregateKernels:
    """Weighted sum of each atom's edges (aggregate.cpp)."""

    kernels: ctypes.CDLL
    rows: Rows

    def forward(
        self,
        rotations: Tensor,
        values: Tensor,
        alpha: Tensor,
        rescale: Tensor,
        target_ptr: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """rescale * sum over a target's edges of D^T (alpha * v).

        Args:
            rotations: [e, entries], compact (so3/wigner.py).
            values: [e, S, heads, v].
            alpha: [e, heads].
            rescale: [K].
            target_ptr: [n + 1], where the edges of each target begin.
            out: dense, where the result is written, if it is given.

        Returns:
            [n, K, heads v].
        """
        rotations, values, alpha = (dense(t) for t in (rotations, values, alpha))
        heads, channels = values.shape[2:]
        nodes = len(target_ptr) - 1
        if out is None:
            out = values.new_empty(nodes, self.rows.struct.coefficients, heads * channels)
        self.kernels.edge_aggregate(
            self.rows.struct,
            rotations,
            values,
            alpha,
            heads,
            channels,
            rescale,
            target_ptr,
            out,
            nodes,
            torch.get_num_threads(),
        )
        return out

    def backward(
        self, rotations: Tensor, grad: Tensor, target: Tensor, values: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the values and of alpha.

        Args:
            rotations, values, alpha: as in :meth:`forward`.
            grad: [n, K, heads v], times the rescale.
            target: [e], atom in the chunk.
        """
        rotations, values, alpha = (dense(t) for t in (rotations, values, alpha))
        grad = dense(grad)
        values_grad, alpha_grad = torch.empty_like(values), torch.zeros_like(alpha)
        self.kernels.edge_aggregate_backward(
            self.rows.struct,
            rotations,
            grad,
            target,
            values,
            alpha,
            *values.shape[2:],
            values_grad,
            alpha_grad,
            len(values),
            torch.get_num_threads(),
        )
        return values_grad, alpha_grad


def aggregate_kernels(
    values: Tensor, alpha: Tensor, edge_layout: Layout, layout: Layout
) -> AggregateKernels | None:
    """Kernels for such values and edges; None where the reference has to run."""
    kernels = usable(values, alpha)
    if kernels is None:
        return None
    found = rows(edge_layout, layout)
    channels = values.shape[3]
    fit = fits("sums over edges", channels, kernels.aggregate_misfit(found.struct, channels))
    return AggregateKernels(kernels, found) if fit else None
