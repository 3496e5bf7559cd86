"""Spherical harmonics of e3nn, as a compiler sees them: one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from e3nn import o3
from torch import Tensor

from fairchem_equiformer.ops import library


def _spherical_harmonics(
    vector: Tensor, degrees: list[int], normalize: bool, normalization: str
) -> Tensor:
    found: Tensor = o3.spherical_harmonics(
        list(degrees), vector, normalize=normalize, normalization=normalization
    )
    return found


_operation = library.register(
    "spherical_harmonics",
    "Tensor vector, int[] degrees, bool normalize, str normalization",
    _spherical_harmonics,
    lambda vector, degrees, *_: vector.new_empty(
        vector.shape[0], sum(2 * degree + 1 for degree in degrees)
    ),
)


def spherical_harmonics(
    degrees: Sequence[int], vector: Tensor, *, normalize: bool, normalization: str = "integral"
) -> Tensor:
    """As e3nn's function of this name; in a compiled graph not differentiable.

    Args:
        degrees: of the harmonics.
        vector: [E, 3].
        normalize: of unit vectors, else solid harmonics.
        normalization: see e3nn.

    Returns:
        [E, number of harmonics].
    """
    compiling = torch.compiler.is_compiling()
    function = _operation if compiling else _spherical_harmonics
    out: Tensor = function(vector, list(degrees), normalize, normalization)
    return out
