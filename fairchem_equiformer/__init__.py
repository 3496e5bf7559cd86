"""EquiformerV2: the same weights and numbers as fairchem's, several times faster.

Importing this package needs nothing but Python; each name below is imported when it is first asked
for. Those of models are fairchem-core 1.10's registered classes where that is installed, and the
same models in plain PyTorch (``fairchem_equiformer.models``) where it is not.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from fairchem_equiformer.threads import wait_asleep

if TYPE_CHECKING:
    from fairchem_equiformer.calculator import EquiformerCalculator
    from fairchem_equiformer.fairchem1.data.md17 import MD17Dataset
    from fairchem_equiformer.fairchem1.data.noisy_nodes import NoisyNodesLmdb
    from fairchem_equiformer.fairchem1.data.qm9 import QM9Dataset
    from fairchem_equiformer.fairchem1.loss import MaskedMAE
    from fairchem_equiformer.fairchem1.models import (
        DeNSBackbone,
        DeNSEnergyHead,
        DeNSForceHead,
        DeNSStressHead,
        EnergyHead,
        Equiformer,
        EquiformerV2,
        EquiformerV2Backbone,
        ForceHead,
        StressHead,
    )
    from fairchem_equiformer.fairchem1.trainer import AuxiliaryTaskTrainer, GradientForcesTrainer

__all__ = [
    "AuxiliaryTaskTrainer",
    "DeNSBackbone",
    "DeNSEnergyHead",
    "DeNSForceHead",
    "DeNSStressHead",
    "EnergyHead",
    "Equiformer",
    "EquiformerCalculator",
    "EquiformerV2",
    "EquiformerV2Backbone",
    "ForceHead",
    "GradientForcesTrainer",
    "MD17Dataset",
    "MaskedMAE",
    "NoisyNodesLmdb",
    "QM9Dataset",
    "StressHead",
]
__version__ = "0.2.0.dev0"

PATCHES_VARIABLE = "FAIRCHEM_EQUIFORMER_PATCHES"

_MODELS = (
    "DeNSBackbone",
    "DeNSEnergyHead",
    "DeNSForceHead",
    "DeNSStressHead",
    "EnergyHead",
    "Equiformer",
    "EquiformerV2",
    "EquiformerV2Backbone",
    "ForceHead",
    "StressHead",
)
_MODULES = {
    "AuxiliaryTaskTrainer": "fairchem1.trainer",
    "EquiformerCalculator": "calculator",
    "GradientForcesTrainer": "fairchem1.trainer",
    "MD17Dataset": "fairchem1.data.md17",
    "MaskedMAE": "fairchem1.loss",
    "NoisyNodesLmdb": "fairchem1.data.noisy_nodes",
    "QM9Dataset": "fairchem1.data.qm9",
}

wait_asleep()  # before somebody imports torch


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        module = "fairchem1.models" if fairchem1_installed() else "models"
    elif name in _MODULES:
        module = _MODULES[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


@cache
def fairchem1_installed() -> bool:
    """Whether this environment has fairchem-core 1.10."""
    try:
        return metadata.version("fairchem-core").startswith("1.10.")
    except metadata.PackageNotFoundError:
        return False


def patches_wanted() -> bool:
    """Whether there is a fairchem-core 1.10 to put right (``fairchem1.patches``).

    Raises:
        ValueError: for a value of the environment's variable other than ``on`` and ``off``.
    """
    choice = os.environ.get(PATCHES_VARIABLE, "on")
    if choice not in ("on", "off"):
        raise ValueError(f"{PATCHES_VARIABLE} is {choice!r}, it must be on or off")
    return choice == "on" and fairchem1_installed()
