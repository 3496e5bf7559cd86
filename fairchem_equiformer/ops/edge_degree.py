"""Edge-degree embedding: the neighbourhood of an atom as seen by distances alone (paper, Fig. 1c).

    x_i = 1 / degree * sum over j of rescale * D_ij^T w(d_ij, z_i, z_j)

where w has only m = 0: each term is the harmonics of the edge's direction times a radial weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library, triton
from fairchem_equiformer.ops.edges import (
    EDGES_SCHEMA,
    Edges,
    chunk_frames,
    edge_arguments,
    edges_of,
    truncation_rescale,
)
from fairchem_equiformer.ops.radial import (
    RADIAL_SCHEMA,
    Basis,
    RadialGradient,
    RadialTables,
    RadialWeights,
    radial_arguments,
    radial_function,
    radial_of,
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


def _forward(
    edges: Edges, basis: Basis, weights: RadialWeights, tables: RadialTables | None = None
) -> Tensor:
    out = weights.bias_3.new_zeros(_shape(edges, weights))
    tables = tables or RadialTables.of(weights)
    for chunk in edges.chunks:
        out[chunk.rows] = _embed(edges, chunk, basis, tables)
    return out


def _backward(
    grad: Tensor, edges: Edges, basis: Basis, weights: RadialWeights
) -> list[Tensor | None]:
    sums = RadialGradient(weights)
    for chunk in edges.chunks:
        with torch.enable_grad():
            part = _embed(edges, chunk, basis, sums.tables)
        sums.add_by_autograd(part, grad[chunk.rows])
    return sums.total()


def _shape(edges: Edges, weights: RadialWeights) -> tuple[int, int, int]:
    channels = len(weights.bias_3) // edges.layout.num_degrees(0)
    return edges.num_rows, edges.layout.num_coefficients, channels


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
        return _forward(edges, basis, RadialWeights(*weights), tables)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _backward(grad, ctx.edges, ctx.basis, RadialWeights(*ctx.saved_tensors))
        return None, None, None, *found


def _decoded(*arguments: Any, fake: bool = False) -> tuple[Edges, Basis, RadialWeights]:
    weights, basis = radial_of(*arguments[:4])
    return edges_of(*arguments[4:], fake=fake), basis, RadialWeights(*weights)  # type: ignore[arg-type]


def _fake(*arguments: Any) -> Tensor:
    edges, _, weights = _decoded(*arguments, fake=True)
    return weights.bias_3.new_empty(_shape(edges, weights))


_operation = library.register(
    "edge_degree_embedding",
    f"{RADIAL_SCHEMA}, {EDGES_SCHEMA}",
    lambda *arguments: _forward(*_decoded(*arguments)),
    _fake,
    lambda grad, *arguments: _backward(grad, *_decoded(*arguments)),
    "weights",
)


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
    weights = weights.including(basis)
    if torch.compiler.is_compiling():
        total: Tensor = _operation(*radial_arguments(weights, basis), *edge_arguments(edges))
    else:
        total = _EdgeDegreeEmbedding.apply(edges, basis, tables, *weights)
    return total / degree
