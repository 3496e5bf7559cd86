"""The grid MLP's hidden layer, G^-1 SiLU(W SiLU(G x)), with the grid in registers alone.

A program takes one atom through the whole grid, a block of points at a time, for a block of output
channels: a product to the points, SiLU, the product of the channels, SiLU, and a product back.
Channels are the rows of all products, so that what one makes the next may read from registers.
Points, coefficients and channels are filled up with zeros to what tensor cores take; SiLU(0) is 0.

The backward pass makes the samples again in each of two kernels. The one for x needs the sum over
the output channels, the one for W that over atoms and points: each has a single writer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_equiformer.ops.triton.functions import silu_slope
from fairchem_equiformer.ops.triton.grid import filled, precision
from fairchem_equiformer.ops.triton.launch import items_contiguous, launch
from fairchem_equiformer.so3.grid import Grid

_LEAST = 16  # of each side of a product
_ROWS = 32  # coefficients at a time
_POINTS = 32  # at a time
CHANNELS = 64  # of a block, at most
SPLITS = 128  # of the atoms, for the gradient of W: the programs of a block of it


@triton.jit
def _samples(
    matrix,
    point,
    x,
    item,
    first,
    num_rows,
    channels,
    stride,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some channels of an atom at the points from ``point`` on: [BLOCK, BLOCK_P].

    A few coefficients at a time: all of them, once loaded, would stay in registers to the end.
    """
    c, p = first + tl.arange(0, BLOCK)[:, None], point + tl.arange(0, BLOCK_P)[None, :]
    samples = tl.zeros([BLOCK, BLOCK_P], tl.float32)
    for first_row in range(0, num_rows, BLOCK_K):
        r = first_row + tl.arange(0, BLOCK_K)
        inside = (r < num_rows)[None, :] & (c < channels)
        found = x + item * stride + r[None, :] * channels + c
        coefficients = tl.load(found, mask=inside, other=0.0)
        values = tl.load(matrix + p * BLOCK_R + r[:, None])
        samples += tl.dot(coefficients, values, input_precision=PRECISION)
    return samples


