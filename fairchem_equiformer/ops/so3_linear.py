"""Equivariant linear layer: one matrix per degree, a bias on l = 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library
from fairchem_equiformer.so3.layout import degree_slices


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:2], weight.shape[1])
    for rows, matrix in zip(degree_slices(len(weight) - 1), weight, strict=True):
        y[:, rows] = _mm(x[:, rows], matrix.t())
    return y


def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x_grad = torch.empty_like(x)
    weight_grad = torch.empty_like(weight)
    for degree, rows in enumerate(degree_slices(len(weight) - 1)):
        part = grad[:, rows]
        x_grad[:, rows] = _mm(part, weight[degree])
        flat = part.flatten(0, 1)
        torch.mm(flat.t(), x[:, rows].flatten(0, 1), out=weight_grad[degree])
    return x_grad, weight_grad


class _SO3Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _backward(grad, *ctx.saved_tensors)


def _mm(x: Tensor, matrix: Tensor) -> Tensor:
    """[N, M, C] times [C, D], by one product whether or not a gradient is wanted."""
    return torch.mm(x.flatten(0, 1), matrix).view(*x.shape[:2], matrix.shape[1])


_operation = library.register(
    "so3_linear",
    "Tensor x, Tensor weight",
    _forward,
    lambda x, weight: x.new_empty(*x.shape[:2], weight.shape[1]),
    _backward,
    "x weight",
)


def so3_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[l, m] = W[l] x[l, m] + (bias if l = 0).

    Under autocast the products run in its dtype.

    Args:
        x: [N, (lmax + 1)^2, C_in], l-major.
        weight: [lmax + 1, C_out, C_in].
        bias: [C_out].

    Returns:
        [N, (lmax + 1)^2, C_out].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    apply = _operation if torch.compiler.is_compiling() else _SO3Linear.apply
    y: Tensor = apply(x, weight)
    if bias is None:
        return y
    return torch.cat([y[:, :1] + bias.to(y.dtype), y[:, 1:]], dim=1)
