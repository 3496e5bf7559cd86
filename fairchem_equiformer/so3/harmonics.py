"""Real spherical harmonics of directions, in e3nn's order and component normalisation."""

from __future__ import annotations

from functools import cache

import torch
from e3nn import o3
from torch import Tensor


def harmonics(vector: Tensor, lmax: int) -> Tensor:
    """Harmonics of degrees 0 to lmax; those of one degree have a sum of squares of 2l + 1.

    Each degree is the coupling of the one before with degree 1, which plain products can be
    differentiated through as often as one likes.

    Args:
        vector: [E, 3], none of them zero.
        lmax: highest degree.

    Returns:
        [E, (lmax + 1)^2].
    """
    unit = vector / vector.norm(dim=1, keepdim=True)
    degree = unit.new_ones(len(unit), 1)
    found = [degree]
    for higher in range(1, lmax + 1):
        pairs = (degree[:, :, None] * unit[:, None]).flatten(1)
        degree = pairs @ _coupling(higher, vector.dtype, vector.device)
        found.append(degree)
    return torch.cat(found, dim=1)


@cache
def _coupling(degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """From products of degree - 1 and unit vectors to harmonics of a degree: [., 2 degree + 1]."""
    with torch.inference_mode(mode=False):  # it outlives the mode that it is made in
        table = o3.wigner_3j(degree - 1, 1, degree, dtype=torch.float64)
        # Along y, e3nn's pole, all harmonics are zero but that of order 0.
        at_pole = float(table[degree - 1, 1, degree]) * max(2 * degree - 1, 1) ** 0.5
        table = table * ((2 * degree + 1) ** 0.5 / at_pole)
        coupling: Tensor = table.flatten(0, 1).to(dtype=dtype, device=device)
    return coupling
