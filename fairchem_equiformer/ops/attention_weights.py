"""Attention weights of edges: logits from scalars, and softmax over each target (paper, Fig. 1b).

z     = a . SmoothLeakyReLU(LN(s))
alpha = softmax over the edges of a target of z
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops.native import LogitKernels, logit_kernels, softmax_kernels
from fairchem_equiformer.ops.rotate import ChunkFrames
from fairchem_equiformer.ops.segments import segment_softmax, segment_sum

_EPSILON = 1e-5  # of the layer norm


class _AttentionLogits(torch.autograd.Function):
    """With the compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any, scalars: Tensor, weight: Tensor | None, bias: Tensor | None, dot: Tensor
    ) -> Tensor:
        ctx.save_for_backward(scalars, weight, bias, dot)
        kernels = _kernels(scalars, weight, bias, dot)
        assert kernels is not None  # noqa: S101  # attention_logits has asked
        return kernels.forward(scalars)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scalars, weight, bias, dot = ctx.saved_tensors
        kernels = _kernels(scalars, weight, bias, dot)
        assert kernels is not None  # noqa: S101
        scalars_grad, weight_grad, bias_grad, dot_grad = kernels.backward(scalars, grad)
        if weight is None:
            return scalars_grad, None, None, dot_grad
        return scalars_grad, weight_grad, bias_grad, dot_grad


def _kernels(
    scalars: Tensor, weight: Tensor | None, bias: Tensor | None, dot: Tensor
) -> LogitKernels | None:
    norm = None if weight is None or bias is None else (weight, bias)
    return logit_kernels(scalars, norm, dot, _EPSILON)


def attention_logits(scalars: Tensor, norm: tuple[Tensor, Tensor] | None, dot: Tensor) -> Tensor:
    """z = a . SmoothLeakyReLU(LN(s)) for every head, in float32 at least.

    The smooth leaky ReLU with slope 0.2 on the left is 0.6 s + 0.4 s (2 sigmoid(s) - 1).

    Args:
        scalars: [E, heads, A].
        norm: weight and bias [A] of the layer norm, or None.
        dot: a [heads, A].

    Returns:
        [E, heads].
    """
    s = scalars.to(dot.dtype)
    weight, bias = norm or (None, None)
    if _kernels(s, weight, bias, dot):
        logits: Tensor = _AttentionLogits.apply(s, weight, bias, dot)
        return logits
    if norm is not None:
        s = F.layer_norm(s, s.shape[2:], weight, bias, _EPSILON)
    s = 0.6 * s + 0.4 * s * (2 * torch.sigmoid(s) - 1)
    return (s * dot).sum(-1)


def attention_softmax(logits: Tensor, frames: ChunkFrames) -> Tensor:
    """Softmax over the edges of each target. Not differentiable.

    Args:
        logits: [e, heads].
        frames: of the e edges of one chunk.

    Returns:
        [e, heads].
    """
    kernels = softmax_kernels(logits)
    if kernels is not None:
        return kernels.forward(logits, frames.target_ptr)
    return segment_softmax(logits, frames.target, frames.num_nodes)


def attention_softmax_backward(alpha: Tensor, grad: Tensor, frames: ChunkFrames) -> Tensor:
    """Gradient of :func:`attention_softmax`'s logits, given its result and that one's gradient."""
    kernels = softmax_kernels(alpha)
    if kernels is not None:
        return kernels.backward(alpha, grad, frames.target_ptr)
    flow = alpha * grad
    total = segment_sum(flow, frames.target, frames.num_nodes)
    return flow - alpha * total[frames.target]
