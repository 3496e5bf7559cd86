"""From node features to energies and forces: what flat model and heads share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairchem_equiformer.nn.attention import GraphAttention
from fairchem_equiformer.nn.feed_forward import FeedForward
from fairchem_equiformer.ops.segments import segment_sum

if TYPE_CHECKING:
    from fairchem_equiformer.models.backbone import Embedding, EquiformerV2Backbone


def energy_block(backbone: EquiformerV2Backbone) -> FeedForward:
    """Feed-forward network to one scalar per atom (paper, section 3.5)."""
    return FeedForward(backbone.config.feed_forward(), 1, scalars_only=True)


def force_block(backbone: EquiformerV2Backbone) -> GraphAttention:
    """Graph attention to one vector per atom (paper, section 3.5)."""
    num_basis = backbone.distance_expansion.num_basis
    return GraphAttention(backbone.config.attention(num_basis), 1, out_degree=1)


def of_all_atoms(values: Tensor, embedding: Embedding) -> Tensor:
    """Results for all atoms [N, ...] from those of this process' rows [rows, ...]."""
    share = embedding.inputs.edges.share
    return values if share is None else share.gather_outputs(values.contiguous())


def sum_energy(block: FeedForward, embedding: Embedding) -> Tensor:
    """Sum of atomic contributions over each structure [B], in float32 at least."""
    node_energy = of_all_atoms(block(embedding.node_embedding).flatten(), embedding)
    if node_energy.dtype in (torch.float16, torch.bfloat16):
        node_energy = node_energy.float()
    return segment_sum(node_energy, embedding.graph.batch, embedding.graph.num_graphs)


def forces(block: GraphAttention, embedding: Embedding) -> Tensor:
    """Forces of all atoms [N, 3], ordered x, y, z as e3nn's l = 1."""
    return of_all_atoms(block(embedding.node_embedding, embedding.inputs)[:, :, 0], embedding)
