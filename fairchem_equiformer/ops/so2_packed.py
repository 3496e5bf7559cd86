"""SO(2) linear layers (ops/so2_linear.py) by our own products (ops/native/matrix_products.py).

All orders of a layer are one call. The weights' gradients, too, take three products for m > 0, with
g the gradient of y:

    common = (g[+m] + g[-m])^T x[+m]
    A_grad = common - g[-m]^T (x[+m] - x[-m])
    B_grad = common - g[+m]^T (x[+m] + x[-m])

In bfloat16 they are four, as they stand in the formula: sums of weights, and of x, would be rounded
once more, and their products cancel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops.native import (
    MatrixProducts,
    Packed,
    pack,
    pack_in_bfloat16,
    product_kernels,
    sum_and_difference,
)


class _Halves(NamedTuple):
    """Columns of one order: those of +m and those of -m."""

    plus: Tensor
    minus: Tensor

    @classmethod
    def of(cls, x: Tensor, columns: slice) -> _Halves:
        return cls(*x[:, columns].chunk(2, dim=1))


class _ByThree(NamedTuple):
    """Matrices of one order m > 0."""

    a: Packed
    a_plus_b: Packed
    b_minus_a: Packed

    @classmethod
    def of(cls, kernels: ctypes.CDLL, a: Tensor, b: Tensor) -> _ByThree:
        return cls(pack(kernels, a), pack(kernels, a, b), pack(kernels, b, a, -1))

    def apply(self, products: MatrixProducts, x: _Halves, y: _Halves, sign: int = 1) -> Tensor:
        """Take in y = (A, -B over B, A) x, with that sign of B; where x[+m] + x[-m] will be."""
        total = x.plus.new_empty(x.plus.shape)
        to_plus, to_minus = self.a_plus_b, self.b_minus_a
        if sign == -1:
            to_plus, to_minus = to_minus, to_plus
        products.add(x.plus, self.a, y.plus, plus=x.minus, sums=total, also=y.minus)
        products.add(x.minus, to_plus, y.plus, sign=-sign, accumulate=True)
        products.add(x.plus, to_minus, y.minus, sign=sign, accumulate=True)
        return total


class _ByFour(NamedTuple):
    """The same in bfloat16."""

    a: Packed
    b: Packed

    @classmethod
    def of(cls, kernels: ctypes.CDLL, a: Tensor, b: Tensor) -> _ByFour:
        return cls(pack_in_bfloat16(kernels, a), pack_in_bfloat16(kernels, b))

    def apply(self, products: MatrixProducts, x: _Halves, y: _Halves, sign: int = 1) -> None:
        """As above."""
        plus, minus = map(products.rounded, x)
        products.add(plus, self.a, y.plus)
        products.add(minus, self.b, y.plus, sign=-sign, accumulate=True)
        products.add(plus, self.b, y.minus, sign=sign)
        products.add(minus, self.a, y.minus, accumulate=True)


class _Layer(NamedTuple):
    zero: Packed
    orders: list[_ByThree | _ByFour]


@dataclass(frozen=True)
class PackedSO2Weights:
    """Weights of a layer as our own products take them."""

    kernels: ctypes.CDLL
    matrices: tuple[Tensor, ...]  # W[0] [Y0, X0] and W[m] [2 Ym, Xm]
    reduced: bool  # products of numbers in bfloat16

    @classmethod
    def of(cls, weights: Sequence[Tensor], dtype: torch.dtype) -> PackedSO2Weights | None:
        """None where torch's products are to be taken.

        Args:
            weights: of the layer, see the fields.
            dtype: of the numbers that are multiplied.
        """
        matrices = tuple(weight.detach() for weight in weights)
        reduced = dtype == torch.bfloat16
        if not reduced and dtype != matrices[0].dtype:
            return None
        rows = [len(matrices[0]), *(len(matrix) // 2 for matrix in matrices[1:])]
        columns = [matrix.shape[1] for matrix in matrices]
        kernels = product_kernels(*matrices, widths=[*rows, *columns], reduced=reduced)
        return None if kernels is None else cls(kernels, matrices, reduced)

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
        zero, *others = self.matrices
        order: type[_ByThree | _ByFour] = _ByFour if self.reduced else _ByThree
        orders = [order.of(self.kernels, *map(turned, weight.chunk(2))) for weight in others]
        pack_one = pack_in_bfloat16 if self.reduced else pack
        return _Layer(pack_one(self.kernels, turned(zero)), orders)

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


def packed_so2_linear(
    x: Tensor, weights: PackedSO2Weights, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """:func:`~fairchem_equiformer.ops.so2_linear.so2_linear` for such weights."""
    y = x.new_empty(len(x), weights.num_outputs) if out is None else out
    products, layer = MatrixProducts(weights.kernels), weights.forward
    products.add(x[:, : layer.zero.k], layer.zero, y[:, : layer.zero.n], bias=bias)
    for (x_columns, y_columns), order in zip(weights.columns(), layer.orders, strict=True):
        order.apply(products, _Halves.of(x, x_columns), _Halves.of(y, y_columns))
    products.run(edges=len(x))
    return y


def packed_so2_linear_backward(
    grad: Tensor, x: Tensor, weights: PackedSO2Weights, weight_grads: Sequence[Tensor]
) -> Tensor:
    """:func:`~fairchem_equiformer.ops.so2_linear.so2_linear_backward` for such weights."""
    x_grad = torch.empty_like(x)
    sums = _input_gradient(grad, x_grad, weights)
    products, zero = MatrixProducts(weights.kernels), weights.backward.zero
    zero_grad, zero_x = grad[:, : zero.k], x[:, : zero.n]
    factor = pack_in_bfloat16(weights.kernels, zero_x) if weights.reduced else zero_x
    products.add(zero_grad.t(), factor, weight_grads[0], accumulate=True)
    for (x_columns, y_columns), total, weight_grad in zip(
        weights.columns(), sums, weight_grads[1:], strict=True
    ):
        g, halves = _Halves.of(grad, y_columns), _Halves.of(x, x_columns)
        if total is None:
            _weight_gradient_by_four(weights.kernels, products, g, halves, weight_grad)
        else:
            _weight_gradient_by_three(weights.kernels, products, g, halves, total, weight_grad)
    products.run()
    return x_grad


def _weight_gradient_by_three(
    kernels: ctypes.CDLL,
    products: MatrixProducts,
    g: _Halves,
    x: _Halves,
    total: Tensor,
    weight_grad: Tensor,
) -> None:
    """Take in what is added to the gradient of one order's weight; total is g[+m] + g[-m]."""
    a_grad, b_grad = weight_grad.chunk(2)
    both, difference = sum_and_difference(kernels, *x)
    products.add(total.t(), x.plus, a_grad, also=b_grad, accumulate=True)
    products.add(g.minus.t(), difference, a_grad, sign=-1, accumulate=True)
    products.add(g.plus.t(), both, b_grad, sign=-1, accumulate=True)


