"""Equivariant norms (ops/norm.py) and their gradients.

They centre l = 0 and differ in which degrees share a mean square, their group: each degree its own,
l = 0 and all others, or all together. A program holds all coefficients and channels of an atom in
registers, so that each number is read once and written once. The gradients of weights and bias are
summed by each program over its atoms, and then over the programs in a fixed order.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops.triton.launch import launch

PROGRAMS = 512  # of the backward pass, at most: more than are at work at a time
_PER_WARP = 512  # numbers: 16 registers of each thread, and several times as many in passing


@triton.jit
def _normal(
    x,  # of this atom
    share,
    group,
    num_coefficients,
    channels,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """An atom's features over their standard deviation [BLOCK_K, BLOCK_C], l = 0 centred.

    Returns:
        These; the inverse of the deviation [BLOCK_K, 1]; the share in the mean square [BLOCK_K];
        which exist.
    """
    k, c = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
    inside = (k < num_coefficients) & (c < channels)
    features = tl.load(x + k * channels + c, mask=inside, other=0.0).to(tl.float32)
    features = tl.where(inside, features - _mean_of_scalars(features, channels, BLOCK_K), 0.0)
    row = tl.arange(0, BLOCK_K)
    part = tl.load(share + row, mask=row < num_coefficients, other=0.0)
    squares = part * tl.sum(features * features, axis=1)
    mean_square = _of_its_group(squares, group, num_coefficients, BLOCK_K)
    inverse_std = 1 / tl.sqrt(mean_square + epsilon)
    return features * inverse_std, inverse_std, part, inside


@triton.jit
def _mean_of_scalars(x, channels, BLOCK_K: tl.constexpr):
    """Mean over the channels of l = 0, and 0 for l > 0: [BLOCK_K, 1]."""
    mean = tl.sum(x, axis=1) / channels
    return tl.where(tl.arange(0, BLOCK_K) == 0, mean, 0.0)[:, None]


@triton.jit
def _of_its_group(terms, group, num_coefficients, BLOCK_K: tl.constexpr):
    """The sum over its group for each of some terms [BLOCK_K]: [BLOCK_K, 1]."""
    k = tl.arange(0, BLOCK_K)
    own = tl.load(group + k, mask=k < num_coefficients, other=-1)
    together = own[:, None] == own[None, :]
    return tl.sum(tl.where(together, terms[None, :], 0.0), axis=1)[:, None]


@triton.jit
def _gain(weight, affine, degree, num_coefficients, channels, k, c, inside):
    """Weights of an atom's features: of l = 0, and of each degree after it."""
    row = tl.load(degree + k, mask=k < num_coefficients, other=0)
    of_degree = tl.where(row == 0, weight + 0 * row, affine + (row - 1) * channels)
    return tl.load(of_degree + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def norm_forward(
    out,  # [N, K, C]
    x,  # [N, K, C]
    weight,  # [C], of l = 0, and so is the bias
    bias,
    affine,  # [lmax, C]
    share,  # [K], in the mean square
    group,  # [K], of those with the same mean square
    degree,  # [K]
    num_coefficients,
    channels,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x / deviation * weight + bias, for one atom."""
    k, c = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
    start = tl.program_id(0).to(tl.int64) * num_coefficients * channels
    normal, _, _, inside = _normal(
        x + start, share, group, num_coefficients, channels, epsilon, BLOCK_K, BLOCK_C
    )
    gain = _gain(weight, affine, degree, num_coefficients, channels, k, c, inside)
    shift = tl.load(bias + c + 0 * k, mask=inside & (k == 0), other=0.0).to(tl.float32)
    tl.store(out + start + k * channels + c, normal * gain + shift, mask=inside)


@triton.jit
def norm_backward(
    x_grad,  # [N, K, C]
    sums,  # [programs, lmax + 2, C]: weights of l = 0, 1, ..., and bias
    grad,  # [N, K, C]
    x,  # [N, K, C]
    weight,  # [C], of l = 0
    affine,  # [lmax, C]
    share,  # [K], in the mean square
    group,  # [K], of those with the same mean square
    degree,  # [K]
    atoms,
    num_coefficients,
    channels,
    num_degrees,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x, and of weights and bias summed over some atoms."""
    program = tl.program_id(0).to(tl.int64)
    k, c = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    bias_total = tl.zeros([BLOCK_C], tl.float32)
    for atom in range(program, atoms, tl.num_programs(0)):
        start = atom * num_coefficients * channels
        normal, inverse_std, part, inside = _normal(
            x + start, share, group, num_coefficients, channels, epsilon, BLOCK_K, BLOCK_C
        )
        flow = tl.load(grad + start + k * channels + c, mask=inside, other=0.0).to(tl.float32)
        total += flow * normal
        bias_total += tl.sum(tl.where(k == 0, flow, 0.0), axis=0)
        flow *= _gain(weight, affine, degree, num_coefficients, channels, k, c, inside)
        straight = _mean_of_scalars(flow, channels, BLOCK_K)
        along = tl.sum(flow * normal, axis=1)
        along = part[:, None] * _of_its_group(along, group, num_coefficients, BLOCK_K)
        flow = (flow - straight - along * normal) * inverse_std
        tl.store(x_grad + start + k * channels + c, flow, mask=inside)
    of_row = tl.load(degree + k, mask=k < num_coefficients, other=-1)
    in_c = tl.arange(0, BLOCK_C) < channels
    found = sums + program * (num_degrees + 1) * channels + tl.arange(0, BLOCK_C)
    for i in range(num_degrees):
        tl.store(found + i * channels, tl.sum(tl.where(of_row == i, total, 0.0), axis=0), mask=in_c)
    tl.store(found + num_degrees * channels, bias_total, mask=in_c)


# Which degrees have one mean square: the group of each.
_GROUP = {
    "layer_norm": lambda degree: degree,
    "layer_norm_sh": lambda degree: min(degree, 1),
    "rms_norm_sh": lambda degree: 0,  # noqa: ARG005
}


@cache
def _tables(kind: str, lmax: int, channels: int, device: torch.device) -> tuple[Tensor, ...]:
    """Each coefficient's share in the mean square, its group and its degree: [K] all."""
    groups = [_GROUP[kind](degree) for degree in range(lmax + 1)]
    degrees = [degree for degree in range(lmax + 1) for _ in range(2 * degree + 1)]
    shares = [1 / channels / ((2 * d + 1) * groups.count(groups[d])) for d in degrees]
    with torch.inference_mode(mode=False):  # they outlive the mode that they are made in
        return (
            torch.tensor(shares, dtype=torch.float32, device=device),
            torch.tensor([groups[d] for d in degrees], dtype=torch.int32, device=device),
            torch.tensor(degrees, dtype=torch.int32, device=device),
        )


def norm_blocks(num_coefficients: int, channels: int) -> dict[str, int]:
    """Sizes of a program, and its warps."""
    block_k, block_c = triton.next_power_of_2(num_coefficients), triton.next_power_of_2(channels)
    warps = min(16, max(1, block_k * block_c // _PER_WARP))
    return {"BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": warps}


class NormKernels:
    """A norm of features [N, (lmax + 1)^2, C], of one of the kinds of ops/norm.py."""

    def __init__(self, kind: str, lmax: int, epsilon: float) -> None:
        self.kind = kind
        self.lmax = lmax
        self.epsilon = epsilon

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, affine: Tensor) -> Tensor:
        """Of x [N, K, C]; weight and bias are of l = 0 [C], ``affine`` of the others [lmax, C]."""
        x, (atoms, num_coefficients, channels) = x.contiguous(), x.shape
        out = torch.empty_like(x)
        launch(
            norm_forward,
            (atoms,),
            *(out, x, weight.contiguous(), bias.contiguous(), affine.contiguous()),
            *_tables(self.kind, self.lmax, channels, x.device),
            *(num_coefficients, channels, self.epsilon),
            **norm_blocks(num_coefficients, channels),
        )
        return out

    def backward(
        self, x: Tensor, weight: Tensor, affine: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, weight, bias and ``affine``; see :meth:`forward`."""
        x, grad, (atoms, num_coefficients, channels) = x.contiguous(), grad.contiguous(), x.shape
        x_grad, programs, degrees = torch.empty_like(x), min(atoms, PROGRAMS), self.lmax + 1
        sums = x.new_empty(programs, degrees + 1, channels, dtype=torch.float32)
        launch(
            norm_backward,
            (programs,),
            *(x_grad, sums, grad, x, weight.contiguous(), affine.contiguous()),
            *_tables(self.kind, self.lmax, channels, x.device),
            *(atoms, num_coefficients, channels, degrees, self.epsilon),
            **norm_blocks(num_coefficients, channels),
        )
        totals = sums.sum(0).to(weight.dtype)
        return x_grad, totals[0], totals[-1], totals[1:-1]


class _Norm(torch.autograd.Function):
    """Keeps its input alone, and the weights."""

    @staticmethod
    def forward(
        ctx: Any, kernels: NormKernels, x: Tensor, weight: Tensor, bias: Tensor, affine: Tensor
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, affine)
        return kernels.forward(x, weight, bias, affine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, affine = ctx.saved_tensors
        return None, *ctx.kernels.backward(x, weight, affine, grad)


def norm(kernels: NormKernels, x: Tensor, weight: Tensor, bias: Tensor, affine: Tensor) -> Tensor:
    """:meth:`NormKernels.forward`, differentiable."""
    out: Tensor = _Norm.apply(kernels, x, weight, bias, affine)
    return out
