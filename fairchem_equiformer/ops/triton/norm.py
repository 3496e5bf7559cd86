"""Separable layer norm: layer norm on l = 0, one RMS for all l > 0, and its gradients.

A program holds all coefficients and channels of an atom in registers, so that each number is read
once and written once. The gradients of weights and bias are summed by each program over its atoms,
and then over the programs in a fixed order.
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
    x,
    share,
    atom,
    num_coefficients,
    channels,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """An atom's features over their standard deviation [BLOCK_K, BLOCK_C], l = 0 centred.

    Returns:
        These; the inverse of the deviation and the share in the mean square [BLOCK_K, 1]; where
        they are in the tensor; which exist; which are scalars.
    """
    k, c = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
    inside = (k < num_coefficients) & (c < channels)
    scalar = inside & (k == 0)
    place = atom * num_coefficients * channels + k * channels + c
    features = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(scalar, features, 0.0), axis=1), axis=0) / channels
    features = tl.where(scalar, features - mean, features)
    part = tl.load(share + k, mask=k < num_coefficients, other=0.0)
    squares = tl.sum(features * features, axis=1)[:, None] * part
    inverse_std = 1 / tl.sqrt(_of_its_kind(squares, k) + epsilon)
    return features * inverse_std, inverse_std, part, place, inside, scalar


@triton.jit
def _of_its_kind(terms, k):
    """The term of l = 0, and the sum of those of l > 0 for each of these: [BLOCK_K, 1]."""
    of_scalars = tl.sum(tl.where(k == 0, terms, 0.0), axis=0)
    of_vectors = tl.sum(tl.where(k == 0, 0.0, terms), axis=0)
    return tl.where(k == 0, of_scalars[None, :], of_vectors[None, :])


@triton.jit
def _gain(
    weight,
    affine,
    degree,
    num_coefficients,
    channels,
    scalar,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Weights of an atom's features: of l = 0, and of each degree after it."""
    k, c = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
    vector = (k > 0) & (k < num_coefficients)
    row = tl.load(degree + k, mask=vector, other=1) - 1
    of_vectors = tl.load(affine + row * channels + c, mask=vector & (c < channels), other=0.0)
    of_scalars = tl.load(weight + c + 0 * k, mask=scalar, other=0.0)
    return of_vectors.to(tl.float32) + of_scalars.to(tl.float32)


@triton.jit
def norm_forward(
    out,  # [N, K, C]
    x,  # [N, K, C]
    weight,  # [C], of l = 0, and so is the bias
    bias,
    affine,  # [lmax, C]
    share,  # [K], in the mean square
    degree,  # [K]
    num_coefficients,
    channels,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x / deviation * weight + bias, for one atom."""
    atom = tl.program_id(0).to(tl.int64)
    normal, _, _, place, inside, scalar = _normal(
        x, share, atom, num_coefficients, channels, epsilon, BLOCK_K, BLOCK_C
    )
    gain = _gain(weight, affine, degree, num_coefficients, channels, scalar, BLOCK_K, BLOCK_C)
    k, c = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
    shift = tl.load(bias + c + 0 * k, mask=scalar, other=0.0).to(tl.float32)
    tl.store(out + place, normal * gain + shift, mask=inside)


@triton.jit
def norm_backward(
    x_grad,  # [N, K, C]
    sums,  # [programs, lmax + 2, C]: weights of l = 0, 1, ..., and bias
    grad,  # [N, K, C]
    x,  # [N, K, C]
    weight,  # [C], of l = 0
    affine,  # [lmax, C]
    share,  # [K], in the mean square
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
    k = tl.arange(0, BLOCK_K)[:, None]
    total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    bias_total = tl.zeros([BLOCK_C], tl.float32)
    for atom in range(program, atoms, tl.num_programs(0)):
        normal, inverse_std, part, place, inside, scalar = _normal(
            x, share, atom, num_coefficients, channels, epsilon, BLOCK_K, BLOCK_C
        )
        gain = _gain(weight, affine, degree, num_coefficients, channels, scalar, BLOCK_K, BLOCK_C)
        flow = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        total += flow * normal
        bias_total += tl.sum(tl.where(scalar, flow, 0.0), axis=0)
        flow = flow * gain
        straight = tl.sum(tl.sum(tl.where(scalar, flow, 0.0), axis=1), axis=0) / channels
        along = part * _of_its_kind(tl.sum(flow * normal, axis=1)[:, None], k)
        flow = tl.where(scalar, flow - straight, flow) - along * normal
        tl.store(x_grad + place, flow * inverse_std, mask=inside)
    of_row = tl.load(degree + k, mask=k < num_coefficients, other=-1)
    in_c = tl.arange(0, BLOCK_C) < channels
    own = sums + program * (num_degrees + 1) * channels + tl.arange(0, BLOCK_C)
    for i in range(num_degrees):
        tl.store(own + i * channels, tl.sum(tl.where(of_row == i, total, 0.0), axis=0), mask=in_c)
    tl.store(own + num_degrees * channels, bias_total, mask=in_c)


@cache
def _tables(lmax: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each coefficient's share in the mean square, and its degree: [K] both."""
    degrees = [degree for degree in range(lmax + 1) for _ in range(2 * degree + 1)]
    shares = [1 / channels / ((2 * d + 1) * lmax if d else 1) for d in degrees]
    with torch.inference_mode(mode=False):  # they outlive the mode that they are made in
        return (
            torch.tensor(shares, dtype=torch.float32, device=device),
            torch.tensor(degrees, dtype=torch.int32, device=device),
        )


def norm_blocks(num_coefficients: int, channels: int) -> dict[str, int]:
    """Sizes of a program, and its warps."""
    block_k, block_c = triton.next_power_of_2(num_coefficients), triton.next_power_of_2(channels)
    warps = min(16, max(1, block_k * block_c // _PER_WARP))
    return {"BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": warps}


class NormKernels:
    """Separable layer norm of features [N, (lmax + 1)^2, C]."""

    def __init__(self, lmax: int, epsilon: float) -> None:
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
            *(*_tables(self.lmax, channels, x.device), num_coefficients, channels, self.epsilon),
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
            *(*_tables(self.lmax, channels, x.device), atoms, num_coefficients, channels, degrees),
            self.epsilon,
            **norm_blocks(num_coefficients, channels),
        )
        totals = sums.sum(0).to(weight.dtype)
        return x_grad, totals[0], totals[-1], totals[1:-1]


class _SeparableLayerNorm(torch.autograd.Function):
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


def separable_layer_norm(
    kernels: NormKernels, x: Tensor, weight: Tensor, bias: Tensor, affine: Tensor
) -> Tensor:
    """:meth:`NormKernels.forward`, differentiable."""
    out: Tensor = _SeparableLayerNorm.apply(kernels, x, weight, bias, affine)
    return out
