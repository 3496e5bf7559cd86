"""Equiformer (V1): equivariant graph attention on irreps, with depth-wise tensor products."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.graph.build import NUM_TAGS, build_graph
from fairchem_equiformer.models.config_v1 import EquiformerConfig
from fairchem_equiformer.models.derivatives import with_derivatives
from fairchem_equiformer.models.load_hooks import explain_misfits
from fairchem_equiformer.models.model import Model
from fairchem_equiformer.models.readouts import of_all_atoms, sum_over_structures
from fairchem_equiformer.nn.irreps.attention import GraphAttention
from fairchem_equiformer.nn.irreps.block import IrrepsBlock
from fairchem_equiformer.nn.irreps.edges import IrrepsEdges, irreps_edges
from fairchem_equiformer.nn.irreps.embedding import IrrepsEdgeDegreeEmbedding, KindEmbedding
from fairchem_equiformer.nn.irreps.heads import ScalarHead
from fairchem_equiformer.nn.irreps.norm import IrrepsLayerNorm
from fairchem_equiformer.nn.radial import (
    ExponentialNormalSmearing,
    LearnableGaussianSmearing,
    SphericalBesselBasis,
)
from fairchem_equiformer.ops.allocator import keep_freed_memory
from fairchem_equiformer.ops.edges import fitting_edges
from fairchem_equiformer.so3.irreps import SCALAR, channels_of

if TYPE_CHECKING:
    from fairchem_equiformer.graph.edge_graph import EdgeGraph

_BASES = {
    "learnable_gaussian": LearnableGaussianSmearing,
    "exponential_normal": ExponentialNormalSmearing,
    "bessel": SphericalBesselBasis,
}


class Equiformer(Model):
    """Equiformer: energies and, where asked for, forces, stress and other vectors of atoms.

    Args:
        keys: those of :class:`~fairchem_equiformer.models.config_v1.EquiformerConfig`.

    Raises:
        ValueError: for an unknown key or an impossible value.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        config = EquiformerConfig.from_keys(keys)
        self.config = config
        self.otf_graph = config.otf_graph
        self.regress_forces = config.regress_forces
        irreps, feature = config.irreps("irreps_node_embedding"), config.irreps("irreps_feature")
        self._lmax = config.irreps("irreps_sh").lmax
        scalars = channels_of(irreps, SCALAR)
        self.atom_embedding = KindEmbedding(config.max_num_elements, scalars)
        self.tag_embedding = KindEmbedding(NUM_TAGS, scalars) if config.use_tag_embedding else None
        basis = _BASES[config.distance_function]
        self.distance_expansion = basis(config.max_radius, config.num_distance_basis)
        attention, block = config.attention_sizes(), config.block()
        self.edge_degree_embedding = IrrepsEdgeDegreeEmbedding(attention, config.avg_degree)
        self.blocks = nn.ModuleList(
            IrrepsBlock(block, irreps if index < config.num_layers - 1 else feature)
            for index in range(config.num_layers)
        )
        self.norm = IrrepsLayerNorm(feature)
        self.energy_head = ScalarHead(channels_of(feature, SCALAR))
        vector = o3.Irreps([(1, config.vector)])
        self.vector_heads = nn.ModuleDict(
            {name: GraphAttention(attention, feature, vector) for name in config.vector_heads}
        )
        explain_misfits(self)

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Predict, in the normalised units of training.

        Args:
            data: any object with the fields of a batch, see
                :func:`~fairchem_equiformer.graph.build.build_graph`.

        Returns:
            ``energy`` [B]; with ``regress_forces``, ``forces`` [N, 3]; with ``regress_stress``,
            ``stress`` [B, 9]; of each of ``vector_outputs`` [N, 3]. Forces and stress that are
            derivatives are those of the normalised energy.

        Raises:
            StructureError: for bad input, a ValueError that names structure and value.
        """
        if not self.config.gradient_forces:
            return self._predict(self.read(data))
        predict = partial(self._predict, twice=torch.is_grad_enabled())
        stress = self.config.regress_stress
        return with_derivatives(self.read, predict, data, self._of_all_shares, stress=stress)

    @property
    def base(self) -> Equiformer:
        """What reads batches: this model itself."""
        return self

    @staticmethod
    def of_head(name: str) -> bool:
        """Whether the parameter of this name is a head's."""
        return name.startswith(("energy_head.", "vector_heads."))

    def read(self, data: Any) -> EdgeGraph:
        """The graph of a batch; arguments and errors as of :meth:`forward`."""
        keep_freed_memory()
        return build_graph(data, self.config.graph(otf=self.otf_graph))

    def edges_at_once(self, device: torch.device) -> int:
        """Edges of a chunk whose tensor products fit a budget; half as many where none is kept."""
        width = self.edge_degree_embedding.product.irreps_out.dim
        width *= 1 if torch.is_grad_enabled() else 2
        fitting = fitting_edges(width, self.norm.weight.dtype, device)
        return self.config.edges_per_chunk or fitting

    def of_graph(
        self,
        graph: EdgeGraph,
        data: Any = None,  # noqa: ARG002
        *,
        chunk_table: Tensor | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """As :meth:`forward`, all edges at once: for a compiler, which sees no chunks.

        Raises:
            ValueError: if forces are the energy's derivative.
        """
        self.refuse_derivatives()
        return self._predict(graph, at_once=True)

    def refuse_derivatives(self) -> None:
        """Check that a graph is enough to predict from.

        Raises:
            ValueError: if forces are the energy's derivative.
        """
        if self.config.gradient_forces:
            raise ValueError(
                "forces that are the energy's derivative by the positions do not follow from a"
                " graph: direct_forces must be True, or regress_forces False"
            )

    def _of_all_shares(self, graph: EdgeGraph, derivative: Tensor) -> Tensor:
        """The energy's derivative, of which each process that shares the graph found a part."""
        share = self.node_share(graph)
        if share is None or share.sum_derivatives is None:  # which the prediction refuses
            return derivative
        return share.sum_derivatives(derivative)

    def _predict(
        self, graph: EdgeGraph, *, twice: bool = False, at_once: bool = False
    ) -> dict[str, Tensor]:
        """What is no derivative; ``twice`` as of irreps_edges, ``at_once`` without chunks."""
        config = self.config
        share = self.node_share(graph)
        if share is not None and config.gradient_forces and share.sum_derivatives is None:
            raise ValueError(
                "forces that are the energy's derivative need all atoms in one process: leave out"
                " graph_parallel, or set direct_forces: True"
            )
        edges = irreps_edges(
            graph,
            self._lmax,
            self.distance_expansion,
            self.norm.weight.dtype,
            max_edges=None if at_once else self.edges_at_once(graph.vector.device),
            twice=twice,
            smooth_within=config.max_radius if config.smooth_cutoff else None,
            share=share,
        )
        x = self._embed(graph, edges)
        for block in self.blocks:
            x = block(x, edges)
        x = self.norm(x)
        energy = sum_over_structures(self.energy_head(x), graph, edges.share)
        out = {"energy": energy / math.sqrt(config.avg_num_nodes)}
        for name, head in self.vector_heads.items():
            out[name] = of_all_atoms(head(x, edges), edges.share)
        return out

    def _embed(self, graph: EdgeGraph, edges: IrrepsEdges) -> Tensor:
        """What the blocks start from: [rows, irreps.dim]."""
        x: Tensor = self.edge_degree_embedding(edges)
        atoms = self.atom_embedding(edges.rows_of(graph.atomic_numbers))
        if self.tag_embedding is not None and graph.tags is not None:
            atoms = atoms + self.tag_embedding(edges.rows_of(graph.tags))
        width = atoms.shape[1]
        return torch.cat([x[:, :width] + atoms, x[:, width:]], dim=1)
