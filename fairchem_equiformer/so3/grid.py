"""Grids on the sphere: matrices between harmonic coefficients and point samples.

Points and normalisation are those of e3nn's ``ToS2Grid`` and ``FromS2Grid`` ("component"), whose
quadrature weights are good to float32 only and whose tables take seconds to make.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from fairchem_equiformer.so3.layout import Layout


class Grid(NamedTuple):
    """Matrices of one grid with P points and R coefficients (paper, section A.4)."""

    to_grid: Tensor  # [P, R]
    from_grid: Tensor  # [P, R]


def _resolution(layout: Layout, resolution: int | None) -> tuple[int, int]:
    """Number of latitudes and longitudes; by default the fewest that resolve the layout."""
    if resolution is not None:
        return resolution, resolution
    longitudes = 2 * layout.mmax + (3 if layout.mmax == layout.lmax else 1)
    return 2 * (layout.lmax + 1), longitudes


def _latitude_weights(polar: Tensor) -> Tensor:
    """Weights, of sum 1, that integrate over the sphere from equally spaced polar angles.

    Exact for as many degrees as there are angles, an even number (Driscoll & Healy 1994).
    """
    odd = torch.arange(1, len(polar), 2, dtype=polar.dtype)
    return 2 / len(polar) * polar.sin() * ((polar[:, None] * odd).sin() / odd).sum(dim=1)


@cache
def _grid(layout: Layout, resolution: int | None, l_major: bool) -> Grid:
    double = torch.float64
    latitudes, longitudes = _resolution(layout, resolution)
    polar = (torch.arange(latitudes, dtype=double) + 0.5) * math.pi / latitudes
    azimuth = torch.arange(longitudes, dtype=double) * 2 * math.pi / longitudes
    weights = _latitude_weights(polar).repeat_interleave(longitudes) / longitudes  # [P]
    polar, azimuth = (angle.flatten() for angle in torch.meshgrid(polar, azimuth, indexing="ij"))
    degrees = list(range(layout.lmax + 1))
    harmonics = o3.spherical_harmonics(
        degrees, o3.angles_to_xyz(azimuth, polar), normalize=True, normalization="norm"
    )  # [P, K]
    size = torch.tensor([2 * degree + 1 for degree, _ in layout.l_major], dtype=double)
    rescale = torch.tensor(layout.truncation_rescale, dtype=double)
    norm = math.sqrt(layout.lmax + 1)
    to_grid = harmonics * rescale / norm
    from_grid = harmonics * weights[:, None] * size * rescale * norm
    index = list(range(layout.num_coefficients) if l_major else layout.rows_in_l_major)
    return Grid(to_grid[:, index].contiguous(), from_grid[:, index].contiguous())


@cache
def grid(
    layout: Layout,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    l_major: bool = False,
) -> Grid:
    """Grid matrices for coefficients in m-major order, or in l-major order.

    Args:
        layout: degrees and orders; orders left out are made up for by the truncation rescale.
        resolution: latitudes and longitudes, or None for 2 (lmax + 1) by 2 mmax + 1 (+ 2 where
            mmax = lmax).
        l_major: coefficients in l-major order, which needs mmax = lmax.

    Raises:
        ValueError: for an l-major grid of a truncated layout; for a resolution that is odd or does
            not resolve lmax.
    """
    if l_major and layout.mmax != layout.lmax:
        msg = f"an l-major grid holds all orders, got mmax {layout.mmax} < lmax {layout.lmax}"
        raise ValueError(msg)
    if resolution is not None and (resolution % 2 or resolution < 2 * (layout.lmax + 1)):
        msg = (
            f"a grid for lmax {layout.lmax} needs an even resolution of at least "
            f"{2 * (layout.lmax + 1)}, got {resolution}"
        )
        raise ValueError(msg)
    matrices = _grid(layout, resolution, l_major)
    return Grid(*(matrix.to(device=device, dtype=dtype) for matrix in matrices))
