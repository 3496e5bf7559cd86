"""SO(2) linear layers: the convolution of eSCN in the edge-aligned frame (paper, Eq. 8).

    y[0]  = W[0] x[0] + b
    y[+m] = A[m] x[+m] - B[m] x[-m]
    y[-m] = B[m] x[+m] + A[m] x[-m],      W[m] = (A[m] over B[m])

where x[m] holds all degrees and channels of one order. Rows are m-major (so3/layout.py), so that
operands and results are slices and nothing is copied or reordered.

The two rows for m > 0 are one product of complex matrices, which takes three real products (Gauss):

    common = A (x[+m] + x[-m])
    y[+m]  = common - (A + B) x[-m]
    y[-m]  = common + (B - A) x[+m]

Where our own products are the faster ones, one call makes all of this (ops/so2_packed.py).

A GPU with tensor cores waits for memory more than for arithmetic. There one product per order, with
the matrix (A, -B) over (B, A), reads its operand once and writes its result once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops.native import flush
from fairchem_equiformer.ops.so2_packed import (
    PackedSO2Weights,
    order_columns,
    packed_so2_linear,
    packed_so2_linear_backward,
)


class OrderWeights(NamedTuple):
    """Weights of one order m > 0, each [Ym, Xm]."""

    a: Tensor
    a_plus_b: Tensor
    b_minus_a: Tensor


class SO2Weights(NamedTuple):
    """Weights of a layer as the products take them."""

    zero: Tensor  # W[0] [Y0, X0]
    # For m = 1..: what three products take, or the one matrix [2 Ym, 2 Xm] of a single one.
    orders: tuple[OrderWeights | Tensor, ...]

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], dtype: torch.dtype, *, single: bool | None = None
    ) -> SO2Weights | PackedSO2Weights:
        """From W[0] [Y0, X0] and, for m = 1.., W[m] [2 Ym, Xm].

        Args:
            weights: of the layer.
            dtype: of the products.
            single: one product per order; by default where tensor cores make the products, and in
                half precision, in which the three would be rounded more often. Either value
                stands for torch's products.
        """
        if single is None:
            packed = PackedSO2Weights.of(weights, dtype)
            if packed is not None:
                return packed
            single = _few_digits(dtype) or (weights[0].is_cuda and _by_tensor_cores())
        orders: list[OrderWeights | Tensor] = []
        for weight in weights[1:]:
            a, b = weight.detach().chunk(2)
            if single:
                rows = torch.cat([a, -b], dim=1), torch.cat([b, a], dim=1)
                orders.append(torch.cat(rows).to(dtype))
            else:
                orders.append(OrderWeights(a.to(dtype), (a + b).to(dtype), (b - a).to(dtype)))
        return cls(weights[0].detach().to(dtype), tuple(orders))

    @property
    def num_outputs(self) -> int:
        """Columns of the layer's result."""
        stops: list[int] = [len(self.zero), *(order.y.stop for order in _orders(self))]
        return stops[-1]


