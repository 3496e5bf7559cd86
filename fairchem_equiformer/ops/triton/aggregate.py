"""What an atom receives of its edges: rescale * sum over j of D^T (alpha * v), and its gradients.

Without alpha it is the sum of the edge-degree embedding, whose v have the order m = 0 alone.

Forward, a program makes one degree of one atom for a block of channels; backward, a program makes
all rows of one edge for the channels of some heads. There are neither turned values nor dense
rotations. Each number has one writer: no atomics, and the same bits at every call.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops.triton.functions import row_of_rotation
from fairchem_equiformer.ops.triton.launch import launch
from fairchem_equiformer.ops.triton.message import LARGEST_BLOCK, blocks
from fairchem_equiformer.ops.triton.rows import rows_of
from fairchem_equiformer.so3.layout import Layout


@triton.jit
def aggregate_forward(
    out,  # [n, K, heads v]
    values,  # [E, S, heads v]
    alpha,  # [E, heads]; not read unless WEIGHTED
    rotations,  # [E, entries]
    pointers,  # [n + 1], edges of each atom
    row,  # and the three that follow: ops/triton/rows.py
    entry,
    of_degree,
    rescale,
    channels,
    head_channels,
    num_heads,
    num_coefficients,
    num_rows,
    num_entries,
    lmin,
    WEIGHTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = rescale * sum over an atom's edges of D^T (alpha * v), for one degree."""
    place = tl.program_id(0).to(tl.int64)
    degree = tl.program_id(1)
    size = 2 * (degree + lmin) + 1
    k = tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_degree, in_c = k < size, c < channels
    first_row, last_row = tl.load(of_degree + degree), tl.load(of_degree + degree + 1)
    total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for edge in range(tl.load(pointers + place), tl.load(pointers + place + 1)):
        share = tl.full([BLOCK_C], 1.0, tl.float32)
        if WEIGHTED:
            share = tl.load(alpha + edge * num_heads + c // head_channels, mask=in_c, other=0.0)
            share = share.to(tl.float32)
        for i in range(first_row, last_row):
            turn = row_of_rotation(rotations, entry, i, edge, num_entries, k, in_degree)
            value = values + (edge * num_rows + tl.load(row + i)) * channels + c
            weighted = share * tl.load(value, mask=in_c, other=0.0).to(tl.float32)
            total += turn[:, None] * weighted[None, :]
    first = (degree + lmin) * (degree + lmin) - lmin * lmin
    tile = (first + k)[:, None] * channels + c[None, :]
    tl.store(
        out + place * num_coefficients * channels + tile,
        total * tl.load(rescale + degree),
        mask=in_degree[:, None] & in_c[None, :],
    )


@triton.jit
def aggregate_backward(
    values_grad,  # [E, S, heads v]
    alpha_grad,  # [E, heads]; it and the two after the next only where WEIGHTED
    grad,  # [n, K, heads v]
    values,  # [E, S, heads v]
    alpha,  # [E, heads]
    rotations,  # [E, entries]
    target,  # [E], atom in the chunk
    row,  # and the three that follow: ops/triton/rows.py
    entry,
    of_degree,
    rescale,
    num_heads,
    num_coefficients,
    num_rows,
    num_entries,
    num_degrees,
    lmin,
    WEIGHTED: tl.constexpr,
    HEAD_CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,  # of the channels of a head
):
    """dv = alpha * D (rescale dy) and dalpha = v . D (rescale dy), for one edge."""
    edge = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    place = tl.arange(0, BLOCK_HEADS * BLOCK_V)
    first_head = tl.program_id(1) * BLOCK_HEADS
    head = first_head + place // BLOCK_V
    in_c = head < num_heads
    c = first_head * HEAD_CHANNELS + place
    if HEAD_CHANNELS != BLOCK_V:  # channels of a head are filled up to a power of two
        in_c = in_c & (place % BLOCK_V < HEAD_CHANNELS)
        c = head * HEAD_CHANNELS + place % BLOCK_V
    channels = num_heads * HEAD_CHANNELS
    atom = grad + tl.load(target + edge) * num_coefficients * channels
    total = tl.zeros([BLOCK_HEADS * BLOCK_V], tl.float32)
    share = total + 1
    if WEIGHTED:
        share = tl.load(alpha + edge * num_heads + head, mask=in_c, other=0.0).to(tl.float32)
    for degree in range(num_degrees):
        size = 2 * (degree + lmin) + 1
        in_degree = k < size
        first = (degree + lmin) * (degree + lmin) - lmin * lmin
        tile = (first + k)[:, None] * channels + c[None, :]
        at_target = tl.load(atom + tile, mask=in_degree[:, None] & in_c[None, :], other=0.0)
        at_target = at_target.to(tl.float32) * tl.load(rescale + degree)
        for i in range(tl.load(of_degree + degree), tl.load(of_degree + degree + 1)):
            turn = row_of_rotation(rotations, entry, i, edge, num_entries, k, in_degree)
            turned = tl.sum(turn[:, None] * at_target, axis=0)
            offset = (edge * num_rows + tl.load(row + i)) * channels + c
            tl.store(values_grad + offset, share * turned, mask=in_c)
            if WEIGHTED:
                total += turned * tl.load(values + offset, mask=in_c, other=0.0).to(tl.float32)
    if WEIGHTED:
        of_heads = tl.sum(tl.reshape(total, [BLOCK_HEADS, BLOCK_V]), axis=1)
        heads = first_head + tl.arange(0, BLOCK_HEADS)
        tl.store(alpha_grad + edge * num_heads + heads, of_heads, mask=heads < num_heads)


def head_blocks(lmax: int, heads: int, head_channels: int) -> dict[str, int]:
    """Sizes of a program of the backward pass, and its warps."""
    block_v = triton.next_power_of_2(head_channels)
    block_heads = max(1, min(LARGEST_BLOCK // block_v, triton.next_power_of_2(heads)))
    return {
        "BLOCK_K": triton.next_power_of_2(2 * lmax + 1),
        "BLOCK_HEADS": block_heads,
        "BLOCK_V": block_v,
        "num_warps": max(1, block_heads * block_v // LARGEST_BLOCK),
    }


class AggregateKernels:
    """Weighted sum of each atom's edges, for one layout of the edges and one of the values."""

    def __init__(self, edge_layout: Layout, layout: Layout) -> None:
        self.edge_layout = edge_layout
        self.layout = layout

    def forward(
        self, rotations: Tensor, values: Tensor, alpha: Tensor | None, pointers: Tensor
    ) -> Tensor:
        """rescale * sum over a target's edges of D^T (alpha * v).

        Args:
            rotations: [e, entries], compact (so3/wigner.py).
            values: [e, S, heads, v].
            alpha: [e, heads]; None for 1.
            pointers: [n + 1], where the edges of each target begin.

        Returns:
            [n, K, heads v], in alpha's dtype; without it in that of the rotations.
        """
        rows = rows_of(self.edge_layout, self.layout, values.device)
        values, atoms = values.contiguous(), len(pointers) - 1
        heads, head_channels = values.shape[2:]
        channels, like = heads * head_channels, rotations if alpha is None else alpha
        out = like.new_empty(atoms, self.layout.num_coefficients, channels)
        block = blocks(self.layout.lmax, channels)
        launch(
            aggregate_forward,
            (atoms, rows.num_degrees, triton.cdiv(channels, block["BLOCK_C"])),
            *(out, values, like.contiguous(), rotations.contiguous(), pointers),
            *(rows.row, rows.entry, rows.of_degree, rows.rescale),
            *(channels, head_channels, heads),
            *(self.layout.num_coefficients, self.layout.num_rows, rows.num_entries),
            self.layout.lmin,
            WEIGHTED=alpha is not None,
            **block,
        )
        return out

    def backward(
        self, rotations: Tensor, grad: Tensor, target: Tensor, values: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the values and of alpha.

        Args:
            rotations, values, alpha: as in :meth:`forward`.
            grad: [n, K, heads v], of its result.
            target: [e], atom in the chunk.
        """
        values_grad = values.new_empty(values.shape)
        alpha_grad = alpha.new_empty(alpha.shape)
        self._backward(rotations, grad, target, values_grad, (values, alpha, alpha_grad))
        return values_grad, alpha_grad

    def backward_values(
        self, rotations: Tensor, grad: Tensor, target: Tensor, heads: int, dtype: torch.dtype
    ) -> Tensor:
        """Gradient of the values [e, S, heads, v] where alpha is 1; arguments as above."""
        shape = len(target), self.layout.num_rows, heads, grad.shape[2] // heads
        values_grad = grad.new_empty(shape, dtype=dtype)
        self._backward(rotations, grad, target, values_grad, None)
        return values_grad

    def _backward(
        self,
        rotations: Tensor,
        grad: Tensor,
        target: Tensor,
        values_grad: Tensor,
        weighted: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        rows = rows_of(self.edge_layout, self.layout, grad.device)
        heads, head_channels = values_grad.shape[2:]
        values, alpha, alpha_grad = weighted or (values_grad, rotations, rotations)
        block = head_blocks(self.layout.lmax, heads, head_channels)
        launch(
            aggregate_backward,
            (len(target), triton.cdiv(heads, block["BLOCK_HEADS"])),
            *(values_grad, alpha_grad, grad.contiguous(), values.contiguous(), alpha.contiguous()),
            *(rotations.contiguous(), target),
            *(rows.row, rows.entry, rows.of_degree, rows.rescale),
            *(heads, self.layout.num_coefficients, self.layout.num_rows, rows.num_entries),
            *(rows.num_degrees, self.layout.lmin),
            WEIGHTED=weighted is not None,
            HEAD_CHANNELS=head_channels,
            **block,
        )


class _SumOverEdges(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: AggregateKernels,
        rotations: Tensor,
        target: Tensor,
        pointers: Tensor,
        messages: Tensor,
    ) -> Tensor:
        ctx.kernels, ctx.dtype = kernels, messages.dtype
        ctx.save_for_backward(rotations, target)
        return kernels.forward(rotations, messages[:, :, None], None, pointers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rotations, target = ctx.saved_tensors
        found = ctx.kernels.backward_values(rotations, grad, target, 1, ctx.dtype)
        return None, None, None, None, found[:, :, 0]


def sum_over_edges(
    kernels: AggregateKernels,
    rotations: Tensor,
    target: Tensor,
    pointers: Tensor,
    messages: Tensor,
) -> Tensor:
    """rescale * sum over a target's edges of D^T v, differentiable in v.

    Args:
        kernels: of the layouts.
        rotations: [e, entries].
        target: [e], atom in the chunk.
        pointers: [n + 1], where the edges of each target begin.
        messages: v [e, S, C].

    Returns:
        [n, K, C].
    """
    out: Tensor = _SumOverEdges.apply(kernels, rotations, target, pointers, messages)
    return out
