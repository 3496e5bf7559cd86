"""The hidden layer of the grid MLP (paper, Fig. 2c, with F a multi-layer perceptron).

    y = G^-1 SiLU(W SiLU(G x))

The MLP's first and last linear layers act on channels alone and commute with G, so that they are
folded into the linear layers on either side (nn/feed_forward.py). Nothing but x is kept for the
backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library, triton
from fairchem_equiformer.ops.linear import add_product, product
from fairchem_equiformer.ops.native import (
    GridKernels,
    grid_kernels,
    pack,
    product_kernels,
    together,
)
from fairchem_equiformer.ops.s2_activation import grid_pieces, project
from fairchem_equiformer.so3.grid import GRID_SCHEMA, Grid, GridSpec

if TYPE_CHECKING:
    from fairchem_equiformer.ops.triton.grid_mlp import GridMLPKernels


class _Kernels(NamedTuple):
    """Those that take such a grid and such tensors."""

    on_gpu: GridMLPKernels | None
    on_cpu: GridKernels | None


def _kernels(x: Tensor, weight: Tensor, grid: Grid) -> _Kernels:
    return _Kernels(triton.grid_mlp_kernels(grid, x, weight), grid_kernels(grid, x))


def _forward(x: Tensor, weight: Tensor, grid: Grid, made: _Kernels) -> Tensor:
    if made.on_gpu is not None:
        return made.on_gpu.forward(x, weight)
    kernels = made.on_cpu
    own = None if kernels is None else product_kernels(x, weight, widths=weight.shape)
    if kernels is not None and own is not None:
        return kernels.mlp(x, pack(own, weight.t()))
    y = x.new_empty(len(x), grid.from_grid.shape[1], len(weight))
    for piece in _pieces(x, grid):
        if kernels is not None:
            y[piece] = kernels.integral(_mix(kernels.samples(x[piece]), weight.t()))
            continue
        first = F.silu(project(grid.to_grid, x[piece]), inplace=True)  # [n, P, C]
        second = F.silu(_mix(first, weight.t()), inplace=True)
        project(grid.from_grid.t(), second, out=y[piece])
    return y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, grid: Grid, made: _Kernels
) -> tuple[Tensor, Tensor]:
    if made.on_gpu is not None:
        return made.on_gpu.backward(x, weight, grad)
    kernels = made.on_cpu
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight_grad = torch.zeros_like(weight)
    silu_backward = torch.ops.aten.silu_backward
    for piece in _pieces(x, grid):
        if kernels is not None:
            with together():
                first = kernels.samples(x[piece])
                mixed = _mix(first, weight.t())
                mixed_grad = kernels.integral_backward(mixed, grad[piece])
                add_product(weight_grad, mixed_grad.flatten(0, 1).t(), first.flatten(0, 1))
                kernels.samples_backward(x[piece], _mix(mixed_grad, weight), x_grad[piece])
            continue
        samples = project(grid.to_grid, x[piece])
        first = F.silu(samples)
        second_grad = project(grid.from_grid, grad[piece])
        second_grad = silu_backward(second_grad, _mix(first, weight.t()))
        add_product(weight_grad, second_grad.flatten(0, 1).t(), first.flatten(0, 1))
        first_grad = silu_backward(_mix(second_grad, weight), samples)
        project(grid.to_grid.t(), first_grad, out=x_grad[piece])
    return x_grad, weight_grad


class _GridMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
        ctx.made = grid, _kernels(x, weight, grid)
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, *ctx.made)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_backward(grad, *ctx.saved_tensors, *ctx.made), None


def _mix(samples: Tensor, matrix: Tensor) -> Tensor:
    """Channels of all points times one matrix: [n, P, C] and [C, D] to [n, P, D]."""
    return product(samples.flatten(0, 1), matrix).view(*samples.shape[:2], matrix.shape[1])


def _pieces(x: Tensor, grid: Grid) -> list[slice]:
    item_bytes = 2 * len(grid.to_grid) * x.shape[2] * x.element_size()
    return list(grid_pieces(len(x), item_bytes, x.device))


def _made(x: Tensor, weight: Tensor, *constants: Any) -> tuple[Grid, _Kernels]:
    """The grid of these constants, and the kernels for it."""
    grid = GridSpec.of(*constants).matrices(x.dtype, x.device)
    return grid, _kernels(x, weight, grid)


_operation = library.register(
    "grid_mlp",
    f"Tensor x, Tensor weight, {GRID_SCHEMA}",
    lambda x, weight, *constants: _forward(x, weight, *_made(x, weight, *constants)),
    lambda x, weight, *constants: x.new_empty(
        x.shape[0], GridSpec.of(*constants).num_wanted, weight.shape[0]
    ),
    lambda grad, x, weight, *constants: _backward(grad, x, weight, *_made(x, weight, *constants)),
    "x weight",
)


def grid_mlp(x: Tensor, weight: Tensor, grid: GridSpec) -> Tensor:
    """Apply SiLU, a linear layer without bias, and SiLU at every point of the sphere.

    Args:
        x: [N, R, C].
        weight: [C, C].
        grid: whose coefficients the rows of x are.

    Returns:
        [N, S, C], the coefficients that the grid gives back.
    """
    weight = weight.to(x.dtype)
    if torch.compiler.is_compiling():
        out: Tensor = _operation(x, weight, *grid.constants())
    else:
        out = _GridMLP.apply(x, weight, grid.matrices(x.dtype, x.device))
    return out
