"""Equiformer (V1): its size, and its symmetries."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from e3nn import o3
from scipy.special import spherical_jn
from torch import Tensor

from fairchem_equiformer.calculator import EquiformerCalculator
from fairchem_equiformer.graph.build import build_graph
from fairchem_equiformer.models import Equiformer
from fairchem_equiformer.nn.irreps.activation import Gate, Normalized
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
from fairchem_equiformer.nn.irreps.norm import IrrepsLayerNorm
from fairchem_equiformer.nn.irreps.tensor_product import TensorProduct
from fairchem_equiformer.nn.radial import (
    ExponentialNormalSmearing,
    SphericalBesselBasis,
    envelope,
)
from fairchem_equiformer.ops.edges import NodeShare
from fairchem_equiformer.so3.harmonics import harmonics
from fairchem_equiformer.so3.irreps import blocks, places
from tests.conformance import Conformance, predict
from tests.models import random_loss, results, scatter_weights
from tests.reference_v1 import Reference
from tests.structures import (
    batch_of,
    from_atoms,
    in_double,
    moved,
    single_atom,
    slab,
    slab_atoms,
)
from tests.tolerances import assert_all_close, assert_close, relative_error

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


def test_bessel_functions_learn_their_frequencies():
    """As many numbers as functions, which weight decay leaves alone."""
    with torch.device("meta"):
        wide = Equiformer(**QM9)
        model = Equiformer(**QM9, distance_function="bessel", num_distance_basis=8)
    read_by = 7 * 64  # hidden units: six blocks and the edge-degree embedding
    assert model.num_params == wide.num_params - 258 + 8 - read_by * (128 - 8)
    assert "distance_expansion.frequencies" in model.no_weight_decay()


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


class TestReference:
    """Against tests/reference_v1.py: e3nn's modules, on the same weights."""

    @pytest.mark.parametrize("irreps", [DEGREE_2, PARITY], ids=["SE(3)", "E(3)"])
    @every_variant
    def test_outputs_and_gradients(self, variant, irreps):
        self.compare(build(**variant, **irreps, max_neighbors=6))

    def test_bessel_functions(self):
        self.compare(build(distance_function="bessel", max_neighbors=6))

    def compare(self, model):
        model = model.double()
        data = in_double(batch_of(slab("Cu", "CO", 1), single_atom()))
        found = results(model, data)
        graph = build_graph(data, model.config.graph(otf=True))
        model.zero_grad()
        outputs = Reference(model, graph).outputs()
        random_loss(outputs).backward()
        assert_all_close(found[0], outputs, "formula")
        # All together, since some are zero but for rounding: (a x y) . y of the same edge.
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert_close(torch.cat([g.flatten() for g in found[1].values()]), expected, "formula")


def energy_of(model: Equiformer, data: Any) -> Any:
    """The energy as a function of positions, strained as `Equiformer` strains."""

    def energy(pos: Tensor, strain: Tensor) -> Tensor:
        moved_data = data.clone()
        deformation = torch.eye(3, dtype=pos.dtype) + (strain + strain.T) / 2
        moved_data.pos = pos @ deformation
        moved_data.cell = data.cell @ deformation
        return model(moved_data)["energy"]

    return energy


def cluster() -> Any:
    """Three atoms, near and far, in a small cell."""
    atoms = Atoms("OH2", [(0, 0, 0), (0.9, 0.3, 0.1), (-0.4, 0.8, 0.2)], cell=[4.0, 4.2, 4.4])
    atoms.pbc = True
    return in_double(batch_of(from_atoms(atoms)))


