"""Weights go from fairchem's `equiformer_v2` to ours and back, with EMA and optimizer state."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from fairchem.core.common.utils import load_state_dict, match_state_dict
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2 as Stock
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from fairchem.core.trainers.base_trainer import BaseTrainer

from fairchem_equiformer import EquiformerV2
from tests.models import KEYS, fix_roll, ours, stock, stock_class
from tests.structures import three_slabs
from tests.tolerances import assert_close, relative_error

# Options that add, remove, move or resize parameters.
EVERY_PARAMETER = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_gate_act": True},
        {"use_gate_act": True, "use_grid_mlp": False},
        {"use_sep_s2_act": False},
        {"use_sep_s2_act": False, "use_grid_mlp": False},
        {"use_grid_mlp": False},
        {"norm_type": "layer_norm"},
        {"norm_type": "rms_norm_sh"},
        {"use_attn_renorm": False},
        {"use_atom_edge_embedding": False},
        {"share_atom_edge_embedding": True},
        {"use_m_share_rad": True, "share_atom_edge_embedding": True},
        {"load_energy_lin_ref": True},
        {"regress_forces": False},
        {"lmax_list": [4], "mmax_list": [0]},
        {"lmax_list": [2], "mmax_list": [2], "num_layers": 3},
    ],
    ids=str,
)


def shapes(model):
    return [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]


def assert_same_weights(model, reference):
    for (name, parameter), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name


def whole_stock():
    """fairchem's model with all of its tables, as it writes checkpoints."""
    return Stock(**KEYS)


@EVERY_PARAMETER
def test_names_shapes_and_order_are_fairchems(changes):
    keys = {**KEYS, **changes}
    assert shapes(EquiformerV2(**keys)) == shapes(stock_class(Stock, **keys))


class TestFromFairchem:
    @EVERY_PARAMETER
    def test_strict(self, changes):
        theirs, own = stock(**changes), ours(**changes)
        state = theirs.state_dict()
        names = set(state)
        own.load_state_dict(state, strict=True)
        assert_same_weights(own, theirs)
        assert set(state) == names  # the caller's dict is left alone

    def test_every_table_is_dropped(self):
        theirs, own = whole_stock(), ours()
        tables = set(theirs.state_dict()) - set(own.state_dict())
        assert {name.split(".")[0] for name in tables} >= {
            "SO3_grid",
            "SO3_rotation",
            "mappingReduced",
            "distance_expansion",
            "edge_degree_embedding",
            "blocks",
        }
        own.load_state_dict(theirs.state_dict(), strict=True)
        assert_same_weights(own, theirs)

    @pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
    def test_through_fairchems_loader(self, prefix):
        """Checkpoints of data-parallel runs carry prefixes, which fairchem removes."""
        theirs, own = stock(), ours()
        saved = OrderedDict((prefix + name, value) for name, value in theirs.state_dict().items())
        load_state_dict(own, match_state_dict(own.state_dict(), saved), strict=True)
        assert_same_weights(own, theirs)

    def test_into_a_model_inside_another(self):
        """The tables go, whatever stands before the names of the parameters."""
        theirs, outer = stock(), torch.nn.ModuleDict({"module": ours()})
        state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
        outer.load_state_dict(state, strict=True)
        assert_same_weights(outer["module"], theirs)

    @pytest.mark.parametrize("change", ["missing", "unexpected"])
    def test_strict_is_strict_about_parameters(self, change):
        own, state = ours(), stock().state_dict()
        if change == "missing":
            del state["blocks.1.ga.alpha_dot"]
        else:
            state["blocks.1.ga.beta_dot"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match=r"blocks\.1\.ga\.(alpha|beta)_dot"):
            own.load_state_dict(state, strict=True)

    def test_exponential_moving_average(self):
        """fairchem saves it as a list in the order of the parameters."""
        theirs, own = stock(), ours()
        average = ExponentialMovingAverage(theirs.parameters(), 0.9)
        for parameter in theirs.parameters():
            parameter.data.add_(1)
        average.update()
        loaded = ExponentialMovingAverage(own.parameters(), 0.9)
        loaded.load_state_dict(average.state_dict())
        loaded.copy_to(own.parameters())
        average.copy_to(theirs.parameters())
        assert_same_weights(own, theirs)

    def test_training_resumes_with_the_optimizers_state(self):
        """One more AdamW step from fairchem's checkpoint is the step that fairchem would do."""
        theirs, own = stock(), ours()
        optimizers = [trainers_optimizer(model) for model in (theirs, own)]
        for seed in range(3):
            if seed == 2:  # the checkpoint
                own.load_state_dict(theirs.state_dict())
                optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            for model, optimizer in zip((theirs, own), optimizers, strict=True):
                generator = torch.Generator().manual_seed(seed)
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
        assert_same_weights(own, theirs)


