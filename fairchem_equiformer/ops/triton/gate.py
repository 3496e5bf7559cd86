"""Gate activation: SiLU on l = 0, a sigmoid of a gate on each degree l > 0, and its gradients.

A program makes one degree of some items and channels, so that a gate is read, and its sigmoid made,
once for all rows of the degree. SiLU is x sigmoid(x): l = 0 is its own gate.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops.triton.launch import items_contiguous, launch

_TILE = 1024  # numbers of a program
_CHANNELS = 128


@triton.jit
def _gate(
    x,
    gates,
    degree,
    items,
    channels,
    x_stride,
    gates_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sigmoid of the gates of some items and channels; items, channels, and which there are."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (item < items) & (c < channels)
    own = tl.load(x + item * x_stride + c, mask=inside & (degree == 0), other=0.0)
    column = (degree - 1) * channels + c
    gate = tl.load(gates + item * gates_stride + column, mask=inside & (degree > 0), other=0.0)
    return tl.sigmoid(own.to(tl.float32) + gate.to(tl.float32)), item, c, inside


@triton.jit
def gate_forward(
    out,  # [B, R, C]
    x,  # [B, R, C], items may lie apart
    gates,  # [B, lmax C], items may lie apart
    row,  # [R], sorted by degree
    of_degree,  # [lmax + 2], where each degree's rows begin
    items,
    channels,
    num_rows,
    x_stride,
    gates_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x sigmoid(gate), for one degree."""
    degree = tl.program_id(1)
    gate, item, c, inside = _gate(
        x, gates, degree, items, channels, x_stride, gates_stride, BLOCK_B, BLOCK_C
    )
    for i in range(tl.load(of_degree + degree), tl.load(of_degree + degree + 1)):
        place = tl.load(row + i) * channels + c
        value = tl.load(x + item * x_stride + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + item * num_rows * channels + place, value * gate, mask=inside)


@triton.jit
def gate_backward(
    x_grad,  # [B, R, C]
    gates_grad,  # [B, lmax C]
    grad,  # [B, R, C], items may lie apart
    x,  # [B, R, C], items may lie apart
    gates,  # [B, lmax C], items may lie apart
    row,  # [R], sorted by degree
    of_degree,  # [lmax + 2], where each degree's rows begin
    items,
    channels,
    num_rows,
    num_gates,  # lmax
    grad_stride,
    x_stride,
    gates_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = dy sigmoid(gate) and dgate = sigmoid'(gate) sum of x dy, for one degree."""
    degree = tl.program_id(1)
    gate, item, c, inside = _gate(
        x, gates, degree, items, channels, x_stride, gates_stride, BLOCK_B, BLOCK_C
    )
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    slope = gate * (1 - gate)
    for i in range(tl.load(of_degree + degree), tl.load(of_degree + degree + 1)):
        place = tl.load(row + i) * channels + c
        value = tl.load(x + item * x_stride + place, mask=inside, other=0.0).to(tl.float32)
        flow = tl.load(grad + item * grad_stride + place, mask=inside, other=0.0).to(tl.float32)
        total += value * flow
        through_gate = tl.where(degree == 0, value * flow * slope, 0.0)
        found = x_grad + item * num_rows * channels + place
        tl.store(found, flow * gate + through_gate, mask=inside)
    found = gates_grad + (item * num_gates + degree - 1) * channels + c
    tl.store(found, total * slope, mask=inside & (degree > 0))


@cache
def _rows_by_degree(
    rows: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows sorted by degree, and where each degree begins."""
    order = sorted(range(len(rows)), key=lambda row: rows[row][0])
    degrees = [rows[row][0] for row in order]
    starts = [degrees.index(degree) for degree in range(degrees[-1] + 1)]
    with torch.inference_mode(mode=False):  # they outlive the mode that they are made in
        return (
            torch.tensor(order, dtype=torch.int32, device=device),
            torch.tensor([*starts, len(rows)], dtype=torch.int32, device=device),
        )


def gate_blocks(channels: int) -> dict[str, int]:
    """Sizes of a program, and its warps."""
    block_c = min(_CHANNELS, triton.next_power_of_2(channels))
    return {"BLOCK_B": _TILE // block_c, "BLOCK_C": block_c, "num_warps": 4}


class GateKernels:
    """Gates on rows (l, m) of which the first is (0, 0), degree by degree.

    x is [B, R, C] and ``gates`` [B, lmax C] in all of them.
    """

    def __init__(self, rows: tuple[tuple[int, int], ...]) -> None:
        self.rows = rows

    def _launch(self, kernel: object, tensors: tuple[Tensor, ...], x: Tensor, *sizes: int) -> None:
        items, num_rows, channels = x.shape
        block = gate_blocks(channels)
        row, of_degree = _rows_by_degree(self.rows, x.device)
        launch(
            kernel,
            (
                triton.cdiv(items, block["BLOCK_B"]),
                len(of_degree) - 1,
                triton.cdiv(channels, block["BLOCK_C"]),
            ),
            *(*tensors, row, of_degree, items, channels, num_rows, *sizes),
            **block,
        )

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """[B, R, C]."""
        x, gates = items_contiguous(x), items_contiguous(gates)
        out = x.new_empty(x.shape)
        self._launch(gate_forward, (out, x, gates), x, x.stride(0), gates.stride(0))
        return out

    def backward(self, x: Tensor, gates: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the gates."""
        x, gates, grad = (items_contiguous(tensor) for tensor in (x, gates, grad))
        x_grad, gates_grad = x.new_empty(x.shape), gates.new_empty(gates.shape)
        tensors = x_grad, gates_grad, grad, x, gates
        sizes = gates.shape[1] // x.shape[2], grad.stride(0), x.stride(0), gates.stride(0)
        self._launch(gate_backward, tensors, x, *sizes)
        return x_grad, gates_grad


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: GateKernels, x: Tensor, gates: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, gates)
        return kernels.forward(x, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates = ctx.saved_tensors
        return None, *ctx.kernels.backward(x, gates, grad)


def gate(kernels: GateKernels, x: Tensor, gates: Tensor) -> Tensor:
    """:meth:`GateKernels.forward`, differentiable."""
    out: Tensor = _Gate.apply(kernels, x, gates)
    return out
