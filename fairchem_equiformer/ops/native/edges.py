"""Messages along edges and their sum over each atom's edges (message.cpp, aggregate.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import Indices, RowsStruct
from fairchem_equiformer.ops.native.loader import fits, usable
from fairchem_equiformer.so3.layout import Layout


@dataclass(frozen=True)
class _Rows:
    """Rows of a layout sorted by degree."""

    table: Tensor  # [4, R]: row, degree, first entry of the compact rotation, radial weight
    struct: RowsStruct


@cache
def _rows(edge_layout: Layout, layout: Layout, *, by_degree: bool = False) -> _Rows:
    """Rows of a layout whose rotations are stored as another's, which has these rows and more."""
    sizes = [2 * degree + 1 for degree, _ in edge_layout.m_major]
    entries = {row: sum(sizes[:i]) for i, row in enumerate(edge_layout.m_major)}
    pairs = sorted({(abs(m), degree) for degree, m in layout.m_major})
    num_weights = layout.num_degrees(0) if by_degree else len(pairs)
    table = []
    for row, (degree, m) in enumerate(layout.m_major):
        weight = degree - layout.lmin if by_degree else pairs.index((abs(m), degree))
        table.append((row, degree, entries[degree, m], weight))
    columns = torch.tensor(sorted(table, key=lambda entry: (entry[1], entry[0]))).t().contiguous()
    counts = (layout.num_rows, layout.num_coefficients, sum(sizes), num_weights, layout.lmin)
    return _Rows(columns, RowsStruct(*map(Indices.of, columns), *counts))


@dataclass(frozen=True)
class MessageKernels:
    """The message of both ends of each edge (message.cpp)."""

    kernels: ctypes.CDLL
    rows: _Rows

    def forward(
        self, x: Tensor, rotations: Tensor, source: Tensor, target: Tensor, radial: Tensor
    ) -> Tensor:
        """w * D (x_source, x_target).

        Args:
            x: [N, K, C].
            rotations: [e, n], compact (so3/wigner.py).
            source, target: [e], atoms.
            radial: [e, W, 2 C].

        Returns:
            [e, R, 2 C].
        """
        x, rotations, radial = x.contiguous(), rotations.contiguous(), radial.contiguous()
        out = x.new_empty(len(source), self.rows.struct.rows, 2 * x.shape[2])
        self.kernels.edge_message(
            self.rows.struct,
            rotations,
            x,
            source,
            target,
            x.shape[2],
            radial,
            out,
            len(source),
            torch.get_num_threads(),
        )
        return out

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        rotations: Tensor,
        source: Tensor,
        target: Tensor,
        radial: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of :meth:`forward`.

        Returns:
            Of the radial weights [e, W, 2 C], and each edge's part of that of the features of its
            source and of its target, [e, K, C] both.
        """
        x, rotations, radial = x.contiguous(), rotations.contiguous(), radial.contiguous()
        grad = grad.contiguous()
        radial_grad = torch.zeros_like(radial)
        source_grad = x.new_empty(len(source), *x.shape[1:])
        target_grad = torch.empty_like(source_grad)
        self.kernels.edge_message_backward(
            self.rows.struct,
            rotations,
            x,
            source,
            target,
            x.shape[2],
            radial,
            grad,
            radial_grad,
            source_grad,
            target_grad,
            len(source),
            torch.get_num_threads(),
        )
        return radial_grad, source_grad, target_grad


def message_kernels(
    x: Tensor, radial: Tensor, layout: Layout, *, by_degree: bool
) -> MessageKernels | None:
    """Kernels for such features and edges; None where the reference has to run."""
    kernels = usable(x, radial)
    if kernels is None:
        return None
    rows = _rows(layout, layout, by_degree=by_degree)
    channels = x.shape[2]
    fit = fits("messages", channels, kernels.message_misfit(rows.struct, channels))
    return MessageKernels(kernels, rows) if fit else None


@dataclass(frozen=True)
class AggregateKernels:
    """Weighted sum of each atom's edges (aggregate.cpp)."""

    kernels: ctypes.CDLL
    rows: _Rows

    def forward(
        self, rotations: Tensor, values: Tensor, alpha: Tensor, rescale: Tensor, target_ptr: Tensor
    ) -> Tensor:
        """rescale * sum over a target's edges of D^T (alpha * v).

        Args:
            rotations: [e, entries], compact (so3/wigner.py).
            values: [e, S, heads, v].
            alpha: [e, heads].
            rescale: [K].
            target_ptr: [n + 1], where the edges of each target begin.

        Returns:
            [n, K, heads v].
        """
        rotations, values, alpha = (t.contiguous() for t in (rotations, values, alpha))
        heads, channels = values.shape[2:]
        nodes = len(target_ptr) - 1
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
        rotations, values, alpha = (t.contiguous() for t in (rotations, values, alpha))
        grad = grad.contiguous()
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
    rows = _rows(edge_layout, layout)
    channels = values.shape[3]
    fit = fits("sums over edges", channels, kernels.aggregate_misfit(rows.struct, channels))
    return AggregateKernels(kernels, rows) if fit else None
