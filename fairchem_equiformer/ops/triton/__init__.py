"""Kernels in Triton for the ops that matrix products do not cover, on NVIDIA GPUs.

The functions give kernels for the tensors they are shown, or None where PyTorch has to run. Nothing
here imports Triton before a kernel is needed, and nothing outside this folder does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fairchem_equiformer.ops.triton.loader import usable
from fairchem_equiformer.so3.grid import Grid
from fairchem_equiformer.so3.layout import Layout, layout

if TYPE_CHECKING:
    from fairchem_equiformer.ops.triton.aggregate import AggregateKernels
    from fairchem_equiformer.ops.triton.attention import LogitKernels, SoftmaxKernels
    from fairchem_equiformer.ops.triton.gaussians import GaussianKernels
    from fairchem_equiformer.ops.triton.grid import GridKernels
    from fairchem_equiformer.ops.triton.grid_mlp import GridMLPKernels
    from fairchem_equiformer.ops.triton.message import MessageKernels

# Each imports its kernels when they are first needed, and Triton with them.
# ruff: noqa: PLC0415


def message_kernels(
    x: Tensor, radial: Tensor, layout: Layout, *, by_degree: bool
) -> MessageKernels | None:
    """Kernels for such features and edges."""
    if not usable("messages", x, radial):
        return None
    from fairchem_equiformer.ops.triton.message import MessageKernels

    return MessageKernels(layout, by_degree=by_degree)


def aggregate_kernels(
    values: Tensor, alpha: Tensor, edge_layout: Layout, layout: Layout
) -> AggregateKernels | None:
    """Kernels for such values and edges."""
    if not usable("sums over edges", values, alpha):
        return None
    from fairchem_equiformer.ops.triton.aggregate import AggregateKernels

    return AggregateKernels(edge_layout, layout)


def logit_kernels(
    scalars: Tensor, norm: tuple[Tensor, Tensor] | None, dot: Tensor, epsilon: float
) -> LogitKernels | None:
    """Kernels for such scalars and weights."""
    if not usable("attention logits", scalars, dot, *(norm or ())):
        return None
    from fairchem_equiformer.ops.triton.attention import LogitKernels

    return LogitKernels(epsilon)


def softmax_kernels(logits: Tensor) -> SoftmaxKernels | None:
    """Kernels for such logits."""
    if not usable("attention softmax", logits):
        return None
    from fairchem_equiformer.ops.triton.attention import SoftmaxKernels

    return SoftmaxKernels()


def grid_kernels(grid: Grid, x: Tensor) -> GridKernels | None:
    """Kernels for such a grid and such an x [B, R, C]."""
    # Its products need tensor cores that take float32 in parts (tf32x3).
    if not usable("non-linearities on the grid", x, grid.to_grid, least=8):
        return None
    from fairchem_equiformer.ops.triton.grid import GridKernels

    return GridKernels(grid)


def grid_mlp_kernels(grid: Grid, x: Tensor, weight: Tensor) -> GridMLPKernels | None:
    """Kernels for such a grid, such an x [N, R, C] and weight [C, C]."""
    if not usable("grid MLP", x, weight, grid.to_grid, least=8):  # as above
        return None
    from fairchem_equiformer.ops.triton.grid_mlp import GridMLPKernels

    return GridMLPKernels(grid)


def equivariant_norm(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor, affine: Tensor, epsilon: float
) -> Tensor | None:
    """The norm of x [N, (lmax + 1)^2, C], differentiable; None where PyTorch has to run.

    Args:
        kind: as in ops/norm.py.
        x: features.
        weight: [C], of l = 0.
        bias: [C].
        affine: [lmax, C], weights of l > 0.
        epsilon: is added to mean squares.
    """
    if not usable("norms", x, weight, bias, affine):
        return None
    from fairchem_equiformer.ops.triton import norm

    return norm.norm(norm.NormKernels(kind, len(affine), epsilon), x, weight, bias, affine)


def gate_activation(x: Tensor, gates: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor | None:
    """As in ops/gate.py, differentiable; None where PyTorch has to run."""
    if not usable("gates", x, gates):
        return None
    from fairchem_equiformer.ops.triton import gate

    return gate.gate(gate.GateKernels(rows), x, gates)


def gaussian_kernels(
    distance: Tensor,
    centers: Tensor,
    coefficient: float,
    least_exponent: float,
    matrix: Tensor,
    *terms: Tensor,
) -> GaussianKernels | None:
    """Kernels for Gaussians times such a matrix, and such terms to add; None as above."""
    tensors = distance, centers, matrix, *terms
    if not usable("radial functions' first layers", *tensors, least=8):  # as the grid's
        return None
    from fairchem_equiformer.ops.triton.gaussians import GaussianKernels

    return GaussianKernels(centers, coefficient, least_exponent)


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor | None:
    """SiLU of the layer norm of x [..., C], differentiable twice; None where PyTorch has to run.

    Args:
        x: features.
        weight: [C]; the result has its dtype.
        bias: [C].
        epsilon: is added to mean squares.
    """
    if not usable("radial functions' layer norms", x, weight, bias):
        return None
    from fairchem_equiformer.ops.triton import radial

    rows = x.reshape(-1, x.shape[-1])
    found = radial.norm_silu(radial.NormSiLUKernels(epsilon), rows, weight, bias)
    return found.view(x.shape)


def sum_over_edges(
    messages: Tensor, rotations: Tensor, target: Tensor, pointers: Tensor, edge_layout: Layout
) -> Tensor | None:
    """Sum of messages of order 0, turned back, differentiable; None where PyTorch has to run.

    Args:
        messages: [e, degrees, C].
        rotations: [e, entries], compact.
        target: [e], atom in the chunk.
        pointers: [n + 1], where the edges of each target begin.
        edge_layout: of the rotations.

    Returns:
        [n, K, C].
    """
    if not usable("edge-degree embedding", messages, rotations):
        return None
    from fairchem_equiformer.ops.triton import aggregate

    kernels = aggregate.AggregateKernels(edge_layout, layout(edge_layout.lmax, 0))
    return aggregate.sum_over_edges(kernels, rotations, target, pointers, messages)
