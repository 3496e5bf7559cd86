"""Activations whose second moment is one, and the equivariant gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from e3nn import o3
from e3nn.math import normalize2mom
from torch import Tensor, nn

from fairchem_equiformer.ops.irreps_gate import irreps_gate
from fairchem_equiformer.so3.irreps import SCALAR, channels_of


@cache
def moment_scale(function: Callable[[Tensor], Tensor]) -> float:
    """What to multiply a function with, so that its mean square on N(0, 1) is one.

    That of e3nn, a mean over a million fixed draws.
    """
    return float(normalize2mom(function).cst)


class Normalized:
    """A function scaled to a second moment of one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.scale = function, moment_scale(function)

    def __call__(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return self.function(x) * self.scale


class Gate(nn.Module):
    """SiLU on invariants (0e); each channel of all other irreps times the sigmoid of one more.

    Both are scaled to a second moment of one.

    Args:
        irreps_out: of the result, with 0e first.

    Attributes:
        irreps_in: of the input: the same, and an invariant more for each channel that is gated.
    """

    def __init__(self, irreps_out: o3.Irreps) -> None:
        super().__init__()
        self.irreps_out = irreps_out
        self.num_scalars = channels_of(irreps_out, SCALAR)
        gated = irreps_out[1:]
        self.irreps_in = o3.Irreps([(irreps_out.num_irreps, SCALAR), *gated])
        self._gated = tuple((mul, ir.dim) for mul, ir in gated)
        self._scales = moment_scale(nn.functional.silu), moment_scale(torch.sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        """[n, irreps_in.dim] to [n, irreps_out.dim]."""
        return irreps_gate(x, self.num_scalars, self._gated, self._scales)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.irreps_in} -> {self.irreps_out}"
