"""SO(2) linear layers: the convolution of eSCN in the edge-aligned frame (paper, Eq. 8).

    y[0]  = W[0] x[0] + b
    y[+m] = A[m] x[+m] - B[m] x[-m]
    y[-m] = B[m] x[+m] + A[m] x[-m],      W[m] = (A[m] over B[m])

where x[m] holds all degrees and channels of one order. Rows are m-major (so3/layout.py), so that
operands and results are slices and nothing is copied or reordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Order(NamedTuple):
    """Slices of one order m > 0 in the input and the output, and the halves of its weight."""

    x_plus: slice
    x_minus: slice
    y_plus: slice
    y_minus: slice
    half: int


def _orders(weights: Sequence[Tensor]) -> Iterator[_Order]:
    y, x = weights[0].shape
    for weight in weights[1:]:
        half, width = weight.shape[0] // 2, weight.shape[1]
        yield _Order(
            slice(x, x + width),
            slice(x + width, x + 2 * width),
            slice(y, y + half),
            slice(y + half, y + 2 * half),
            half,
        )
        x, y = x + 2 * width, y + 2 * half


def so2_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Apply an SO(2) linear layer. Not differentiable; see :func:`so2_linear_backward`.

    Args:
        x: [E, X], m-major rows with their channels, flattened. Columns of orders that have no
            weight are ignored.
        weights: W[0] [Y0, X0] and, for m = 1.., W[m] [2 Ym, Xm].
        bias: [Y0].

    Returns:
        [E, Y0 + sum over m of 2 Ym].
    """
    y = x.new_empty(len(x), sum(len(weight) for weight in weights))
    first = y[:, : len(weights[0])]
    torch.mm(x[:, : weights[0].shape[1]], weights[0].t(), out=first)
    if bias is not None:
        first += bias
    for order, weight in zip(_orders(weights), weights[1:], strict=True):
        a, b = weight[: order.half].t(), weight[order.half :].t()
        plus, minus = x[:, order.x_plus], x[:, order.x_minus]
        y_plus, y_minus = y[:, order.y_plus], y[:, order.y_minus]
        torch.mm(plus, a, out=y_plus)
        y_plus.addmm_(minus, b, alpha=-1)
        torch.mm(plus, b, out=y_minus)
        y_minus.addmm_(minus, a)
    return y


def so2_linear_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], weight_grads: Sequence[Tensor]
) -> Tensor:
    """Add the weights' gradients to ``weight_grads`` in place and return the input's.

    Args:
        grad: [E, Y], gradient of :func:`so2_linear`'s result.
        x: [E, X], its input.
        weights: its weights.
        weight_grads: tensors of the weights' shapes that are added to.

    Returns:
        [E, X]; zero in columns of orders that have no weight.
    """
    x_grad = torch.empty_like(x)
    y_stop, x_stop = weights[0].shape
    torch.mm(grad[:, :y_stop], weights[0], out=x_grad[:, :x_stop])
    weight_grads[0].addmm_(grad[:, :y_stop].t(), x[:, :x_stop])
    for order, weight, weight_grad in zip(
        _orders(weights), weights[1:], weight_grads[1:], strict=True
    ):
        a, b = weight[: order.half], weight[order.half :]
        a_grad, b_grad = weight_grad[: order.half], weight_grad[order.half :]
        plus, minus = x[:, order.x_plus], x[:, order.x_minus]
        g_plus, g_minus = grad[:, order.y_plus], grad[:, order.y_minus]
        torch.mm(g_plus, a, out=x_grad[:, order.x_plus]).addmm_(g_minus, b)
        torch.mm(g_minus, a, out=x_grad[:, order.x_minus]).addmm_(g_plus, b, alpha=-1)
        a_grad.addmm_(g_plus.t(), plus).addmm_(g_minus.t(), minus)
        b_grad.addmm_(g_minus.t(), plus).addmm_(g_plus.t(), minus, alpha=-1)
        x_stop = order.x_minus.stop
    x_grad[:, x_stop:] = 0
    return x_grad
