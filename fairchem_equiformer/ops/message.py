"""What the first SO(2) layer reads of an edge: w * D (x_source, x_target).

The features of both ends, in the edge's frame D, each (l, |m|) scaled channel by channel with the
radial weights w (paper, section 3.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops import native, triton
from fairchem_equiformer.ops.edges import ChunkFrames
from fairchem_equiformer.ops.rotate import (
    rotate_in,
    rotate_in_backward,
    scale_orders,
    scale_orders_backward,
)
from fairchem_equiformer.ops.segments import add_rows
from fairchem_equiformer.so3.layout import Layout

if TYPE_CHECKING:
    from fairchem_equiformer.ops.triton.message import MessageKernels as TritonMessageKernels


class Message(NamedTuple):
    """What the messages of one chunk were made of, for :func:`message_backward`."""

    frames: ChunkFrames
    radial: Tensor  # [e, W, 2 C]
    # D x_source, D x_target [e, R, C]; or the kernels, which make them again.
    rotated: tuple[Tensor, Tensor] | native.MessageKernels | TritonMessageKernels


def message(
    x: Tensor,
    frames: ChunkFrames,
    radial: Tensor,
    layout: Layout,
    *,
    by_degree: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Message]:
    """Messages of one chunk. Not differentiable; see :func:`message_backward`.

    Args:
        x: [N, K, C], l-major.
        frames: of the e edges of the chunk.
        radial: [e, W, 2 C], a row per (|m|, l), or per l where ``by_degree``.
        layout: of the edge frame.
        by_degree: see ``radial``.
        dtype: of the messages, by default that of x.

    Returns:
        [e, R, 2 C], source and target beside each other; and what they were made of.
    """
    dtype = dtype or x.dtype
    on_gpu = triton.message_kernels(x, radial, layout, by_degree=by_degree)
    if on_gpu is not None:
        first = frames.nodes.start
        scaled = on_gpu.forward(
            x, frames.compact, frames.source, frames.target, first, radial, dtype
        )
        return scaled, Message(frames, radial, on_gpu)
    kernels = native.message_kernels(x, radial, layout, by_degree=by_degree)
    if kernels is not None:
        ends = frames.source, frames.target + frames.nodes.start
        scaled = kernels.forward(x, frames.compact, *ends, radial)
        if dtype != scaled.dtype:
            native.flush()
        return scaled.to(dtype), Message(frames, radial, kernels)
    rotated = rotate_in(x, frames)
    channels = x.shape[2]
    scaled = x.new_empty(len(radial), layout.num_rows, 2 * channels)
    for end, features in enumerate(rotated):
        half = slice(end * channels, (end + 1) * channels)
        scale_orders(
            features, radial[:, :, half], layout, by_degree=by_degree, out=scaled[:, :, half]
        )
    return scaled.to(dtype), Message(frames, radial, rotated)


def message_backward(
    grad: Tensor, sent: Message, x: Tensor, x_grad: Tensor, layout: Layout, *, by_degree: bool
) -> Tensor:
    """Add to ``x_grad`` [N, K, C] in place; return the gradient of the radial weights.

    Args:
        grad: [e, R, 2 C], of the messages.
        sent: what the messages were made of.
        x: [N, K, C], what they were made of.
        x_grad: is added to.
        layout, by_degree: as for :func:`message`.

    Returns:
        [e, W, 2 C].
    """
    frames, radial = sent.frames, sent.radial
    if isinstance(sent.rotated, native.MessageKernels):
        grad = grad.to(x.dtype)
        ends = frames.source, frames.target + frames.nodes.start
        with native.together():
            radial_grad, *ends_grad = sent.rotated.backward(grad, x, frames.compact, *ends, radial)
            for end, end_grad in zip(ends, ends_grad, strict=True):
                add_rows(x_grad, end, end_grad)
        return radial_grad
    if not isinstance(sent.rotated, tuple):
        return _backward_on_gpu(sent.rotated, grad, sent, x, x_grad)
    grad, channels = grad.to(x.dtype), x.shape[2]
    radial_grad = torch.zeros_like(radial)
    rotated_grads = []
    for end, features in enumerate(sent.rotated):
        half = slice(end * channels, (end + 1) * channels)
        part = grad[:, :, half]
        scale_orders_backward(
            part, features, layout, by_degree=by_degree, scale_grad=radial_grad[:, :, half]
        )
        rotated_grad = torch.empty_like(features)
        scale_orders(part, radial[:, :, half], layout, by_degree=by_degree, out=rotated_grad)
        rotated_grads.append(rotated_grad)
    rotate_in_backward(rotated_grads[0], rotated_grads[1], frames, x_grad)
    return radial_grad


def _backward_on_gpu(
    kernels: TritonMessageKernels, grad: Tensor, sent: Message, x: Tensor, x_grad: Tensor
) -> Tensor:
    """As :func:`message_backward`; each atom's edges are summed within a kernel."""
    frames, radial = sent.frames, sent.radial
    first = frames.nodes.start
    radial_grad = kernels.backward_radial(
        grad, x, frames.compact, frames.source, frames.target, first, radial
    )
    order, pointers = frames.by_source(len(x))
    kernels.add_to_atoms(x_grad, grad, frames.compact, radial, pointers, order, 0)
    kernels.add_to_atoms(x_grad, grad, frames.compact, radial, frames.target_ptr, None, first)
    return radial_grad
