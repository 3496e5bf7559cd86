"""Equiformer (V1): its size, and its symmetries."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from e3nn import o3
from torch import Tensor

from fairchem_equiformer.models import Equiformer
from fairchem_equiformer.so3.harmonics import harmonics
from tests.conformance import Conformance, predict
from tests.models import scatter_weights
from tests.structures import batch_of, in_double, moved, slab
from tests.tolerances import assert_all_close, assert_close

# A small model of all parts.
KEYS: dict[str, Any] = {
    "max_neighbors": 12,
    "max_radius": 6.0,
    "max_num_elements": 90,
    "num_layers": 2,
    "irreps_node_embedding": "16x0e+8x1e",
    "irreps_head": "8x0e+4x1e",
    "num_heads": 2,
    "irreps_mlp_mid": "24x0e+8x1e",
    "irreps_feature": "16x0e+8x1e",
    "num_distance_basis": 8,
    "edge_channels": 16,
    "alpha_drop": 0.0,
    "regress_forces": True,
}
PARITY = {
    "irreps_node_embedding": "16x0e+4x0o+4x1e+8x1o",
    "irreps_sh": "1x0e+1x1o",
    "irreps_head": "8x0e+2x0o+2x1e+4x1o",
    "irreps_mlp_mid": "24x0e+4x0o+4x1e+8x1o",
    "irreps_feature": "16x0e+4x0o+4x1e+8x1o",
}
DEGREE_2 = {
    "irreps_node_embedding": "16x0e+8x1e+4x2e",
    "irreps_sh": "1x0e+1x1e+1x2e",
    "irreps_head": "8x0e+4x1e+2x2e",
    "irreps_mlp_mid": "24x0e+8x1e+4x2e",
    "irreps_feature": "16x0e",
}
DERIVED = {
    "direct_forces": False,
    "regress_stress": True,
    "distance_function": "exponential_normal",
}
VARIANTS = {
    "nonlinear": {},
    "linear": {"nonlinear_message": False},
    "dot_product": {"attention": "dot_product"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def build(**changes: Any) -> Equiformer:
    return scatter_weights(Equiformer(**{**KEYS, **changes})).eval()


class TestNonLinear(Conformance):
    def build(self, **changes: Any) -> Equiformer:
        return build(**changes)


class TestDotProduct(Conformance):
    def build(self, **changes: Any) -> Equiformer:
        return build(attention="dot_product", **changes)


class TestDerivatives(Conformance):
    """Forces and stress as the energy's derivatives."""

    SYSTEM: ClassVar = {"energy": (), "stress": (9,)}

    def build(self, **changes: Any) -> Equiformer:
        return build(nonlinear_message=False, **DEGREE_2, **DERIVED, **changes)

    def test_gradients_or_none_give_the_same_bits(self):
        """To rounding: PyTorch takes derivatives in other steps where they are taken again."""
        model, data = self.build(), self.wide_data()
        assert_all_close(model(data.clone()), predict(model, data), "outputs")


# The poster's, and what section D of the paper on Equiformer counts.
SIZES = {
    "nonlinear": 9_123_331,
    "linear": 7_837_699,
    "dot_product": 8_722_435,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_sizes(variant):
    with torch.device("meta"):
        model = Equiformer(**VARIANTS[variant])
    assert model.num_params == SIZES[variant]


def test_size_with_auxiliary_head():
    keys = {"num_layers": 18, "irreps_feature": "512x0e+256x1e", "vector_outputs": ["displacement"]}
    with torch.device("meta"):
        assert Equiformer(**keys).num_params == 26_773_379


QM9 = {
    "use_tag_embedding": False,
    "max_num_elements": 5,
    "irreps_node_embedding": "128x0e+64x1e+32x2e",
    "irreps_sh": "1x0e+1x1e+1x2e",
    "irreps_head": "32x0e+16x1e+8x2e",
    "num_heads": 4,
    "irreps_mlp_mid": "384x0e+192x1e+96x2e",
}


@pytest.mark.parametrize(
    ("variant", "millions"), [("nonlinear", 3.53), ("linear", 3.01), ("dot_product", 3.35)]
)
def test_published_sizes_of_qm9(variant, millions):
    with torch.device("meta"):
        model = Equiformer(**QM9, **VARIANTS[variant])
    assert round(model.num_params / 1e6, 2) == millions


def turned(outputs: dict[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """What a structure's outputs are after the rotation."""
    expected = dict(outputs)
    for key in ("forces", "displacement"):
        if key in expected:
            expected[key] = outputs[key] @ rotation.T
    if "stress" in expected:
        stress = outputs["stress"].view(-1, 3, 3)
        expected["stress"] = (rotation @ stress @ rotation.T).flatten(1)
    return expected


def rotated_pair(model: Equiformer, rotation: Tensor) -> tuple[dict[str, Tensor], ...]:
    model = model.double()
    structure = in_double(slab("Pt", "CH3OH"))
    outputs = model(batch_of(structure))
    return turned(outputs, rotation), model(batch_of(moved(structure, rotation)))


class TestSymmetry:
    @every_variant
    def test_rotation(self, variant):
        model = build(**DEGREE_2, **variant, vector_outputs=["displacement"])
        expected, found = rotated_pair(model, o3.rand_matrix(dtype=torch.float64))
        assert found.keys() == {"energy", "forces", "displacement"}
        for key in found:
            assert_close(found[key], expected[key], "outputs", name=key)

    @every_variant
    def test_rotation_and_reflection(self, variant):
        rotation = -o3.rand_matrix(dtype=torch.float64)
        expected, found = rotated_pair(build(**PARITY, **variant), rotation)
        for key in found:
            assert_close(found[key], expected[key], "outputs", name=key)

    def test_derivatives(self):
        rotation = o3.rand_matrix(dtype=torch.float64)
        expected, found = rotated_pair(build(**DERIVED), rotation)
        assert found.keys() == {"energy", "forces", "stress"}
        for key in found:
            assert_close(found[key], expected[key], "outputs", name=key)


@pytest.mark.parametrize("lmax", [0, 1, 3, 8])
def test_harmonics_are_those_of_e3nn(lmax):
    vector = torch.randn(20, 3, dtype=torch.float64)
    expected = o3.spherical_harmonics(list(range(lmax + 1)), vector, True, "component")
    assert_close(harmonics(vector, lmax), expected, "wigner")
