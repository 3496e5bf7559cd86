"""What all layers share of the edges in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from fairchem_equiformer.ops.radial import EdgeScalars
from fairchem_equiformer.ops.segments import Chunk
from fairchem_equiformer.so3.layout import Layout
from fairchem_equiformer.so3.wigner import expand_rotations

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
    # Edges of a chunk sorted by source, made when first asked for.
    sorted_by_source: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

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


@dataclass(frozen=True)
class ChunkFrames:
    """Rotations and indices of one chunk: e edges, n target atoms."""

    compact: Tensor  # [e, entries] rotations without their zeros (so3/wigner.py)
    layout: Layout  # of the edge frame
    source: Tensor  # [e], atom in the batch
    target: Tensor  # [e], atom in the chunk
    target_ptr: Tensor  # [n + 1], edges of the i-th target are target_ptr[i]:target_ptr[i + 1]
    nodes: slice  # target atoms in the batch
    sorted_by_source: tuple[int, dict[int, tuple[Tensor, Tensor]]]  # where by_source() is kept

    @property
    def num_nodes(self) -> int:
        """Number of target atoms."""
        return int(self.nodes.stop - self.nodes.start)

    def by_source(self, num_atoms: int) -> tuple[Tensor, Tensor]:
        """The edges sorted by source, made once for all layers.

        Returns:
            order: [e], edges of the first atom, of the second, ...
            pointers: [num_atoms + 1], where in that order the edges of each atom begin.
        """
        first_edge, known = self.sorted_by_source
        if first_edge not in known:
            source, order = torch.sort(self.source, stable=True)
            atoms = torch.arange(num_atoms + 1, device=source.device)
            known[first_edge] = order, torch.searchsorted(source, atoms)
        return known[first_edge]

    @cached_property
    def rotation(self) -> Tensor:
        """[e, R, K], m-major rows by l-major columns."""
        return expand_rotations(self.compact, self.layout)

    def rotation_of(self, wanted: Layout) -> Tensor:
        """The rows and columns of fewer degrees and orders."""
        if wanted == self.layout:
            return self.rotation
        rows = _rows_of(self.layout, wanted, self.rotation.device)
        columns = slice(wanted.lmin**2, (wanted.lmax + 1) ** 2)
        return self.rotation.index_select(1, rows)[:, :, columns]


@cache
def _rows_of(layout: Layout, wanted: Layout, device: torch.device) -> Tensor:
    """Where the rows of one layout stand among those of another."""
    with torch.inference_mode(mode=False):  # it outlives the mode that it is made in
        return torch.tensor([layout.m_major.index(row) for row in wanted.m_major], device=device)


@cache
def truncation_rescale(layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The layout's factors [K] for the orders left out, made once for each device."""
    with torch.inference_mode(mode=False):
        return torch.tensor(layout.truncation_rescale, dtype=dtype, device=device)


def chunk_frames(edges: Edges, chunk: Chunk) -> ChunkFrames:
    """Rotations and indices of one chunk."""
    return ChunkFrames(
        compact=edges.rotations[chunk.edges],
        layout=edges.layout,
        source=edges.source[chunk.edges],
        target=edges.target[chunk.edges] - chunk.nodes.start,
        target_ptr=edges.target_ptr[chunk.rows.start : chunk.rows.stop + 1] - chunk.edges.start,
        nodes=chunk.nodes,
        sorted_by_source=(chunk.edges.start, edges.sorted_by_source),
    )


def edges_per_chunk(layout: Layout, channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Edges whose rotated inputs, 2 C channels by the layout's rows, fit the device's budget."""
    return fitting_edges(layout.num_rows * 2 * channels, dtype, device)


def fitting_edges(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Edges of which ``width`` numbers each fit the device's budget."""
    budget = _CPU_CHUNK_BYTES if device.type == "cpu" else _CUDA_CHUNK_BYTES
    return max(1, budget // (width * dtype.itemsize))
