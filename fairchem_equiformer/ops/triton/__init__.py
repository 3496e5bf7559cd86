"""Kernels in Triton for the ops that matrix products do not cover, on NVIDIA GPUs.

The functions give kernels for the tensors they are shown, or None where PyTorch has to run. Nothing
here imports Triton before a kernel is needed, and nothing outside this folder does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fairchem_equiformer.ops.triton.loader import usable
from fairchem_equiformer.so3.grid import Grid
from fairchem_equiformer.so3.layout import Layout

if TYPE_CHECKING:
    from fairchem_equiformer.ops.triton.aggregate import AggregateKernels
    from fairchem_equiformer.ops.triton.attention import LogitKernels, SoftmaxKernels
    from fairchem_equiformer.ops.triton.grid import GridKernels
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
