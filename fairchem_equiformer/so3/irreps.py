"""Features of e3nn's irreps: "256x0e+128x1e" is 256 scalars, then 128 vectors of even parity.

A row holds one irrep after the other. Within an irrep components come first, [2l + 1, channels],
unlike in e3nn, where those of a channel are side by side: so a linear layer over channels is one
matrix product on the rows, without a transposition. Components are ordered as e3nn's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from e3nn import o3
from torch import Tensor

SCALAR = o3.Irrep(0, 1)
"""What rotations and the inversion leave alone."""


def blocks(x: Tensor, irreps: o3.Irreps) -> list[Tensor]:
    """Each irrep of features [n, irreps.dim]: views [n, 2l + 1, channels].

    Taken in one operation, whose gradient is written once; that of each slice has the size of all.
    """
    parts = x.split([mul * ir.dim for mul, ir in irreps], dim=1)
    return [part.unflatten(1, (ir.dim, mul)) for part, (mul, ir) in zip(parts, irreps, strict=True)]


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Inverse of :func:`blocks`."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def channels_of(irreps: o3.Irreps, irrep: o3.Irrep) -> int:
    """Number of channels of one irrep, over all the places where it stands."""
    return sum(mul for mul, ir in irreps if ir == irrep)


def copies(number: int, irreps: o3.Irreps) -> o3.Irreps:
    """Irreps with ``number`` times the channels."""
    return o3.Irreps([(number * mul, ir) for mul, ir in irreps])
