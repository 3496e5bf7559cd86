"""Feed-forward network of Equiformer."""

from __future__ import annotations

from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.nn.irreps.activation import Gate
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear


class IrrepsFeedForward(nn.Module):
    """Linear layer, gate, linear layer.

    Args:
        irreps_in: of the features.
        irreps_mid: behind the gate.
        irreps_out: of the result.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_mid: o3.Irreps, irreps_out: o3.Irreps) -> None:
        super().__init__()
        gate = Gate(irreps_mid)
        self.linear_1 = IrrepsLinear(irreps_in, gate.irreps_in)
        self.gate = gate
        self.linear_2 = IrrepsLinear(irreps_mid, irreps_out)

    def forward(self, x: Tensor) -> Tensor:
        """[n, irreps_in.dim] to [n, irreps_out.dim]."""
        out: Tensor = self.linear_2(self.gate(self.linear_1(x)))
        return out
