"""Edge-degree embedding: the neighbourhood of an atom as seen by distances alone (paper, Fig. 1c).

    x_i = 1 / degree * sum over j of rescale * D_ij^T w(d_ij, z_i, z_j)

where w has only m = 0: each term is the harmonics of the edge's direction times a radial weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import triton
from fairchem_equiformer.ops.edges import Edges, chunk_frames, truncation_rescale
from fairchem_equiformer.ops.radial import (
    Basis,
    RadialGradient,
    RadialTables,
    RadialWeights,
    radial_function,
)
from fairchem_equiformer.ops.rotate import rotate_back_and_sum
from fairchem_equiformer.ops.segments import Chunk


def _embed(edges: Edges, chunk: Chunk, basis: Basis, tables: RadialTables) -> Tensor:
    """Sum over the edges of one chunk: [n, K, C]."""
    frames = chunk_frames(edges, chunk)
    num_degrees = edges.layout.num_degrees(0)
    radial = radial_function(edges.scalars.select(chunk.edges), tables, basis)
    messages = radial.view(len(radial), num_degrees, radial.shape[1] // num_degrees)
    by_kernels = triton.sum_over_edges(
        messages, frames.compact, frames.target, frames.target_ptr, frames.layout
    )
    if by_kernels is not None:
        return by_kernels
    rescale = truncation_rescale(edges.layout, messages.dtype, messages.device)
    return rotate_back_and_sum(messages, frames, rescale, frames.rotation[:, :num_degrees])  # m = 0


class _EdgeDegreeEmbedding(torch.autograd.Function):
    """Keeps nothing but the weights; each chunk is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        edges: Edges,
        basis: Basis,
        tables: RadialTables | None,
        *weights: Tensor | None,
    ) -> Tensor:
        ctx.edges, ctx.basis = edges, basis
        ctx.save_for_backward(*weights)
        radial_weights = RadialWeights(*weights)  # type: ignore[arg-type]
        channels = len(radial_weights.bias_3) // edges.layout.num_degrees(0)
        shape = (edges.num_rows, edges.layout.num_coefficients, channels)
        out = radial_weights.bias_3.new_zeros(shape)
        tables = tables or RadialTables.of(radial_weights)
        for chunk in edges.chunks:
            out[chunk.rows] = _embed(edges, chunk, basis, tables)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums = RadialGradient(RadialWeights(*ctx.saved_tensors))
        for chunk in ctx.edges.chunks:
            with torch.enable_grad():
                part = _embed(ctx.edges, chunk, ctx.basis, sums.tables)
            sums.add(part, grad[chunk.rows])
        return None, None, None, *sums.total()


def edge_degree_embedding(
    edges: Edges,
    basis: Basis,
    weights: RadialWeights,
    degree: float,
    tables: RadialTables | None = None,
) -> Tensor:
    """Sum of radial weights times harmonics over each atom's edges, divided by the mean degree.

    Args:
        weights: whose output is (lmax + 1) C numbers an edge.
        tables: of these weights, if they were made before.

    Returns:
        [rows, (lmax + 1)^2, C].
    """
    total: Tensor = _EdgeDegreeEmbedding.apply(edges, basis, tables, *weights.including(basis))
    return total / degree