@triton.jit
def _back(
    matrix,
    point,
    samples,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What samples [BLOCK, BLOCK_P] at those points add to coefficients: [BLOCK, BLOCK_R]."""
    p, r = point + tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_R)[None, :]
    rows = tl.load(matrix + p * BLOCK_R + r)
    return tl.dot(samples.to(rows.dtype), rows, input_precision=PRECISION)


@triton.jit
def _mixed(
    x,
    weight,
    to_grid,
    point,
    item,
    first_out,
    num_in,
    channels,
    x_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W SiLU(G x) at some points, for some output channels [BLOCK, BLOCK_P]."""
    mixed = tl.zeros([BLOCK, BLOCK_P], tl.float32)
    o = first_out + tl.arange(0, BLOCK)[:, None]
    for first_in in range(0, channels, BLOCK):
        samples = _samples(
            to_grid,
            point,
            x,
            item,
            first_in,
            num_in,
            channels,
            x_stride,
            BLOCK_P,
            BLOCK_R,
            BLOCK_K,
            BLOCK,
            PRECISION,
        )
        samples = (samples * tl.sigmoid(samples)).to(x.dtype.element_ty)
        i = first_in + tl.arange(0, BLOCK)[None, :]
        inside = (o < channels) & (i < channels)
        matrix = tl.load(weight + o * channels + i, mask=inside, other=0.0)
        mixed += tl.dot(matrix, samples, input_precision=PRECISION)
    return mixed


@triton.jit
def _mixed_grad(
    grad,
    from_grid,
    mixed,
    point,
    item,
    first_out,
    num_out,
    channels,
    grad_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of W SiLU(G x) at some points, for some output channels [BLOCK, BLOCK_P]."""
    samples_grad = _samples(
        from_grid,
        point,
        grad,
        item,
        first_out,
        num_out,
        channels,
        grad_stride,
        BLOCK_P,
        BLOCK_S,
        BLOCK_K,
        BLOCK,
        PRECISION,
    )
    return (samples_grad * silu_slope(mixed)).to(grad.dtype.element_ty)


@triton.jit
def grid_mlp_forward(
    out,  # [N, S, C]
    x,  # [N, R, C], items may lie apart
    weight,  # [C, C]
    to_grid,  # [points, BLOCK_R], filled up
    from_grid,  # [points, BLOCK_S], filled up
    num_in,  # R
    num_out,  # S
    channels,
    x_stride,
    POINTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = G^-1 SiLU(W SiLU(G x)), for one atom and some output channels."""
    item = tl.program_id(0).to(tl.int64)
    first_out = tl.program_id(1) * BLOCK
    total = tl.zeros([BLOCK, BLOCK_S], tl.float32)
    for point in range(0, POINTS, BLOCK_P):
        mixed = _mixed(
            x,
            weight,
            to_grid,
            point,
            item,
            first_out,
            num_in,
            channels,
            x_stride,
            BLOCK_P,
            BLOCK_R,
            BLOCK_K,
            BLOCK,
            PRECISION,
        )
        samples = mixed * tl.sigmoid(mixed)
        total += _back(from_grid, point, samples, BLOCK_P, BLOCK_S, PRECISION)
    c, s = first_out + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_S)[None, :]
    found = out + item * num_out * channels + s * channels + c
    tl.store(found, total, mask=(s < num_out) & (c < channels))


@triton.jit
def grid_mlp_backward(
    x_grad,  # [N, R, C]
    x,  # [N, R, C], items may lie apart
    grad,  # [N, S, C], items may lie apart
    weight,  # [C, C]
    to_grid,  # [points, BLOCK_R], filled up
    from_grid,  # [points, BLOCK_S], filled up
    num_in,  # R
    num_out,  # S
    channels,
    x_stride,
    grad_stride,
    POINTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = G^T (SiLU' * W^T (SiLU' * G^-1^T dy)), for one atom and some input channels."""
    item = tl.program_id(0).to(tl.int64)
    first_in = tl.program_id(1) * BLOCK
    total = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    i = first_in + tl.arange(0, BLOCK)[:, None]
    for point in range(0, POINTS, BLOCK_P):
        samples_grad = tl.zeros([BLOCK, BLOCK_P], tl.float32)
        for first_out in range(0, channels, BLOCK):
            mixed = _mixed(
                x,
                weight,
                to_grid,
                point,
                item,
                first_out,
                num_in,
                channels,
                x_stride,
                BLOCK_P,
                BLOCK_R,
                BLOCK_K,
                BLOCK,
                PRECISION,
            )
            flow = _mixed_grad(
                grad,
                from_grid,
                mixed,
                point,
                item,
                first_out,
                num_out,
                channels,
                grad_stride,
                BLOCK_P,
                BLOCK_S,
                BLOCK_K,
                BLOCK,
                PRECISION,
            )
            o = first_out + tl.arange(0, BLOCK)[None, :]
            inside = (i < channels) & (o < channels)
            matrix = tl.load(weight + o * channels + i, mask=inside, other=0.0)
            samples_grad += tl.dot(matrix, flow, input_precision=PRECISION)
        samples = _samples(
            to_grid,
            point,
            x,
            item,
            first_in,
            num_in,
            channels,
            x_stride,
            BLOCK_P,
            BLOCK_R,
            BLOCK_K,
            BLOCK,
            PRECISION,
        )
        samples_grad *= silu_slope(samples)
        total += _back(to_grid, point, samples_grad, BLOCK_P, BLOCK_R, PRECISION)
    r = tl.arange(0, BLOCK_R)[None, :]
    found = x_grad + item * num_in * channels + r * channels + i
    tl.store(found, total, mask=(r < num_in) & (i < channels))


@triton.jit
def grid_mlp_backward_weight(
    sums,  # [splits, C, C]
    x,  # [N, R, C], items may lie apart
    grad,  # [N, S, C], items may lie apart
    weight,  # [C, C]
    to_grid,  # [points, BLOCK_R], filled up
    from_grid,  # [points, BLOCK_S], filled up
    num_in,  # R
    num_out,  # S
    channels,
    x_stride,
    grad_stride,
    items,
    POINTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW = sum over points of (SiLU' * G^-1^T dy) SiLU(G x)^T, of some atoms, for a block."""
    split = tl.program_id(0).to(tl.int64)
    first_out, first_in = tl.program_id(1) * BLOCK, tl.program_id(2) * BLOCK
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for item in range(split, items, tl.num_programs(0)):
        for point in range(0, POINTS, BLOCK_P):
            mixed = _mixed(
                x,
                weight,
                to_grid,
                point,
                item,
                first_out,
                num_in,
                channels,
                x_stride,
                BLOCK_P,
                BLOCK_R,
                BLOCK_K,
                BLOCK,
                PRECISION,
            )
            flow = _mixed_grad(
                grad,
                from_grid,
                mixed,
                point,
                item,
                first_out,
                num_out,
                channels,
                grad_stride,
                BLOCK_P,
                BLOCK_S,
                BLOCK_K,
                BLOCK,
                PRECISION,
            )
            samples = _samples(
                to_grid,
                point,
                x,
                item,
                first_in,
                num_in,
                channels,
                x_stride,
                BLOCK_P,
                BLOCK_R,
                BLOCK_K,
                BLOCK,
                PRECISION,
            )
            samples = tl.trans((samples * tl.sigmoid(samples)).to(x.dtype.element_ty))
            total += tl.dot(flow, samples, input_precision=PRECISION)
    o, i = first_out + tl.arange(0, BLOCK)[:, None], first_in + tl.arange(0, BLOCK)[None, :]
    found = sums + split * channels * channels + o * channels + i
    tl.store(found, total, mask=(o < channels) & (i < channels))


def grid_mlp_blocks(num_in: int, num_out: int, channels: int, *, narrow: bool) -> dict[str, int]:
    """Sizes of a program, and its warps.

    Args:
        num_in: R.
        num_out: S.
        channels: C.
        narrow: take half of the channels, where otherwise registers would go through memory.
    """
    block_r, block_s = (max(_ROWS, triton.next_power_of_2(rows)) for rows in (num_in, num_out))
    return {
        "BLOCK_P": _POINTS,
        "BLOCK_R": block_r,
        "BLOCK_S": block_s,
        "BLOCK_K": _ROWS,
        "BLOCK": min(
            CHANNELS // (2 if narrow else 1), max(_LEAST, triton.next_power_of_2(channels))
        ),
        "num_warps": 4,
        "num_stages": 1,
    }


class GridMLPKernels:
    """Two SiLUs and a linear layer between them, on the sphere; x is [N, R, C]."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def _call(
        self,
        kernel: object,
        items: int,
        split_axes: int,
        tensors: tuple[Tensor, ...],
        x: Tensor,
        *sizes: int,
    ) -> None:
        """Start a program for each item, and each block of channels along one axis or two."""
        _, num_in, channels = x.shape
        kind = precision(x.dtype)
        num_out = self.grid.from_grid.shape[1]
        block = grid_mlp_blocks(num_in, num_out, channels, narrow=kind == "tf32x3")
        matrices = filled(self.grid, block["BLOCK_P"], block["BLOCK_K"])
        launch(
            kernel,
            (items, *[triton.cdiv(channels, block["BLOCK"])] * split_axes),
            *(*tensors, matrices.to_grid, matrices.from_grid),
            *(num_in, num_out, channels, x.stride(0), *sizes),
            POINTS=len(matrices.to_grid),
            PRECISION=kind,
            **block,
        )

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """[N, S, C], given x and the weight [C, C]."""
        x, weight = items_contiguous(x), weight.contiguous()
        out = x.new_empty(len(x), self.grid.from_grid.shape[1], x.shape[2])
        self._call(grid_mlp_forward, len(x), 1, (out, x, weight), x)
        return out

    def backward(self, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        x, grad, weight = items_contiguous(x), items_contiguous(grad), weight.contiguous()
        items, channels, apart = len(x), x.shape[2], grad.stride(0)
        x_grad, tensors = x.new_empty(x.shape), (x, grad, weight)
        self._call(grid_mlp_backward, items, 1, (x_grad, *tensors), x, apart)
        splits = min(items, SPLITS)
        sums = x.new_empty(splits, channels, channels, dtype=torch.float32)
        self._call(grid_mlp_backward_weight, splits, 2, (sums, *tensors), x, apart, items)
        return x_grad, sums.sum(0).to(weight.dtype)
