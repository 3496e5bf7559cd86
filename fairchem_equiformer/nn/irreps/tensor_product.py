"""Depth-wise tensor product with the edges' harmonics."""

from __future__ import annotations

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.nn.radial import RadialFunction
from fairchem_equiformer.ops.depthwise_tensor_product import Ends, depthwise_tensor_product
from fairchem_equiformer.so3.depthwise import depthwise_paths


class RadialTensorProduct(nn.Module):
    """Product whose weights are a radial function of the edge's length.

    Args:
        irreps_in: of the features.
        irreps_sh: of the harmonics.
        irreps_wanted: those of the result's irreps that are kept, beside invariants.
        num_basis: radial basis functions.
        hidden: width of the radial function's two hidden layers.

    Attributes:
        irreps_out: of the result.
    """

    def __init__(
        self,
        irreps_in: o3.Irreps,
        irreps_sh: o3.Irreps,
        irreps_wanted: o3.Irreps,
        num_basis: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.paths = depthwise_paths(irreps_in, irreps_sh, irreps_wanted)
        self.irreps_out = self.paths.irreps_out
        self.radial = RadialFunction(num_basis, hidden, self.paths.weight_numel)
        for layer in (self.radial.net[0], self.radial.net[3]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor | Ends, harmonics: Tensor, basis: Tensor) -> Tensor:
        """[E, irreps_in.dim], or features of atoms, to [E, irreps_out.dim]."""
        weights = self.radial(basis).to(harmonics.dtype)
        return depthwise_tensor_product(x, harmonics, weights, self.paths, channels_last=True)


class TensorProduct(nn.Module):
    """Product with weights of its own, the same for all edges: N(0, 1) at first.

    Args:
        irreps_in: of the features.
        irreps_sh: of the harmonics.
        irreps_wanted: those of the result's irreps that are kept, beside invariants.

    Attributes:
        irreps_out: of the result.
    """

    def __init__(
        self, irreps_in: o3.Irreps, irreps_sh: o3.Irreps, irreps_wanted: o3.Irreps
    ) -> None:
        super().__init__()
        self.paths = depthwise_paths(irreps_in, irreps_sh, irreps_wanted)
        self.irreps_out = self.paths.irreps_out
        self.weight = nn.Parameter(torch.randn(self.paths.weight_numel))

    def forward(self, x: Tensor, harmonics: Tensor) -> Tensor:
        """[E, irreps_in.dim] to [E, irreps_out.dim]."""
        return depthwise_tensor_product(x, harmonics, self.weight, self.paths, channels_last=True)
