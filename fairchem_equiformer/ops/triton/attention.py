"""Attention logits, a . SmoothLeakyReLU(LN(s)), and their softmax over each target's edges.

Sums of the weights' gradients are kept apart for each program, and added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_equiformer.ops.triton.functions import standardised, standardised_grad
from fairchem_equiformer.ops.triton.launch import items_contiguous, launch

_BLOCK_EDGES = 32

Norm = tuple[Tensor, Tensor] | None


@triton.jit
def _normalised(
    scalars,
    weight,
    bias,
    edge,
    head,
    a,
    inside,
    in_a,
    stride,
    channels,
    epsilon,
    NORM: tl.constexpr,
):
    """What the leaky ReLU reads [BLOCK_E, BLOCK_A], and what it was made of.

    Returns:
        LN(s), or s; before weight and bias; 1 / standard deviation [BLOCK_E, 1]; weight [BLOCK_A].
    """
    found = scalars + edge[:, None] * stride + head * channels + a[None, :]
    s = tl.load(found, mask=inside, other=0.0).to(tl.float32)
    normal, inverse_std = s, tl.zeros_like(edge).to(tl.float32)[:, None]
    gain = tl.zeros_like(a).to(tl.float32)
    if NORM:
        normal, inverse_std = standardised(s, inside, channels, epsilon)
        gain = tl.load(weight + a, mask=in_a, other=0.0).to(tl.float32)
        shift = tl.load(bias + a, mask=in_a, other=0.0).to(tl.float32)
        s = normal * gain[None, :] + shift[None, :]
    return s, normal, inverse_std, gain


@triton.jit
def _of_some_edges(values, first, stop, head, num_heads, other, BLOCK_E: tl.constexpr):
    """Numbers of each head for the edges from ``first`` on: [BLOCK_E, BLOCK_H]; and where."""
    edge = first + tl.arange(0, BLOCK_E)
    inside = (edge < stop)[:, None] & (head < num_heads)[None, :]
    offset = edge[:, None] * num_heads + head[None, :]
    return tl.load(values + offset, mask=inside, other=other).to(tl.float32), offset, inside


@triton.jit
def logits_forward(
    out,  # [E, heads]
    scalars,  # [E, heads, A], edges may lie apart
    weight,  # [A], and so is the bias; not read unless NORM
    bias,
    dot,  # [heads, A]
    edges,
    stride,  # between edges, of the scalars
    num_heads,
    channels,
    epsilon,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """z = a . SmoothLeakyReLU(LN(s)), for one head of some edges."""
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    head = tl.program_id(1)
    a = tl.arange(0, BLOCK_A)
    in_a = a < channels
    inside = (edge < edges)[:, None] & in_a[None, :]
    s, _, _, _ = _normalised(
        scalars, weight, bias, edge, head, a, inside, in_a, stride, channels, epsilon, NORM
    )
    y = 0.6 * s + 0.4 * s * (2 * tl.sigmoid(s) - 1)
    factor = tl.load(dot + head * channels + a, mask=in_a, other=0.0).to(tl.float32)
    logits = tl.sum(y * factor[None, :], axis=1)
    tl.store(out + edge * num_heads + head, logits, mask=edge < edges)


@triton.jit
def logits_backward(
    scalars_grad,  # [E, heads, A]
    sums,  # [programs, heads, 3, A]: weight, bias, dot
    grad,  # [E, heads]
    scalars,  # [E, heads, A], edges may lie apart
    weight,  # [A], and so is the bias; not read unless NORM
    bias,
    dot,  # [heads, A]
    edges,
    stride,  # between edges, of the scalars
    num_heads,
    channels,
    epsilon,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Gradients of s, and of the weights summed over some edges, for one head."""
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    head = tl.program_id(1)
    a = tl.arange(0, BLOCK_A)
    in_a, in_e = a < channels, edge < edges
    inside = in_e[:, None] & in_a[None, :]
    s, normal, inverse_std, gain = _normalised(
        scalars, weight, bias, edge, head, a, inside, in_a, stride, channels, epsilon, NORM
    )
    own = sums + (tl.program_id(0).to(tl.int64) * num_heads + head) * 3 * channels + a
    gate = tl.sigmoid(s)
    y = 0.6 * s + 0.4 * s * (2 * gate - 1)
    slope = 0.2 + 0.8 * (gate + s * gate * (1 - gate))
    flow = tl.load(grad + edge * num_heads + head, mask=in_e, other=0.0).to(tl.float32)
    factor = tl.load(dot + head * channels + a, mask=in_a, other=0.0).to(tl.float32)
    tl.store(own + 2 * channels, tl.sum(flow[:, None] * y, axis=0), mask=in_a)
    s_grad = flow[:, None] * factor[None, :] * slope
    if NORM:
        tl.store(own, tl.sum(s_grad * normal, axis=0), mask=in_a)
        tl.store(own + channels, tl.sum(s_grad, axis=0), mask=in_a)
        s_grad = standardised_grad(s_grad * gain[None, :], normal, inverse_std, channels)
    found = scalars_grad + (edge[:, None] * num_heads + head) * channels + a[None, :]
    tl.store(found, s_grad, mask=inside)


