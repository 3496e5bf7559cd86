"""S2 activation, G^-1 SiLU(G x), with the grid in registers alone.

Coefficients of all items and channels stand side by side as columns. A program takes some columns
through the whole grid, a block of points at a time: one small product to the points, SiLU, and one
back. Points and coefficients are filled up with zeros to what tensor cores take: SiLU(0) is 0.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_equiformer.ops.triton.functions import silu_slope
from fairchem_equiformer.ops.triton.launch import items_contiguous, launch
from fairchem_equiformer.so3.grid import Grid

BLOCK_P = 32  # points at a time
_LEAST = 16  # of each side of a product
_COLUMNS = 64
_TILE = 64 * _COLUMNS  # numbers that a program may hold of each operand


@triton.jit
def _columns(
    columns,
    channels,
    num_in,
    num_out,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where a program's columns are: item and channel, rows in and out, and which exist."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r, s = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_S)[:, None]
    item, c = (column // channels)[None, :], (column % channels)[None, :]
    in_columns = (column < columns)[None, :]
    return (
        item,
        r * channels + c,
        s * channels + c,
        (r < num_in) & in_columns,
        (s < num_out) & in_columns,
    )


@triton.jit
def _samples(
    to_grid,
    first,
    coefficients,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G x at the points from ``first`` on."""
    p, r = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    forth = tl.load(to_grid + (first + p)[:, None] * BLOCK_R + r[None, :])
    return tl.dot(forth, coefficients, input_precision=PRECISION)


@triton.jit
def s2_forward(
    out,  # [B, S, C], items may lie apart
    x,  # [B, R, C], items may lie apart
    to_grid,  # [points, BLOCK_R], filled up
    from_grid,  # [points, BLOCK_S], filled up
    columns,  # B C
    channels,
    num_in,  # R
    num_out,  # S
    x_stride,
    out_stride,
    POINTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = G^-1 SiLU(G x), for some columns."""
    item, row_in, row_out, inside_in, inside_out = _columns(
        columns, channels, num_in, num_out, BLOCK_R, BLOCK_S, BLOCK_N
    )
    p, s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    coefficients = tl.load(x + item * x_stride + row_in, mask=inside_in, other=0.0)
    total = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for first in range(0, POINTS, BLOCK_P):
        samples = _samples(to_grid, first, coefficients, BLOCK_P, BLOCK_R, PRECISION)
        samples = samples * tl.sigmoid(samples)
        back = tl.load(from_grid + (first + p)[None, :] * BLOCK_S + s[:, None])
        total += tl.dot(back, samples.to(back.dtype), input_precision=PRECISION)
    tl.store(out + item * out_stride + row_out, total, mask=inside_out)


@triton.jit
def s2_backward(
    x_grad,  # [B, R, C]
    x,  # [B, R, C], items may lie apart
    grad,  # [B, S, C], items may lie apart
    to_grid,  # [points, BLOCK_R], filled up
    from_grid,  # [points, BLOCK_S], filled up
    columns,  # B C
    channels,
    num_in,  # R
    num_out,  # S
    x_stride,
    grad_stride,
    POINTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = G^T (SiLU'(G x) * G^-1^T dy), for some columns."""
    item, row_in, row_out, inside_in, inside_out = _columns(
        columns, channels, num_in, num_out, BLOCK_R, BLOCK_S, BLOCK_N
    )
    p, r, s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    coefficients = tl.load(x + item * x_stride + row_in, mask=inside_in, other=0.0)
    flow = tl.load(grad + item * grad_stride + row_out, mask=inside_out, other=0.0)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, POINTS, BLOCK_P):
        samples = _samples(to_grid, first, coefficients, BLOCK_P, BLOCK_R, PRECISION)
        back = tl.load(from_grid + (first + p)[:, None] * BLOCK_S + s[None, :])
        samples_grad = tl.dot(back, flow, input_precision=PRECISION) * silu_slope(samples)
        forth = tl.load(to_grid + (first + p)[None, :] * BLOCK_R + r[:, None])
        total += tl.dot(forth, samples_grad.to(forth.dtype), input_precision=PRECISION)
    tl.store(x_grad + item * num_in * channels + row_in, total, mask=inside_in)


@dataclass(frozen=True)
class Filled:
    """Matrices of a grid, filled up with zeros."""

    to_grid: Tensor  # [points, BLOCK_R]
    from_grid: Tensor  # [points, BLOCK_S]


@cache
def filled(grid: Grid, block_p: int, least: int) -> Filled:
    """The matrices with as many points as whole blocks have, and a power of two of columns."""
    points = triton.cdiv(len(grid.to_grid), block_p) * block_p

    def fill(matrix: Tensor) -> Tensor:
        width = max(least, triton.next_power_of_2(matrix.shape[1]))
        filled = matrix.new_zeros(points, width)
        filled[: len(matrix), : matrix.shape[1]] = matrix
        return filled

    with torch.inference_mode(mode=False):  # they outlive the mode that they are made in
        return Filled(fill(grid.to_grid), fill(grid.from_grid))


def precision(dtype: torch.dtype) -> str:
    """How products are made: of float32 by TF32 if PyTorch's own are, else by three of TF32.

    Three products of what TF32 keeps of each operand, and of what it leaves over, are as exact as
    float32 to a few roundings.
    """
    if dtype != torch.float32:
        return "ieee"  # of halves there is but one way
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def s2_blocks(num_in: int, num_out: int, *, narrow: bool) -> dict[str, int]:
    """Sizes of a program, and its warps.

    Args:
        num_in: R.
        num_out: S.
        narrow: take half of the columns, where otherwise registers would go through memory.
    """
    block_r = max(_LEAST, triton.next_power_of_2(num_in))
    block_s = max(_LEAST, triton.next_power_of_2(num_out))
    columns = _TILE // max(block_r, block_s, _TILE // _COLUMNS) // (2 if narrow else 1)
    return {
        "BLOCK_P": BLOCK_P,
        "BLOCK_R": block_r,
        "BLOCK_S": block_s,
        "BLOCK_N": max(_LEAST, columns),
        "num_warps": 4,
    }


class GridKernels:
    """SiLU on the sphere for one grid; x is [B, R, C] in all of them."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def _call(
        self, kernel: object, tensors: tuple[Tensor, ...], x: Tensor, strides: tuple[int, ...]
    ) -> None:
        items, num_in, channels = x.shape
        num_out = self.grid.from_grid.shape[1]
        kind = precision(x.dtype)
        narrow = kernel is s2_backward and kind == "tf32x3"
        block = s2_blocks(num_in, num_out, narrow=narrow)
        columns = items * channels
        matrices = filled(self.grid, BLOCK_P, _LEAST)
        launch(
            kernel,
            (triton.cdiv(columns, block["BLOCK_N"]),),
            *(*tensors, matrices.to_grid, matrices.from_grid),
            *(columns, channels, num_in, num_out, *strides),
            POINTS=len(matrices.to_grid),
            PRECISION=kind,
            **block,
        )

    def activation(self, x: Tensor, y: Tensor) -> None:
        """Write G^-1 SiLU(G x) to y [B, S, C], whose items are dense."""
        x = items_contiguous(x)
        assert items_contiguous(y) is y  # noqa: S101
        self._call(s2_forward, (y, x), x, (x.stride(0), y.stride(0)))

    def activation_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of :meth:`activation`: [B, R, C]."""
        x, grad = items_contiguous(x), items_contiguous(grad)
        x_grad = x.new_empty(x.shape)
        self._call(s2_backward, (x_grad, x, grad), x, (x.stride(0), grad.stride(0)))
        return x_grad
