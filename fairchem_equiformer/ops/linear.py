"""Matrix products and linear layers, by our own products (ops/native) where they are the faster."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops.native import MatrixProducts, Packed, pack, product_kernels


def product(a: Tensor, b: Tensor) -> Tensor:
    """[M, K] times [K, N]. Not differentiable."""
    kernels = product_kernels(a, b, widths=[b.shape[1]])
    if kernels is None:
        return torch.mm(a, b)
    return _product(kernels, a, pack(kernels, b))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add [M, K] times [K, N] to ``total``. Not differentiable."""
    kernels = product_kernels(total, a, b, widths=[b.shape[1]])
    if kernels is None:
        total.addmm_(a, b)
        return
    products = MatrixProducts(kernels)
    products.add(a, b, total, accumulate=True)
    products.run()


def _product(kernels: ctypes.CDLL, a: Tensor, b: Packed, bias: Tensor | None = None) -> Tensor:
    out = a.new_empty(len(a), b.n)
    products = MatrixProducts(kernels)
    products.add(a, b, out, bias=bias)
    products.run()
    return out


@dataclass(frozen=True)
class _PackedLinear:
    """A weight in the order in which our products read it, made when first asked for."""

    kernels: ctypes.CDLL
    weight: Tensor  # [out, in]

    @cached_property
    def forward(self) -> Packed:
        return pack(self.kernels, self.weight.t())

    @cached_property
    def backward(self) -> Packed:
        return pack(self.kernels, self.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed: _PackedLinear,
        x: Tensor,
        weight: Tensor,  # noqa: ARG004 - what the packed one was made of, to get its gradient
        bias: Tensor,
    ) -> Tensor:
        ctx.packed = packed
        ctx.save_for_backward(x)
        return _product(packed.kernels, x, packed.forward, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), packed = ctx.saved_tensors, ctx.packed
        weight_grad = torch.zeros_like(packed.weight)
        add_product(weight_grad, grad.t(), x)
        return None, _product(packed.kernels, grad, packed.backward), weight_grad, grad.sum(0)


class Linear:
    """A linear layer that many chunks of rows go through, its weight packed once for all.

    Differentiable once.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        kernels = product_kernels(weight, bias, widths=weight.shape)
        self._packed = None if kernels is None else _PackedLinear(kernels, weight.detach())

    def __call__(self, x: Tensor) -> Tensor:
        """[E, in] to [E, out]."""
        if self._packed is None or x.dtype != self._weight.dtype:
            return F.linear(x, self._weight, self._bias)
        out: Tensor = _Linear.apply(self._packed, x, self._weight, self._bias)
        return out