@triton.jit
def softmax_forward(
    out,  # [E, heads]
    logits,  # [E, heads]
    pointers,  # [n + 1], edges of each atom
    num_heads,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """alpha = exp(z - peak) / sum, over the edges of one atom."""
    place = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(pointers + place), tl.load(pointers + place + 1)
    head = tl.arange(0, BLOCK_H)
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for first in range(start, stop, BLOCK_E):
        z, _, _ = _of_some_edges(logits, first, stop, head, num_heads, float("-inf"), BLOCK_E)
        peak = tl.maximum(peak, tl.max(z, axis=0))
    peak = tl.where(head < num_heads, peak, 0.0)
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(start, stop, BLOCK_E):
        z, _, _ = _of_some_edges(logits, first, stop, head, num_heads, float("-inf"), BLOCK_E)
        total += tl.sum(tl.exp(z - peak[None, :]), axis=0)
    total = tl.where(head < num_heads, total, 1.0)
    for first in range(start, stop, BLOCK_E):
        z, offset, inside = _of_some_edges(
            logits, first, stop, head, num_heads, float("-inf"), BLOCK_E
        )
        tl.store(out + offset, tl.exp(z - peak[None, :]) / total[None, :], mask=inside)


@triton.jit
def softmax_backward(
    logits_grad,  # [E, heads]
    alpha,  # [E, heads]
    grad,  # [E, heads]
    pointers,  # [n + 1], edges of each atom
    num_heads,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dz = alpha * (dalpha - sum of alpha dalpha), over the edges of one atom."""
    place = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(pointers + place), tl.load(pointers + place + 1)
    head = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(start, stop, BLOCK_E):
        share, _, _ = _of_some_edges(alpha, first, stop, head, num_heads, 0.0, BLOCK_E)
        flow, _, _ = _of_some_edges(grad, first, stop, head, num_heads, 0.0, BLOCK_E)
        total += tl.sum(share * flow, axis=0)
    for first in range(start, stop, BLOCK_E):
        share, _, _ = _of_some_edges(alpha, first, stop, head, num_heads, 0.0, BLOCK_E)
        flow, offset, inside = _of_some_edges(grad, first, stop, head, num_heads, 0.0, BLOCK_E)
        tl.store(logits_grad + offset, share * (flow - total[None, :]), mask=inside)


def logit_blocks(channels: int) -> dict[str, int]:
    """Sizes of a program of the logits, and its warps."""
    return {"BLOCK_E": _BLOCK_EDGES, "BLOCK_A": triton.next_power_of_2(channels), "num_warps": 4}


def softmax_blocks(heads: int) -> dict[str, int]:
    """Sizes of a program of the softmax, and its warps."""
    return {"BLOCK_E": _BLOCK_EDGES, "BLOCK_H": triton.next_power_of_2(heads), "num_warps": 1}


class LogitKernels:
    """a . SmoothLeakyReLU(LN(s)) for every head; s is [E, heads, A] in all of them."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def _call(
        self, kernel: object, made: tuple[Tensor, ...], scalars: Tensor, norm: Norm, dot: Tensor
    ) -> None:
        edges, heads, channels = scalars.shape
        block, dot = logit_blocks(channels), dot.contiguous()
        weight, bias = norm or (dot, dot)
        launch(
            kernel,
            (triton.cdiv(edges, block["BLOCK_E"]), heads),
            *(*made, scalars, weight.contiguous(), bias.contiguous(), dot),
            *(edges, scalars.stride(0), heads, channels, self.epsilon),
            NORM=norm is not None,
            **block,
        )

    def forward(self, scalars: Tensor, norm: Norm, dot: Tensor) -> Tensor:
        """Logits [E, heads]; the norm is weight and bias [A], dot is a [heads, A]."""
        scalars = items_contiguous(scalars)
        out = scalars.new_empty(scalars.shape[:2])
        self._call(logits_forward, (out,), scalars, norm, dot)
        return out

    def backward(
        self, scalars: Tensor, norm: Norm, dot: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the scalars, of weight and bias of the norm [A], and of a [heads, A]."""
        scalars = items_contiguous(scalars)
        edges, heads, channels = scalars.shape
        scalars_grad = scalars.new_empty(scalars.shape)
        programs = triton.cdiv(edges, logit_blocks(channels)["BLOCK_E"])
        sums = scalars.new_zeros(programs, heads, 3, channels, dtype=torch.float32)
        made = scalars_grad, sums, grad.contiguous()
        self._call(logits_backward, made, scalars, norm, dot)
        totals = sums.sum(0).to(dot.dtype)
        return scalars_grad, totals[:, 0].sum(0), totals[:, 1].sum(0), totals[:, 2]


class SoftmaxKernels:
    """Softmax over the edges of each target; ``pointers`` [n + 1] says where they begin."""

    def forward(self, logits: Tensor, pointers: Tensor) -> Tensor:
        """[E, heads]."""
        logits, atoms = logits.contiguous(), len(pointers) - 1
        out = torch.empty_like(logits)
        block = softmax_blocks(logits.shape[1])
        launch(softmax_forward, (atoms,), out, logits, pointers, logits.shape[1], **block)
        return out

    def backward(self, alpha: Tensor, grad: Tensor, pointers: Tensor) -> Tensor:
        """Gradient of the logits [E, heads], given the softmax alpha and its gradient."""
        alpha, grad, atoms = alpha.contiguous(), grad.contiguous(), len(pointers) - 1
        out = torch.empty_like(alpha)
        block = softmax_blocks(alpha.shape[1])
        launch(softmax_backward, (atoms,), out, alpha, grad, pointers, alpha.shape[1], **block)
        return out
