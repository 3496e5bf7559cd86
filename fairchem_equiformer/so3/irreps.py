"""Features of e3nn's irreps: "256x0e+128x1e" is 256 scalars, then 128 vectors of even parity.

A row holds one irrep after the other. Within an irrep components come first, [2l + 1, channels],
unlike in e3nn, where those of a channel are side by side: so a linear layer over channels is one
matrix product on the rows, without a transposition. Components are ordered as e3nn's.

Modules are made of e3nn's irreps and run on :func:`places`: names and numbers, which
``torch.compile`` can follow where it cannot follow the classes of e3nn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor

SCALAR = o3.Irrep(0, 1)
"""What rotations and the inversion leave alone."""


class Place(NamedTuple):
    """Where an irrep stands in a row."""

    irrep: str  # as "1e"
    dim: int  # components, 2l + 1
    channels: int
    columns: slice


def places(irreps: o3.Irreps) -> tuple[Place, ...]:
    """Of each irrep of a row."""
    found = zip(irreps, irreps.slices(), strict=True)
    return tuple(Place(str(ir), ir.dim, mul, columns) for (mul, ir), columns in found)


def width(places: Sequence[Place]) -> int:
    """Numbers of a row."""
    return places[-1].columns.stop if places else 0


def blocks(x: Tensor, places: Sequence[Place]) -> list[Tensor]:
    """Each irrep of features [n, irreps.dim]: views [n, 2l + 1, channels].

    Taken in one operation, whose gradient is written once; that of each slice has the size of all.
    """
    parts = x.split([place.dim * place.channels for place in places], dim=1)
    return [
        part.unflatten(1, (place.dim, place.channels))
        for part, place in zip(parts, places, strict=True)
    ]


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Inverse of :func:`blocks`."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def channels_of(irreps: o3.Irreps, irrep: o3.Irrep) -> int:
    """Number of channels of one irrep, over all the places where it stands."""
    return sum(mul for mul, ir in irreps if ir == irrep)


def copies(number: int, irreps: o3.Irreps) -> o3.Irreps:
    """Irreps with ``number`` times the channels."""
    return o3.Irreps([(number * mul, ir) for mul, ir in irreps])
