"""The hidden layer of the grid MLP (paper, Fig. 2c, with F a multi-layer perceptron).

    y = G^-1 SiLU(W SiLU(G x))

The MLP's first and last linear layers act on channels alone and commute with G, so that they are
folded into the linear layers on either side (nn/feed_forward.py). Nothing but x is kept for the
backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import triton
from fairchem_equiformer.ops.native import grid_kernels
from fairchem_equiformer.ops.s2_activation import grid_pieces, project
from fairchem_equiformer.so3.grid import Grid


class _GridMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
        on_gpu, kernels = triton.grid_mlp_kernels(grid, x, weight), grid_kernels(grid, x)
        ctx.grid, ctx.kernels, ctx.on_gpu = grid, kernels, on_gpu
        ctx.save_for_backward(x, weight)
        if on_gpu is not None:
            return on_gpu.forward(x, weight)
        y = x.new_empty(len(x), grid.from_grid.shape[1], len(weight))
        for piece in _pieces(x, grid):
            if kernels is not None:
                y[piece] = kernels.integral(_mix(kernels.samples(x[piece]), weight.t()))
                continue
            first = F.silu(project(grid.to_grid, x[piece]), inplace=True)  # [n, P, C]
            second = F.silu(_mix(first, weight.t()), inplace=True)
            project(grid.from_grid.t(), second, out=y[piece])
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), grid, kernels = ctx.saved_tensors, ctx.grid, ctx.kernels
        if ctx.on_gpu is not None:
            return *ctx.on_gpu.backward(x, weight, grad), None
        x_grad = torch.empty_like(x)
        weight_grad = torch.zeros_like(weight)
        silu_backward = torch.ops.aten.silu_backward
        for piece in _pieces(x, grid):
            if kernels is not None:
                first = kernels.samples(x[piece])
                mixed = _mix(first, weight.t())
                mixed_grad = kernels.integral_backward(mixed, grad[piece])
                weight_grad.addmm_(mixed_grad.flatten(0, 1).t(), first.flatten(0, 1))
                x_grad[piece] = kernels.samples_backward(x[piece], _mix(mixed_grad, weight))
                continue
            samples = project(grid.to_grid, x[piece])
            first = F.silu(samples)
            second_grad = project(grid.from_grid, grad[piece])
            second_grad = silu_backward(second_grad, _mix(first, weight.t()))
            weight_grad.addmm_(second_grad.flatten(0, 1).t(), first.flatten(0, 1))
            first_grad = silu_backward(_mix(second_grad, weight), samples)
            project(grid.to_grid.t(), first_grad, out=x_grad[piece])
        return x_grad, weight_grad, None


def _mix(samples: Tensor, matrix: Tensor) -> Tensor:
    """Channels of all points times one matrix: [n, P, C] and [C, D] to [n, P, D]."""
    return torch.mm(samples.flatten(0, 1), matrix).view(*samples.shape[:2], matrix.shape[1])


def _pieces(x: Tensor, grid: Grid) -> list[slice]:
    item_bytes = 2 * len(grid.to_grid) * x.shape[2] * x.element_size()
    return list(grid_pieces(len(x), item_bytes, x.device))


def grid_mlp(x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """Apply SiLU, a linear layer without bias, and SiLU at every point of the sphere.

    Args:
        x: [N, R, C].
        weight: [C, C].
        grid: in x's dtype, on its device.

    Returns:
        [N, S, C], the coefficients that the grid gives back.
    """
    out: Tensor = _GridMLP.apply(x, weight.to(x.dtype), grid)
    return out
