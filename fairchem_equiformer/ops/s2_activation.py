"""S2 activation: a pointwise non-linearity on the sphere (paper, section A.4).

    y = G^-1 SiLU(G x)

with G the samples of the harmonics at the grid points. The grid is 5 to 20 times the size of x; it
is made piece by piece, in the processor's cache on a CPU, and never kept for the backward pass. The
compiled version holds one latitude of one item at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library, native, triton
from fairchem_equiformer.so3.grid import GRID_SCHEMA, Grid, GridSpec

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


_Kernels = Union["native.GridKernels", "TritonGridKernels", None]


def _forward(x: Tensor, gates: Tensor | None, grid: Grid, kernels: _Kernels) -> Tensor:
    num_scalars = 0 if gates is None else 1
    out = x.new_empty(len(x), num_scalars + grid.from_grid.shape[1], x.shape[2])
    y = out[:, num_scalars:]
    if isinstance(kernels, native.GridKernels):
        if gates is not None:
            kernels.silu(gates, out[:, 0])
        kernels.activation(x, y)
        return out
    if gates is not None:
        out[:, 0] = F.silu(gates)
    if kernels is not None:
        kernels.activation(x, y)
        return out
    for piece in _pieces(x, grid):
        samples = F.silu(project(grid.to_grid, x[piece]), inplace=True)  # [e, P, C]
        y[piece] = project(grid.from_grid.t(), samples)
    return out


def _backward(
    grad: Tensor, x: Tensor, gates: Tensor | None, grid: Grid, kernels: _Kernels
) -> tuple[Tensor, Tensor | None]:
    if gates is None:
        return _through_grid(grad, x, grid, kernels), None
    if isinstance(kernels, native.GridKernels):
        gates_grad = torch.empty_like(gates, memory_format=torch.contiguous_format)
        kernels.silu_backward(gates, grad[:, 0], gates_grad)
    else:
        gates_grad = torch.ops.aten.silu_backward(grad[:, 0], gates)
    return _through_grid(grad[:, 1:], x, grid, kernels), gates_grad


class _S2Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor | None, grid: Grid) -> Tensor:
        ctx.made = grid, _kernels(grid, x)
        ctx.save_for_backward(x, gates)
        return _forward(x, gates, *ctx.made)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *_backward(grad, *ctx.saved_tensors, *ctx.made), None


def _through_grid(grad: Tensor, x: Tensor, grid: Grid, kernels: _Kernels) -> Tensor:
    if kernels is not None:
        return kernels.activation_backward(x, grad)
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    for piece in _pieces(x, grid):
        samples = project(grid.to_grid, x[piece])
        samples_grad = project(grid.from_grid, grad[piece])
        samples_grad = torch.ops.aten.silu_backward(samples_grad, samples)
        project(grid.to_grid.t(), samples_grad, out=x_grad[piece])
    return x_grad


def _kernels(grid: Grid, x: Tensor) -> _Kernels:
    return triton.grid_kernels(grid, x) or native.grid_kernels(grid, x)


def _pieces(x: Tensor, grid: Grid) -> Iterator[slice]:
    item_bytes = len(grid.to_grid) * x.shape[2] * x.element_size()
    return grid_pieces(len(x), item_bytes, x.device)


def _made(x: Tensor, *constants: Any) -> tuple[Grid, _Kernels]:
    """The grid of these constants, and the kernels for it."""
    grid = GridSpec.of(*constants).matrices(x.dtype, x.device)
    return grid, _kernels(grid, x)


_operation = library.register(
    "s2_activation",
    f"Tensor x, Tensor? gates, {GRID_SCHEMA}",
    lambda x, gates, *constants: _forward(x, gates, *_made(x, *constants)),
    lambda x, gates, *constants: x.new_empty(
        x.shape[0], GridSpec.of(*constants).num_wanted + (gates is not None), x.shape[2]
    ),
    lambda grad, x, gates, *constants: _backward(grad, x, gates, *_made(x, *constants)),
    "x gates",
)


def _activation(x: Tensor, gates: Tensor | None, grid: GridSpec) -> Tensor:
    if torch.compiler.is_compiling():
        out: Tensor = _operation(x, gates, *grid.constants())
    else:
        out = _S2Activation.apply(x, gates, grid.matrices(x.dtype, x.device))
    return out


def s2_activation(x: Tensor, grid: GridSpec) -> Tensor:
    """SiLU on the sphere, channel by channel.

    Args:
        x: [B, R, C], R coefficients in the grid's order.
        grid: whose coefficients the rows of x are.

    Returns:
        [B, S, C], the coefficients that the grid gives back.
    """
    return _activation(x, None, grid)


def separable_s2_activation(x: Tensor, gates: Tensor, grid: GridSpec) -> Tensor:
    """SiLU of scalars made from elsewhere, and SiLU on the sphere for the rest (paper, Fig. 2c).

    Args:
        x: [B, R, C], R coefficients in the grid's order.
        gates: [B, C], the scalars before their SiLU.
        grid: that gives back all coefficients but the first.

    Returns:
        [B, R, C].
    """
    return _activation(x, gates, grid)
