"""Names of models in configs: fairchem's, the original release's and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairchem_equiformer import models
from fairchem_equiformer.checkpoints.reading import CheckpointError

_OURS = "fairchem_equiformer."
_THEIRS = "fairchem.core.models.equiformer_v2."


@dataclass(frozen=True)
class Names:
    """By which names configs ask for a class of :mod:`fairchem_equiformer.models`.

    Attributes:
        module: the class.
        registered: in fairchem-core 1.10; where two mean one of ours, the last is today's.
        classes: names of fairchem-core's classes, for dotted names.
        own: what fairchem1 registers it as.
    """

    module: type[Any]
    registered: tuple[str, ...]
    classes: tuple[str, ...]
    own: str

    @property
    def ours(self) -> str:
        """The public name of ours."""
        return _OURS + self.module.__name__

    @property
    def theirs(self) -> str:
        """The name that fairchem's configs of today use."""
        return self.registered[-1]

    def mean(self, name: str) -> bool:
        """Whether a config's `name` is one of these."""
        if name.startswith(_THEIRS):
            return name.rpartition(".")[2] in self.classes
        return name in self.registered or self.is_ours(name)

    def is_ours(self, name: str) -> bool:
        """Whether a config's `name` is one that ours has."""
        last = name.rpartition(".")[2]
        return name == self.own or (name.startswith(_OURS) and last == self.module.__name__)


FLAT = Names(models.EquiformerV2, ("equiformer_v2",), ("EquiformerV2",), "fairchem_equiformer_v2")
EQUIFORMER = Names(models.Equiformer, (), (), "equiformer")  # of which fairchem has none
BACKBONES = (
    Names(
        models.EquiformerV2Backbone,
        ("equiformer_v2_backbone",),
        ("EquiformerV2Backbone",),
        "fairchem_equiformer_v2_backbone",
    ),
    Names(
        models.DeNSBackbone,
        ("equiformer_v2_dens_backbone",),
        ("EqV2DeNSBackbone",),
        "fairchem_equiformer_v2_dens_backbone",
    ),
)
HEADS = (
    Names(
        models.EnergyHead,
        ("equiformer_v2_energy_head", "equiformerV2_scalar_head"),
        ("EquiformerV2EnergyHead", "EqV2ScalarHead"),
        "fairchem_equiformer_v2_energy_head",
    ),
    Names(
        models.ForceHead,
        ("equiformer_v2_force_head", "equiformerV2_vector_head"),
        ("EquiformerV2ForceHead", "EqV2VectorHead"),
        "fairchem_equiformer_v2_force_head",
    ),
    Names(
        models.StressHead,
        ("rank2_symmetric_head",),
        ("Rank2SymmetricTensorHead",),
        "fairchem_equiformer_v2_stress_head",
    ),
    Names(
        models.DeNSEnergyHead,
        ("eqV2_DeNS_scalar_head",),
        ("DeNSScalarHead",),
        "fairchem_equiformer_v2_dens_energy_head",
    ),
    Names(
        models.DeNSForceHead,
        ("eqV2_DeNS_vector_head",),
        ("DeNSVectorHead",),
        "fairchem_equiformer_v2_dens_force_head",
    ),
    Names(
        models.DeNSStressHead,
        ("dens_rank2_symmetric_head",),
        ("DeNSRank2Head",),
        "fairchem_equiformer_v2_dens_stress_head",
    ),
)


def resolve(where: str, name: str | None, among: tuple[Names, ...]) -> Names:
    """Whose name this is.

    Args:
        where: stands the name, for the message.
        name: in a config.
        among: these.

    Raises:
        CheckpointError: for none of them.
    """
    for names in among:
        if name is not None and names.mean(name):
            return names
    known = sorted(name for names in among for name in (*names.registered, names.ours))
    raise CheckpointError(f"{where} is {name!r}; known are {', '.join(known)}")
