"""Every model of the package, and with compiled kernels and without, holds to `Conformance`."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from fairchem_equiformer.models import (
    EnergyHead,
    EquiformerV2,
    EquiformerV2Hydra,
    ForceHead,
    StressHead,
)
from fairchem_equiformer.ops.native import loader
from tests.conformance import Conformance
from tests.models import KEYS, scatter_weights


class TestFlat(Conformance):
    def build(self, **changes: Any) -> EquiformerV2:
        return scatter_weights(EquiformerV2(**{**KEYS, **changes}))


class TestFlatInPyTorch(TestFlat):
    """Without compiled kernels, as where there is no compiler."""

    @pytest.fixture(autouse=True)
    def _no_kernels(self, monkeypatch):
        monkeypatch.setattr(loader, "library", lambda: None)


class TestGate(Conformance):
    def build(self, **changes: Any) -> EquiformerV2:
        keys = {**KEYS, "use_gate_act": True, "use_grid_mlp": False}
        return scatter_weights(EquiformerV2(**{**keys, **changes}))


class TestMaterials(Conformance):
    """Energy, forces and stress in hydra form, as OMat24's models."""

    SYSTEM: ClassVar = {"energy": (), "stress_isotropic": (1,), "stress_anisotropic": (5,)}

    def build(self, **changes: Any) -> EquiformerV2Hydra:
        stress = {"decompose": True, "edge_level_mlp": True, "use_source_target_embedding": True}
        heads = {
            "energy": (EnergyHead, {}),
            "forces": (ForceHead, {}),
            "stress": (StressHead, stress),
        }
        return scatter_weights(EquiformerV2Hydra({**KEYS, **changes}, heads))


class TestDirect(Conformance):
    """IS2RE with displacements as auxiliary task: tags, learned Gaussians, no element embedding."""

    VECTORS = ("displacement",)

    def build(self, **changes: Any) -> EquiformerV2Hydra:
        keys = {
            "use_tag_embedding": True,
            "distance_function": "learnable_gaussian",
            "num_distance_basis": 16,
            "use_atom_edge_embedding": False,
        }
        heads = {
            "energy": (EnergyHead, {}),
            "displacement": (ForceHead, {"output_name": "displacement"}),
        }
        return scatter_weights(EquiformerV2Hydra({**KEYS, **keys, **changes}, heads))
