"""The models as fairchem-core 1.10 sees them: registered, graph-parallel, heads for its hydra."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import gp_utils
from fairchem.core.common.registry import registry
from fairchem.core.models.base import HeadInterface

from fairchem_equiformer import models
from fairchem_equiformer.fairchem1.fine_tuning import start_from
from fairchem_equiformer.fairchem1.shares import differentiable_share
from fairchem_equiformer.models.weight_decay import no_weight_decay
from fairchem_equiformer.ops.edges import NodeShare

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairchem.core.models.base import HydraModel
    from torch import Tensor

    from fairchem_equiformer.graph.edge_graph import EdgeGraph


def gather_nodes(x: Tensor) -> Tensor:
    """Rows of all processes of a graph-parallel group: [rows, ...] to [N, ...].

    Each process uses them for edges of its own, so the backward pass adds up their gradients.
    """
    gathered: Tensor = gp_utils.gather_from_model_parallel_region_sum_grad(x, dim=0)
    return gathered


def gather_outputs(x: Tensor) -> Tensor:
    """As :func:`gather_nodes`, for results, of which every process computes the whole loss.

    The gradient is scaled by the size of the group, since data-parallel training averages over all
    processes what the group's share among themselves.
    """
    gathered = gp_utils.gather_from_model_parallel_region(x, dim=0)
    scaled: Tensor = gp_utils.scale_backward_grad(gathered)
    return scaled


class _GraphParallel:
    """Computes this process' share of the atoms where fairchem-core spreads a batch (--gp-gpus)."""

    def node_share(self, graph: EdgeGraph) -> NodeShare | None:
        """The atoms whose features this process computes; None for all."""
        if not gp_utils.initialized():
            return None
        atoms = torch.arange(graph.num_nodes, device=graph.target.device)
        own = gp_utils.scatter_to_model_parallel_region(atoms)
        start = int(own[0]) if len(own) else graph.num_nodes
        return NodeShare(slice(start, start + len(own)), gather_nodes, gather_outputs)


@registry.register_model("fairchem_equiformer_v2_backbone")
class EquiformerV2Backbone(_GraphParallel, models.EquiformerV2Backbone):
    """:class:`fairchem_equiformer.models.EquiformerV2Backbone` for fairchem's ``hydra``."""


@registry.register_model("fairchem_equiformer_v2")
class EquiformerV2(_GraphParallel, models.EquiformerV2):
    """:class:`fairchem_equiformer.models.EquiformerV2`, a drop-in for ``equiformer_v2``."""


@registry.register_model("equiformer")
class Equiformer(_GraphParallel, models.Equiformer):
    """:class:`fairchem_equiformer.models.Equiformer`.

    Args:
        finetune_config: where to start from, see
            :func:`~fairchem_equiformer.fairchem1.fine_tuning.start_from`; heads start anew.
        keys: those of the model.
    """

    def __init__(self, finetune_config: dict[str, Any] | None = None, **keys: Any) -> None:
        super().__init__(**keys)
        if finetune_config:
            start_from(self, finetune_config)

    def node_share(self, graph: EdgeGraph) -> NodeShare | None:
        """As above; where forces are derivatives, all that is shared is differentiated twice."""
        share = super().node_share(graph)
        if share is None or not self.config.gradient_forces:
            return share
        return differentiable_share(share.rows, graph.num_nodes)


@registry.register_model("fairchem_equiformer_v2_energy_head")
class EnergyHead(models.EnergyHead, HeadInterface):
    """:class:`fairchem_equiformer.models.EnergyHead` for fairchem's ``hydra``."""


@registry.register_model("fairchem_equiformer_v2_force_head")
class ForceHead(models.ForceHead, HeadInterface):
    """:class:`fairchem_equiformer.models.ForceHead` for fairchem's ``hydra``."""


@registry.register_model("fairchem_equiformer_v2_stress_head")
class StressHead(models.StressHead, HeadInterface):
    """:class:`fairchem_equiformer.models.StressHead` for fairchem's ``hydra``."""


@registry.register_model("fairchem_equiformer_v2_dens_backbone")
class DeNSBackbone(_GraphParallel, models.DeNSBackbone):
    """:class:`fairchem_equiformer.models.DeNSBackbone` for fairchem's ``hydra``."""


@registry.register_model("fairchem_equiformer_v2_dens_energy_head")
class DeNSEnergyHead(models.DeNSEnergyHead, HeadInterface):
    """:class:`fairchem_equiformer.models.DeNSEnergyHead` for fairchem's ``hydra``."""


@registry.register_model("fairchem_equiformer_v2_dens_force_head")
class DeNSForceHead(models.DeNSForceHead, HeadInterface):
    """:class:`fairchem_equiformer.models.DeNSForceHead` for fairchem's ``hydra``."""


@registry.register_model("fairchem_equiformer_v2_dens_stress_head")
class DeNSStressHead(models.DeNSStressHead, HeadInterface):
    """:class:`fairchem_equiformer.models.DeNSStressHead` for fairchem's ``hydra``."""


def no_weight_decay_of_hydra(original: Callable[[HydraModel], Any]) -> Callable[[HydraModel], Any]:
    """Make ``HydraModel.no_weight_decay`` give with our backbone what the flat model gives."""

    @functools.wraps(original)
    def names(hydra: HydraModel) -> Any:
        if isinstance(hydra.backbone, models.EquiformerV2Backbone):
            return no_weight_decay(hydra)
        return original(hydra)

    return names
