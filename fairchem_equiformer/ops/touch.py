"""Zero gradients for parameters that a result does not depend on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairchem_equiformer.ops import library


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=dev) for shape, dtype, dev in ctx.like)
        return grad, *zeros


_operation = library.register(
    "touch",
    "Tensor x, Tensor[] parameters",
    lambda x, _: x.clone(memory_format=torch.contiguous_format),
    lambda x, _: x.new_empty(x.shape),
    lambda grad, _, parameters: [grad.clone(), *map(torch.zeros_like, parameters)],
    "x parameters",
)


def touch(x: Tensor, *parameters: Tensor) -> Tensor:
    """Return x; in the backward pass, give ``parameters`` a gradient of zero.

    A head that reads a few coefficients leaves some of its parameters without influence.
    Data-parallel training waits for a gradient of each of them, and weight decay acts only on
    parameters that have one.
    """
    if torch.compiler.is_compiling():  # no operation there returns its argument itself
        copy: Tensor = _operation(x, list(parameters))
        return copy
    out: Tensor = _Touch.apply(x, *parameters)
    return out