class TestDerivativesOfTheEnergy:
    @pytest.fixture(params=["exponential_normal", "bessel"])
    def model(self, request) -> Equiformer:
        keys = {"irreps_node_embedding": "4x0e+2x1e", "irreps_head": "2x0e+1x1e"}
        sizes = {"irreps_mlp_mid": "4x0e+2x1e", "irreps_feature": "4x0e", "edge_channels": 4}
        keys |= {**sizes, **DERIVED, "distance_function": request.param}
        return build(**keys, max_radius=3.0, num_layers=1).double()

    def test_forces_and_stress_against_finite_differences(self, model):
        data, step = cluster(), 1e-5
        energy = energy_of(model, data)
        out = model(data)
        none = torch.zeros(3, 3, dtype=torch.float64)
        for index in range(9):
            change = torch.zeros(9, dtype=torch.float64)
            change[index] = step
            change = change.view(3, 3)
            by_position = energy(data.pos + change, none) - energy(data.pos - change, none)
            by_strain = energy(data.pos, change) - energy(data.pos, -change)
            force = -by_position / (2 * step)
            stress = by_strain / (2 * step) / data.cell.det()
            for key, value in (("forces", force), ("stress", stress)):
                error = abs(value - out[key].flatten()[index]) / out[key].abs().max()
                assert error < 1e-6, key

    def test_they_can_be_differentiated(self, model):
        data = cluster()

        def outputs(pos: Tensor) -> tuple[Tensor, Tensor]:
            moved_data = data.clone()
            moved_data.pos = pos
            out = model(moved_data)
            return out["forces"], out["stress"]

        pos = data.pos.clone().requires_grad_()
        assert torch.autograd.gradcheck(outputs, (pos,))
        strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(energy_of(model, data), (pos, strain), fast_mode=True)

    def test_a_training_step_learns_forces(self, model):
        data = cluster()
        loss = model(data)["forces"].square().sum()
        loss.backward()
        with torch.no_grad():
            gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
            squares = sum(grad.square().sum() for grad in gradients.values())
            step = 1e-5 * loss / squares
            for parameter, grad in gradients.items():
                parameter.sub_(step * grad)
            gained = loss - model(data)["forces"].square().sum()
        assert gained.item() == pytest.approx((step * squares).item(), rel=0.01)

    def test_in_inference_mode(self, model):
        data = cluster()
        expected = predict(model, data)
        with torch.inference_mode():
            out = model(data.clone())
        assert_all_close(out, expected, "outputs")

    def test_a_molecule_without_a_cell_has_no_stress(self, model):
        data = cluster()
        boxed = data.clone()
        boxed.cell = 20 * torch.eye(3, dtype=torch.float64)[None]
        data.cell = torch.zeros_like(data.cell)
        boxed.pbc = data.pbc = torch.zeros(1, 3, dtype=torch.bool)
        found, expected = model(data), model(boxed)
        assert_close(found["energy"], expected["energy"], "outputs")
        assert_close(found["forces"], expected["forces"], "outputs")
        assert expected["stress"].abs().max() > 0
        assert not found["stress"].any()
        data.cell = None
        with pytest.raises(ValueError, match="no field 'cell'"):
            model(data)


class TestInitialization:
    """Components of variance one stay so, through every layer."""

    def test_layers_keep_the_variance(self):
        irreps = o3.Irreps("64x0e+64x1e+64x2e")
        x = torch.randn(500, irreps.dim)
        linear = IrrepsLinear(irreps, irreps)
        normalised = IrrepsLayerNorm(irreps)(3 * x)
        gate = Gate(irreps)
        gated = gate(torch.randn(500, gate.irreps_in.dim))
        for name, out in (("linear", linear(x)), ("norm", normalised), ("gate", gated)):
            for part in blocks(out, places(irreps)):
                assert part.square().mean().item() == pytest.approx(1, abs=0.06), name
        assert linear(x).mean().abs() < 0.05

    def test_tensor_product(self):
        irreps, sh = o3.Irreps("64x0e+64x1e+64x2e"), o3.Irreps("1x0e+1x1e+1x2e")
        product = TensorProduct(irreps, sh, irreps)
        directions = harmonics(torch.randn(2000, 3), 2)
        out = product(torch.randn(2000, irreps.dim), directions)
        for part in blocks(out, places(product.irreps_out)):
            assert part.square().mean().item() == pytest.approx(1, abs=0.25)

    @pytest.mark.parametrize(
        "function", [Normalized(torch.nn.functional.silu), Normalized(torch.sigmoid)]
    )
    def test_second_moments_are_one(self, function):
        nodes, weights = np.polynomial.hermite_e.hermegauss(100)
        values = function(torch.from_numpy(nodes)).square()
        moment = (torch.from_numpy(weights) * values).sum() / weights.sum()
        assert moment.item() == pytest.approx(1, abs=5e-3)  # e3nn's is a mean of draws


class TestKeys:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"irreps_head": "32x0e+16x1"}, "irreps_head is '32x0e.16x1', it must be irreps as"),
            ({"irreps_feature": "16x1e+512x0e"}, "irreps_feature .* with 0e first"),
            ({"irreps_sh": "1x0e+2x1e"}, "irreps_sh .* it must be 1x0e.1x1e .SE.3.. or 1x0e.1x1o"),
            ({"irreps_mlp_mid": "8x0e+8x1o"}, "irreps_mlp_mid .* of even irreps"),
            ({"regress_stress": True}, "regress_stress is True, it must be False"),
            ({"attention": "linear"}, "attention is 'linear', it must be 'mlp' or 'dot_product'"),
            ({"vector_outputs": ["energy"]}, "vector_outputs .* names of outputs"),
            ({"alpha_drop": 1}, "alpha_drop is 1, it must be a probability"),
            ({"num_layers": 2.5}, "num_layers is 2.5, it must be a whole number"),
            ({"num_head": 4}, "unknown key 'num_head' in the config of Equiformer; did you mean"),
        ],
    )
    def test_a_wrong_value_is_named(self, keys, message):
        with pytest.raises(ValueError, match=message):
            Equiformer(**keys)

    def test_a_checkpoint_of_another_size(self):
        other = build(num_layers=1).state_dict()
        with pytest.raises(ValueError, match="num_layers: checkpoint 1, config 2"):
            build().load_state_dict(other)


