"""SiLU of a layer norm, what the radial function does between its products, and its gradients.

A program holds some edges with all their channels in registers, so that each number is read once
and written once. The gradients of weight and bias are summed by each program over its edges, and
then over the programs in a fixed order.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fairchem_equiformer.ops.triton.functions import silu_slope, standardised, standardised_grad
from fairchem_equiformer.ops.triton.launch import launch

PROGRAMS = 1024  # of the backward pass, at most: more than are at work at a time
_TILE = 2048  # numbers of a program


@triton.jit
def _layer_norm(
    x,
    weight,
    bias,
    block,
    items,
    channels,
    epsilon,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Layer norm of some edges [BLOCK_B, BLOCK_C].

    Returns:
        It; before weight and bias; 1 / standard deviation [BLOCK_B, 1]; weight [1, BLOCK_C]; where
        the edges are in the tensor; which numbers there are.
    """
    item = block * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (item < items) & (c < channels)
    place = item * channels + c
    read = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    normal, inverse_std = standardised(read, inside, channels, epsilon)
    gain = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    return normal * gain + shift, normal, inverse_std, gain, place, inside


@triton.jit
def norm_silu_forward(
    out,  # [E, C]
    x,  # [E, C]
    weight,  # [C], and so is the bias
    bias,
    items,
    channels,
    epsilon,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = SiLU(LN(x)), for some edges."""
    block = tl.program_id(0).to(tl.int64)
    y, _, _, _, place, inside = _layer_norm(
        x, weight, bias, block, items, channels, epsilon, BLOCK_B, BLOCK_C
    )
    tl.store(out + place, y * tl.sigmoid(y), mask=inside)


@triton.jit
def norm_silu_backward(
    x_grad,  # [E, C]
    sums,  # [programs, 2, C]: weight, bias
    grad,  # [E, C]
    x,  # [E, C]
    weight,  # [C], and so is the bias
    bias,
    items,
    blocks,
    channels,
    epsilon,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x, and of weight and bias summed over some edges."""
    program = tl.program_id(0).to(tl.int64)
    weight_total = tl.zeros([BLOCK_C], tl.float32)
    bias_total = tl.zeros([BLOCK_C], tl.float32)
    for block in range(program, blocks, tl.num_programs(0)):
        y, normal, inverse_std, gain, place, inside = _layer_norm(
            x, weight, bias, block, items, channels, epsilon, BLOCK_B, BLOCK_C
        )
        flow = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * silu_slope(y)
        weight_total += tl.sum(flow * normal, axis=0)
        bias_total += tl.sum(flow, axis=0)
        flow = standardised_grad(flow * gain, normal, inverse_std, channels)
        tl.store(x_grad + place, flow, mask=inside)
    c = tl.arange(0, BLOCK_C)
    own = sums + program * 2 * channels + c
    tl.store(own, weight_total, mask=c < channels)
    tl.store(own + channels, bias_total, mask=c < channels)


def norm_silu_blocks(channels: int) -> dict[str, int]:
    """Sizes of a program, and its warps."""
    block_c = triton.next_power_of_2(channels)
    return {"BLOCK_B": max(1, _TILE // block_c), "BLOCK_C": block_c, "num_warps": 4}


class NormSiLUKernels:
    """SiLU of a layer norm over the channels of x [E, C]."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[E, C], in the dtype of weight and bias [C]."""
        x, (items, channels) = x.contiguous(), x.shape
        out, block = x.new_empty(x.shape, dtype=weight.dtype), norm_silu_blocks(channels)
        launch(
            norm_silu_forward,
            (triton.cdiv(items, block["BLOCK_B"]),),
            *(out, x, weight.contiguous(), bias.contiguous(), items, channels, self.epsilon),
            **block,
        )
        return out

    def backward(
        self, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        x, grad, (items, channels) = x.contiguous(), grad.contiguous(), x.shape
        block = norm_silu_blocks(channels)
        blocks = triton.cdiv(items, block["BLOCK_B"])
        programs, x_grad = min(blocks, PROGRAMS), torch.empty_like(x)
        sums = x.new_empty(programs, 2, channels, dtype=torch.float32)
        launch(
            norm_silu_backward,
            (programs,),
            *(x_grad, sums, grad, x, weight.contiguous(), bias.contiguous()),
            *(items, blocks, channels, self.epsilon),
            **block,
        )
        weight_grad, bias_grad = sums.sum(0).to(weight.dtype)
        return x_grad, weight_grad, bias_grad


class _NormSiLU(torch.autograd.Function):
    """By the kernels; what is differentiated again is made by PyTorch."""

    @staticmethod
    def forward(
        ctx: Any, kernels: NormSiLUKernels, x: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, bias)
        return kernels.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, *ctx.kernels.backward(*ctx.saved_tensors, grad)
        x, weight, bias = ctx.saved_tensors
        y = F.silu(
            F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, ctx.kernels.epsilon)
        )
        wanted = ctx.needs_input_grad[1:]
        leaves = [t for t, want in zip(ctx.saved_tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, leaves, grad, create_graph=True))
        return None, *(next(found) if want else None for want in wanted)


def norm_silu(kernels: NormSiLUKernels, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:meth:`NormSiLUKernels.forward`, differentiable twice."""
    out: Tensor = _NormSiLU.apply(kernels, x, weight, bias)
    return out
