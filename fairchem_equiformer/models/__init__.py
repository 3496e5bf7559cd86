"""In plain PyTorch: EquiformerV2 (config, backbone, heads, flat model), and Equiformer (V1)."""

from fairchem_equiformer.models.backbone import Embedding, EquiformerV2Backbone
from fairchem_equiformer.models.config import ModelConfig
from fairchem_equiformer.models.config_v1 import EquiformerConfig
from fairchem_equiformer.models.dens import (
    DeNSBackbone,
    DeNSEnergyHead,
    DeNSForceHead,
    DeNSStressHead,
)
from fairchem_equiformer.models.equiformer_v1 import Equiformer
from fairchem_equiformer.models.equiformer_v2 import EquiformerV2
from fairchem_equiformer.models.heads import EnergyHead, ForceHead, StressHead
from fairchem_equiformer.models.hydra import EquiformerV2Hydra

__all__ = [
    "DeNSBackbone",
    "DeNSEnergyHead",
    "DeNSForceHead",
    "DeNSStressHead",
    "Embedding",
    "EnergyHead",
    "Equiformer",
    "EquiformerConfig",
    "EquiformerV2",
    "EquiformerV2Backbone",
    "EquiformerV2Hydra",
    "ForceHead",
    "ModelConfig",
    "StressHead",
]
