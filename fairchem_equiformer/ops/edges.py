"""What all layers share of the edges in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from fairchem_equiformer.ops.radial import EdgeScalars
from fairchem_equiformer.ops.segments import Chunk, chunks_of
from fairchem_equiformer.so3.layout import Layout, layout
from fairchem_equiformer.so3.wigner import expand_rotations

# Bytes of the rotated message input of one chunk, the largest of its intermediates. A CPU's threads
# share the chunk's edges: each has enough of them to read the weights from far for.
_CPU_CHUNK_BYTES_PER_THREAD = 3 * 2**20
_CPU_THREADS = range(2, 17)  # fewer count as the first, more as the last of them
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
    # The energy's derivative by positions or strains, from what each process found of it. None
    # where the ways above cannot be differentiated twice.
    sum_derivatives: Callable[[Tensor], Tensor] | None = None


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
    chunks: tuple[Chunk, ...]  # empty for a compiler, which reads chunk_table
    first_row: int  # of the atoms whose features are computed here
    batch: Tensor  # [rows], structure of each of them
    num_graphs: int
    share: NodeShare | None = None  # None where all atoms are computed here
    # The chunks as a tensor [chunks, 6] on the host (ops/segments.py); None without a compiler.
    chunk_table: Tensor | None = None
    # Edges of a chunk sorted by source, made when first asked for.
    sorted_by_source: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    @property
    def num_edges(self) -> int:
        """Number of edges, E."""
        return self.source.shape[0]

    @property
    def num_rows(self) -> int:
        """Number of atoms whose features are computed here."""
        return self.batch.shape[0]

    @property
    def rows(self) -> slice:
        """Atoms whose features are computed here."""
        return slice(self.first_row, self.first_row + self.num_rows)

    def rows_of(self, per_atom: Tensor) -> Tensor:
        """Entries of a tensor [N, ...] for the atoms computed here."""
        return per_atom[self.rows]


# The types of what :func:`edge_arguments` gives.
EDGES_SCHEMA = "Tensor[] edges, int[] layout, SymInt first_row, SymInt num_graphs"


def edge_arguments(edges: Edges) -> tuple[list[Tensor], list[int], int, int]:
    """Edges in types that an operation of PyTorch takes.

    Raises:
        ValueError: without a ``chunk_table``.
    """
    if edges.chunk_table is None:
        raise ValueError("a compiler needs the edges' chunks as a tensor: see models/on_graph.py")
    sizes = edges.layout
    tensors = [
        *edges.scalars,
        edges.source,
        edges.target,
        edges.target_ptr,
        edges.rotations,
        edges.vector,
        edges.chunk_table,
        edges.batch,
    ]
    return tensors, [sizes.lmax, sizes.mmax, sizes.lmin], edges.first_row, edges.num_graphs


def edges_of(
    tensors: list[Tensor], sizes: list[int], first_row: int, num_graphs: int, *, fake: bool = False
) -> Edges:
    """Inverse of :func:`edge_arguments`, without the other processes' share.

    Args:
        tensors, sizes, first_row, num_graphs: what it gave.
        fake: the tensors hold no numbers, so that there are no chunks to read.
    """
    *scalars, source, target, target_ptr, rotations, vector, chunk_table, batch = tensors
    return Edges(
        scalars=EdgeScalars(*scalars),
        source=source,
        target=target,
        target_ptr=target_ptr,
        layout=layout(*sizes),
        rotations=rotations,
        vector=vector,
        chunks=() if fake else chunks_of(chunk_table),
        chunk_table=chunk_table,
        first_row=first_row,
        batch=batch,
        num_graphs=num_graphs,
    )


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
    if device.type == "cpu":
        threads = min(max(torch.get_num_threads(), _CPU_THREADS[0]), _CPU_THREADS[-1])
        budget = threads * _CPU_CHUNK_BYTES_PER_THREAD
    else:
        budget = _CUDA_CHUNK_BYTES
    return max(1, budget // (width * dtype.itemsize))
