"""Backbone and heads in fairchem's `hydra` model: as the flat model, and as fairchem's own."""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from e3nn import o3
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_model_and_weights_from_checkpoint
from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone as StockBackbone
from fairchem.core.models.equiformer_v2.heads import (
    EqV2ScalarHead,
    EqV2VectorHead,
    Rank2SymmetricTensorHead,
)
from fairchem.core.trainers.base_trainer import BaseTrainer

from fairchem_equiformer import (
    EnergyHead,
    EquiformerV2,
    EquiformerV2Backbone,
    ForceHead,
    StressHead,
)
from fairchem_equiformer.nn import recompute
from tests.models import (
    KEYS,
    fix_roll,
    ours,
    results,
    scatter_weights,
    stock_class,
)
from tests.structures import batch_of, in_double, moved, single_atom, slab, three_slabs
from tests.tolerances import assert_all_close, assert_close

HEADS = {
    "energy": {"module": "fairchem_equiformer.EnergyHead"},
    "forces": {"module": "fairchem_equiformer.ForceHead"},
}


def hydra(heads=None, *, keys=None, **options):
    """fairchem's hydra on our backbone and heads, as a config builds it."""
    options.setdefault("pass_through_head_outputs", True)
    model = HydraModel(
        backbone={"model": "fairchem_equiformer.EquiformerV2Backbone", **KEYS, **(keys or {})},
        heads=HEADS if heads is None else heads,
        **options,
    )
    return scatter_weights(model)


def stock_hydra(keys=None, **energy_options):
    """fairchem's hydra on its own backbone and heads, with the frames of ours."""
    backbone = stock_class(StockBackbone, **{**KEYS, **(keys or {})})
    fix_roll(backbone)
    model = hydra()
    model.backbone = backbone
    model.output_heads = torch.nn.ModuleDict(
        {
            "energy": EqV2ScalarHead(backbone, **energy_options),
            "forces": EqV2VectorHead(backbone),
        }
    )
    return scatter_weights(model)


