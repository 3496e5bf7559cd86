"""A backbone with heads by name: the form of the materials models, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fairchem_equiformer.models.backbone import EquiformerV2Backbone
from fairchem_equiformer.models.dens import DeNSForceHead
from fairchem_equiformer.models.heads import ForceHead
from fairchem_equiformer.models.recorded import predict

if TYPE_CHECKING:
    from fairchem_equiformer.graph.edge_graph import EdgeGraph


class EquiformerV2Hydra(nn.Module):
    """The model that fairchem-core 1.10's ``hydra`` builds; parameters have the same names.

    Args:
        backbone: config keys of the backbone.
        heads: class and config keys of each head, by its name. As in fairchem, heads are made and
            stored in the order of their names.
        backbone_class: of the backbone.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        heads: dict[str, tuple[type[nn.Module], dict[str, Any]]],
        backbone_class: type[EquiformerV2Backbone] = EquiformerV2Backbone,
    ) -> None:
        super().__init__()
        self.backbone = backbone_class(**backbone)
        self.output_heads = nn.ModuleDict(
            {name: head(self.backbone, **keys) for name, (head, keys) in sorted(heads.items())}
        )

    @property
    def base(self) -> EquiformerV2Backbone:
        """The backbone."""
        return self.backbone

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Predict, in the normalised units of training: the outputs of all heads, by their keys."""
        return predict(self, data)

    def of_graph(self, graph: EdgeGraph, data: Any = None, **chunks: Any) -> dict[str, Tensor]:
        """As :meth:`forward`; arguments as of the backbone's ``embed_graph``."""
        embedding = self.backbone.embed_graph(graph, data, **chunks)
        outputs: dict[str, Tensor] = {}
        for head in self.output_heads.values():
            outputs.update(head(data, embedding))
        return outputs

    def atom_results(self) -> set[str]:
        """Names of results that have a row for each atom: the forces."""
        heads = self.output_heads.values()
        return {head.output_name for head in heads if isinstance(head, ForceHead | DeNSForceHead)}
