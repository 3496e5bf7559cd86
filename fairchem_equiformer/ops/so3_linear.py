"""Equivariant linear layer: one matrix per degree, a bias on l = 0."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library
from fairchem_equiformer.ops.native import MatrixProducts, pack, product_kernels, together
from fairchem_equiformer.so3.layout import degree_slices


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.new_empty(*x.shape[:2], weight.shape[1])
    kernels = product_kernels(x, weight, widths=weight.shape[1:])
    if kernels is not None:
        with together():
            _own_products(kernels, x, weight.transpose(1, 2), y, bias)
        return y
    with torch.autocast(x.device.type, enabled=False):  # x has the products' dtype
        for rows, matrix in zip(degree_slices(len(weight) - 1), weight, strict=True):
            y[:, rows] = _mm(x[:, rows], matrix.t())
    if bias is not None:
        y[:, 0] += bias
    return y


def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x_grad, weight_grad = torch.empty_like(x), torch.empty_like(weight)
    kernels = product_kernels(grad, x, weight, widths=weight.shape[1:])
    if kernels is not None:
        with together():
            _own_products(kernels, grad, weight, x_grad)
            _own_weight_gradient(kernels, grad, x, weight_grad)
        return x_grad, weight_grad
    for degree, rows in enumerate(degree_slices(len(weight) - 1)):
        part = grad[:, rows]
        x_grad[:, rows] = _mm(part, weight[degree])
        flat = part.flatten(0, 1)
        torch.mm(flat.t(), x[:, rows].flatten(0, 1), out=weight_grad[degree])
    return x_grad, weight_grad


def _own_products(
    kernels: ctypes.CDLL, x: Tensor, matrices: Tensor, out: Tensor, bias: Tensor | None = None
) -> None:
    """Every coefficient of x [N, M, C] times its degree's matrix [C, D], to ``out`` [N, M, D].

    The bias [D] is that of l = 0.
    """
    products = MatrixProducts(kernels)
    for matrix, rows in zip(matrices, degree_slices(len(matrices) - 1), strict=True):
        packed = pack(kernels, matrix)
        for row in range(rows.start, rows.stop):
            products.add(x[:, row], packed, out[:, row], bias=None if row else bias)
    products.run()


def _own_weight_gradient(kernels: ctypes.CDLL, grad: Tensor, x: Tensor, total: Tensor) -> None:
    """Write ``total`` [lmax + 1, D, C]."""
    x = x if x.stride(2) == 1 else x.contiguous()
    products = MatrixProducts(kernels)
    for degree, rows in enumerate(degree_slices(len(total) - 1)):
        for row in range(rows.start, rows.stop):
            further = row > rows.start
            products.add(grad[:, row].t(), x[:, row], total[degree], accumulate=further)
    products.run()


class _SO3Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias_grad = grad[:, 0].sum(0) if ctx.needs_input_grad[2] else None
        return *_backward(grad, *ctx.saved_tensors), bias_grad


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

    Under autocast the products run in its dtype; on a CPU in that of the weights, which costs
    little there and keeps the result's digits.

    Args:
        x: [N, (lmax + 1)^2, C_in], l-major.
        weight: [lmax + 1, C_out, C_in].
        bias: [C_out].

    Returns:
        [N, (lmax + 1)^2, C_out].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = weight.dtype if device == "cpu" else torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if not torch.compiler.is_compiling():
        out: Tensor = _SO3Linear.apply(x, weight, None if bias is None else bias.to(x.dtype))
        return out
    y: Tensor = _operation(x, weight)
    if bias is None:
        return y
    return torch.cat([y[:, :1] + bias.to(y.dtype), y[:, 1:]], dim=1)
