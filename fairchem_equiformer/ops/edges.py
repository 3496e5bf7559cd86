"""What all layers share of the edges in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.radial import EdgeScalars
from fairchem_equiformer.ops.segments import Chunk
from fairchem_equiformer.so3.layout import Layout

# Bytes of the rotated message input of one chunk, the largest of its intermediates.
_CPU_CHUNK_BYTES = 6 * 2**20
_CUDA_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class NodeShare:
    """The atoms whose features one process of several computes, and the way to those of all."""

    rows: slice
    # [rows, ...] to [N, ...]. Each process reads the features in edges of its own, so the backward
    # pass adds up their gradients ...
    gather: Callable[[Tensor], Tensor]
    # ... and of results, each process computes the whole loss.
    gather_outputs: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edges:
    """Edges of a batch, their rotations, and the chunks they are worked through in.

    A process that has a share of the atoms (graph-parallel training) has the edges to these.
    """

    scalars: EdgeScalars
    source: Tensor  # [E], atom in the batch
    target: Tensor  # [E], atom in the batch, ascending
    target_ptr: Tensor  # [rows + 1], edges of the i-th of them
    layout: Layout  # degrees and orders kept in the edge frame
    rotations: Tensor  # [E, n], compact; see so3/wigner.py
    vector: Tensor  # [E, 3] Angstrom, from target to source
    chunks: tuple[Chunk, ...]
    rows: slice  # atoms whose features are computed here
    batch: Tensor  # [rows], structure of each of them
    num_graphs: int
    share: NodeShare | None = None  # None where all atoms are computed here

    @property
    def num_edges(self) -> int:
        """Number of edges, E."""
        return len(self.source)

    @property
    def num_rows(self) -> int:
        """Number of atoms whose features are computed here."""
        return len(self.batch)

    def rows_of(self, per_atom: Tensor) -> Tensor:
        """Entries of a tensor [N, ...] for the atoms computed here."""
        return per_atom[self.rows]


def edges_per_chunk(layout: Layout, channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Edges whose rotated inputs, 2 C channels by the layout's rows, fit the device's budget."""
    budget = _CPU_CHUNK_BYTES if device.type == "cpu" else _CUDA_CHUNK_BYTES
    return max(1, budget // (layout.num_rows * 2 * channels * dtype.itemsize))
