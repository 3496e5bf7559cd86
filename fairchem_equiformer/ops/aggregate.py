"""What an atom receives of its edges: y_i = rescale * sum over j of D^T (alpha * v).

Values v in the edge's frame D, each head's channels weighted by its attention alpha (paper, section
3.5), turned back and summed.
"""

from __future__ import annotations

from torch import Tensor

from fairchem_equiformer.ops import native, triton
from fairchem_equiformer.ops.edges import ChunkFrames, truncation_rescale
from fairchem_equiformer.ops.rotate import rotate_back_and_sum, rotate_back_and_sum_backward
from fairchem_equiformer.so3.layout import Layout


def aggregate(
    values: Tensor,
    alpha: Tensor,
    frames: ChunkFrames,
    layout: Layout,
    out: Tensor | None = None,
) -> Tensor:
    """Sum over each target's edges. Not differentiable; see :func:`aggregate_backward`.

    Args:
        values: [e, S, heads, v] of the e edges of one chunk, rows of ``layout``.
        alpha: [e, heads].
        frames: of the edges; their layout holds all degrees and orders of ``layout``.
        layout: degrees and orders of the values; those of the result, all orders.
        out: dense, where the result is written, if it is given.

    Returns:
        [n, K, heads v].
    """
    on_gpu = triton.aggregate_kernels(values, alpha, frames.layout, layout)
    if on_gpu is not None:
        total = on_gpu.forward(frames.compact, values, alpha, frames.target_ptr)
        return total if out is None else out.copy_(total)
    rescale = truncation_rescale(layout, alpha.dtype, alpha.device)
    kernels = native.aggregate_kernels(values, alpha, frames.layout, layout)
    if kernels is not None:
        return kernels.forward(frames.compact, values, alpha, rescale, frames.target_ptr, out)
    weighted = _weighted(values, alpha)
    total = rotate_back_and_sum(weighted, frames, rescale, frames.rotation_of(layout))
    return total if out is None else out.copy_(total)


def aggregate_backward(
    grad: Tensor, values: Tensor, alpha: Tensor, frames: ChunkFrames, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`aggregate`.

    Args:
        grad: [n, K, heads v], of the result.
        values, alpha, frames, layout: as there.

    Returns:
        Of the values [e, S, heads, v] and of alpha [e, heads].
    """
    on_gpu = triton.aggregate_kernels(values, alpha, frames.layout, layout)
    if on_gpu is not None:
        return on_gpu.backward(frames.compact, grad, frames.target, values, alpha)
    rescale = truncation_rescale(layout, alpha.dtype, alpha.device)
    kernels = native.aggregate_kernels(values, alpha, frames.layout, layout)
    if kernels is not None:
        rescaled = grad * rescale[:, None]
        return kernels.backward(frames.compact, rescaled, frames.target, values, alpha)
    rotation = frames.rotation_of(layout)
    turned = rotate_back_and_sum_backward(grad, frames, rescale, rotation).view(values.shape)
    alpha_grad = (values.to(alpha.dtype) * turned).sum((1, 3))
    return _weighted(turned, alpha).view(values.shape), alpha_grad


def _weighted(values: Tensor, alpha: Tensor) -> Tensor:
    """alpha * v: [e, S, heads v]."""
    weighted: Tensor = (values.to(alpha.dtype) * alpha[:, None, :, None]).flatten(2)
    return weighted
