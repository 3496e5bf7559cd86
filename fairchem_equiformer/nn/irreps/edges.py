"""What all layers of Equiformer read of a batch's edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.nn.radial import envelope
from fairchem_equiformer.ops.edges import NodeShare
from fairchem_equiformer.ops.harmonics import spherical_harmonics
from fairchem_equiformer.ops.over_chunks import Part, over_chunks
from fairchem_equiformer.ops.segments import Chunk, segment_sum, target_chunks
from fairchem_equiformer.so3.harmonics import harmonics


@dataclass(frozen=True)
class IrrepsEdges:
    """Edges of a batch with their harmonics and radial basis.

    A process that has a share of the atoms (graph-parallel training) has the edges to these.
    """

    source: Tensor  # [E], atom in the batch
    target: Tensor  # [E], receiving atom among those computed here, ascending
    basis: Tensor  # [E, num_basis], radial basis functions
    harmonics: Tensor  # [E, irreps_sh.dim], component-normalised
    batch: Tensor  # [rows], structure of each atom computed here
    num_graphs: int
    rows: slice  # atoms whose features are computed here
    chunks: tuple[Chunk, ...]  # in which the edges are worked through
    twice: bool  # whether results are differentiated, and then their derivatives
    envelope: Tensor | None = None  # [E], what takes edges to nothing at the cutoff, if anything
    share: NodeShare | None = None  # None where all atoms are computed here

    @property
    def num_edges(self) -> int:
        """Number of edges, E."""
        return self.source.shape[0]

    @property
    def degree(self) -> Tensor:
        """Number of edges of each atom, or the sum of their envelopes [rows]."""
        if self.envelope is not None:
            return segment_sum(self.envelope, self.target, self.num_rows)
        bounds = torch.arange(self.num_rows + 1, device=self.target.device)
        return torch.searchsorted(self.target.contiguous(), bounds).diff().to(self.basis.dtype)

    @property
    def num_rows(self) -> int:
        """Number of atoms whose features are computed here."""
        return self.batch.shape[0]

    def rows_of(self, per_atom: Tensor) -> Tensor:
        """Entries of a tensor [N, ...] for the atoms computed here."""
        return per_atom[self.rows]

    def of_all_atoms(self, x: Tensor) -> Tensor:
        """Features [N, ...] from those of the atoms computed here."""
        return x if self.share is None else self.share.gather(x)

    def sum(
        self,
        function: Callable[[Part], Tensor],
        sources: Tensor,
        *,
        edges: Sequence[Tensor],
        rows: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        """Call a function on the edges, chunk by chunk; all at once where ``twice``.

        Args:
            function, edges, rows, parameters: of :func:`over_chunks`.
            sources: [N, ...], features of all atoms; [1, ...] where they are all the same.
        """
        source = self.source if sources.shape[0] > 1 else torch.zeros_like(self.source)
        if self.twice:
            part = Part(sources, source, self.target, tuple(edges), tuple(rows), self.num_rows)
            return function(part)
        ends = source, self.target
        return over_chunks(
            function, self.chunks, ends, sources, edges=edges, rows=rows, parameters=parameters
        )


def irreps_edges(
    graph: EdgeGraph,
    lmax: int,
    expansion: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    *,
    max_edges: int | None,
    twice: bool = False,
    smooth_within: float | None = None,
    share: NodeShare | None = None,
) -> IrrepsEdges:
    """Compute what depends on the graph alone, once for all layers.

    Args:
        graph: sorted by target.
        lmax: highest degree of the harmonics, every degree once.
        expansion: the radial basis, of distances in Angstrom.
        dtype: of the features.
        max_edges: of a chunk; None for all edges at once, so that the host reads nothing of the
            graph.
        twice: see :class:`IrrepsEdges`.
        smooth_within: Angstrom, the cutoff at which edges' weights go to zero, if they do.
        share: the atoms whose features are computed here, by default all.
    """
    rows = slice(0, graph.num_nodes) if share is None else share.rows
    chunks: tuple[Chunk, ...] = ()
    kept = slice(0, graph.num_edges)
    if max_edges is not None:
        pointers = graph.target_ptr[rows.start : rows.stop + 1].cpu()  # the host waits once
        kept = slice(int(pointers[0]), int(pointers[-1]))
        if not twice:
            chunks = target_chunks(pointers - kept.start, max_edges, rows.start)
    distance = graph.distance[kept].to(dtype)
    return IrrepsEdges(
        source=graph.source[kept],
        target=graph.target[kept] - rows.start,
        basis=expansion(distance),
        harmonics=_harmonics(graph.vector[kept], lmax).to(dtype),
        batch=graph.batch[rows],
        num_graphs=graph.num_graphs,
        rows=rows,
        chunks=chunks,
        twice=twice or max_edges is None,
        envelope=None if smooth_within is None else envelope(distance / smooth_within, 6),
        share=share,
    )


def _harmonics(vector: Tensor, lmax: int) -> Tensor:
    if torch.compiler.is_compiling():
        degrees = range(lmax + 1)
        return spherical_harmonics(degrees, vector, normalize=True, normalization="component")
    return harmonics(vector, lmax)
