"""Structures as tensors, for callers that have no framework to batch them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The fields that :func:`~fairchem_equiformer.graph.build.build_graph` reads."""

    pos: Tensor  # [N, 3] Angstrom, atoms of a structure contiguous
    cell: Tensor  # [B, 3, 3] Angstrom, lattice vectors as rows
    pbc: Tensor  # [B, 3] bool
    natoms: Tensor  # [B] int64
    atomic_numbers: Tensor  # [N] int64
    tags: Tensor | None = None  # [N] int64, where the model reads them
