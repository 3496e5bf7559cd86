"""Equivariant linear layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fairchem_equiformer.ops.so3_linear import so3_linear


class SO3Linear(nn.Module):
    """One weight matrix per degree, a bias on l = 0.

    Args:
        in_features: channels C_in.
        out_features: channels C_out.
        lmax: highest degree.
    """

    def __init__(self, in_features: int, out_features: int, lmax: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.lmax = lmax
        bound = 1 / math.sqrt(in_features)
        weight = torch.empty(lmax + 1, out_features, in_features).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[N, (lmax + 1)^2, C_in] to [N, (lmax + 1)^2, C_out]."""
        return so3_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, lmax={self.lmax}"
