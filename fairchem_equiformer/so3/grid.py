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

from fairchem_equiformer.so3.layout import Layout, layout


class GridFactors(NamedTuple):
    """A harmonic on the grid is a function of the latitude times one of the longitude.

    With B latitudes, A longitudes, M orders, R coefficients, S of them wanted back.
    """

    latitude_in: Tensor  # [B, R]
    latitude_out: Tensor  # [B, S]
    longitude: Tensor  # [A, M]: cos(m a) for m >= 0, sin(|m| a) for m < 0
    order_in: Tensor  # [R] int64, column of `longitude`
    order_out: Tensor  # [S]


class Grid(NamedTuple):
    """Matrices of one grid with P = B A points (paper, section A.4), whole and as factors."""

    to_grid: Tensor  # [P, R]
    from_grid: Tensor  # [P, S]
    factors: GridFactors


class GridSpec(NamedTuple):
    """Which grid: the arguments of :func:`grid` but dtype and device."""

    layout: Layout
    resolution: int | None = None
    l_major: bool = False
    wanted: str = "all"

    def matrices(self, dtype: torch.dtype, device: torch.device) -> Grid:
        """The grid, made once."""
        return grid(
            self.layout, self.resolution, dtype, device, l_major=self.l_major, wanted=self.wanted
        )

    def constants(self) -> tuple[int, int, int | None, bool, str]:
        """Itself in types that an operation of PyTorch takes, ``GRID_SCHEMA``."""
        return self.layout.lmax, self.layout.mmax, *self[1:]

    @property
    def num_wanted(self) -> int:
        """Coefficients that it gives back, S."""
        return len(range(self.layout.num_rows)[_PARTS[self.wanted]])

    @classmethod
    def of(
        cls, lmax: int, mmax: int, resolution: int | None, l_major: bool, wanted: str
    ) -> GridSpec:
        """Inverse of :meth:`constants`."""
        return cls(layout(lmax, mmax), resolution, l_major, wanted)


GRID_SCHEMA = "int lmax, int mmax, int? resolution, bool l_major, str wanted"


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
def _factors(layout: Layout, resolution: int | None, l_major: bool) -> GridFactors:
    double = torch.float64
    latitudes, longitudes = _resolution(layout, resolution)
    polar = (torch.arange(latitudes, dtype=double) + 0.5) * math.pi / latitudes
    azimuth = torch.arange(longitudes, dtype=double) * 2 * math.pi / longitudes
    weights = _latitude_weights(polar) / longitudes  # [B]

    orders = list(range(-layout.mmax, layout.mmax + 1))
    rows = layout.l_major if l_major else layout.m_major
    columns = torch.tensor([orders.index(m) for _, m in rows])
    longitude = [(m * azimuth).cos() if m >= 0 else (-m * azimuth).sin() for m in orders]
    degrees = list(range(layout.lmax + 1))
    latitude = torch.empty(latitudes, len(rows), dtype=double)
    for m in orders:
        # where the function of the longitude is 1
        meridian = torch.full_like(polar, 0.0 if m >= 0 else math.pi / (-2 * m))
        harmonics = o3.spherical_harmonics(
            degrees, o3.angles_to_xyz(meridian, polar), normalize=True, normalization="norm"
        )
        for row in [row for row, (_, order) in enumerate(rows) if order == m]:
            degree = rows[row][0]
            latitude[:, row] = harmonics[:, degree**2 + degree + m]

    size = torch.tensor([2 * degree + 1 for degree, _ in rows], dtype=double)
    rescale = torch.tensor(layout.truncation_rescale, dtype=double)
    rescale = rescale[[degree**2 + degree + m for degree, m in rows]]
    norm = math.sqrt(layout.lmax + 1)
    return GridFactors(
        latitude * rescale / norm,
        latitude * weights[:, None] * size * rescale * norm,
        torch.stack(longitude, dim=1),
        columns,
        columns,
    )


def _points(latitude: Tensor, longitude: Tensor, order: Tensor) -> Tensor:
    """Product of the factors at every point: [P, R]."""
    return (latitude[:, None] * longitude[:, order]).flatten(0, 1)


# Rows of the result that are wanted, in either order.
_PARTS = {"all": slice(None), "scalars": slice(0, 1), "others": slice(1, None)}


@cache
def grid(
    layout: Layout,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    l_major: bool = False,
    wanted: str = "all",
) -> Grid:
    """Grid matrices for coefficients in m-major order, or in l-major order.

    Args:
        layout: degrees and orders; orders left out are made up for by the truncation rescale.
        resolution: latitudes and longitudes, or None for 2 (lmax + 1) by 2 mmax + 1 (+ 2 where
            mmax = lmax).
        l_major: coefficients in l-major order, which needs mmax = lmax.
        wanted: coefficients of the result: "all", "scalars" (l = 0) or "others" (l > 0).

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
    factors = _factors(layout, resolution, l_major)
    part = _PARTS[wanted]
    latitude_in, latitude_out, longitude, order_in, order_out = factors
    latitude_out, order_out = latitude_out[:, part].contiguous(), order_out[part].contiguous()

    def cast(matrix: Tensor) -> Tensor:
        return matrix.to(device=device, dtype=dtype)

    return Grid(
        cast(_points(latitude_in, longitude, order_in)),
        cast(_points(latitude_out, longitude, order_out)),
        GridFactors(
            cast(latitude_in),
            cast(latitude_out),
            cast(longitude),
            order_in.to(device),
            order_out.to(device),
        ),
    )
