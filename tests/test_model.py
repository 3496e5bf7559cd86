"""What the flat model does by itself: its contract, symmetries, training and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2 as Stock

from fairchem_equiformer import EquiformerV2
from fairchem_equiformer.nn.regularization import ChannelDropout, GraphDropPath
from tests.conformance import (
    assert_same_bits,
    in_float64,
    predict,
)
from tests.models import KEYS, gradients, ours, random_loss, stock_class
from tests.structures import (
    batch_of,
    from_atoms,
    in_double,
    moved,
    rutile,
    single_atom,
    slab,
    three_slabs,
)
from tests.tolerances import TOLERANCES, assert_all_close, assert_close, relative_error

GATE = {"use_gate_act": True, "use_grid_mlp": False}
EVERY_ACTIVATION = pytest.mark.parametrize(
    "changes",
    [{}, GATE, {"use_sep_s2_act": False}, {"use_grid_mlp": False}],
    ids=["grid MLP", "gate", "S2 grid MLP", "separable S2"],
)


class TestContract:
    def test_found_by_dotted_path_and_by_name(self):
        for name in ("fairchem_equiformer.EquiformerV2", "fairchem_equiformer_v2"):
            assert registry.get_model_class(name) is EquiformerV2

    def test_takes_no_name_from_fairchem(self):
        assert registry.get_model_class("equiformer_v2") is Stock

    def test_energy_only(self):
        out = predict(ours(regress_forces=False), three_slabs())
        assert list(out) == ["energy"]

    def test_runs_as_many_blocks_as_num_layers_says(self):
        """fairchem's own test cuts a loaded model to its first block this way."""
        model = ours(num_layers=3)
        model.num_layers = 1
        short = ours(num_layers=1)
        short.load_state_dict(
            {name: p for name, p in model.state_dict().items() if name in short.state_dict()}
        )
        data = three_slabs()
        assert_same_bits(predict(model, data), predict(short, data))

    def test_counts_its_parameters(self):
        model = ours(load_energy_lin_ref=True)
        assert model.num_params == sum(p.numel() for p in model.parameters())
        assert not model.energy_lin_ref.requires_grad


class TestDeterminism:
    @EVERY_ACTIVATION
    def test_two_calls_give_the_same_bits(self, changes):
        model, data = ours(**changes), three_slabs()
        assert_same_bits(predict(model, data), predict(model, data))

    @EVERY_ACTIVATION
    def test_gradients_or_none_give_the_same_bits(self, changes):
        model, data = ours(**changes), three_slabs()
        assert_same_bits(model(data.clone()), predict(model, data))

    def test_the_same_seed_gives_the_same_training_step(self):
        model, data = ours(alpha_drop=0.2, drop_path_rate=0.2, proj_drop=0.2), three_slabs()
        outs = []
        for _ in range(2):
            torch.manual_seed(3)
            outs.append(predict(model, data))
        assert_same_bits(*outs)

    def test_construction_draws_from_the_global_seed(self):
        models = []
        for _ in range(2):
            torch.manual_seed(5)
            models.append(EquiformerV2(**KEYS).state_dict())
        assert_same_bits(*models)


class TestCrystals:
    """Unrattled, all neighbours come in shells, which `max_neighbors` cuts."""

    CHANGES = ("moved", "reversed", "repeated")

    @staticmethod
    def energy_per_atom(atoms, strict):
        torch.manual_seed(0)
        model = ours(max_neighbors=20, enforce_max_neighbors_strictly=strict)
        return predict(model, batch_of(from_atoms(atoms)))["energy"] / len(atoms)

    @staticmethod
    def changed(atoms, change):
        atoms = atoms.copy()
        if change == "moved":
            atoms.translate(0.3)
        return {"moved": atoms, "reversed": atoms[::-1], "repeated": atoms * (2, 1, 1)}[change]

    @pytest.mark.parametrize("change", CHANGES)
    def test_not_strict_they_are_the_same_however_they_are_written(self, change):
        energy = self.energy_per_atom(rutile(), strict=False)
        other = self.energy_per_atom(self.changed(rutile(), change), strict=False)
        assert_close(other, energy, "outputs")

    @pytest.mark.parametrize("change", CHANGES)
    def test_strict_they_are_not_as_the_readme_says(self, change):
        energy = self.energy_per_atom(rutile(), strict=True)
        other = self.energy_per_atom(self.changed(rutile(), change), strict=True)
        assert relative_error(other, energy) > 10 * TOLERANCES["outputs"][torch.float32]


def rotation_error(structure, changes, rotation):
    """Relative error in energies and in forces that a rotation of the input makes, in float64."""
    torch.manual_seed(0)
    model = ours(**changes)
    still = in_float64(model, structure)
    turned = in_float64(model, moved(structure, rotation))
    return {
        "energy": relative_error(turned["energy"], still["energy"]),
        "forces": relative_error(turned["forces"] @ rotation, still["forces"]),
    }


