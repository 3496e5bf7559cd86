"""Attention logits of edges from scalars, and softmax over each target (paper, Fig. 1b).

z     = a . SmoothLeakyReLU(LN(s))
alpha = softmax over the edges of a target of z
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import native, triton
from fairchem_equiformer.ops.edges import ChunkFrames
from fairchem_equiformer.ops.head_sums import Targets
from fairchem_equiformer.ops.segments import segment_softmax, segment_sum, take

if TYPE_CHECKING:
    from fairchem_equiformer.ops.triton.attention import LogitKernels as TritonLogitKernels

EPSILON = 1e-5  # of the layer norm


class _AttentionLogits(torch.autograd.Function):
    """With the compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: native.LogitKernels | TritonLogitKernels,
        scalars: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dot: Tensor,
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(scalars, weight, bias, dot)
        return kernels.forward(scalars, _norm(weight, bias), dot)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scalars, weight, bias, dot = ctx.saved_tensors
        scalars_grad, weight_grad, bias_grad, dot_grad = ctx.kernels.backward(
            scalars, _norm(weight, bias), dot, grad
        )
        if weight is None:
            return None, scalars_grad, None, None, dot_grad
        return None, scalars_grad, weight_grad, bias_grad, dot_grad


def _norm(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if weight is None or bias is None else (weight, bias)


def attention_logits(
    scalars: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    dot: Tensor,
    *,
    twice: bool = False,
) -> Tensor:
    """z = a . SmoothLeakyReLU(LN(s)) for every head, in float32 at least.

    The smooth leaky ReLU with slope 0.2 on the left is 0.6 s + 0.4 s (2 sigmoid(s) - 1).

    Args:
        scalars: [E, heads, A].
        norm: weight and bias [A] of the layer norm, or None.
        dot: a [heads, A].
        twice: the result's derivatives are differentiated, too: without compiled kernels.

    Returns:
        [E, heads].
    """
    s = scalars.to(dot.dtype)
    weight, bias = norm or (None, None)
    arguments = s, norm, dot, EPSILON
    kernels = None
    if not twice:
        kernels = triton.logit_kernels(*arguments) or native.logit_kernels(*arguments)
    if kernels is not None:
        logits: Tensor = _AttentionLogits.apply(kernels, s, weight, bias, dot)
        return logits
    if norm is not None:
        s = F.layer_norm(s, s.shape[2:], weight, bias, EPSILON)
    s = 0.6 * s + 0.4 * s * (2 * torch.sigmoid(s) - 1)
    return (s * dot).sum(-1)


def attention_softmax(logits: Tensor, frames: ChunkFrames | Targets) -> Tensor:
    """Softmax over the edges of each target. Not differentiable.

    Args:
        logits: [e, heads].
        frames: of the e edges of one chunk.

    Returns:
        [e, heads].
    """
    kernels = triton.softmax_kernels(logits) or native.softmax_kernels(logits)
    if kernels is not None:
        return kernels.forward(logits, frames.target_ptr)
    return segment_softmax(logits, frames.target, frames.num_nodes)


class _Softmax(torch.autograd.Function):
    """With the compiled kernels; what is differentiated again is made by PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets) -> Tensor:
        ctx.targets = targets
        alpha = attention_softmax(logits, targets)
        ctx.save_for_backward(alpha)
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (alpha,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return attention_softmax_backward(alpha, grad, ctx.targets), None
        return _flow(alpha, grad, ctx.targets), None


def edge_softmax(logits: Tensor, targets: Targets) -> Tensor:
    """Softmax over the edges of each target; differentiable any number of times.

    Args:
        logits: [e, heads].
        targets: of the edges.

    Returns:
        [e, heads].
    """
    if torch.compiler.is_compiling():  # which sees PyTorch's operations alone
        return segment_softmax(logits, targets.target, targets.target_ptr.shape[0] - 1)
    alpha: Tensor = _Softmax.apply(logits, targets)
    return alpha


def attention_softmax_backward(
    alpha: Tensor, grad: Tensor, frames: ChunkFrames | Targets
) -> Tensor:
    """Gradient of :func:`attention_softmax`'s logits, given its result and that one's gradient."""
    kernels = triton.softmax_kernels(alpha) or native.softmax_kernels(alpha)
    if kernels is not None:
        return kernels.backward(alpha, grad, frames.target_ptr)
    return _flow(alpha, grad, frames)


def _flow(alpha: Tensor, grad: Tensor, frames: ChunkFrames | Targets) -> Tensor:
    flow = alpha * grad
    total = segment_sum(flow, frames.target, frames.num_nodes)
    return flow - alpha * take(total, 0, frames.target)
