"""The part of EquiformerV2 that all outputs share: a batch of structures in, node features out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fairchem_equiformer.graph.build import NUM_TAGS, build_graph
from fairchem_equiformer.graph.edges import prepare_edges
from fairchem_equiformer.models.config import AVERAGE_DEGREE, AVERAGE_NUM_NODES, ModelConfig
from fairchem_equiformer.models.load_hooks import drop_derived, explain_misfits
from fairchem_equiformer.models.model import Model
from fairchem_equiformer.nn.block import TransformerBlock
from fairchem_equiformer.nn.edge_inputs import EdgeInputs
from fairchem_equiformer.nn.embedding import EdgeDegreeEmbedding
from fairchem_equiformer.nn.initialization import initialize
from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.nn.radial import GaussianSmearing, LearnableGaussianSmearing
from fairchem_equiformer.nn.recompute import recomputed
from fairchem_equiformer.ops.allocator import keep_freed_memory
from fairchem_equiformer.ops.edges import edges_per_chunk

if TYPE_CHECKING:
    from fairchem_equiformer.graph.edge_graph import EdgeGraph


@dataclass(frozen=True)
class Embedding:
    """What the backbone hands to the heads."""

    # [rows, (lmax + 1)^2, C]; the rows are all atoms, or this process' share of them.
    node_embedding: Tensor
    graph: EdgeGraph
    inputs: EdgeInputs


class EquiformerV2Backbone(Model):
    """Embedding, blocks and final norm: a batch in, node features out (paper, Fig. 1a).

    Args:
        keys: those of :class:`~fairchem_equiformer.models.config.ModelConfig`.

    Raises:
        ValueError: for an unknown key or an impossible value.
    """

    own_keys: ClassVar[frozenset[str]] = frozenset()  # config keys beside ModelConfig's

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        config = ModelConfig.from_keys(keys)
        self.config = config
        self.layout = config.layout  # of the edge frame
        self.otf_graph = config.otf_graph
        self.regress_forces = config.regress_forces
        self.num_layers = config.num_layers  # of the blocks, how many are run
        self.average_num_nodes = config.avg_num_nodes or AVERAGE_NUM_NODES
        if config.load_energy_lin_ref:
            references = torch.zeros(config.max_num_elements)
            self.energy_lin_ref = nn.Parameter(references, requires_grad=False)
        self.sphere_embedding = nn.Embedding(config.max_num_elements, config.sphere_channels)
        if config.use_tag_embedding:
            self.tag_embedding = nn.Embedding(NUM_TAGS, config.sphere_channels)
        self.distance_expansion = distance_expansion(config)
        num_basis = self.distance_expansion.num_basis
        self.source_embedding = self.target_embedding = None
        if config.share_atom_edge_embedding:
            self.source_embedding = nn.Embedding(config.max_num_elements, config.edge_channels)
            self.target_embedding = nn.Embedding(config.max_num_elements, config.edge_channels)
        attention = config.attention(num_basis)
        self.edge_degree_embedding = EdgeDegreeEmbedding(
            channels=config.sphere_channels,
            lmax=config.lmax,
            num_basis=num_basis,
            edge_channels=config.edge_channels,
            num_elements=attention.num_elements,
            shared_embedding=attention.shared_embedding,
            average_degree=config.avg_degree or AVERAGE_DEGREE,
        )
        block = config.block(num_basis)
        self.blocks = nn.ModuleList(TransformerBlock(block) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm_type](config.lmax, config.sphere_channels)
        initialize(self, config.weight_init)
        explain_misfits(self)
        drop_derived(self)

    def forward(self, data: Any) -> Any:
        """As :meth:`embed`."""
        return self.embed(data)

    def embed(self, data: Any) -> Embedding:
        """Node features and what the heads need of the graph.

        Args:
            data: any object with the fields of a batch, see
                :func:`~fairchem_equiformer.graph.build.build_graph`.

        Raises:
            StructureError: for bad input, a ValueError that names structure and value.
        """
        return self.embed_graph(self.read(data), data)

    def read(self, data: Any) -> EdgeGraph:
        """The graph of a batch; arguments and errors as of :meth:`embed`."""
        keep_freed_memory()
        return build_graph(data, self.config.graph(otf=self.otf_graph))

    def edges_at_once(self, device: torch.device) -> int:
        """Edges that one chunk holds."""
        config, dtype = self.config, self.sphere_embedding.weight.dtype
        fitting = edges_per_chunk(config.layout, config.sphere_channels, dtype, device)
        return config.edges_per_chunk or fitting

    def embed_graph(
        self,
        graph: EdgeGraph,
        data: Any = None,
        *,
        at_once: bool = False,
        chunk_table: Tensor | None = None,
    ) -> Embedding:
        """As :meth:`embed`.

        Args:
            graph: of the batch.
            data: the batch, for models that read more of it.
            at_once: all edges are one chunk, so that the host need not know which atoms have them.
            chunk_table: see :func:`~fairchem_equiformer.graph.edges.prepare_edges`.
        """
        config = self.config
        edges = prepare_edges(
            graph,
            self.layout,
            config.sphere_channels,
            self.sphere_embedding.weight.dtype,
            max_edges=config.edges_per_chunk,
            share=self.node_share(graph),
            at_once=at_once,
            chunk_table=chunk_table,
        )
        inputs = EdgeInputs(
            edges, self.distance_expansion.basis(), self.source_embedding, self.target_embedding
        )
        x = self.edge_degree_embedding(inputs)
        atoms = self.sphere_embedding(edges.rows_of(graph.atomic_numbers))
        if graph.tags is not None:
            atoms = atoms + self.tag_embedding(edges.rows_of(graph.tags))
        x = torch.cat([x[:, :1] + atoms[:, None], x[:, 1:]], dim=1)
        further = self.further_inputs(data, graph)
        if further is not None:
            x = x + edges.rows_of(further)
        for block in list(self.blocks)[: self.num_layers]:  # a compiler makes no ModuleList
            if config.activation_checkpoint and torch.is_grad_enabled():
                x = recomputed(block, x, inputs, random=True)
            else:
                x = block(x, inputs)
        return Embedding(self.norm(x), graph, inputs)

    def further_inputs(self, data: Any, graph: EdgeGraph) -> Tensor | None:  # noqa: ARG002
        """What else the nodes start from: [N, (lmax + 1)^2, C], or None."""
        return None


def distance_expansion(config: ModelConfig) -> GaussianSmearing | LearnableGaussianSmearing:
    """The radial basis that the config asks for."""
    if config.distance_function == "learnable_gaussian":
        return LearnableGaussianSmearing(config.max_radius, config.num_distance_basis)
    return GaussianSmearing(config.max_radius)
