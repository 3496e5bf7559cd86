"""Heads: from the backbone's node features to one output each.

Their ``forward`` takes the batch, which they do not need, since the hydra models of fairchem-core,
1.10 and 2, hand it over.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from fairchem_equiformer.models.backbone import Embedding, EquiformerV2Backbone
from fairchem_equiformer.models.load_hooks import drop_derived
from fairchem_equiformer.models.readouts import (
    energy_block,
    force_block,
    forces,
    of_all_atoms,
    sum_energy,
)
from fairchem_equiformer.nn.feed_forward import FeedForward
from fairchem_equiformer.nn.initialization import initialize
from fairchem_equiformer.nn.rank2 import Rank2Readout
from fairchem_equiformer.ops.segments import segment_sum


def check_backbone(head: nn.Module, backbone: nn.Module) -> None:
    """Raise TypeError unless a head can read this backbone's features."""
    if not isinstance(backbone, EquiformerV2Backbone):
        msg = (
            f"{type(head).__name__} reads fairchem_equiformer.EquiformerV2Backbone, not "
            f"{type(backbone).__name__}: set model.backbone.model to it"
        )
        raise TypeError(msg)


class EnergyHead(nn.Module):
    """Energy of each structure, from a feed-forward network on each atom.

    Args:
        backbone: whose features it reads.
        output_name: key of the result.
        reduce: "sum" over atoms, divided by the mean number of atoms, or "mean".

    Raises:
        ValueError: for another ``reduce``.
        TypeError: for another backbone.
    """

    block_name: ClassVar = "energy_block"  # in names of parameters

    def __init__(
        self, backbone: EquiformerV2Backbone, output_name: str = "energy", reduce: str = "sum"
    ) -> None:
        super().__init__()
        check_backbone(self, backbone)
        if reduce not in ("sum", "mean"):
            msg = f"EnergyHead config: reduce is {reduce!r}, it must be 'sum' or 'mean'"
            raise ValueError(msg)
        self.output_name = output_name
        self.reduce = reduce
        self.average_num_nodes = backbone.average_num_nodes
        self.add_module(self.block_name, energy_block(backbone))
        initialize(self, backbone.config.weight_init)
        drop_derived(self)

    @staticmethod
    def results(output_name: str = "energy", **_: Any) -> list[str]:
        """Keys of what a head of these config keys gives."""
        return [output_name]

    def forward(self, data: Any, emb: Embedding) -> dict[str, Tensor]:  # noqa: ARG002
        """[B], keyed by ``output_name``."""
        energy = sum_energy(cast("FeedForward", getattr(self, self.block_name)), emb)
        divisor = self.average_num_nodes if self.reduce == "sum" else emb.graph.natoms
        return {self.output_name: energy / divisor}


class ForceHead(nn.Module):
    """Force on each atom, from a block of graph attention.

    Args:
        backbone: whose features it reads.
        output_name: key of the result.

    Raises:
        TypeError: for another backbone.
    """

    def __init__(self, backbone: EquiformerV2Backbone, output_name: str = "forces") -> None:
        super().__init__()
        check_backbone(self, backbone)
        self.output_name = output_name
        self.force_block = force_block(backbone)
        initialize(self, backbone.config.weight_init)
        drop_derived(self)

    @staticmethod
    def results(output_name: str = "forces", **_: Any) -> list[str]:
        """Keys of what a head of these config keys gives."""
        return [output_name]

    def forward(self, data: Any, emb: Embedding) -> dict[str, Tensor]:  # noqa: ARG002
        """[N, 3], keyed by ``output_name``."""
        return {self.output_name: forces(self.force_block, emb)}


class StressHead(Rank2Readout):
    """Symmetric second-rank tensor of each structure, such as its stress.

    Takes the keys of fairchem's ``rank2_symmetric_head`` and has its parameters. A stress has the
    unit and sign of the labels, which fairchem reads through ASE: eV/Angstrom^3, positive where the
    cell would shrink (the energy's derivative by the strain, over the volume).

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
        check_backbone(self, backbone)
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

    @staticmethod
    def results(output_name: str = "stress", decompose: bool = False, **_: Any) -> list[str]:
        """Keys of what a head of these config keys gives."""
        kinds = ("_isotropic", "_anisotropic") if decompose else ("",)
        return [output_name + kind for kind in kinds]

    def forward(self, data: Any, emb: Embedding) -> dict[str, Tensor]:  # noqa: ARG002
        """Predict.

        Returns:
            With ``decompose``, ``<output_name>_isotropic`` [B, 1] and ``<output_name>_anisotropic``
            [B, 5]; else ``output_name`` [3 B, 3], one matrix below the other.
        """
        graph, edges = emb.graph, emb.inputs.edges
        x = emb.node_embedding
        if edges.share is not None:
            x = edges.share.gather(x)
        found = [of_all_atoms(values, edges.share) for values in self.components(x, edges)]
        divisor = self.avg_num_nodes if self.extensive else graph.natoms[:, None]
        parts = [segment_sum(v, graph.batch, graph.num_graphs) / divisor for v in found]
        if not self.block.decompose:
            return {self.output_name: parts[0].reshape(-1, 3)}
        return dict(zip(self.results(self.output_name, decompose=True), parts, strict=True))
