"""Equivariant linear layer."""

from __future__ import annotations

import math

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.so3.irreps import SCALAR, blocks, channels_of, joined


class IrrepsLinear(nn.Module):
    """One matrix over the channels of each irrep, and a bias on the invariants (0e).

    An irrep that stands in several places of the input is read as one with the channels of all. One
    that the input lacks is zero in the result, and has no weights.

    Weights start as N(0, 1 / input channels), so that components keep their variance; the bias
    starts at zero.

    Args:
        irreps_in: of the input.
        irreps_out: of the result, each irrep once.
        bias: whether invariants get one.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, *, bias: bool = True) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = irreps_in, irreps_out
        self.weight = nn.ParameterDict()
        for mul, ir in irreps_out:
            inputs = channels_of(irreps_in, ir)
            if inputs:
                initial = torch.randn(mul, inputs) / math.sqrt(inputs)
                self.weight[str(ir)] = nn.Parameter(initial)
        scalars = channels_of(irreps_out, SCALAR) if bias else 0
        self.bias = nn.Parameter(torch.zeros(scalars)) if scalars else None

    def forward(self, x: Tensor) -> Tensor:
        """[n, irreps_in.dim] to [n, irreps_out.dim]."""
        inputs = blocks(x, self.irreps_in)
        parts = []
        for mul, ir in self.irreps_out:
            own = [part for part, (_, k) in zip(inputs, self.irreps_in, strict=True) if k == ir]
            bias = self.bias if ir == SCALAR else None
            parts.append(self._of(own, ir, bias) if own else x.new_zeros(len(x), ir.dim, mul))
        return joined(parts)

    def _of(self, inputs: list[Tensor], ir: o3.Irrep, bias: Tensor | None) -> Tensor:
        """One irrep [n, 2l + 1, channels]."""
        weight = self.weight[str(ir)]
        if len(inputs) == 1:
            return nn.functional.linear(inputs[0], weight, bias)
        widths = [part.shape[2] for part in inputs]
        columns = weight.split(widths, dim=1)
        total = nn.functional.linear(inputs[0], columns[0], bias)
        for part, own in zip(inputs[1:], columns[1:], strict=True):
            total = total + nn.functional.linear(part, own)
        return total

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.irreps_in} -> {self.irreps_out}, bias={self.bias is not None}"
