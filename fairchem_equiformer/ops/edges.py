"""What all layers share of the edges in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.edge_graph import EdgeGraph
from fairchem_equiformer.ops.radial import EdgeScalars
from fairchem_equiformer.ops.segments import Chunk, target_chunks
from fairchem_equiformer.so3.layout import Layout
from fairchem_equiformer.so3.wigner import edge_rotations

# Bytes of the rotated message input of one chunk, the largest of its intermediates.
_CPU_CHUNK_BYTES = 6 * 2**20
_CUDA_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Edges:
    """Edges of a batch, their rotations, and the chunks they are worked through in.

    In graph-parallel training a process computes the features of some of the atoms only, the
    targets of its edges; ``gather`` then brings the features of all atoms together.
    """

    scalars: EdgeScalars
    source: Tensor  # [E], atom in the batch
    target: Tensor  # [E], atom in the batch, ascending
    target_ptr: Tensor  # [rows + 1], edges of the i-th of them
    layout: Layout  # degrees and orders kept in the edge frame
    rotations: Tensor  # [E, n], compact; see so3/wigner.py
    chunks: tuple[Chunk, ...]
    rows: slice  # atoms whose features are computed here
    batch: Tensor  # [rows], structure of each of them
    num_graphs: int
    gather: Callable[[Tensor], Tensor] | None = None  # [rows, ...] to [N, ...]

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


def prepare_edges(
    graph: EdgeGraph,
    layout: Layout,
    channels: int,
    dtype: torch.dtype,
    *,
    max_edges: int | None = None,
    rows: slice | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Edges:
    """Compute what depends on the graph alone, once for all layers.

    Args:
        graph: sorted by target.
        layout: of the edge frame.
        channels: of the node features, C.
        dtype: of the features.
        max_edges: edges per chunk; by default as many as fit the device's budget.
        rows: atoms whose features are computed here, by default all.
        gather: brings the features of all processes' rows together.
    """
    if max_edges is None:
        max_edges = edges_per_chunk(layout, channels, dtype, graph.vector.device)
    rows = rows or slice(0, graph.num_nodes)
    pointers = graph.target_ptr[rows.start : rows.stop + 1]
    kept = slice(int(pointers[0]), int(pointers[-1]))
    pointers = pointers - pointers[0]
    source, target = graph.source[kept], graph.target[kept]
    scalars = EdgeScalars(
        graph.distance[kept].to(dtype), graph.atomic_numbers[source], graph.atomic_numbers[target]
    )
    return Edges(
        scalars,
        source,
        target,
        pointers,
        layout,
        edge_rotations(graph.vector[kept], layout, dtype),
        target_chunks(pointers, max_edges, rows.start),
        rows,
        graph.batch[rows],
        graph.num_graphs,
        gather,
    )
