"""From the graph of a batch to what all layers share of its edges."""

from __future__ import annotations

import torch
from torch import Tensor

from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.ops.edges import Edges, NodeShare, edges_per_chunk
from fairchem_equiformer.ops.radial import EdgeScalars
from fairchem_equiformer.ops.rotate import edge_rotations
from fairchem_equiformer.ops.segments import Chunk, target_chunks
from fairchem_equiformer.so3.layout import Layout


def prepare_edges(
    graph: EdgeGraph,
    layout: Layout,
    channels: int,
    dtype: torch.dtype,
    *,
    max_edges: int | None = None,
    share: NodeShare | None = None,
    at_once: bool = False,
    chunk_table: Tensor | None = None,
) -> Edges:
    """Compute what depends on the graph alone, once for all layers.

    Args:
        graph: sorted by target.
        layout: of the edge frame.
        channels: of the node features, C.
        dtype: of the features.
        max_edges: edges per chunk; by default as many as fit the device's budget.
        share: the atoms whose features are computed here, by default all.
        at_once: all edges of all atoms are one chunk; the host then reads nothing of a GPU.
        chunk_table: the chunks of all atoms' edges, where a compiler looks on: [chunks, 6] on the
            host, of :func:`~fairchem_equiformer.ops.segments.table_of`. The host then reads nothing
            of the graph.
    """
    rows = slice(0, graph.num_nodes) if share is None else share.rows
    pointers = graph.target_ptr[rows.start : rows.stop + 1]
    kept = slice(0, graph.num_edges)
    chunks: tuple[Chunk, ...] = ()
    if at_once:
        chunks = (Chunk(rows, rows, kept),)
    elif chunk_table is None:
        if max_edges is None:
            max_edges = edges_per_chunk(layout, channels, dtype, graph.vector.device)
        on_host = pointers.cpu()  # the one time that the host waits for a GPU here
        kept = slice(int(on_host[0]), int(on_host[-1]))
        chunks = target_chunks(on_host - on_host[0], max_edges, rows.start)
    source, target = graph.source[kept], graph.target[kept]
    scalars = EdgeScalars(
        graph.distance[kept].to(dtype), graph.atomic_numbers[source], graph.atomic_numbers[target]
    )
    return Edges(
        scalars=scalars,
        source=source,
        target=target,
        target_ptr=pointers - pointers[0],
        layout=layout,
        rotations=edge_rotations(graph.vector[kept], layout, dtype),
        vector=graph.vector[kept],
        chunks=chunks,
        first_row=rows.start,
        batch=graph.batch[rows],
        num_graphs=graph.num_graphs,
        share=share,
        chunk_table=chunk_table,
    )