def trainers_optimizer(model):
    """The optimizer that fairchem's trainers make, which asks the model about weight decay."""
    trainer = SimpleNamespace(
        model=model,
        _unwrapped_model=model,
        config={
            "optim": {
                "optimizer": "AdamW",
                "optimizer_params": {"weight_decay": 0.1},
                "lr_initial": 0.01,
            }
        },
    )
    BaseTrainer.load_optimizer(trainer)
    return trainer.optimizer


class TestToFairchem:
    @EVERY_PARAMETER
    def test_only_tables_are_missing(self, changes):
        theirs, own = stock(**changes), ours(**changes)
        result = theirs.load_state_dict(own.state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert not set(result.missing_keys) & {name for name, _ in theirs.named_parameters()}
        assert_same_weights(theirs, own)

    def test_nothing_but_parameters_is_saved(self):
        own = ours(load_energy_lin_ref=True)
        assert list(own.state_dict()) == [name for name, _ in own.named_parameters()]


class TestMisfit:
    """A checkpoint of a model of another size: what differs, by config key and by tensor."""

    @pytest.mark.parametrize(
        ("key", "saved", "configured"),
        [
            ("num_layers", 2, 3),
            ("num_layers", 3, 2),
            ("sphere_channels", 16, 24),
            ("attn_hidden_channels", 8, 6),
            ("num_heads", 2, 4),
            ("attn_alpha_channels", 8, 4),
            ("attn_value_channels", 4, 2),
            ("ffn_hidden_channels", 12, 20),
            ("edge_channels", 10, 14),
            ("max_num_elements", 90, 100),
            ("lmax_list", 3, 4),
            ("mmax_list", 2, 1),
        ],
    )
    def test_names_the_config_key(self, key, saved, configured):
        is_list = key.endswith("_list")
        theirs = stock(**{key: [saved] if is_list else saved})
        own = ours(**{key: [configured] if is_list else configured})
        with pytest.raises(ValueError, match="another size") as error:
            own.load_state_dict(theirs.state_dict())
        lines = str(error.value).splitlines()
        listed = lines[
            2 : next(i for i, line in enumerate(lines) if not line.startswith("  ") and i > 1)
        ]
        assert listed == [f"  {key}: checkpoint {saved}, config {configured}"]

    def test_lists_tensors(self):
        own = ours(sphere_channels=24)
        with pytest.raises(ValueError, match="Tensors that differ") as error:
            own.load_state_dict(stock().state_dict())
        message = str(error.value)
        assert "sphere_embedding.weight: checkpoint [90, 16], model [90, 24]" in message
        assert " more" in message  # of many, the first are listed

    def test_leaves_the_model_as_it_was(self):
        own = ours(num_layers=3)
        before = copy.deepcopy(own)
        with pytest.raises(ValueError, match="num_layers"):
            own.load_state_dict(stock().state_dict())
        assert_same_weights(own, before)

    def test_another_cutoff_is_a_warning(self, caplog):
        with caplog.at_level(logging.WARNING):
            ours(max_radius=5.0).load_state_dict(stock(max_radius=6.0).state_dict())
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("fairchem_eq")]
        assert len(messages) == 1
        assert "max_radius 6" in messages[0]
        assert "5" in messages[0]

    def test_the_same_cutoff_is_none(self, caplog):
        with caplog.at_level(logging.WARNING):
            ours().load_state_dict(stock().state_dict())
        assert [r for r in caplog.records if r.name.startswith("fairchem_eq")] == []


def test_a_checkpoint_cut_to_its_first_block_predicts_as_fairchems():
    """How fairchem's own test uses a published one: strip prefixes, load, cut, predict."""
    theirs, own = stock(num_layers=3), ours(num_layers=3)
    fix_roll(theirs)
    saved = {f"module.module.{name}": value for name, value in theirs.state_dict().items()}
    load_state_dict(own, {name[len("module.") * 2 :]: value for name, value in saved.items()})
    results = []
    for model in (own, theirs):
        model.eval()
        model.num_layers = 1
        with torch.no_grad():
            results.append(model(three_slabs()))
    for key, expected in results[1].items():
        assert_close(results[0][key], expected.view_as(results[0][key]), "outputs", name=key)
    own.num_layers = 3
    with torch.no_grad():
        whole = own(three_slabs())
    assert relative_error(whole["energy"], results[0]["energy"]) > 1e-3  # cut it was
