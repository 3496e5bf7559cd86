"""The flat EquiformerV2: energies and forces in one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fairchem_equiformer.models.backbone import EquiformerV2Backbone
from fairchem_equiformer.models.readouts import energy_block, force_block, forces, sum_energy
from fairchem_equiformer.models.recorded import predict
from fairchem_equiformer.nn.initialization import initialize
from fairchem_equiformer.ops.segments import segment_sum

if TYPE_CHECKING:
    from fairchem_equiformer.graph.edge_graph import EdgeGraph


class EquiformerV2(EquiformerV2Backbone):
    """Flat EquiformerV2: energies and, with ``regress_forces``, forces.

    The same config keys, parameter names and order as fairchem-core 1.10's ``equiformer_v2``.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.energy_block = energy_block(self)
        initialize(self.energy_block, self.config.weight_init)
        if self.regress_forces:
            self.force_block = force_block(self)
            initialize(self.force_block, self.config.weight_init)

    @property
    def base(self) -> EquiformerV2Backbone:
        """This model, which is its own backbone."""
        return self

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Predict, in the normalised units of training.

        Returns:
            ``energy`` [B] and, with ``regress_forces``, ``forces`` [N, 3].

        Raises:
            StructureError: for bad input, a ValueError that names structure and value.
        """
        return predict(self, data)

    def of_graph(self, graph: EdgeGraph, data: Any = None, **chunks: Any) -> dict[str, Tensor]:
        """As :meth:`forward`; arguments as of :meth:`embed_graph`."""
        embedding = self.embed_graph(graph, data, **chunks)
        energy = sum_energy(self.energy_block, embedding) / self.average_num_nodes
        if self.config.use_energy_lin_ref:
            references = self.energy_lin_ref[graph.atomic_numbers]
            energy = energy + segment_sum(references, graph.batch, graph.num_graphs)
        out = {"energy": energy}
        if self.regress_forces:
            out["forces"] = forces(self.force_block, embedding)
        return out

    def atom_results(self) -> set[str]:
        """Names of results that have a row for each atom."""
        return {"forces"}