class TestRotation:
    """SiLU on a grid of points is equivariant up to what the grid cannot resolve; gates are exact.

    Measured with S2 activation at lmax 3, as a share of the largest value, on grids of 8, 14 and 30
    points: up to 6e-2, 2e-3 and 6e-6 in energy, 0.13, 7e-3 and 5e-5 in forces.
    """

    def test_gate_activation_is_exact(self):
        rotation = o3.rand_matrix(dtype=torch.float64)
        errors = rotation_error(in_double(slab("Pt", "CH3OH")), GATE, rotation)
        assert max(errors.values()) < TOLERANCES["outputs"][torch.float64]

    @pytest.mark.parametrize("sep", [True, False], ids=["separable S2", "S2"])
    @pytest.mark.parametrize("mlp", [True, False], ids=["grid MLP", "no grid MLP"])
    def test_finer_grids_are_more_exact(self, sep, mlp):
        options = {"use_sep_s2_act": sep, "use_grid_mlp": mlp}
        structure, rotation = in_double(slab("Pt", "CH3OH")), o3.rand_matrix(dtype=torch.float64)
        coarse, medium, fine = (
            rotation_error(structure, {**options, "grid_resolution": points}, rotation)
            for points in (8, 14, 30)
        )
        for key in coarse:
            assert coarse[key] < 0.3
            assert medium[key] < coarse[key] / 3
            assert fine[key] < medium[key] / 10

    def test_edges_along_the_axes(self):
        """Along y the azimuth of an edge's frame is undefined."""
        line = in_double(single_atom())
        line.pos = torch.tensor([[0, 0, 0], [0, 2.0, 0], [0, -2.1, 0]], dtype=torch.float64)
        line.atomic_numbers = torch.tensor([29.0, 8.0, 6.0])
        line.natoms = 3
        identity = torch.eye(3, dtype=torch.float64)
        along_x, along_z = -identity[[1, 0, 2]], identity[[2, 0, 1]]
        for rotation in (along_x, along_z, o3.rand_matrix(dtype=torch.float64)):
            errors = rotation_error(line, GATE, rotation)
            assert max(errors.values()) < TOLERANCES["outputs"][torch.float64]


class TestNeighbourless:
    def test_single_atom(self):
        model = ours()
        out = predict(model, batch_of(single_atom()))
        assert out["energy"].isfinite().all()
        assert torch.equal(out["forces"], torch.zeros(1, 3))
        assert all(
            grad.isfinite().all() for grad in gradients(model, batch_of(single_atom())).values()
        )

    def test_energy_of_atoms_far_apart_adds_up(self):
        model = ours()
        pair = single_atom("Cu")
        pair.pos = torch.tensor([[0.0, 0.0, 0.0], [15.0, 0.0, 0.0]])
        pair.atomic_numbers = torch.tensor([29.0, 8.0])
        pair.natoms = 2
        alone = predict(model, batch_of(single_atom("Cu"), single_atom("O")))["energy"]
        both = predict(model, batch_of(pair))["energy"]
        assert_close(both, alone.sum(dim=0, keepdim=True), "outputs")


class TestRegularisation:
    @pytest.mark.parametrize("key", ["alpha_drop", "drop_path_rate", "proj_drop"])
    def test_acts_in_training_only(self, key):
        model, data = ours(**{key: 0.5}), three_slabs()
        plain = ours()
        plain.load_state_dict(model.state_dict())
        model.eval()
        assert_same_bits(predict(model, data), predict(plain, data))
        model.train()
        first, second = predict(model, data), predict(model, data)
        assert not torch.equal(first["energy"], second["energy"])
        assert not torch.equal(first["forces"], second["forces"])

    def test_stochastic_depth_is_by_structure_and_right_on_average(self):
        drop, draws = GraphDropPath(0.25), 4000
        batch = torch.arange(draws).repeat_interleave(2)
        x = torch.randn(1, 3, 4).expand(2 * draws, 3, 4)
        y = drop(x, batch, draws)
        kept = (y != 0).flatten(1).any(dim=1)
        assert torch.equal(kept[0::2], kept[1::2])  # the two atoms of a structure together
        assert torch.allclose(y[kept], x[kept] / 0.75)
        assert kept.float().mean() == pytest.approx(0.75, abs=5 * math.sqrt(0.19 / draws))
        assert drop.eval()(x, batch, draws) is x

    def test_channel_dropout_is_by_atom_and_channel_and_right_on_average(self):
        drop, draws = ChannelDropout(0.25), 4000
        x = torch.randn(draws, 4, 3)
        y = drop(x)
        kept = y != 0
        assert torch.equal(kept, kept[:, :1].expand_as(kept))  # all orders of an irrep together
        assert torch.allclose(y[kept], x[kept] / 0.75)
        share = kept[:, 0].float().mean()
        assert share == pytest.approx(0.75, abs=5 * math.sqrt(0.19 / (3 * draws)))
        assert torch.equal(drop.eval()(x), x)

    def test_attention_dropout_is_right_on_average(self):
        """Its result is linear in the attention weights, so the mean over masks is the result."""
        backbone, draws = ours(alpha_drop=0.3), 150
        with torch.no_grad():
            embedding = backbone.embed(batch_of(slab("Ni", "H2O")))
            inputs = embedding.node_embedding, embedding.inputs
            attention = backbone.blocks[0].ga
            sampled = torch.stack([attention(*inputs) for _ in range(draws)])
            exact = attention.eval()(*inputs)
        spread = sampled.std(dim=0)
        assert (spread > 0).all()
        deviation = (sampled.mean(dim=0) - exact) / (spread / math.sqrt(draws))
        assert deviation.square().mean() == pytest.approx(1, abs=0.3)


