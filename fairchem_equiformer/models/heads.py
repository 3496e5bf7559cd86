"""Heads for fairchem's ``hydra`` model with :class:`EquiformerV2Backbone`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairchem.core.common.registry import registry
from fairchem.core.models.base import HeadInterface, HydraModel
from torch import Tensor, nn

from fairchem_equiformer.models.checkpoint import drop_derived
from fairchem_equiformer.models.equiformer_v2 import (
    EquiformerV2Backbone,
    energy_block,
    force_block,
    forces,
    gather_outputs,
    rank2_inputs,
    sum_energy,
)
from fairchem_equiformer.models.weight_decay import no_weight_decay
from fairchem_equiformer.nn.initialization import initialize
from fairchem_equiformer.nn.rank2 import Rank2Readout
from fairchem_equiformer.ops.segments import segment_sum

if TYPE_CHECKING:
    from torch_geometric.data import Batch


def _check_backbone(head: nn.Module, backbone: nn.Module) -> None:
    if not isinstance(backbone, EquiformerV2Backbone):
        msg = (
            f"{type(head).__name__} reads fairchem_equiformer.EquiformerV2Backbone, not "
            f"{type(backbone).__name__}: set model.backbone.model to it"
        )
        raise TypeError(msg)


@registry.register_model("fairchem_equiformer_v2_energy_head")
class EnergyHead(nn.Module, HeadInterface):
    """Energy of each structure, from a feed-forward network on each atom.

    Args:
        backbone: whose features it reads.
        output_name: key of the result.
        reduce: "sum" over atoms, divided by the mean number of atoms, or "mean".

    Raises:
        ValueError: for another ``reduce``.
        TypeError: for another backbone.
    """

    def __init__(
        self, backbone: EquiformerV2Backbone, output_name: str = "energy", reduce: str = "sum"
    ) -> None:
        super().__init__()
        _check_backbone(self, backbone)
        if reduce not in ("sum", "mean"):
            msg = f"EnergyHead config: reduce is {reduce!r}, it must be 'sum' or 'mean'"
            raise ValueError(msg)
        self.output_name = output_name
        self.reduce = reduce
        self.average_num_nodes = backbone.average_num_nodes
        self.energy_block = energy_block(backbone)
        initialize(self, backbone.config.weight_init)
        drop_derived(self)

    def forward(self, data: Batch, emb: dict[str, Any]) -> dict[str, Tensor]:
        """[B], keyed by ``output_name``."""
        energy = sum_energy(self.energy_block(emb["node_embedding"]).flatten(), emb)
        divisor = self.average_num_nodes if self.reduce == "sum" else data.natoms
        return {self.output_name: energy / divisor}


@registry.register_model("fairchem_equiformer_v2_force_head")
class ForceHead(nn.Module, HeadInterface):
    """Force on each atom, from a block of graph attention.

    Args:
        backbone: whose features it reads.
        output_name: key of the result.

    Raises:
        TypeError: for another backbone.
    """

    def __init__(self, backbone: EquiformerV2Backbone, output_name: str = "forces") -> None:
        super().__init__()
        _check_backbone(self, backbone)
        self.output_name = output_name
        self.force_block = force_block(backbone)
        initialize(self, backbone.config.weight_init)
        drop_derived(self)

    def forward(self, data: Batch, emb: dict[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        """[N, 3], keyed by ``output_name``."""
        return {self.output_name: forces(self.force_block, emb)}


@registry.register_model("fairchem_equiformer_v2_stress_head")
class StressHead(Rank2Readout, HeadInterface):
    """Symmetric second-rank tensor of each structure, such as its stress.

    Takes the keys of fairchem's ``rank2_symmetric_head`` and has its parameters.

    Args:
        backbone: whose features it reads.
        output_name: key of the result, or beginning of the keys.
        decompose: give the isotropic part (the trace over sqrt(3)) and the anisotropic part (five
            components of degree 2) by themselves; the trainer puts them together.
        edge_level_mlp: perceptron on edges instead of atoms.
        num_mlp_layers: of the perceptron.
        use_source_target_embedding: read the features of both atoms of an edge.
        extensive: sum over atoms instead of their mean.
        avg_num_nodes: divides the sum, with ``decompose``.

    Raises:
        TypeError: for another backbone.
        ValueError: for fewer than one layer.
    """

    def __init__(
        self,
        backbone: EquiformerV2Backbone,
        output_name: str = "stress",
        decompose: bool = False,
        edge_level_mlp: bool = False,
        num_mlp_layers: int = 2,
        use_source_target_embedding: bool = False,
        extensive: bool = False,
        avg_num_nodes: float = 1.0,
    ) -> None:
        _check_backbone(self, backbone)
        if num_mlp_layers < 1:
            msg = f"StressHead config: num_mlp_layers is {num_mlp_layers}, it must be at least 1"
            raise ValueError(msg)
        config = backbone.config
        super().__init__(
            config.lmax,
            config.sphere_channels,
            config.norm_type,
            decompose=decompose,
            edge_level=edge_level_mlp,
            num_layers=num_mlp_layers,
            both_ends=use_source_target_embedding,
        )
        self.output_name = output_name
        self.extensive = extensive
        self.avg_num_nodes = avg_num_nodes if decompose else 1.0
        initialize(self.block, "uniform")
        drop_derived(self)

    def forward(self, data: Batch, emb: dict[str, Any]) -> dict[str, Tensor]:
        """Predict.

        Returns:
            With ``decompose``, ``<output_name>_isotropic`` [B, 1] and ``<output_name>_anisotropic``
            [B, 5]; else ``output_name`` [3 B, 3], one matrix below the other.
        """
        found = self.components(*rank2_inputs(emb))
        if emb["edges"].gather is not None:
            found = [gather_outputs(values) for values in found]
        graph = emb["graph"]
        divisor = self.avg_num_nodes if self.extensive else data.natoms[:, None]
        parts = [segment_sum(v, graph.batch, graph.num_graphs) / divisor for v in found]
        if not self.block.decompose:
            return {self.output_name: parts[0].reshape(-1, 3)}
        kinds = ("isotropic", "anisotropic")
        return {f"{self.output_name}_{kind}": v for kind, v in zip(kinds, parts, strict=True)}


_hydra_no_weight_decay = HydraModel.no_weight_decay


def _no_weight_decay(self: HydraModel) -> Any:
    """As the flat model with our backbone; else by parameter names, as fairchem does."""
    if isinstance(self.backbone, EquiformerV2Backbone):
        return no_weight_decay(self)
    return _hydra_no_weight_decay(self)


# fairchem's hydra asks neither backbone nor heads, and leaves them no other place to say it.
HydraModel.no_weight_decay = _no_weight_decay
