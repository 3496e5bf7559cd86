"""Matrix products and linear layers, by our own products (ops/native) where they are the faster."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairchem_equiformer.ops.native import MatrixProducts, Packed, flush, pack, product_kernels


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


class _Linear(torch.autograd.Function):
    """By our own products; what is differentiated again is made by torch's."""

    @staticmethod
    def forward(
        ctx: Any, layer: Linear, packed: Packed, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return _product(layer.kernels, x, packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        *_, of_x, of_weight, of_bias = ctx.needs_input_grad
        bias_grad = grad.sum(0) if of_bias else None
        if torch.is_grad_enabled():
            weight_grad = grad.t() @ x if of_weight else None
            return None, None, grad @ weight if of_x else None, weight_grad, bias_grad
        weight_grad = None
        if of_weight:
            weight_grad = torch.zeros_like(weight)
            add_product(weight_grad, grad.t(), x)
        x_grad = _product(ctx.layer.kernels, grad, ctx.layer.packed_for_grad) if of_x else None
        return None, None, x_grad, weight_grad, bias_grad


class Linear:
    """A linear layer that many chunks of rows go through.

    Attributes:
        kernels: that make the products; None where PyTorch's are taken.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        parameters = (weight,) if bias is None else (weight, bias)
        self.kernels: Any = product_kernels(*parameters, widths=weight.shape)

    def pack(self) -> Packed:
        """The weight as products read it; there must be kernels."""
        return pack(self.kernels, self._weight.detach().t())

    @cached_property
    def packed(self) -> Packed:
        """The same, made once."""
        return self.pack()

    @cached_property
    def packed_for_grad(self) -> Packed:
        """The weight as products with gradients of the result read it."""
        return pack(self.kernels, self._weight.detach())

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Of edges [E, in], given that of the result [E, out]; there must be kernels."""
        out = grad.new_empty(len(grad), self.packed_for_grad.n)
        products = MatrixProducts(self.kernels)
        products.add(grad, self.packed_for_grad, out)
        products.run(edges=len(grad))
        return out

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self._of(x, lambda: self.packed)

    def once(self, x: Tensor) -> Tensor:
        """The same, without keeping the packed weight."""
        return self._of(x, self.pack)

    def _of(self, x: Tensor, packed: Callable[[], Packed]) -> Tensor:
        if self.kernels is None or x.dtype != self._weight.dtype:
            flush()
            return F.linear(x, self._weight, self._bias)
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = _Linear.apply(self, packed(), rows, self._weight, self._bias)
        return out.view(*x.shape[:-1], len(self._weight))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; under autocast or a compiler, it itself.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out].
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return Linear(weight, bias).once(x)