def flat_name(name):
    """Name in the flat model of a parameter of the hydra."""
    for prefix in ("backbone.", "output_heads.energy.", "output_heads.forces."):
        name = name.removeprefix(prefix)
    return name


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("fairchem_equiformer.EquiformerV2Backbone", EquiformerV2Backbone),
        ("fairchem_equiformer.EnergyHead", EnergyHead),
        ("fairchem_equiformer.ForceHead", ForceHead),
        ("fairchem_equiformer_v2_backbone", EquiformerV2Backbone),
        ("fairchem_equiformer_v2_energy_head", EnergyHead),
        ("fairchem_equiformer_v2_force_head", ForceHead),
        ("fairchem_equiformer.StressHead", StressHead),
        ("fairchem_equiformer_v2_stress_head", StressHead),
        ("equiformer_v2_backbone", StockBackbone),
        ("equiformerV2_scalar_head", EqV2ScalarHead),
        ("equiformerV2_vector_head", EqV2VectorHead),
    ],
)
def test_names(name, cls):
    assert registry.get_model_class(name) is cls


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_gate_act": True, "use_grid_mlp": False},
        {"share_atom_edge_embedding": True, "norm_type": "rms_norm_sh"},
        {"use_sep_s2_act": False, "use_m_share_rad": True},
    ],
    ids=str,
)
class TestEqual:
    def test_to_the_flat_model(self, keys):
        model, flat = hydra(keys=keys), ours(**keys)
        flat.load_state_dict({flat_name(name): p for name, p in model.state_dict().items()})
        outputs, gradients = results(model, three_slabs())
        expected, flat_gradients = results(flat, three_slabs())
        for key, value in expected.items():
            assert torch.equal(outputs[key], value), key
        for name, value in gradients.items():
            assert torch.equal(value, flat_gradients[flat_name(name)]), name

    def test_to_fairchems_own(self, keys):
        theirs, own = stock_hydra(keys), hydra(keys=keys)
        own.load_state_dict(theirs.state_dict(), strict=True)
        assert [n for n, _ in own.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        (expected, reference), (outputs, gradients) = (
            results(model, three_slabs()) for model in (theirs, own)
        )
        assert_all_close(outputs, expected, "outputs")
        for name, value in reference.items():
            if value is not None:
                assert_close(gradients[name], value, "gradients", name=name)


@pytest.mark.parametrize(
    "options",
    [
        {"decompose": True, "use_source_target_embedding": True},
        {"decompose": True, "edge_level_mlp": True, "num_mlp_layers": 3},
        {"decompose": True, "extensive": True, "avg_num_nodes": 12.5},
        {"edge_level_mlp": True, "use_source_target_embedding": True, "extensive": True},
        {"num_mlp_layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm_type", ["layer_norm_sh", "layer_norm", "rms_norm_sh"])
def test_stress_equals_fairchems(options, norm_type):
    keys = {"norm_type": norm_type}
    theirs = stock_hydra(keys)
    heads = {"stress": {"module": "fairchem_equiformer.StressHead", **options}}
    theirs.output_heads = torch.nn.ModuleDict(
        {"stress": Rank2SymmetricTensorHead(theirs.backbone, **options)}
    )
    scatter_weights(theirs)
    own = hydra(heads, keys=keys)
    assert [n for n, _ in own.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    own.load_state_dict(theirs.state_dict(), strict=True)
    (expected, reference), (outputs, gradients) = (
        results(model, three_slabs()) for model in (theirs, own)
    )
    norm = "output_heads.stress.sphharm_norm"
    assert_all_close(outputs, expected, "outputs")
    for name, value in reference.items():
        if value is not None:
            # One number each. The bias is a sum that all but cancels; against float64 fairchem's is
            # off by 6e-5. The weight of a norm of one channel has no influence: in float64 its
            # gradient is zero, and in float32 a millionth of the bias's.
            cancels = name.startswith(f"{norm}.") and (value.numel() == 1 or "bias" in name)
            kind = "gradients that cancel" if cancels else "gradients"
            assert_close(gradients[name], value, kind, name=name)


@pytest.mark.skipif(not torch.__version__.startswith("2.4."), reason="later ones do not warn")
def test_training_a_stress_head_warns_of_nothing():
    """torch's own checkpoint would, of a name within torch; what silences it is read anew here."""
    model = hydra({"stress": {"module": "fairchem_equiformer.StressHead"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning, match="autocast"):
            results(model, three_slabs())
        importlib.reload(recompute)
        results(model, three_slabs())


class TestStress:
    KEYS: ClassVar = {"use_gate_act": True, "use_grid_mlp": False}  # exactly equivariant
    LINEAR: ClassVar = {"module": "fairchem_equiformer.StressHead", "num_mlp_layers": 1}

    def model(self, **options):
        model = hydra({"stress": {**self.LINEAR, **options}}, keys=self.KEYS)
        for parameter in model.output_heads.parameters():
            if parameter.shape == (1,):
                parameter.data.zero_()  # a bias on a component does not turn
        return model.double()

    def test_turns_as_a_tensor(self):
        rotation = o3.rand_matrix(dtype=torch.float64)
        data = in_double(slab("Pt", "CH3OH"))
        turned = moved(data, rotation)
        model = self.model()
        with torch.no_grad():
            stress, rotated = model(batch_of(data))["stress"], model(batch_of(turned))["stress"]
        assert_close(rotated, rotation @ stress @ rotation.T, "outputs")
        assert_close(stress.T, stress, "outputs")

    def test_parts_turn_as_degrees_0_and_2(self):
        rotation = o3.rand_matrix(dtype=torch.float64)
        data = in_double(slab("Pt", "CH3OH"))
        model = self.model(decompose=True, use_source_target_embedding=True)
        with torch.no_grad():
            out = model(batch_of(data))
            turned = model(batch_of(moved(data, rotation)))
        assert_close(turned["stress_isotropic"], out["stress_isotropic"], "outputs")
        wigner = o3.Irrep("2e").D_from_matrix(rotation)
        expected = out["stress_anisotropic"] @ wigner.T
        # e3nn's D is float32
        assert_close(turned["stress_anisotropic"], expected, "outputs", torch.float32)

    def test_alone_or_in_a_batch(self):
        model = hydra({"stress": {**self.LINEAR, "decompose": True, "num_mlp_layers": 2}})
        with torch.no_grad():
            together = model(batch_of(slab("Pt", "CH3OH"), single_atom(), slab("Cu", "CO")))
            alone = model(batch_of(slab("Cu", "CO")))
        for key, value in alone.items():
            assert_close(together[key][2:], value, "outputs", name=key)

    def test_needs_a_layer(self):
        with pytest.raises(ValueError, match="num_mlp_layers is 0"):
            hydra({"stress": {**self.LINEAR, "num_mlp_layers": 0}})


class TestOutputs:
    def test_by_head(self):
        out = hydra(pass_through_head_outputs=False)(three_slabs())
        assert {head: list(values) for head, values in out.items()} == {
            "energy": ["energy"],
            "forces": ["forces"],
        }
        assert out["energy"]["energy"].shape == (3,)
        assert out["forces"]["forces"].shape == (36, 3)

    def test_under_other_names(self):
        heads = {
            "bulk": {**HEADS["energy"], "output_name": "formation_energy"},
            "pull": {**HEADS["forces"], "output_name": "noise"},
        }
        assert set(hydra(heads)(three_slabs())) == {"formation_energy", "noise"}

    def test_one_head_only(self):
        assert set(hydra({"energy": HEADS["energy"]})(three_slabs())) == {"energy"}

    def test_mean_over_atoms(self):
        heads = {**HEADS, "energy": {**HEADS["energy"], "reduce": "mean"}}
        theirs, own = stock_hydra(reduce="mean"), hydra(heads)
        own.load_state_dict(theirs.state_dict())
        data = three_slabs()
        with torch.no_grad():
            expected, mean = theirs(data.clone())["energy"], own(data.clone())["energy"]
        assert_close(mean, expected, "outputs")
        total = hydra()
        total.load_state_dict(own.state_dict())
        average = total.backbone.average_num_nodes
        with torch.no_grad():
            energy = total(data.clone())["energy"]
        assert_close(mean * data.natoms, energy * average, "outputs")

    def test_no_autocast_in_heads(self):
        """fairchem turns it off for heads that do not ask: results stay float32."""
        model = hydra()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(three_slabs())
        assert {value.dtype for value in out.values()} == {torch.float32}

    def test_every_parameter_gets_a_gradient(self):
        for data in (three_slabs(), batch_of(single_atom())):
            _, gradients = results(hydra(), data)
            assert [name for name, value in gradients.items() if value is None] == []


class TestFreeze:
    def test_backbone(self):
        model = hydra(freeze_backbone=True)
        frozen, gradients = results(model, three_slabs())
        assert {name.split(".")[0] for name in gradients} == {"output_heads"}
        whole = hydra()
        whole.load_state_dict(model.state_dict())
        trained, expected = results(whole, three_slabs())
        assert all(torch.equal(frozen[key], trained[key]) for key in trained)
        for name, value in gradients.items():
            assert_close(value, expected[name], "made again", name=name)


def excluded(model):
    """Names of the parameters that fairchem's trainer keeps from weight decay."""
    trainer = SimpleNamespace(
        model=model,
        _unwrapped_model=model,
        config={"optim": {"optimizer_params": {"weight_decay": 0.1}, "lr_initial": 1e-3}},
    )
    BaseTrainer.load_optimizer(trainer)
    spared, decayed = trainer.optimizer.param_groups
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    ids = {id(parameter) for parameter in spared["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


class TestWeightDecay:
    """fairchem's hydra decides by the names of parameters and lets norms decay; ours does not."""

    def test_as_the_flat_model_of_fairchem(self):
        from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import (
            EquiformerV2 as Stock,
        )

        flat = excluded(stock_class(Stock, **KEYS))
        assert {flat_name(name) for name in excluded(hydra())} == flat
        assert excluded(EquiformerV2(**KEYS)) == flat

    def test_norms_are_spared_and_embeddings_are_not(self):
        names = hydra().no_weight_decay()
        assert "backbone.norm.norm_l0.weight" in names
        assert "output_heads.energy.energy_block.so3_linear_1.bias" in names
        assert not [name for name in names if "embedding.weight" in name or "alpha_dot" in name]

    def test_fairchems_own_hydra_is_left_alone(self):
        model = stock_hydra()
        words = ("embedding", "frequencies", "bias")
        assert set(model.no_weight_decay()) == {
            name for name, _ in model.named_parameters() if any(word in name for word in words)
        }


class TestBadInput:
    @pytest.mark.parametrize("head", [EnergyHead, ForceHead, StressHead])
    def test_head_on_another_backbone(self, head):
        with pytest.raises(TypeError, match=r"set model\.backbone\.model") as error:
            head(stock_class(StockBackbone, **KEYS))
        assert head.__name__ in str(error.value)

    def test_unknown_reduction(self):
        heads = {"energy": {**HEADS["energy"], "reduce": "max"}}
        with pytest.raises(ValueError, match=r"'max'.*'sum' or 'mean'"):
            hydra(heads)

    def test_unknown_key(self):
        with pytest.raises(ValueError, match="did you mean 'num_layers'"):
            hydra(keys={"num_layer": 1})

    def test_checkpoint_of_another_size(self):
        saved = hydra(keys={"num_layers": 1}).state_dict()
        with pytest.raises(ValueError, match="num_layers: checkpoint 1, config 2"):
            hydra().load_state_dict(saved)


def test_fine_tuning_starts_from_a_checkpoint(tmp_path):
    """As `finetune_config` does: backbone from a saved model, a new head."""
    saved = hydra()
    config = {
        "name": "hydra",
        "backbone": {"model": "fairchem_equiformer.EquiformerV2Backbone", **KEYS},
        "heads": HEADS,
    }
    path = tmp_path / "checkpoint.pt"
    state = {f"module.{name}": value for name, value in saved.state_dict().items()}
    torch.save({"config": {"model": config}, "state_dict": state}, path)
    loaded = load_model_and_weights_from_checkpoint(path)
    tuned = HydraModel(
        finetune_config={"starting_checkpoint": path}, heads={"energy": HEADS["energy"]}
    )
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        if name.startswith("backbone."):
            assert torch.equal(tuned.state_dict()[name], value), name
    assert tuned(three_slabs())["energy"]["energy"].shape == (3,)
