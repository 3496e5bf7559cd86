"""EquiformerV2 and Equiformer in fairchem-core 2.x: models, heads, checkpoints in its form.

Nothing is registered and nothing in fairchem-core is changed: configs and checkpoints name the
classes here by their dotted names.

Raises:
    ImportError: where another fairchem-core is installed, or none.
"""

from importlib import metadata

try:
    _version = metadata.version("fairchem-core")
except metadata.PackageNotFoundError:
    _version = ""
if not _version.startswith("2."):
    _found = f"fairchem-core {_version} is installed" if _version else "there is none"
    raise ImportError(
        f"this needs fairchem-core 2, and {_found}: pip install 'fairchem-equiformer[fairchem2]'"
        " into an environment of its own"
    )

from fairchem_equiformer.fairchem2.checkpoint import convert, load_predict_unit
from fairchem_equiformer.fairchem2.models import (
    DeNSBackbone,
    DeNSEnergyHead,
    DeNSForceHead,
    DeNSStressHead,
    EnergyHead,
    EquiformerBackbone,
    EquiformerHead,
    EquiformerV2Backbone,
    ForceHead,
    HydraModel,
    StressHead,
)

__all__ = [
    "DeNSBackbone",
    "DeNSEnergyHead",
    "DeNSForceHead",
    "DeNSStressHead",
    "EnergyHead",
    "EquiformerBackbone",
    "EquiformerHead",
    "EquiformerV2Backbone",
    "ForceHead",
    "HydraModel",
    "StressHead",
    "convert",
    "load_predict_unit",
]
