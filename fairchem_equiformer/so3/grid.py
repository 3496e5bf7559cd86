"""Grids on the sphere: matrices between harmonic coefficients and point samples."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from e3nn.o3 import FromS2Grid, ToS2Grid
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


@cache
def _grid(layout: Layout, resolution: int | None, l_major: bool) -> Grid:
    points = _resolution(layout, resolution)
    double = torch.float64
    to = ToS2Grid(layout.lmax, points, normalization="component", dtype=double)
    back = FromS2Grid(points, layout.lmax, normalization="component", dtype=double)
    index = range(layout.num_coefficients) if l_major else layout.rows_in_l_major
    rescale = torch.tensor(layout.truncation_rescale, dtype=double)
    to_grid = torch.einsum("mbi,am->bai", to.shb, to.sha).flatten(0, 1) * rescale
    from_grid = torch.einsum("am,mbi->bai", back.sha, back.shb).flatten(0, 1) * rescale
    return Grid(to_grid[:, list(index)].contiguous(), from_grid[:, list(index)].contiguous())


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
        ValueError: for an l-major grid of a truncated layout.
    """
    if l_major and layout.mmax != layout.lmax:
        msg = f"an l-major grid holds all orders, got mmax {layout.mmax} < lmax {layout.lmax}"
        raise ValueError(msg)
    matrices = _grid(layout, resolution, l_major)
    return Grid(*(matrix.to(device=device, dtype=dtype) for matrix in matrices))
