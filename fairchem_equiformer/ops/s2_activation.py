"""S2 activation: a pointwise non-linearity on the sphere (paper, section A.4).

    y = G^-1 SiLU(G x)

with G the samples of the harmonics at the grid points. The grid is 5 to 20 times the size of x; it
is made piece by piece, in the processor's cache on a CPU, and never kept for the backward pass. The
compiled version holds one latitude of one item at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import native, triton
from fairchem_equiformer.so3.grid import Grid

if TYPE_CHECKING:
    from fairchem_equiformer.ops.triton.grid import GridKernels as TritonGridKernels

_CPU_GRID_BYTES = 3 * 2**20  # of one piece; about the second-level cache of the cores that share it
_CUDA_GRID_BYTES = 256 * 2**20


def grid_pieces(num_items: int, bytes_per_item: int, device: torch.device) -> Iterator[slice]:
    """Slices over ``num_items`` such that the grid of each fits a fixed budget."""
    budget = _CPU_GRID_BYTES if device.type == "cpu" else _CUDA_GRID_BYTES
    size = max(1, budget // bytes_per_item)
    for start in range(0, num_items, size):
        yield slice(start, min(start + size, num_items))


def project(matrix: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """One matrix times every item: [P, R] and [B, R, C] to [B, P, C].

    torch.matmul would choose its path, and so its rounding, by whether a gradient is wanted.
    """
    return torch.bmm(matrix.expand(len(x), -1, -1), x, out=out)


class _S2Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor | None, grid: Grid) -> Tensor:
        kernels = triton.grid_kernels(grid, x) or native.grid_kernels(grid, x)
        ctx.grid, ctx.kernels = grid, kernels
        ctx.save_for_backward(x, gates)
        num_scalars = 0 if gates is None else 1
        out = x.new_empty(len(x), num_scalars + grid.from_grid.shape[1], x.shape[2])
        if gates is not None:
            out[:, 0] = F.silu(gates)
        y = out[:, num_scalars:]
        if kernels is not None:
            kernels.activation(x, y)
            return out
        for piece in _pieces(x, grid):
            samples = F.silu(project(grid.to_grid, x[piece]), inplace=True)  # [e, P, C]
            y[piece] = project(grid.from_grid.t(), samples)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x, gates), grid, kernels = ctx.saved_tensors, ctx.grid, ctx.kernels
        if gates is None:
            return _backward(x, grad, grid, kernels), None, None
        gates_grad = torch.ops.aten.silu_backward(grad[:, 0], gates)
        return _backward(x, grad[:, 1:], grid, kernels), gates_grad, None


def _backward(
    x: Tensor, grad: Tensor, grid: Grid, kernels: native.GridKernels | TritonGridKernels | None
) -> Tensor:
    if kernels is not None:
        return kernels.activation_backward(x, grad)
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    for piece in _pieces(x, grid):
        samples = project(grid.to_grid, x[piece])
        samples_grad = project(grid.from_grid, grad[piece])
        samples_grad = torch.ops.aten.silu_backward(samples_grad, samples)
        project(grid.to_grid.t(), samples_grad, out=x_grad[piece])
    return x_grad


def _pieces(x: Tensor, grid: Grid) -> Iterator[slice]:
    item_bytes = len(grid.to_grid) * x.shape[2] * x.element_size()
    return grid_pieces(len(x), item_bytes, x.device)


def s2_activation(x: Tensor, grid: Grid) -> Tensor:
    """SiLU on the sphere, channel by channel.

    Args:
        x: [B, R, C], R coefficients in the grid's order.
        grid: in x's dtype, on its device.

    Returns:
        [B, S, C], the coefficients that the grid gives back.
    """
    out: Tensor = _S2Activation.apply(x, None, grid)
    return out


def separable_s2_activation(x: Tensor, gates: Tensor, grid: Grid) -> Tensor:
    """SiLU of scalars made from elsewhere, and SiLU on the sphere for the rest (paper, Fig. 2c).

    Args:
        x: [B, R, C], R coefficients in the grid's order.
        gates: [B, C], the scalars before their SiLU.
        grid: that gives back all coefficients but the first, in x's dtype, on its device.

    Returns:
        [B, R, C].
    """
    out: Tensor = _S2Activation.apply(x, gates, grid)
    return out