class TestCheckpoint:
    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
    def test_in_ase(self, tmp_path, dtype):
        """Derived forces and stress come in units."""
        keys = {**KEYS, **DERIVED}
        model = build(**DERIVED)
        scale = {"energy": {"mean": 1.5, "rmsd": 2.0}}
        scale |= {name: {"mean": 0.0, "rmsd": 2.0} for name in ("forces", "stress")}
        levels = {"energy": "system", "forces": "atom", "stress": "system"}
        config = {
            "model": {"name": "fairchem_equiformer.Equiformer", **keys},
            "outputs": {name: {"level": level} for name, level in levels.items()},
            "dataset": {"transforms": {"normalizer": scale}},
        }
        path = tmp_path / "checkpoint.pt"
        torch.save({"state_dict": model.state_dict(), "config": config}, path)
        atoms = slab_atoms()
        atoms.set_tags(0)  # as from_atoms has them
        atoms.calc = EquiformerCalculator(path, dtype=dtype)
        expected = predict(model, batch_of(from_atoms(atoms)))
        close = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 0.1}[dtype]
        energy = 2 * expected["energy"].item() + 1.5
        assert atoms.get_potential_energy() == pytest.approx(energy, rel=close)
        for found, name in (
            (atoms.get_forces(), "forces"),
            (atoms.get_stress(voigt=False).reshape(1, 9), "stress"),
        ):
            wanted = 2 * expected[name]
            assert relative_error(torch.from_numpy(found), wanted) < close

    def test_no_forces_of_shares(self, monkeypatch):
        """Each process would have the derivative of its own atoms alone."""
        model = build(**DERIVED)
        monkeypatch.setattr(model, "node_share", lambda _: NodeShare(slice(0, 2), None, None))
        with pytest.raises(ValueError, match="leave out graph_parallel"):
            model(batch_of(slab()))


class TestCutoff:
    """An atom comes within reach of two others."""

    @pytest.fixture(params=["learnable_gaussian", "exponential_normal", "bessel"])
    def jump(self, request):
        """Change of energy and forces, from just outside to just inside."""

        def jump(**changes: Any) -> tuple[float, float]:
            keys = {**DERIVED, "regress_stress": False, "distance_function": request.param}
            model = build(**{**keys, **changes}, max_radius=4.0).double()
            found = []
            for distance in (4 + 1e-5, 4 - 1e-5):
                positions = [(0, 0, 0), (0, 1.1, 0.4), (distance, 0, 0)]
                atoms = Atoms("CuOH", positions, cell=[20.0] * 3)
                found.append(predict(model, in_double(batch_of(from_atoms(atoms)))))
            return tuple(
                (found[1][key] - found[0][key]).abs().max().item() for key in ("energy", "forces")
            )

        return jump

    @every_variant
    def test_smooth(self, jump, variant):
        energy, forces = jump(smooth_cutoff=True, **variant)
        assert energy < 1e-12
        assert forces < 1e-8

    def test_published_models_are_not(self, jump):
        """Radial functions have biases, and softmax gives the first neighbour all the weight."""
        energy, _ = jump()
        assert energy > 1e-5

    @pytest.mark.parametrize("p", [5, 6])
    def test_the_envelope(self, p):
        x = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
        a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
        expected = 1 - a * x**p + b * x ** (p + 1) - c * x ** (p + 2)
        assert_close(envelope(x, p)[:3], expected[:3], "wigner")
        (slope,) = torch.autograd.grad(envelope(x, p).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert envelope(x, p)[3] == slope[0] == slope[2] == slope[3] == 0
        assert curvature[2] == curvature[3] == 0

    def test_the_cosine_takes_the_basis_to_zero(self):
        """With its slope, at the cutoff; so the published models of MD17 have it."""
        distance = torch.tensor([5 - 1e-4], dtype=torch.float64, requires_grad=True)
        basis = ExponentialNormalSmearing(5.0).double()(distance)
        assert basis.abs().max() < 1e-8
        (slope,) = torch.autograd.grad(basis.sum(), distance)
        assert slope.abs() < 1e-2

    def test_bessel_functions(self):
        """They are sqrt(2 / cutoff^3) n pi j0(n pi d / cutoff) under the envelope, to zero."""
        distance = torch.tensor([0.3, 1.0, 2.7, 4.9, 5.0, 5.2], dtype=torch.float64)
        basis = SphericalBesselBasis(5.0, 8).double()
        x = distance[:, None].numpy() / 5
        frequencies = np.pi * np.arange(1, 9)
        waves = np.sqrt(2 / 5**3) * frequencies * spherical_jn(0, frequencies * x)
        expected = np.where(x < 1, 1 - 21 * x**5 + 35 * x**6 - 15 * x**7, 0) * waves
        basis.frequencies.data.copy_(torch.from_numpy(frequencies))
        assert_close(basis(distance), torch.from_numpy(expected), "wigner")
        edge = torch.tensor([5 - 1e-4], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(basis(edge).sum(), edge, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, edge)
        assert max(basis(edge).abs().max(), slope.abs(), curvature.abs()) < 1e-3
