"""Readout of Equiformer's invariants."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fairchem_equiformer.nn.irreps.activation import Normalized


class ScalarHead(nn.Module):
    """One number of each atom from its invariants, which stand first among its features.

    Linear layer, SiLU of second moment one, linear layer; weights start as N(0, 1 / channels).

    Args:
        channels: invariants of an atom.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, channels)
        self.linear_2 = nn.Linear(channels, 1)
        self._silu = Normalized(nn.functional.silu)
        for layer in (self.linear_1, self.linear_2):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(channels))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, irreps.dim] to [rows]."""
        hidden = self._silu(self.linear_1(x[:, : self.channels]))
        # Not by a matrix of one row: its second derivative has strides that DDP warns of.
        out: Tensor = hidden @ self.linear_2.weight[0] + self.linear_2.bias
        return out
