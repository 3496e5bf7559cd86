"""Rotation of features into edge frames, and back with a sum over each atom's edges."""

from __future__ import annotations

import torch
from torch import Tensor

from fairchem_equiformer.ops import library
from fairchem_equiformer.ops.edges import ChunkFrames
from fairchem_equiformer.ops.segments import add_rows, segment_sum
from fairchem_equiformer.so3 import wigner
from fairchem_equiformer.so3.layout import Layout, layout

_rotations = library.register(
    "edge_rotations",
    "Tensor vector, int[] layout, ScalarType dtype",
    lambda vector, sizes, dtype: wigner.edge_rotations(vector, layout(*sizes), dtype),
    lambda vector, sizes, dtype: vector.new_empty(
        vector.shape[0], wigner.num_entries(layout(*sizes)), dtype=dtype
    ),
)


def edge_rotations(vector: Tensor, sizes: Layout, dtype: torch.dtype) -> Tensor:
    """As :func:`fairchem_equiformer.so3.wigner.edge_rotations`. Not differentiable."""
    if torch.compiler.is_compiling():
        found: Tensor = _rotations(vector, [sizes.lmax, sizes.mmax, sizes.lmin], dtype)
        return found
    return wigner.edge_rotations(vector, sizes, dtype)


def rotate_in(x: Tensor, frames: ChunkFrames) -> tuple[Tensor, Tensor]:
    """Features of both ends of each edge, in the edge's frame: D x[source], D x[target].

    Args:
        x: [N, K, C].

    Returns:
        Two tensors [e, R, C].
    """
    source = torch.bmm(frames.rotation, x.index_select(0, frames.source))
    target = torch.bmm(frames.rotation, x[frames.nodes].index_select(0, frames.target))
    return source, target


def rotate_in_backward(
    source_grad: Tensor, target_grad: Tensor, frames: ChunkFrames, x_grad: Tensor
) -> None:
    """Add the gradient of :func:`rotate_in` to ``x_grad`` [N, K, C] in place."""
    back = frames.rotation.transpose(1, 2)
    add_to_ends(torch.bmm(back, source_grad), torch.bmm(back, target_grad), frames, x_grad)


def add_to_ends(
    source_grad: Tensor, target_grad: Tensor, frames: ChunkFrames, x_grad: Tensor
) -> None:
    """Add each edge's [e, K, C] to its source's and to its target's row of [N, K, C]."""
    add_rows(x_grad, frames.source, source_grad)
    x_grad[frames.nodes] += segment_sum(target_grad, frames.target, frames.num_nodes)


def scale_orders(x: Tensor, scale: Tensor, layout: Layout, *, by_degree: bool, out: Tensor) -> None:
    """Multiply every (l, |m|) row, channel by channel, with its radial weight.

    Args:
        x: [e, R, C].
        scale: [e, W, C], one row per (|m|, l), or per l where ``by_degree``.
        out: [e, R, C] that receives the product.
    """
    for rows, signs, weights in _scale_blocks(layout, by_degree=by_degree):
        shape = (len(x), signs, weights.stop - weights.start, x.shape[2])
        torch.mul(x[:, rows].view(shape), scale[:, None, weights], out=out[:, rows].view(shape))


def scale_orders_backward(
    grad: Tensor, x: Tensor, layout: Layout, *, by_degree: bool, scale_grad: Tensor
) -> None:
    """Add the gradient of the weights of :func:`scale_orders` to ``scale_grad`` [e, W, C]."""
    for rows, signs, weights in _scale_blocks(layout, by_degree=by_degree):
        for sign in range(signs):
            width = weights.stop - weights.start
            part = slice(rows.start + sign * width, rows.start + (sign + 1) * width)
            scale_grad[:, weights].addcmul_(grad[:, part], x[:, part])


def _scale_blocks(layout: Layout, *, by_degree: bool) -> list[tuple[slice, int, slice]]:
    """For each order: its rows, how many signs they hold, and the rows of their weights."""
    blocks = []
    start = 0
    for m, rows in enumerate(layout.order_slices):
        width = layout.num_degrees(m)
        first = max(m, layout.lmin) - layout.lmin if by_degree else start
        blocks.append((rows, 2 if m else 1, slice(first, first + width)))
        start += width
    return blocks


def rotate_back_and_sum(
    messages: Tensor, frames: ChunkFrames, rescale: Tensor, rotation: Tensor
) -> Tensor:
    """Turn messages to the common frame and sum over each target: rescale * sum of D^T v.

    Args:
        messages: [e, R, C].
        frames: of the edges.
        rescale: [K], for the orders left out (so3/layout.py).
        rotation: [e, R, K], the frames' or some rows and columns of it.

    Returns:
        [n, K, C].
    """
    turned = torch.bmm(rotation.transpose(1, 2), messages)
    return segment_sum(turned, frames.target, frames.num_nodes) * rescale[:, None]


def rotate_back_and_sum_backward(
    grad: Tensor, frames: ChunkFrames, rescale: Tensor, rotation: Tensor
) -> Tensor:
    """Gradient of :func:`rotate_back_and_sum`: [n, K, C] to [e, R, C]."""
    scaled = grad * rescale[:, None]
    return torch.bmm(rotation, scaled.index_select(0, frames.target))