# torch 2.4's own activation checkpointing calls autocast by its old name.
@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
class TestTraining:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            GATE,
            {"use_gate_act": True},
            {"use_sep_s2_act": False},
            {"use_sep_s2_act": False, "use_grid_mlp": False},
            {"use_grid_mlp": False},
            {"use_m_share_rad": True, "mmax_list": [3]},
            {"share_atom_edge_embedding": True, "mmax_list": [0]},
            {"use_attn_renorm": False, "load_energy_lin_ref": True},
        ],
        ids=str,
    )
    def test_every_parameter_gets_a_gradient(self, changes):
        """Data-parallel training waits for all of them, at every step."""
        grads = gradients(ours(**changes), three_slabs())
        assert [name for name, grad in grads.items() if grad is None] == []
        assert all(grad.isfinite().all() for grad in grads.values())

    def test_every_parameter_gets_a_gradient_without_edges(self):
        grads = gradients(ours(), batch_of(single_atom()))
        assert [name for name, grad in grads.items() if grad is None] == []

    def test_activation_checkpoint_changes_memory_only(self):
        plain, saving = ours(), ours(activation_checkpoint=True)
        saving.load_state_dict(plain.state_dict())
        data = three_slabs()
        assert_same_bits(saving(data.clone()), plain(data.clone()))
        assert_same_bits(gradients(saving, data), gradients(plain, data))
        assert held_by(saving, data) < 0.8 * held_by(plain, data)

    def test_activation_checkpoint_draws_the_same_masks_again(self):
        keys = {"alpha_drop": 0.3, "drop_path_rate": 0.3, "proj_drop": 0.3}
        plain, saving = ours(**keys), ours(**keys, activation_checkpoint=True)
        saving.load_state_dict(plain.state_dict())
        data, grads = three_slabs(), []
        for model in (plain, saving):
            torch.manual_seed(7)
            grads.append(gradients(model, data))
        assert_same_bits(grads[1], grads[0])

    def test_second_derivatives_are_refused(self):
        model = ours()
        total = sum(value.square().sum() for value in model(three_slabs()).values())
        parameters = list(model.parameters())
        first = torch.autograd.grad(total, parameters, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            sum(grad.square().sum() for grad in first).backward()

    def test_frozen_parameters_get_none_and_change_no_other(self):
        model, data = ours(), three_slabs()
        whole = gradients(model, data)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("blocks.0.", "sphere_embedding.")))
        part = gradients(model, data)
        assert 0 < len(part) < len(whole)
        assert_all_close(part, {name: whole[name] for name in part}, "gradients")
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    def test_bfloat16_is_near(self):
        """Products in bfloat16 (8 bits of mantissa); results and gradients stay float32."""
        model, data = ours(), three_slabs()
        exact = predict(model, data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(data.clone())
        assert_all_close(out, exact, "outputs", torch.bfloat16)
        assert any(not torch.equal(out[key].float(), exact[key]) for key in exact)
        random_loss(out).backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        assert all(p.grad.isfinite().all() for p in model.parameters())


def held_by(model, data) -> int:
    """Bytes that autograd keeps for the backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(data.clone())
    del out
    return sum(storages.values())


class TestInitialWeights:
    @pytest.mark.parametrize("kind", ["normal", "uniform"])
    @pytest.mark.parametrize("embedding", [{}, {"share_atom_edge_embedding": True}], ids=str)
    def test_same_statistics_as_fairchem(self, kind, embedding):
        """Per tensor: mean and spread within six standard errors, and the same kind of tails."""
        keys = {**KEYS, **embedding, "num_layers": 1, "weight_init": kind}
        keys |= {"sphere_channels": 32, "ffn_hidden_channels": 32, "edge_channels": 32}
        theirs = dict(stock_class(Stock, **keys).named_parameters())
        for name, parameter in EquiformerV2(**keys).named_parameters():
            reference, value = theirs[name].detach(), parameter.detach()
            spread = reference.std(correction=0)
            if spread == 0:
                assert torch.equal(value, reference), name  # biases 0, scales 1
                continue
            count = value.numel()
            error = 6 * spread / math.sqrt(count)
            assert abs(value.mean() - reference.mean()) < math.sqrt(2) * error, name
            assert abs(value.std(correction=0) - spread) < error, name
            if count >= 500:  # a uniform distribution ends at sqrt(3) spreads
                uniform = [bool(x.abs().max() < 2 * x.std()) for x in (value, reference)]
                assert uniform[0] == uniform[1], name

    def test_biases_are_zero(self):
        model = EquiformerV2(**KEYS)
        biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
        assert len(biases) > 20
        assert all(not p.any() for p in biases.values())


@pytest.mark.parametrize(
    "changes",
    [
        *({"norm_type": norm} for norm in ("layer_norm", "layer_norm_sh", "rms_norm_sh")),
        GATE,
        {"share_atom_edge_embedding": True},
        {"use_attn_renorm": False, "use_grid_mlp": False},
    ],
    ids=str,
)
def test_no_weight_decay_as_fairchem(changes):
    keys = {**KEYS, **changes}
    assert EquiformerV2(**keys).no_weight_decay() == stock_class(Stock, **keys).no_weight_decay()


class TestBadKeys:
    @pytest.mark.parametrize(
        ("key", "value", "parts"),
        [
            ("num_layer", 3, ["'num_layer'", "did you mean 'num_layers'?"]),
            ("lmax", [3], ["'lmax'", "did you mean 'lmax_list'?"]),
            ("use_grid_mpl", True, ["'use_grid_mpl'", "did you mean 'use_grid_mlp'?"]),
            ("zzz", 1, ["'zzz'", "known keys", "num_layers"]),
            ("mmax_list", [4], ["mmax_list", "[4]", "lmax_list", "[3]"]),
            ("mmax_list", [-1], ["mmax_list", "[-1]"]),
            ("lmax_list", [9], ["lmax_list", "[9]", "[8]"]),
            ("lmax_list", [0], ["lmax_list", "[0]", "[1]"]),
            ("lmax_list", [3, 2], ["lmax_list", "[3, 2]", "one"]),
            ("grid_resolution", 13, ["grid_resolution", "13", "even"]),
            ("grid_resolution", 6, ["grid_resolution", "6", "at least 8"]),
            ("num_layers", 0, ["num_layers", "0"]),
            ("max_radius", -5.0, ["max_radius", "-5.0"]),
            ("alpha_drop", 1.5, ["alpha_drop", "1.5", "probability"]),
            ("norm_type", "batch_norm", ["norm_type", "'batch_norm'", "'layer_norm_sh'"]),
            ("weight_init", "zeros", ["weight_init", "'zeros'", "'uniform'"]),
            ("distance_function", "bessel", ["distance_function", "'bessel'", "'gaussian'"]),
            ("use_energy_lin_ref", True, ["load_energy_lin_ref", "use_energy_lin_ref"]),
        ],
    )
    def test_a_value_that_cannot_be(self, key, value, parts):
        with pytest.raises(ValueError) as error:
            EquiformerV2(**{**KEYS, key: value})
        for part in parts:
            assert part in str(error.value)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_layers", "12"),
            ("num_layers", 2.5),
            ("sphere_channels", "128"),
            ("lmax_list", 3),
            ("lmax_list", ["3"]),
            ("lmax_list", [2.5]),
            ("max_radius", "six"),
            ("alpha_drop", "0.1"),
            ("use_grid_mlp", "yes"),
            ("grid_resolution", "18"),
            ("norm_type", ["layer_norm"]),
        ],
    )
    def test_a_value_of_another_type(self, key, value):
        with pytest.raises((TypeError, ValueError), match=key) as error:
            EquiformerV2(**{**KEYS, key: value})
        assert repr(value) in str(error.value)

    def test_none_means_the_default(self):
        keys = {**KEYS, "num_layers": 1, "avg_degree": None, "max_num_elements": None}
        assert EquiformerV2(**keys).config == EquiformerV2(**{**KEYS, "num_layers": 1}).config


@pytest.mark.gpu
class TestOnGpu:
    def test_two_calls_give_the_same_bits(self):
        model, data = ours().cuda(), three_slabs().to("cuda")
        assert_same_bits(predict(model, data), predict(model, data))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_near(self, dtype):
        model, data = ours().cuda(), three_slabs().to("cuda")
        exact = predict(model, data)
        with torch.autocast("cuda", dtype=dtype):
            out = model(data.clone())
        assert_all_close(out, exact, "outputs", torch.bfloat16)
