"""The models as fairchem-core 2.x sees them: its hydra, a backbone, a head for each output."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import gp_utils
from fairchem.core.models import base

from fairchem_equiformer import models
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.models.weight_decay import no_weight_decay
from fairchem_equiformer.ops.edges import NodeShare
from fairchem_equiformer.so3.rank2 import symmetric_tensor

if TYPE_CHECKING:
    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
    from fairchem.core.units.mlip_unit.mlip_unit import Task
    from torch import Tensor

    from fairchem_equiformer.graph.edge_graph import EdgeGraph
    from fairchem_equiformer.models import Embedding

logger = logging.getLogger(__name__)


@dataclass
class RegressConfig:
    """What fairchem asks a backbone: whether forces and stress are outputs or derivatives."""

    direct_forces: bool = True
    forces: bool = False  # by a derivative
    stress: bool = False  # likewise
    hessian: bool = False


class _Backbone(base.BackboneInterface):
    """What fairchem asks of a backbone, for either model.

    Periodic directions are those of the structure, ``pbc``, as in fairchem-core 1.10's calculator.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(**{key: _plain(value) for key, value in keys.items()})
        self.regress_config = RegressConfig()

    def node_share(self, graph: EdgeGraph) -> NodeShare | None:
        """This process' atoms where fairchem spreads a batch over several (``graph_parallel``)."""
        if not gp_utils.initialized():
            return None
        atoms = torch.arange(graph.num_nodes, device=graph.target.device)
        own = gp_utils.scatter_to_model_parallel_region(atoms)
        start = int(own[0]) if len(own) else graph.num_nodes
        return NodeShare(
            slice(start, start + len(own)),
            partial(gp_utils.gather_from_model_parallel_region_sum_grad, natoms=len(atoms)),
            # fairchem's loss scales the gradient by the size of the group.
            partial(gp_utils.gather_from_model_parallel_region, natoms=len(atoms)),
        )

    @classmethod
    def build_inference_settings(cls, settings: InferenceSettings) -> dict[str, Any]:
        """Config keys that settings of inference change: none.

        Raises:
            ValueError: for graphs from outside, which have another cutoff than the model.
        """
        if settings.external_graph_gen:
            raise ValueError(
                "external_graph_gen: True gives a model neighbours within 6 Angstrom, whatever its"
                " cutoff; set it to False: these models find their neighbours themselves"
            )
        return {}

    def prepare_for_inference(
        self,
        data: AtomicData,  # noqa: ARG002
        settings: InferenceSettings,
    ) -> _Backbone:
        """Leave ``torch.compile`` out, which has nothing to gain beside the compiled kernels."""
        if settings.compile:
            settings.compile = False
            logger.info("the model runs its own kernels: inference goes without torch.compile")
        return self

    def get_default_untrained_tasks(
        self,
        checkpoint_tasks: dict[str, Task],  # noqa: ARG002
        inference_settings: InferenceSettings,  # noqa: ARG002
    ) -> list[Task]:
        """None: there is no output without a head for it."""
        return []

    def validate_tasks(self, dataset_to_tasks: dict[str, list[Task]]) -> None:
        """Take tasks on any data set: the model does not read its name."""

    def on_predict_check(self, data: AtomicData) -> None:
        """Leave the check of a batch to the graph, which names what is wrong."""

    def validate_atoms_data(self, atoms: Atoms, task_name: str) -> None:
        """Take structures as they are: the model reads neither charge nor spin."""


def _prepare(data: AtomicData) -> AtomicData:
    """Give the batch the fields that fairchem reads element references by."""
    data["batch_full"] = data.batch
    data["atomic_numbers_full"] = data.atomic_numbers
    return data


class EquiformerV2Backbone(_Backbone, models.EquiformerV2Backbone):
    """:class:`fairchem_equiformer.models.EquiformerV2Backbone` for fairchem's ``hydra``."""

    def forward(self, data: AtomicData) -> Embedding:
        """As :meth:`embed`."""
        return self.embed(_prepare(data))


