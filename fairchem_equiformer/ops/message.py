"""What the first SO(2) layer reads of an edge: w * D (x_source, x_target).

The features of both ends, in the edge's frame D, each (l, |m|) scaled channel by channel with the
radial weights w (paper, section 3.5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops.edges import ChunkFrames
from fairchem_equiformer.ops.native import MessageKernels, message_kernels
from fairchem_equiformer.ops.rotate import (
    add_to_ends,
    rotate_in,
    rotate_in_backward,
    scale_orders,
    scale_orders_backward,
)
from fairchem_equiformer.so3.layout import Layout


class Message(NamedTuple):
    """What the messages of one chunk were made of, for :func:`message_backward`."""

    frames: ChunkFrames
    radial: Tensor  # [e, W, 2 C]
    # D x_source, D x_target [e, R, C]; or the kernels, which make them again.
    rotated: tuple[Tensor, Tensor] | MessageKernels


def message(
    x: Tensor, frames: ChunkFrames, radial: Tensor, layout: Layout, *, by_degree: bool
) -> tuple[Tensor, Message]:
    """Messages of one chunk. Not differentiable; see :func:`message_backward`.

    Args:
        x: [N, K, C], l-major.
        frames: of the e edges of the chunk.
        radial: [e, W, 2 C], a row per (|m|, l), or per l where ``by_degree``.
        layout: of the edge frame.
        by_degree: see ``radial``.

    Returns:
        [e, R, 2 C], source and target beside each other; and what they were made of.
    """
    kernels = message_kernels(x, radial, layout, by_degree=by_degree)
    if kernels is not None:
        ends = frames.source, frames.target + frames.nodes.start
        scaled = kernels.forward(x, frames.compact, *ends, radial)
        return scaled, Message(frames, radial, kernels)
    rotated = rotate_in(x, frames)
    channels = x.shape[2]
    scaled = x.new_empty(len(radial), layout.num_rows, 2 * channels)
    for end, features in enumerate(rotated):
        half = slice(end * channels, (end + 1) * channels)
        scale_orders(
            features, radial[:, :, half], layout, by_degree=by_degree, out=scaled[:, :, half]
        )
    return scaled, Message(frames, radial, rotated)


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
    if isinstance(sent.rotated, MessageKernels):
        ends = frames.source, frames.target + frames.nodes.start
        radial_grad, *ends_grad = sent.rotated.backward(grad, x, frames.compact, *ends, radial)
        add_to_ends(ends_grad[0], ends_grad[1], frames, x_grad)
        return radial_grad
    channels = x.shape[2]
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
