"""Equivariant layer norm of Equiformer."""

from __future__ import annotations

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.so3.irreps import SCALAR, blocks, channels_of, joined, places

_EPSILON = 1e-5
_SCALAR = str(SCALAR)


class IrrepsLayerNorm(nn.Module):
    """Each irrep is divided by its RMS over channels and components; invariants are centred first.

    One weight for each channel, and a bias on the invariants (0e). Runs in float32 at least, also
    under autocast.

    Args:
        irreps: of the features.
    """

    def __init__(self, irreps: o3.Irreps) -> None:
        super().__init__()
        self.irreps = irreps
        self._places = places(irreps)
        self.weight = nn.Parameter(torch.ones(irreps.num_irreps))
        self.bias = nn.Parameter(torch.zeros(channels_of(irreps, SCALAR)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n, irreps.dim]."""
        parts = []
        weights = self.weight.split([place.channels for place in self._places])
        for part, place, weight in zip(
            blocks(x.to(self.weight.dtype), self._places), self._places, weights, strict=True
        ):
            if place.irrep == _SCALAR:
                width = (len(weight),)
                parts.append(nn.functional.layer_norm(part, width, weight, self.bias, _EPSILON))
            else:
                mean_square = part.square().mean(dim=(1, 2), keepdim=True)
                parts.append(part * (mean_square + _EPSILON).rsqrt() * weight)
        return joined(parts)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return str(self.irreps)
