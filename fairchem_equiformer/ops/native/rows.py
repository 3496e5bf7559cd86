"""Rows of edge frames as the kernels of messages and of their sums read them (rows.h)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import Indices, RowsStruct
from fairchem_equiformer.so3.layout import Layout


@dataclass(frozen=True)
class Rows:
    """Rows of a layout sorted by degree."""

    table: Tensor  # [4, R]: row, degree, first entry of the compact rotation, radial weight
    struct: RowsStruct


@cache
def rows(edge_layout: Layout, layout: Layout, *, by_degree: bool = False) -> Rows:
    """Rows of a layout whose rotations are stored as another's, which has these rows and more."""
    sizes = [2 * degree + 1 for degree, _ in edge_layout.m_major]
    entries = {row: sum(sizes[:i]) for i, row in enumerate(edge_layout.m_major)}
    pairs = sorted({(abs(m), degree) for degree, m in layout.m_major})
    num_weights = layout.num_degrees(0) if by_degree else len(pairs)
    table = []
    for row, (degree, m) in enumerate(layout.m_major):
        weight = degree - layout.lmin if by_degree else pairs.index((abs(m), degree))
        table.append((row, degree, entries[degree, m], weight))
    columns = torch.tensor(sorted(table, key=lambda entry: (entry[1], entry[0]))).t().contiguous()
    counts = (layout.num_rows, layout.num_coefficients, sum(sizes), num_weights, layout.lmin)
    return Rows(columns, RowsStruct(*map(Indices.address, columns), *counts))
