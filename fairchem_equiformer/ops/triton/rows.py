"""What kernels read of a layout: rows sorted by degree, so that a program works on one degree.

A degree's block of a rotation is stored row by row (so3/wigner.py): 2 l + 1 numbers from the row's
``entry`` on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fairchem_equiformer.so3.layout import Layout


@dataclass(frozen=True)
class Rows:
    """Tables on one device, all int32 but the factors, and the sizes that go with them."""

    row: Tensor  # [R], m-major row
    entry: Tensor  # [R], where its part of the rotation begins
    weight: Tensor  # [R], its radial weight
    fresh: Tensor  # [R], 1 where a radial weight comes for the first time
    of_degree: Tensor  # [degrees + 1], where each degree's rows begin
    rescale: Tensor  # [degrees] float32, for the orders that the edges leave out
    layout: Layout
    num_entries: int
    num_weights: int

    @property
    def num_degrees(self) -> int:
        """Degrees that have rows."""
        return len(self.rescale)


@cache
def rows_of(
    edge_layout: Layout, layout: Layout, device: torch.device, *, by_degree: bool = False
) -> Rows:
    """Tables of a layout whose rotations are stored as another's, which has these rows and more."""
    entries, total = {}, 0
    for degree, m in edge_layout.m_major:
        entries[degree, m] = total
        total += 2 * degree + 1
    pairs = sorted({(abs(m), degree) for degree, m in layout.m_major})
    table = []
    for row, (degree, m) in enumerate(layout.m_major):
        weight = degree - layout.lmin if by_degree else pairs.index((abs(m), degree))
        table.append((degree, weight, row, entries[degree, m]))
    table.sort()
    degrees = [degree for degree, *_ in table]
    weights = [weight for _, weight, *_ in table]
    starts = [degrees.index(degree) for degree in range(layout.lmin, layout.lmax + 1)]
    rescale = dict(zip(edge_layout.l_major, edge_layout.truncation_rescale, strict=True))

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    with torch.inference_mode(mode=False):  # they outlive the mode that they are made in
        return Rows(
            on_device([row for *_, row, _ in table]),
            on_device([entry for *_, entry in table]),
            on_device(weights),
            on_device([weights.index(weight) == i for i, weight in enumerate(weights)]),
            on_device([*starts, len(table)]),
            torch.tensor(
                [rescale[degree, 0] for degree in range(layout.lmin, layout.lmax + 1)],
                device=device,
            ),
            layout,
            total,
            layout.num_degrees(0) if by_degree else len(pairs),
        )
