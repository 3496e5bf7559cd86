"""Gaussians of distances times a matrix, the radial function's first layer, and its gradient.

A program makes the Gaussians of some edges a block at a time, in registers, and multiplies them:
they are never in device memory. What is looked up by the edge's elements is added to the product
with the bias. Gaussians and edges are filled up with zeros to what tensor cores take.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_equiformer.ops.triton.grid import precision
from fairchem_equiformer.ops.triton.launch import launch

SPLITS = 64  # of the edges, for the gradient of the matrix: the programs of a block of it
_LEAST = 16  # of each side of a product
_EDGES = 64
_GAUSSIANS = 32  # at a time
_COLUMNS = 128


@triton.jit
def _gaussians(
    distance,
    centers,
    edge,
    basis,
    edges,
    num_basis,
    coefficient,
    least_exponent,
):
    """Some Gaussians of some edges; where there is none, 0. One index is a row, one a column."""
    inside = (edge < edges) & (basis < num_basis)
    d = tl.load(distance + edge, mask=edge < edges, other=0.0).to(tl.float32)
    offset = d - tl.load(centers + basis, mask=basis < num_basis, other=0.0).to(tl.float32)
    exponent = tl.maximum(coefficient * offset * offset, least_exponent)
    return tl.where(inside, tl.exp(exponent), 0.0)


@triton.jit
def _tf32(x):
    """What TF32 keeps of float32, rounded: ten bits of the mantissa."""
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    return ((bits >> 13) << 13).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a b, by one product of TF32 or three: Triton 3.0 makes no three of computed a."""
    if PRECISION == "tf32x3":
        a_main, b_main = _tf32(a), _tf32(b)
        total = tl.dot(a_main, _tf32(b - b_main), total, input_precision="tf32")
        total = tl.dot(_tf32(a - a_main), b_main, total, input_precision="tf32")
        total = tl.dot(a_main, b_main, total, input_precision="tf32")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def gaussians_forward(
    out,  # [E, H]
    distance,  # [E]
    centers,  # [B]
    x,  # [B, H], the matrix
    bias,  # [H]
    source_table,  # [elements, H], and the three that follow: not read unless LOOKUPS
    target_table,
    source_element,  # [E]
    target_element,
    edges,
    num_basis,
    channels,
    coefficient,
    least_exponent,
    LOOKUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = Gaussians * matrix + bias + rows of both tables, for some edges and channels."""
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    for first in range(0, num_basis, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        values = _gaussians(
            distance, centers, edge, b[None, :], edges, num_basis, coefficient, least_exponent
        )
        inside = (b < num_basis)[:, None] & (c < channels)
        matrix = tl.load(x + b[:, None] * channels + c, mask=inside, other=0.0).to(tl.float32)
        total = _add_product(total, values, matrix, PRECISION)
    inside = (edge < edges) & (c < channels)
    total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    if LOOKUPS:
        row = tl.load(source_element + edge, mask=edge < edges, other=0)
        total += tl.load(source_table + row * channels + c, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(target_element + edge, mask=edge < edges, other=0)
        total += tl.load(target_table + row * channels + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + edge * channels + c, total, mask=inside)


@triton.jit
def gaussians_backward(
    sums,  # [splits, B, H]
    distance,  # [E]
    centers,  # [B]
    x,  # [E, H], gradient of the product
    edges,
    blocks,
    num_basis,
    channels,
    coefficient,
    least_exponent,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the matrix: Gaussians^T dy, for a block of it, summed over some edges."""
    split = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for block in range(split, blocks, tl.num_programs(0)):
        edge = block * BLOCK_E + tl.arange(0, BLOCK_E)
        values = _gaussians(
            distance, centers, edge[None, :], b, edges, num_basis, coefficient, least_exponent
        )
        inside = (edge < edges)[:, None] & (c < channels)
        flow = tl.load(x + edge[:, None] * channels + c, mask=inside, other=0.0).to(tl.float32)
        total = _add_product(total, values, flow, PRECISION)
    inside = (b < num_basis) & (c < channels)
    tl.store(sums + (split * num_basis + b) * channels + c, total, mask=inside)


def gaussian_blocks(channels: int) -> dict[str, Any]:
    """Sizes of a program, how it makes products, and its warps."""
    kind = precision(torch.float32)
    return {
        # Triton 3.0 makes three products of TF32 for 9.0 only of fewer rows than wgmma has.
        "BLOCK_E": _EDGES // (2 if kind == "tf32x3" else 1),
        "PRECISION": kind,
        "BLOCK_B": _GAUSSIANS,
        "BLOCK_C": min(_COLUMNS, max(_LEAST, triton.next_power_of_2(channels))),
        "num_warps": 8,
        "num_stages": 1,
    }


class GaussianKernels:
    """Gaussians exp(coefficient (d - center)^2) times a matrix [B, H], made in float32.

    Args:
        centers: [B].
        coefficient: below zero.
        least_exponent: smaller ones are taken as this.
    """

    def __init__(self, centers: Tensor, coefficient: float, least_exponent: float) -> None:
        self.centers = centers.contiguous()
        self._constants = coefficient, least_exponent

    def forward(
        self,
        distance: Tensor,
        matrix: Tensor,
        bias: Tensor,
        lookups: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Gaussians times matrix, plus bias, plus rows of tables.

        Args:
            distance: [E].
            matrix: [B, H].
            bias: [H].
            lookups: none or two of a table [., H] and its row for each edge [E].

        Returns:
            [E, H].
        """
        edges, (num_basis, channels) = len(distance), matrix.shape
        out, block = (
            matrix.new_empty(edges, channels),
            gaussian_blocks(channels),
        )
        (source, at_source), (target, at_target) = lookups or [(bias, distance)] * 2
        launch(
            gaussians_forward,
            (triton.cdiv(edges, block["BLOCK_E"]), triton.cdiv(channels, block["BLOCK_C"])),
            *(out, distance.contiguous(), self.centers, matrix.contiguous(), bias.contiguous()),
            *(source.contiguous(), target.contiguous()),
            *(at_source.contiguous(), at_target.contiguous()),
            *(edges, num_basis, channels, *self._constants),
            LOOKUPS=bool(lookups),
            **block,
        )
        return out

    def backward(self, distance: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the matrix [B, H], given that of the product [E, H]."""
        edges, channels, num_basis = *grad.shape, len(self.centers)
        block = gaussian_blocks(channels)
        blocks = triton.cdiv(edges, block["BLOCK_E"])
        splits = min(blocks, SPLITS)
        sums = grad.new_empty(splits, num_basis, channels, dtype=torch.float32)
        launch(
            gaussians_backward,
            (
                splits,
                triton.cdiv(num_basis, block["BLOCK_B"]),
                triton.cdiv(channels, block["BLOCK_C"]),
            ),
            *(sums, distance.contiguous(), self.centers, grad.contiguous()),
            *(edges, blocks, num_basis, channels, *self._constants),
            **block,
        )
        return sums.sum(0).to(grad.dtype)