def _weight_gradient_by_four(
    kernels: ctypes.CDLL, products: MatrixProducts, g: _Halves, x: _Halves, weight_grad: Tensor
) -> None:
    """The same in bfloat16."""
    a_grad, b_grad = weight_grad.chunk(2)
    g_plus, g_minus = (products.rounded(half.t()) for half in g)
    x_plus, x_minus = (pack_in_bfloat16(kernels, half) for half in x)
    products.add(g_plus, x_plus, a_grad, accumulate=True)
    products.add(g_minus, x_minus, a_grad, accumulate=True)
    products.add(g_minus, x_plus, b_grad, accumulate=True)
    products.add(g_plus, x_minus, b_grad, sign=-1, accumulate=True)


def _input_gradient(grad: Tensor, x_grad: Tensor, weights: PackedSO2Weights) -> list[Tensor | None]:
    """Write the input's gradient; return g[+m] + g[-m] of each order, if it was made."""
    products, layer, sums = MatrixProducts(weights.kernels), weights.backward, []
    products.add(grad[:, : layer.zero.k], layer.zero, x_grad[:, : layer.zero.n])
    x_stop = layer.zero.n
    for (x_columns, y_columns), order in zip(weights.columns(), layer.orders, strict=True):
        g, out = _Halves.of(grad, y_columns), _Halves.of(x_grad, x_columns)
        sums.append(order.apply(products, g, out, sign=-1))  # of A^T and -B^T
        x_stop = x_columns.stop
    products.run(edges=len(x_grad))
    x_grad[:, x_stop:] = 0
    return sums