def _few_digits(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _by_tensor_cores() -> bool:
    """Whether a GPU's tensor cores make products in float32, as PyTorch is set."""
    return torch.get_float32_matmul_precision() != "highest"


class _Order(NamedTuple):
    """Columns of one order m > 0 in the input and the output, +m before -m, and its weights."""

    x: slice
    y: slice
    weights: OrderWeights | Tensor


def _orders(weights: SO2Weights) -> Iterator[_Order]:
    sizes = [
        (order.shape[0], order.shape[1])
        if isinstance(order, Tensor)
        else (2 * order.a.shape[0], 2 * order.a.shape[1])
        for order in weights.orders
    ]
    columns = order_columns(weights.zero, sizes)
    for (x, y), order in zip(columns, weights.orders, strict=True):
        yield _Order(x, y, order)


def so2_linear(
    x: Tensor,
    weights: SO2Weights | PackedSO2Weights,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply an SO(2) linear layer. Not differentiable; see :func:`so2_linear_backward`.

    Args:
        x: [E, X], m-major rows with their channels, flattened. Columns of orders that have no
            weight are ignored.
        weights: of the layer; x is rounded to their dtype.
        bias: [Y0].
        out: dense, where the result is written, if it is given.

    Returns:
        [E, Y0 + sum over m of 2 Ym], in the dtype of x.
    """
    if isinstance(weights, PackedSO2Weights):
        return packed_so2_linear(x, weights, bias, out)
    flush()
    if out is not None:
        return out.copy_(so2_linear(x, weights, bias))
    if x.dtype != weights.zero.dtype:
        y = so2_linear(x.to(weights.zero.dtype), weights, None).to(x.dtype)
        return y if bias is None else _add_bias(y, bias)
    y = x.new_empty(len(x), weights.num_outputs)
    first = y[:, : len(weights.zero)]
    torch.mm(x[:, : weights.zero.shape[1]], weights.zero.t(), out=first)
    for order in _orders(weights):
        if isinstance(order.weights, Tensor):
            torch.mm(x[:, order.x], order.weights.t(), out=y[:, order.y])
            continue
        a, a_plus_b, b_minus_a = (weight.t() for weight in order.weights)
        plus, minus = x[:, order.x].chunk(2, dim=1)
        y_plus, y_minus = y[:, order.y].chunk(2, dim=1)
        torch.mm(plus + minus, a, out=y_plus)
        y_minus.copy_(y_plus)
        y_plus.addmm_(minus, a_plus_b, alpha=-1)
        y_minus.addmm_(plus, b_minus_a)
    return y if bias is None else _add_bias(y, bias)


def _add_bias(y: Tensor, bias: Tensor) -> Tensor:
    y[:, : len(bias)] += bias
    return y


def so2_linear_backward(
    grad: Tensor,
    x: Tensor,
    weights: SO2Weights | PackedSO2Weights,
    weight_grads: Sequence[Tensor],
) -> Tensor:
    """Add the weights' gradients to ``weight_grads`` in place and return the input's.

    Args:
        grad: [E, Y], gradient of :func:`so2_linear`'s result.
        x: [E, X], its input.
        weights: its weights.
        weight_grads: tensors of the shapes of W[0], W[1], ... that are added to.

    Returns:
        [E, X]; zero in columns of orders that have no weight.
    """
    if isinstance(weights, PackedSO2Weights):
        return packed_so2_linear_backward(grad, x, weights, weight_grads)
    flush()
    if weight_grads[0].dtype != weights.zero.dtype:
        return _backward_in_fewer_digits(grad, x, weights, weight_grads)
    x_grad = torch.empty_like(x)
    y_stop, x_stop = weights.zero.shape
    torch.mm(grad[:, :y_stop], weights.zero, out=x_grad[:, :x_stop])
    weight_grads[0].addmm_(grad[:, :y_stop].t(), x[:, :x_stop])
    for order, weight_grad in zip(_orders(weights), weight_grads[1:], strict=True):
        x_stop = order.x.stop
        a_grad, b_grad = weight_grad.chunk(2)
        if isinstance(order.weights, Tensor):
            torch.mm(grad[:, order.y], order.weights, out=x_grad[:, order.x])
            rows = torch.mm(grad[:, order.y].t(), x[:, order.x]).chunk(2)
            (aa, ab), (ba, bb) = (row.chunk(2, dim=1) for row in rows)
            a_grad.add_(aa).add_(bb)
            b_grad.add_(ba).sub_(ab)
            continue
        a, a_plus_b, b_minus_a = order.weights
        plus, minus = x[:, order.x].chunk(2, dim=1)
        g_plus, g_minus = grad[:, order.y].chunk(2, dim=1)
        x_plus, x_minus = x_grad[:, order.x].chunk(2, dim=1)
        torch.mm(g_plus + g_minus, a, out=x_plus)
        x_minus.copy_(x_plus)
        x_plus.addmm_(g_minus, b_minus_a)
        x_minus.addmm_(g_plus, a_plus_b, alpha=-1)
        # Four products here: the three would each need a buffer of the weights' size.
        a_grad.addmm_(g_plus.t(), plus).addmm_(g_minus.t(), minus)
        b_grad.addmm_(g_minus.t(), plus).addmm_(g_plus.t(), minus, alpha=-1)
    x_grad[:, x_stop:] = 0
    return x_grad


def _backward_in_fewer_digits(
    grad: Tensor, x: Tensor, weights: SO2Weights, weight_grads: Sequence[Tensor]
) -> Tensor:
    """As :func:`so2_linear_backward`, in the weights' dtype; sums keep their own."""
    dtype = weights.zero.dtype
    parts = [torch.zeros_like(total, dtype=dtype) for total in weight_grads]
    x_grad = so2_linear_backward(grad.to(dtype), x.to(dtype), weights, parts)
    for total, part in zip(weight_grads, parts, strict=True):
        total.add_(part)
    return x_grad.to(grad.dtype)
