"""Messages along edges: w * D (x_source, x_target), and its gradients.

A program makes one degree of one edge (or, of the features' gradient, of one atom) for a block of
channels. It holds the 2 l + 1 coefficients of that degree and turns them row by row: there are
neither turned features nor dense rotations. Each gradient has one writer: no atomics, and the same
bits at every call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_equiformer.ops.triton.functions import row_of_rotation
from fairchem_equiformer.ops.triton.launch import launch
from fairchem_equiformer.ops.triton.rows import Rows, rows_of
from fairchem_equiformer.so3.layout import Layout

LARGEST_BLOCK = 128  # channels of a program: four for each thread of one warp


@triton.jit
def _both_ends(
    x, source, target, first_target, edge, degree, k, c, inside, num_coefficients, channels
):
    """Coefficients of one degree at an edge's source and target, each [BLOCK_K, BLOCK_C]."""
    tile = (degree * degree + k)[:, None] * channels + c[None, :]
    atom = num_coefficients * channels
    at_source = x + tl.load(source + edge) * atom + tile
    at_target = x + (tl.load(target + edge) + first_target) * atom + tile
    return (
        tl.load(at_source, mask=inside, other=0.0).to(tl.float32),
        tl.load(at_target, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def message_forward(
    out,  # [E, R, 2 C]
    x,  # [N, K, C]
    rotations,  # [E, n]
    radial,  # [E, W, 2 C]
    source,  # [E]
    target,  # [E]
    row,  # and the three that follow: ops/triton/rows.py
    entry,
    weight,
    of_degree,
    channels,
    num_coefficients,
    num_rows,
    num_weights,
    num_entries,
    first_target,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = w * D (x_source, x_target), for one degree of one edge."""
    edge = tl.program_id(0).to(tl.int64)
    degree = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_degree, in_c = k < 2 * degree + 1, c < channels
    inside = in_degree[:, None] & in_c[None, :]
    at_source, at_target = _both_ends(
        x, source, target, first_target, edge, degree, k, c, inside, num_coefficients, channels
    )
    for i in range(tl.load(of_degree + degree), tl.load(of_degree + degree + 1)):
        turn = row_of_rotation(rotations, entry, i, edge, num_entries, k, in_degree)[:, None]
        scale = radial + (edge * num_weights + tl.load(weight + i)) * 2 * channels + c
        made = out + (edge * num_rows + tl.load(row + i)) * 2 * channels + c
        from_source = tl.sum(turn * at_source, axis=0)
        from_target = tl.sum(turn * at_target, axis=0)
        tl.store(made, from_source * tl.load(scale, mask=in_c).to(tl.float32), mask=in_c)
        scale += channels
        tl.store(made + channels, from_target * tl.load(scale, mask=in_c).to(tl.float32), mask=in_c)


@triton.jit
def message_backward_radial(
    radial_grad,  # [E, W, 2 C]
    grad,  # [E, R, 2 C]
    x,  # [N, K, C]
    rotations,  # [E, n]
    source,  # [E]
    target,  # [E]
    row,  # and the four that follow: ops/triton/rows.py
    entry,
    weight,
    fresh,
    of_degree,
    channels,
    num_coefficients,
    num_rows,
    num_weights,
    num_entries,
    first_target,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dw = sum over the rows of w of dy * D x, for one degree of one edge."""
    edge = tl.program_id(0).to(tl.int64)
    degree = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_degree, in_c = k < 2 * degree + 1, c < channels
    inside = in_degree[:, None] & in_c[None, :]
    at_source, at_target = _both_ends(
        x, source, target, first_target, edge, degree, k, c, inside, num_coefficients, channels
    )
    total_source = tl.zeros([BLOCK_C], tl.float32)
    total_target = tl.zeros([BLOCK_C], tl.float32)
    for i in range(tl.load(of_degree + degree), tl.load(of_degree + degree + 1)):
        turn = row_of_rotation(rotations, entry, i, edge, num_entries, k, in_degree)[:, None]
        flow = grad + (edge * num_rows + tl.load(row + i)) * 2 * channels + c
        first = tl.load(fresh + i) != 0  # the rows of one weight follow each other
        total_source = tl.where(first, 0.0, total_source)
        total_target = tl.where(first, 0.0, total_target)
        of_source = tl.load(flow, mask=in_c, other=0.0).to(tl.float32)
        of_target = tl.load(flow + channels, mask=in_c, other=0.0).to(tl.float32)
        total_source += of_source * tl.sum(turn * at_source, axis=0)
        total_target += of_target * tl.sum(turn * at_target, axis=0)
        found = radial_grad + (edge * num_weights + tl.load(weight + i)) * 2 * channels + c
        tl.store(found, total_source, mask=in_c)  # the last of its rows has the whole sum
        tl.store(found + channels, total_target, mask=in_c)


@triton.jit
def message_backward_atoms(
    x_grad,  # [N, K, C], added to
    grad,  # [E, R, 2 C]
    rotations,  # [E, n]
    radial,  # [E, W, 2 C]
    pointers,  # [atoms + 1], edges of each atom
    order,  # [E], edges sorted by atom; not read unless SORTED
    row,  # and the three that follow: ops/triton/rows.py
    entry,
    weight,
    of_degree,
    channels,
    num_coefficients,
    num_rows,
    num_weights,
    num_entries,
    first_atom,
    half,  # 0 for the atoms as sources, the number of channels for them as targets
    SORTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx += sum over an atom's edges of D^T (w * dy), for one degree of one end."""
    place = tl.program_id(0).to(tl.int64)
    degree = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_degree, in_c = k < 2 * degree + 1, c < channels
    first_row, last_row = tl.load(of_degree + degree), tl.load(of_degree + degree + 1)
    start, stop = tl.load(pointers + place), tl.load(pointers + place + 1)
    total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for j in range(start, stop):
        edge = j
        if SORTED:
            edge = tl.load(order + j)
        for i in range(first_row, last_row):
            turn = row_of_rotation(rotations, entry, i, edge, num_entries, k, in_degree)
            flow = grad + (edge * num_rows + tl.load(row + i)) * 2 * channels + half + c
            scale = radial + (edge * num_weights + tl.load(weight + i)) * 2 * channels + half + c
            scaled = tl.load(flow, mask=in_c, other=0.0).to(tl.float32)
            scaled *= tl.load(scale, mask=in_c, other=0.0).to(tl.float32)
            total += turn[:, None] * scaled[None, :]
    inside = in_degree[:, None] & in_c[None, :] & (stop > start)
    tile = (degree * degree + k)[:, None] * channels + c[None, :]
    found = x_grad + (place + first_atom) * num_coefficients * channels + tile
    tl.store(found, tl.load(found, mask=inside, other=0.0) + total, mask=inside)


def blocks(lmax: int, channels: int) -> dict[str, int]:
    """Sizes of a program of any of these kernels, and its warps."""
    block_k = triton.next_power_of_2(2 * lmax + 1)
    # Two tiles of 16 coefficients take half of the registers of a warp.
    largest = LARGEST_BLOCK if block_k <= 16 else LARGEST_BLOCK // 2
    block_c = min(largest, triton.next_power_of_2(channels))
    return {"BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": 1}


class MessageKernels:
    """The message of both ends of each edge, for one layout."""

    def __init__(self, layout: Layout, *, by_degree: bool) -> None:
        self.layout = layout
        self.by_degree = by_degree

    def _rows(self, x: Tensor) -> Rows:
        return rows_of(self.layout, self.layout, x.device, by_degree=self.by_degree)

    def _sizes(self, x: Tensor, rows: Rows) -> tuple[int, ...]:
        counts = x.shape[1], self.layout.num_rows, rows.num_weights, rows.num_entries
        return (x.shape[2], *counts)

    def _programs(
        self, items: int, rows: Rows, block: dict[str, int], channels: int
    ) -> tuple[int, int, int]:
        return items, rows.num_degrees, triton.cdiv(channels, block["BLOCK_C"])

    def forward(
        self,
        x: Tensor,
        rotations: Tensor,
        source: Tensor,
        target: Tensor,
        first_target: int,
        radial: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """w * D (x_source, x_target).

        Args:
            x: [N, K, C].
            rotations: [e, n], compact (so3/wigner.py).
            source: [e], atoms.
            target: [e], atoms counted from ``first_target``.
            first_target: see there.
            radial: [e, W, 2 C].
            dtype: of the result.

        Returns:
            [e, R, 2 C].
        """
        x, radial = x.contiguous(), radial.contiguous()
        rows, edges, channels = self._rows(x), len(source), x.shape[2]
        out = x.new_empty(edges, self.layout.num_rows, 2 * channels, dtype=dtype)
        block = blocks(self.layout.lmax, channels)
        launch(
            message_forward,
            self._programs(edges, rows, block, channels),
            *(out, x, rotations.contiguous(), radial, source, target),
            *(rows.row, rows.entry, rows.weight, rows.of_degree),
            *self._sizes(x, rows),
            first_target,
            **block,
        )
        return out

    def backward_radial(
        self,
        grad: Tensor,
        x: Tensor,
        rotations: Tensor,
        source: Tensor,
        target: Tensor,
        first_target: int,
        radial: Tensor,
    ) -> Tensor:
        """Gradient of the radial weights [e, W, 2 C], given that of the messages [e, R, 2 C]."""
        x, grad = x.contiguous(), grad.contiguous()
        rows, edges, channels = self._rows(x), len(source), x.shape[2]
        radial_grad = torch.empty_like(radial, memory_format=torch.contiguous_format)
        block = blocks(self.layout.lmax, channels)
        launch(
            message_backward_radial,
            self._programs(edges, rows, block, channels),
            *(radial_grad, grad, x, rotations.contiguous(), source, target),
            *(rows.row, rows.entry, rows.weight, rows.fresh, rows.of_degree),
            *self._sizes(x, rows),
            first_target,
            **block,
        )
        return radial_grad

    def add_to_atoms(
        self,
        x_grad: Tensor,
        grad: Tensor,
        rotations: Tensor,
        radial: Tensor,
        pointers: Tensor,
        order: Tensor | None,
        first_atom: int,
    ) -> None:
        """Add to atoms' gradients what flows back to them along their edges.

        Args:
            x_grad: [N, K, C], contiguous; is added to.
            grad: [e, R, 2 C], of the messages.
            rotations: [e, n].
            radial: [e, W, 2 C].
            pointers: [atoms + 1], where each atom's edges begin.
            order: [e], the edges sorted by source; None for the edges as they are, sorted by
                target. This says, too, which end the atoms are.
            first_atom: which atom of ``x_grad`` the first pointer belongs to.
        """
        rows, channels = self._rows(x_grad), x_grad.shape[2]
        block = blocks(self.layout.lmax, channels)
        launch(
            message_backward_atoms,
            self._programs(len(pointers) - 1, rows, block, channels),
            *(x_grad, grad.contiguous(), rotations.contiguous(), radial.contiguous()),
            *(pointers, pointers if order is None else order),
            *(rows.row, rows.entry, rows.weight, rows.of_degree),
            *self._sizes(x_grad, rows),
            first_atom,
            channels if order is None else 0,
            SORTED=order is not None,
            **block,
        )