class EquiformerBackbone(_Backbone, models.Equiformer):
    """:class:`fairchem_equiformer.models.Equiformer` for fairchem's ``hydra``, heads and all.

    What it predicts goes to its outputs by :class:`EquiformerHead`.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        derived = self.config.gradient_forces
        self.regress_config = RegressConfig(
            direct_forces=not derived, forces=derived, stress=self.config.regress_stress
        )

    def forward(self, data: AtomicData) -> dict[str, Tensor]:
        """Outputs by name; derivatives can be differentiated again in training alone."""
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return models.Equiformer.forward(self, _prepare(data))

    def validate_tasks(self, dataset_to_tasks: dict[str, list[Task]]) -> None:
        """Take tasks on any data set, for what the model predicts.

        Raises:
            InputError: for a derivative that it was not trained on, which settings ask for.
        """
        for task in (task for tasks in dataset_to_tasks.values() for task in tasks):
            if task.inference_only:
                raise InputError(
                    f"predict_untrained_{task.property}: Equiformer predicts what its config says:"
                    " leave it out, or take a model with regress_forces and regress_stress"
                )


class EquiformerHead(torch.nn.Module, base.HeadInterface):
    """One output of :class:`EquiformerBackbone`, which has the parameters.

    Args:
        backbone: whose output it is.
        output_name: ``energy``, ``forces``, ``stress`` or another of the backbone's.
    """

    def __init__(self, backbone: EquiformerBackbone, output_name: str) -> None:
        super().__init__()
        config = backbone.config
        known = ["energy", *config.vector_heads]
        known += ["forces"] * config.gradient_forces + ["stress"] * config.regress_stress
        if output_name not in known:
            raise InputError(
                f"a head has output_name {output_name!r}; there are {', '.join(known)}"
            )
        self.output_name = output_name

    def forward(self, data: AtomicData, emb: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """Energy [B], vectors [N, 3] or stress [B, 9], keyed by ``output_name``."""
        return {self.output_name: emb[self.output_name]}


def _plain(value: Any) -> Any:
    """A list of hydra's config as a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


class DeNSBackbone(EquiformerV2Backbone, models.DeNSBackbone):
    """:class:`fairchem_equiformer.models.DeNSBackbone`, which no trainer of 2.x gives noise."""


class EnergyHead(models.EnergyHead, base.HeadInterface):
    """:class:`fairchem_equiformer.models.EnergyHead`, for a head named as its task."""


class ForceHead(models.ForceHead, base.HeadInterface):
    """:class:`fairchem_equiformer.models.ForceHead`, for a head named as its task."""


class DeNSEnergyHead(models.DeNSEnergyHead, base.HeadInterface):
    """:class:`fairchem_equiformer.models.DeNSEnergyHead`, for a head named as its task."""


class DeNSForceHead(models.DeNSForceHead, base.HeadInterface):
    """:class:`fairchem_equiformer.models.DeNSForceHead`, for a head named as its task."""


class StressHead(models.StressHead, base.HeadInterface):
    """:class:`fairchem_equiformer.models.StressHead`, as nine components.

    Args:
        backbone: whose features it reads.
        isotropic: ``mean`` and ``rmsd`` by which fairchem-core 1.10 normalised that part ...
        anisotropic: ... and that. A task of fairchem-core 2 has one normaliser for the whole.
        keys: those of :class:`fairchem_equiformer.models.StressHead`.
    """

    def __init__(
        self,
        backbone: EquiformerV2Backbone,
        isotropic: dict[str, float] | None = None,
        anisotropic: dict[str, float] | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(backbone, **keys)
        self.scales = {"isotropic": isotropic or {}, "anisotropic": anisotropic or {}}

    def forward(self, data: AtomicData, emb: Embedding) -> dict[str, Tensor]:
        """[B, 9], keyed by ``output_name``."""
        found = super().forward(data, emb)
        if not self.block.decompose:
            return {self.output_name: found[self.output_name].reshape(-1, 9)}
        parts = [
            found[f"{self.output_name}_{kind}"] * scale.get("rmsd", 1.0) + scale.get("mean", 0.0)
            for kind, scale in self.scales.items()
        ]
        return {self.output_name: symmetric_tensor(*parts).flatten(1)}


class DeNSStressHead(StressHead, models.DeNSStressHead):
    """:class:`fairchem_equiformer.models.DeNSStressHead`, as :class:`StressHead`."""


class HydraModel(base.HydraModel):
    """fairchem's hydra, which says what weight decay leaves alone and takes isolated atoms.

    Args:
        backbone: ``model``, a dotted name, and config keys of the backbone.
        heads: ``module``, a dotted name, and config keys of each head, by its name.
        options: the other arguments of fairchem's class.
    """

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        heads: dict[str, dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, heads, **{"supports_single_atoms": True, **options})

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, as in the flat model."""
        return no_weight_decay(self)
