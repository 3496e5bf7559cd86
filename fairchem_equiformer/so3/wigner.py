"""Wigner-D matrices of edge frames, compact: block-diagonal in l, only rows |m| <= mmax.

With e3nn's real harmonics D(a, b, c) = Z(a) J Z(b) J Z(c), where Z(angle) turns about the y axis
and J swaps x and y up to sign. The frame without roll is Rx(-beta) Ry(-alpha), so that

    D = d(beta) Z(-alpha),    d(beta) = J Z(-beta) J.

Every entry of d(beta) is a sum of cos(f beta) and sin(f beta), f = 0..l, with constant
coefficients: one matrix product makes the rows of all edges. Z(-alpha) then mixes m with -m.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.so3.frames import edge_angles
from fairchem_equiformer.so3.harmonics import harmonics
from fairchem_equiformer.so3.layout import Layout


def swap_matrix(degree: int) -> Tensor:
    """J of one degree: how the harmonics change under (x, y, z) -> (-y, -x, z).

    Solved from the harmonics themselves at more points than unknowns, exact to about 1e-14.

    Returns:
        [2l + 1, 2l + 1] float64, symmetric and its own inverse.
    """
    generator = torch.Generator().manual_seed(degree)
    points = torch.randn(8 * degree + 8, 3, generator=generator, dtype=torch.float64)
    swapped = torch.stack([-points[:, 1], -points[:, 0], points[:, 2]], dim=-1)
    before, after = (harmonics(xyz, degree)[:, degree**2 :] for xyz in (points, swapped))
    # The map is improper, so that a field of parity (-1)^l picks up the sign of the determinant.
    matrix: Tensor = torch.linalg.lstsq(before, after).solution.T
    return matrix


class _Tables(NamedTuple):
    """Constants of one layout; n counts the stored entries of an edge's block-diagonal matrix."""

    fourier: Tensor  # [2 lmax + 1, n] float64, d(beta) from cos(0..lmax beta), sin(1..lmax beta)
    order: Tensor  # [n] column order -m that Z(-alpha) multiplies with
    mirror: Tensor  # [n] entry in the same row whose column has order -m
    dense_index: Tensor  # [n] position in the dense [num_rows, num_coefficients] matrix


def _beta_harmonics(degree: int, lmax: int) -> Tensor:
    """Fourier coefficients of d(beta): [2 lmax + 1, 2l + 1, 2l + 1] float64."""
    swap = swap_matrix(degree)
    size = 2 * degree + 1
    coefficients = torch.zeros(2 * lmax + 1, size, size, dtype=torch.float64)
    for column in range(size):
        frequency = degree - column  # Z has cos at (column, column), sin at (column, mirrored)
        sign = 1.0 if frequency > 0 else -1.0
        outer_cos = swap[:, column, None] * swap[None, column, :]
        outer_sin = swap[:, column, None] * swap[None, size - 1 - column, :]
        coefficients[abs(frequency)] += outer_cos
        if frequency:
            coefficients[lmax + abs(frequency)] -= sign * outer_sin  # Z is taken at -beta
    return coefficients


# Edges at a time, about 10 kB each: what a processor's cache holds, or enough to fill a GPU.
_CPU_PIECE, _CUDA_PIECE = 4096, 32768


@cache
def _tables(layout: Layout, device: torch.device) -> _Tables:
    fourier: list[Tensor] = []
    orders: list[int] = []
    mirrors: list[int] = []
    dense: list[int] = []
    blocks = {
        degree: _beta_harmonics(degree, layout.lmax)
        for degree in range(layout.lmin, layout.lmax + 1)
    }
    start = 0
    for row, (degree, m) in enumerate(layout.m_major):
        size = 2 * degree + 1
        fourier.append(blocks[degree][:, degree + m, :])
        orders += range(-degree, degree + 1)
        mirrors += range(start + size - 1, start - 1, -1)
        first = row * layout.num_coefficients + degree**2 - layout.lmin**2
        dense += range(first, first + size)
        start += size
    return _Tables(
        torch.cat(fourier, dim=1).to(device),
        torch.tensor(orders, device=device),
        torch.tensor(mirrors, device=device),
        torch.tensor(dense, device=device),
    )


def num_entries(layout: Layout) -> int:
    """Numbers stored for each edge, n."""
    return sum(2 * degree + 1 for degree, _ in layout.m_major)


def edge_rotations(vector: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Wigner matrices of the edges' frames, stored without their zeros.

    Computed in float64 whatever the dtype, in pieces that bound the memory.

    Args:
        vector: [E, 3].
        layout: degrees and orders kept.
        dtype: of the result.

    Returns:
        [E, n], n = sum over l of min(2l + 1, 2 mmax + 1) (2l + 1); :func:`expand_rotations` makes
        matrices of them.
    """
    tables = _tables(layout, vector.device)
    frequencies = torch.arange(layout.lmax + 1, dtype=torch.float64, device=vector.device)
    compact = vector.new_empty(len(vector), len(tables.order), dtype=dtype)
    piece = _CPU_PIECE if vector.device.type == "cpu" else _CUDA_PIECE
    for start in range(0, len(vector), piece):
        alpha, beta = edge_angles(vector[start : start + piece])
        multiples = beta[:, None] * frequencies
        features = torch.cat([multiples.cos(), multiples[:, 1:].sin()], dim=1)
        beta_part = features @ tables.fourier  # [e, n]
        angles = alpha[:, None] * torch.arange(
            -layout.lmax, layout.lmax + 1, dtype=torch.float64, device=vector.device
        )
        column = tables.order + layout.lmax
        turned = beta_part * angles.cos()[:, column]
        turned -= beta_part[:, tables.mirror] * angles.sin()[:, column]
        compact[start : start + piece] = turned
    return compact


def expand_rotations(compact: Tensor, layout: Layout) -> Tensor:
    """Dense rotation matrices.

    Args:
        compact: [E, n] from :func:`edge_rotations`.

    Returns:
        [E, num_rows, num_coefficients]: m-major rows of the edge frame by l-major columns.
    """
    dense = compact.new_zeros(len(compact), layout.num_rows * layout.num_coefficients)
    dense.index_copy_(1, _tables(layout, compact.device).dense_index, compact)
    return dense.view(-1, layout.num_rows, layout.num_coefficients)
