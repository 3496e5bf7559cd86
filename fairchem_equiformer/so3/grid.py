"""Grids on the sphere: matrices between harmonic coefficients and point samples.

Points and normalisation are those of e3nn's ``ToS2Grid`` and ``FromS2Grid`` ("component"), whose
quadrature weights are good to float32 only and whose tables take seconds to make.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.so3 import harmonics as spherical
from fairchem_equiformer.so3.layout import Layout, layout


class LatitudeFactor(NamedTuple):
    """The part of R coefficients that depends on the latitude, as functions of it.

    Those of even l + m are the same north and south of the equator, those of odd l + m opposite.
    """

    values: Tensor  # [B / 2, R] in the north, sorted by order, and in it even l + m first
    row: Tensor  # [R] int64, of these coefficients among those of the grid
    starts: Tensor  # [2 M + 1] int64, where each order begins, and in it its odd l + m


class GridFactors(NamedTuple):
    """A harmonic on the grid is a function of the latitude times one of the longitude.

    With B latitudes, M orders m, R coefficients, S of them wanted back. Longitudes are paired so
    that the functions of the first orders are the same at both of a pair, the others opposite.
    """

    latitude_in: LatitudeFactor
    latitude_out: LatitudeFactor
    longitude: Tensor  # [pairs + unpaired, M] at the first of each pair: cos(m a) or sin(|m| a)
    num_pairs: int
    num_same: int  # orders whose function is the same at both of a pair


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


class _Harmonics(NamedTuple):
    """The factors at all latitudes and longitudes, and the coefficients that they belong to."""

    rows: tuple[tuple[int, int], ...]  # (l, m) of each
    orders: tuple[int, ...]
    latitude_in: Tensor  # [B, R]
    latitude_out: Tensor  # [B, R]
    longitude: Tensor  # [A, M]: cos(m a) for m >= 0, sin(|m| a) for m < 0


@cache
def _harmonics(layout: Layout, resolution: int | None, l_major: bool) -> _Harmonics:
    double = torch.float64
    latitudes, longitudes = _resolution(layout, resolution)
    polar = (torch.arange(latitudes, dtype=double) + 0.5) * math.pi / latitudes
    azimuth = torch.arange(longitudes, dtype=double) * 2 * math.pi / longitudes
    weights = _latitude_weights(polar) / longitudes  # [B]

    orders = tuple(range(-layout.mmax, layout.mmax + 1))
    rows = layout.l_major if l_major else layout.m_major
    longitude = [(m * azimuth).cos() if m >= 0 else (-m * azimuth).sin() for m in orders]
    latitude = torch.empty(latitudes, len(rows), dtype=double)
    for m in orders:
        # where the function of the longitude is 1
        meridian = 0.0 if m >= 0 else math.pi / (-2 * m)
        ring = polar.sin()
        points = [ring * math.sin(meridian), polar.cos(), ring * math.cos(meridian)]
        values = spherical.harmonics(torch.stack(points, dim=1), layout.lmax)
        for row in [row for row, (_, order) in enumerate(rows) if order == m]:
            degree = rows[row][0]
            latitude[:, row] = values[:, degree**2 + degree + m]

    size = torch.tensor([2 * degree + 1 for degree, _ in rows], dtype=double)
    rescale = torch.tensor(layout.truncation_rescale, dtype=double)
    rescale = rescale[[degree**2 + degree + m for degree, m in rows]]
    norm = math.sqrt(layout.lmax + 1)
    latitude /= size.sqrt()
    return _Harmonics(
        rows,
        orders,
        latitude * rescale / norm,
        latitude * weights[:, None] * size * rescale * norm,
        torch.stack(longitude, dim=1),
    )


def _factors(harmonics: _Harmonics, part: slice) -> GridFactors:
    """Of each pair of longitudes, and of the northern latitudes, one.

    Half a turn apart, functions of even orders are equal and others opposite. An odd number of
    longitudes has no such pairs: there a and -a are one, and a = 0 remains.
    """
    longitudes = len(harmonics.longitude)
    half = longitudes // 2
    if longitudes % 2:
        same, first = [m >= 0 for m in harmonics.orders], [*range(1, half + 1), 0]
    else:
        same, first = [m % 2 == 0 for m in harmonics.orders], list(range(half))
    columns = sorted(range(len(same)), key=lambda i: (not same[i], abs(harmonics.orders[i])))
    orders = [harmonics.orders[column] for column in columns]

    def latitude_factor(values: Tensor, rows: tuple[tuple[int, int], ...]) -> LatitudeFactor:
        place = [2 * orders.index(m) + (degree + m) % 2 for degree, m in rows]
        row = sorted(range(len(rows)), key=place.__getitem__)
        starts = [sum(p < start for p in place) for start in range(2 * len(orders) + 1)]
        north = values[: len(values) // 2, row]
        return LatitudeFactor(north, torch.tensor(row), torch.tensor(starts))

    return GridFactors(
        latitude_factor(harmonics.latitude_in, harmonics.rows),
        latitude_factor(harmonics.latitude_out[:, part], harmonics.rows[part]),
        harmonics.longitude[first][:, columns],
        half,
        sum(same),
    )


def _points(harmonics: _Harmonics, latitude: Tensor) -> Tensor:
    """Product of the factors at every point: [P, R]."""
    columns = [harmonics.orders.index(m) for _, m in harmonics.rows]
    return (latitude[:, None] * harmonics.longitude[:, columns]).flatten(0, 1)


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
    harmonics = _harmonics(layout, resolution, l_major)
    part = _PARTS[wanted]

    def cast(matrix: Tensor) -> Tensor:
        return matrix.to(device=device, dtype=dtype).contiguous()

    def cast_latitudes(factor: LatitudeFactor) -> LatitudeFactor:
        return LatitudeFactor(cast(factor.values), factor.row.to(device), factor.starts.to(device))

    latitude_in, latitude_out, longitude, *counts = _factors(harmonics, part)
    return Grid(
        cast(_points(harmonics, harmonics.latitude_in)),
        cast(_points(harmonics, harmonics.latitude_out)[:, part]),
        GridFactors(
            cast_latitudes(latitude_in), cast_latitudes(latitude_out), cast(longitude), *counts
        ),
    )
