"""Backbone and heads in fairchem's `hydra` model: as the flat model, and as fairchem's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_model_and_weights_from_checkpoint
from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone as StockBackbone
from fairchem.core.models.equiformer_v2.heads import EqV2ScalarHead, EqV2VectorHead
from fairchem.core.trainers.base_trainer import BaseTrainer

from fairchem_equiformer import EnergyHead, EquiformerV2, EquiformerV2Backbone, ForceHead
from tests.models import (
    KEYS,
    fix_roll,
    ours,
    relative_error,
    results,
    scatter_weights,
    stock_class,
)
from tests.structures import batch_of, single_atom, three_slabs

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
        for key, value in expected.items():
            assert relative_error(outputs[key], value) < 1e-5, key
        for name, value in reference.items():
            if value is not None:
                assert relative_error(gradients[name], value) < 3e-5, name


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
        assert relative_error(mean, expected) < 1e-5
        total = hydra()
        total.load_state_dict(own.state_dict())
        average = total.backbone.average_num_nodes
        with torch.no_grad():
            energy = total(data.clone())["energy"]
        assert relative_error(mean * data.natoms, energy * average) < 1e-5

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
        _, gradients = results(model, three_slabs())
        assert {name.split(".")[0] for name in gradients} == {"output_heads"}
        whole = hydra()
        whole.load_state_dict(model.state_dict())
        _, expected = results(whole, three_slabs())
        for name, value in gradients.items():
            assert relative_error(value, expected[name]) < 1e-6, name


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
    @pytest.mark.parametrize("head", [EnergyHead, ForceHead])
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
