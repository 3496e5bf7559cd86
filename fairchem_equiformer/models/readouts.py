"""From node features to energies and forces: what flat model and heads share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fairchem_equiformer.nn.attention import GraphAttention
from fairchem_equiformer.nn.feed_forward import FeedForward
from fairchem_equiformer.ops.segments import in_single, segment_sum

if TYPE_CHECKING:
    from fairchem_equiformer.graph.edge_graph import EdgeGraph
    from fairchem_equiformer.models.backbone import Embedding, EquiformerV2Backbone
    from fairchem_equiformer.ops.edges import NodeShare


def energy_block(backbone: EquiformerV2Backbone) -> FeedForward:
    """Feed-forward network to one scalar per atom (paper, section 3.5)."""
    return FeedForward(backbone.config.feed_forward(), 1, scalars_only=True)


def force_block(backbone: EquiformerV2Backbone) -> GraphAttention:
    """Graph attention to one vector per atom (paper, section 3.5)."""
    num_basis = backbone.distance_expansion.num_basis
    return GraphAttention(backbone.config.attention(num_basis), 1, out_degree=1)


def of_all_atoms(values: Tensor, share: NodeShare | None) -> Tensor:
    """Results for all atoms [N, ...] from those of this process' rows [rows, ...]."""
    return values if share is None else share.gather_outputs(values.contiguous())


def sum_over_structures(values: Tensor, graph: EdgeGraph, share: NodeShare | None) -> Tensor:
    """Sum of atomic contributions [rows] over each structure [B], in float32 at least."""
    values = of_all_atoms(values, share)
    return segment_sum(in_single(values), graph.batch, graph.num_graphs)


def sum_energy(block: FeedForward, embedding: Embedding) -> Tensor:
    """Sum of atomic energies over each structure [B], in float32 at least."""
    node_energy = block(embedding.node_embedding).flatten()
    return sum_over_structures(node_energy, embedding.graph, embedding.inputs.edges.share)


def forces(block: GraphAttention, embedding: Embedding) -> Tensor:
    """Forces of all atoms [N, 3], ordered x, y, z as e3nn's l = 1."""
    vectors = block(embedding.node_embedding, embedding.inputs)[:, :, 0]
    return of_all_atoms(vectors, embedding.inputs.edges.share)
