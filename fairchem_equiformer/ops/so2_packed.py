"""SO(2) linear layers (ops/so2_linear.py) by our own products (ops/native/matrix_products.py).

All orders of a layer are one call. The weights' gradients, too, take three products for m > 0, with
g the gradient of y:

    common = (g[+m] + g[-m])^T x[+m]
    A_grad = common - g[-m]^T (x[+m] - x[-m])
    B_grad = common - g[+m]^T (x[+m] + x[-m])
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops.native import MatrixProducts, Packed, pack, product_kernels


class _Order(NamedTuple):
    """Matrices of one order m > 0."""

    a: Packed
    a_plus_b: Packed
    b_minus_a: Packed


class _Layer(NamedTuple):
    zero: Packed
    orders: list[_Order]


@dataclass(frozen=True)
class PackedSO2Weights:
    """Weights of a layer as our own products take them."""

    kernels: ctypes.CDLL
    matrices: tuple[Tensor, ...]  # W[0] [Y0, X0] and W[m] [2 Ym, Xm]

    @classmethod
    def of(cls, weights: Sequence[Tensor], dtype: torch.dtype) -> PackedSO2Weights | None:
        """None where torch's products are to be taken."""
        matrices = tuple(weight.detach().to(dtype) for weight in weights)
        rows = [len(matrices[0]), *(len(matrix) // 2 for matrix in matrices[1:])]
        columns = [matrix.shape[1] for matrix in matrices]
        kernels = product_kernels(*matrices, widths=[*rows, *columns])
        return None if kernels is None else cls(kernels, matrices)

    @property
    def num_outputs(self) -> int:
        """Columns of the layer's result."""
        return sum(map(len, self.matrices))

    @cached_property
    def forward(self) -> _Layer:
        """Matrices [X, Y], made when first asked for."""
        return self._packed(Tensor.t)

    @cached_property
    def backward(self) -> _Layer:
        """Matrices [Y, X], likewise."""
        return self._packed(lambda matrix: matrix)

    def _packed(self, turned: Callable[[Tensor], Tensor]) -> _Layer:
        orders = []
        for weight in self.matrices[1:]:
            a, b = map(turned, weight.chunk(2))
            parts = pack(self.kernels, a), pack(self.kernels, a, b), pack(self.kernels, b, a, -1)
            orders.append(_Order(*parts))
        return _Layer(pack(self.kernels, turned(self.matrices[0])), orders)

    def columns(self) -> Iterator[tuple[slice, slice]]:
        """Of each order m > 0 in the input and the output: +m before -m."""
        zero, *others = self.matrices
        return order_columns(zero, [(len(m), 2 * m.shape[1]) for m in others])


def order_columns(zero: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, slice]]:
    """Columns of each order m > 0 in the input and the output, those of +m before those of -m.

    Args:
        zero: W[0] [Y0, X0].
        sizes: (2 Ym, 2 Xm) of m = 1..
    """
    y, x = zero.shape
    for rows, columns in sizes:
        yield slice(x, x + columns), slice(y, y + rows)
        x, y = x + columns, y + rows


def _halves(x: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Columns of +m and of -m."""
    plus, minus = x[:, columns].chunk(2, dim=1)
    return plus, minus


def packed_so2_linear(x: Tensor, weights: PackedSO2Weights, bias: Tensor | None) -> Tensor:
    """:func:`~fairchem_equiformer.ops.so2_linear.so2_linear` for such weights."""
    y = x.new_empty(len(x), weights.num_outputs)
    products, layer = MatrixProducts(weights.kernels), weights.forward
    products.add(x[:, : layer.zero.k], layer.zero, y[:, : layer.zero.n], bias=bias)
    for (x_columns, y_columns), order in zip(weights.columns(), layer.orders, strict=True):
        plus, minus = _halves(x, x_columns)
        y_plus, y_minus = _halves(y, y_columns)
        sums = x.new_empty(plus.shape)
        products.add(plus, order.a, y_plus, plus=minus, sums=sums, also=y_minus)
        products.add(minus, order.a_plus_b, y_plus, sign=-1, accumulate=True)
        products.add(plus, order.b_minus_a, y_minus, accumulate=True)
    products.run()
    return y


def packed_so2_linear_backward(
    grad: Tensor, x: Tensor, weights: PackedSO2Weights, weight_grads: Sequence[Tensor]
) -> Tensor:
    """:func:`~fairchem_equiformer.ops.so2_linear.so2_linear_backward` for such weights."""
    x_grad, layer = torch.empty_like(x), weights.backward
    sums = _input_gradient(grad, x_grad, weights, layer)
    products = MatrixProducts(weights.kernels)
    products.add(
        grad[:, : layer.zero.k].t(), x[:, : layer.zero.n], weight_grads[0], accumulate=True
    )
    for (x_columns, y_columns), total, weight_grad in zip(
        weights.columns(), sums, weight_grads[1:], strict=True
    ):
        plus, minus = _halves(x, x_columns)
        g_plus, g_minus = _halves(grad, y_columns)
        a_grad, b_grad = weight_grad.chunk(2)
        products.add(total.t(), plus, a_grad, also=b_grad, accumulate=True)
        products.add(g_minus.t(), plus - minus, a_grad, sign=-1, accumulate=True)
        products.add(g_plus.t(), plus + minus, b_grad, sign=-1, accumulate=True)
    products.run()
    return x_grad


def _input_gradient(
    grad: Tensor, x_grad: Tensor, weights: PackedSO2Weights, layer: _Layer
) -> list[Tensor]:
    """Write the input's gradient; return g[+m] + g[-m] of each order."""
    products, sums = MatrixProducts(weights.kernels), []
    products.add(grad[:, : layer.zero.k], layer.zero, x_grad[:, : layer.zero.n])
    x_stop = layer.zero.n
    for (x_columns, y_columns), order in zip(weights.columns(), layer.orders, strict=True):
        # A^T x, with -B for B: the roles of A + B and B - A are exchanged.
        plus, minus = _halves(grad, y_columns)
        x_plus, x_minus = _halves(x_grad, x_columns)
        total = grad.new_empty(plus.shape)
        products.add(plus, order.a, x_plus, plus=minus, sums=total, also=x_minus)
        products.add(minus, order.b_minus_a, x_plus, accumulate=True)
        products.add(plus, order.a_plus_b, x_minus, sign=-1, accumulate=True)
        sums.append(total)
        x_stop = x_columns.stop
    products.run()
    x_grad[:, x_stop:] = 0
    return sums
