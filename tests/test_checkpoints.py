"""Reading checkpoints safely, understanding them, and predicting what fairchem predicts."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from torch_geometric.data import Data

from fairchem_equiformer import checkpoints
from fairchem_equiformer.fairchem1 import convert
from fairchem_equiformer.models import EnergyHead, ForceHead, StressHead
from tests.models import KEYS
from tests.stock_checkpoints import (
    NORMALIZERS,
    OUTPUTS,
    STRESS,
    build,
    content_of,
    grids_of,
    save,
    stock_predictions,
)
from tests.structures import in_double, three_slabs
from tests.tolerances import assert_close

FLAT = {"name": "equiformer_v2", **KEYS}
HYDRA: dict[str, Any] = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "backbone": {"model": "equiformer_v2_backbone", **KEYS},
    "heads": {
        "energy": {"module": "equiformer_v2_energy_head"},
        "forces": {"module": "equiformerV2_vector_head"},
        "stress": {
            "module": "rank2_symmetric_head",
            "output_name": "stress",
            "use_source_target_embedding": True,
            "decompose": True,
        },
    },
}
WHOLE_STRESS = {
    **HYDRA,
    "pass_through_head_outputs": False,
    "heads": {**HYDRA["heads"], "stress": {"module": "rank2_symmetric_head"}},
}
FORMS = {
    "flat": (FLAT, OUTPUTS),
    "hydra": (HYDRA, {**OUTPUTS, "stress": STRESS}),
    "stress as a whole, by head": (
        WHOLE_STRESS,
        {**OUTPUTS, "stress": {"level": "system", "property": "stress"}},
    ),
    "energy only": (FLAT | {"regress_forces": False}, {"energy": OUTPUTS["energy"]}),
}

pytestmark = pytest.mark.filterwarnings("ignore:equiformer_v2_:DeprecationWarning")


@pytest.fixture(autouse=True)
def _normalizer_of_the_whole(monkeypatch):
    monkeypatch.setitem(NORMALIZERS, "stress", (0.2, 0.4))


class Hostile:
    """A value whose pickle runs a program."""

    def __reduce__(self):
        return os.system, ("echo struck",)


class TestReading:
    def test_numbers_of_numpy(self, tmp_path):
        """As metrics of older releases are, under NumPy 1 and 2."""
        content = {"metric": np.float64(0.25), "count": np.int64(-7), "flag": np.bool_(True)}
        path = save({**content, "half": np.float32(1.5)}, tmp_path / "a.pt")
        read = checkpoints.read(path)
        assert read == {"metric": 0.25, "count": -7, "flag": True, "half": 1.5}
        assert {type(value) for value in read.values()} == {float, int, bool}
        newer = renamed(path, b"cnumpy.core.multiarray", b"cnumpy._core.multiarray")
        assert checkpoints.read(newer) == read

    def test_other_values_of_numpy_are_refused(self, tmp_path):
        path = save({"x": np.datetime64("2024-01-01")}, tmp_path / "a.pt")
        with pytest.raises(checkpoints.CheckpointError, match="'M8', which is no number"):
            checkpoints.read(path)

    def test_what_others_allow_is_left_alone(self, tmp_path):
        """torch-geometric allows its own classes for the whole process."""
        before = list(torch.serialization.get_safe_globals())
        assert Data in before
        path = save({"x": Data()}, tmp_path / "a.pt")
        with pytest.raises(checkpoints.CheckpointError, match="asks for torch_geometric"):
            checkpoints.read(path)
        assert torch.serialization.get_safe_globals() == before

    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    @pytest.mark.parametrize("archive", [True, False])
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    def test_hostile(self, protocol, archive, tmp_path, capfd):
        """What it asks for is named, and not called; nor is it advised to read it all the same."""
        path, content = tmp_path / "a.pt", {"config": "system", "state_dict": Hostile()}
        if archive:
            torch.save(content, path, pickle_protocol=protocol)
        else:
            path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(checkpoints.CheckpointError, match=r"asks for (posix|nt)\.system") as e:
            checkpoints.read(path)
        message = str(e.value)
        assert message.startswith(f"{path}: asks for ")
        assert "trusted=True" in message
        assert "--trusted" in message
        assert "weights_only" not in message
        assert "\n" not in message
        assert "struck" not in capfd.readouterr().out

    def test_trusted(self, tmp_path, capfd):
        checkpoints.read(save({"config": Hostile()}, tmp_path / "a.pt"), trusted=True)
        assert "struck" in capfd.readouterr().out

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    def test_harmless_but_not_understood(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"config": {}}, path, pickle_protocol=4)
        with pytest.raises(checkpoints.CheckpointError, match="cannot be read") as error:
            checkpoints.read(path)
        assert "weights_only" not in str(error.value)

    @pytest.mark.parametrize("kind", ["missing", "no pickle", "list", "plain pickle"])
    def test_no_checkpoint(self, kind, tmp_path):
        path = tmp_path / "a.pt"
        if kind == "no pickle":
            path.write_bytes(b"no checkpoint")
        elif kind == "list":
            torch.save([1], path)
        elif kind == "plain pickle":
            path.write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(checkpoints.CheckpointError, match=r"a\.pt: \w") as error:
            checkpoints.load(path)
        assert "\n" not in str(error.value)


def renamed(path: Path, old: bytes, new: bytes) -> Path:
    """The same checkpoint with another name of a module in its pickle."""
    copy = path.with_name("renamed.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            assert not name.endswith("data.pkl") or old in data
            target.writestr(name, data.replace(old, new))
    return copy


@pytest.fixture(scope="module", params=FORMS)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NORMALIZERS, "stress", (0.2, 0.4))
        content = content_of(*FORMS[request.param])
    return save(content, folder / "checkpoint.pt"), content


class TestPotential:
    def test_predicts_as_fairchem(self, saved):
        path, content = saved
        batch = three_slabs()
        expected = stock_predictions(path, batch)
        with torch.no_grad():
            found = checkpoints.load(path).potential()(batch.clone())
        assert set(found) == set(content["config"]["outputs"])
        shapes = {"energy": (3,), "forces": (36, 3), "stress": (3, 3, 3)}
        for target, value in found.items():
            assert value.shape == shapes[target]
            assert_close(value.flatten(), expected[target].flatten(), "outputs", name=target)

    def test_in_double_precision(self, saved):
        checkpoint = checkpoints.load(saved[0])
        batch = three_slabs()
        with torch.no_grad():
            single = checkpoint.potential()(batch.clone())
            double = checkpoint.potential(dtype=torch.float64)(in_double(batch.clone()))
        for target, value in double.items():
            assert value.dtype == torch.float64
            assert_close(single[target], value, "all in float32", name=target)


class TestFineTuned:
    """fairchem saves what the fine-tuning's config says, and reads the start again each time."""

    @pytest.fixture
    def paths(self, tmp_path):
        model, outputs = FORMS["hydra"]
        start = save(content_of(model, outputs), tmp_path / "start.pt")
        tuned = {
            "name": "hydra",
            "pass_through_head_outputs": True,
            "finetune_config": {
                "starting_checkpoint": str(start),
                "override": {"max_neighbors": 6},
            },
            "heads": {"energy": HYDRA["heads"]["energy"], "forces": HYDRA["heads"]["forces"]},
        }
        with grids_of(HYDRA):
            return start, save(content_of(tuned, OUTPUTS), tmp_path / "tuned.pt")

    def test_predicts_as_fairchem(self, paths):
        checkpoint = checkpoints.load(paths[1])
        assert checkpoint.backbone == KEYS | {"max_neighbors": 6}
        assert set(checkpoint.heads) == {"energy", "forces"}
        with grids_of(HYDRA):
            expected = stock_predictions(paths[1], three_slabs())
        with torch.no_grad():
            found = checkpoint.potential()(three_slabs())
        for target, value in found.items():
            assert_close(value.flatten(), expected[target].flatten(), "outputs", name=target)

    def test_start_beside_it(self, paths, tmp_path):
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        start, tuned = (path.rename(folder / path.name) for path in paths)
        assert checkpoints.load(tuned).backbone["max_neighbors"] == 6
        start.unlink()
        with pytest.raises(checkpoints.CheckpointError, match=r"put start\.pt beside it"):
            checkpoints.load(tuned)

    def test_converted_it_needs_the_start_no_more(self, paths, tmp_path):
        with grids_of(HYDRA):
            content = convert.convert(checkpoints.read(paths[1]), "fairchem_equiformer", tmp_path)
        paths[0].unlink()
        found = checkpoints.load(save(content, tmp_path / "ours.pt"))
        assert found.backbone == KEYS | {"max_neighbors": 6}
        assert "finetune_config" not in content["config"]["model"]


class TestUnderstanding:
    def test_hydra(self, tmp_path):
        model, outputs = FORMS["hydra"]
        found = checkpoints.load(save(content_of(model, outputs), tmp_path / "a.pt"))
        assert (found.form, found.averaged) == ("hydra", False)
        assert found.backbone == KEYS
        assert {name: head for name, (head, _) in found.heads.items()} == {
            "energy": EnergyHead,
            "forces": ForceHead,
            "stress": StressHead,
        }
        assert found.outputs["stress"].parts == ("stress_isotropic", "stress_anisotropic")
        assert found.normalizers["forces"].std == pytest.approx(0.58)
        assert found.references["energy"].shape == (119,)
        assert list(found.weights) == [name for name, _ in found.model().named_parameters()]

    @pytest.mark.parametrize("form", ["flat", "hydra"])
    @pytest.mark.parametrize("changes", [{}, {"load_energy_lin_ref": True}])
    def test_moving_averages(self, form, changes, tmp_path):
        """They are a list in the order of the trained parameters of fairchem's model."""
        model, outputs = FORMS[form]
        if form == "flat":
            model = model | changes
        content = content_of(model, outputs)
        theirs, raw = build(model), content["state_dict"]
        average = ExponentialMovingAverage(theirs.parameters(), 0.9)
        content["ema"] = average.state_dict()
        found = checkpoints.load(save(content, tmp_path / "a.pt"))
        assert found.averaged
        for name, value in theirs.named_parameters():
            expected = value if value.requires_grad else raw[name]
            assert torch.equal(found.weights[name], expected), name
        content["ema"]["shadow_params"] = average.shadow_params[1:]
        with pytest.raises(checkpoints.CheckpointError, match="moving averages"):
            checkpoints.load(save(content, tmp_path / "b.pt"))

    def test_moving_averages_of_heads_alone(self, tmp_path):
        model, outputs = FORMS["hydra"]
        model = model | {"freeze_backbone": True}
        content, theirs = content_of(model, outputs), build(model)
        content["ema"] = ExponentialMovingAverage(theirs.parameters(), 0.9).state_dict()
        found = checkpoints.load(save(content, tmp_path / "a.pt"))
        for name, value in theirs.named_parameters():
            expected = value if value.requires_grad else content["state_dict"][name]
            assert torch.equal(found.weights[name], expected), name

    @pytest.mark.parametrize("prefix", ["module.", "module.module."])
    def test_original_release(self, prefix, tmp_path):
        """Its keys, its names of normalisers, and weights as data-parallel training names them."""
        content = content_of(FLAT)
        plain = checkpoints.load(save(content, tmp_path / "plain.pt"))
        keys = {key: value for key, value in FLAT.items() if key != "name"}
        content["config"] = {
            "model": "equiformer_v2",
            "model_attributes": keys,
            "task": {"dataset": "trajectory_lmdb"},
            "dataset": {"normalize_labels": True},
        }
        content["normalizers"] = {
            "target": {"mean": torch.tensor(-0.7), "std": torch.tensor(24.9)},
            "grad_target": {"mean": np.float64(0.0), "std": torch.tensor(0.58)},
        }
        content["state_dict"] = OrderedDict(
            (prefix + key, value) for key, value in content["state_dict"].items()
        )
        found = checkpoints.load(save(content, tmp_path / "old.pt"))
        assert (found.backbone, found.outputs) == (plain.backbone, plain.outputs)
        assert found.normalizers["forces"].std == pytest.approx(0.58)
        assert found.normalizers["energy"] == plain.normalizers["energy"]
        assert all(torch.equal(found.weights[name], value) for name, value in plain.weights.items())
        content["config"]["task"]["dataset"] = "single_point_lmdb"
        energies = checkpoints.load(save(content, tmp_path / "is2re.pt"))
        assert set(energies.outputs) == {"energy"}

    def test_keys_of_odac(self, tmp_path):
        content = content_of(FLAT)
        content["config"]["model"] |= {"norm_scale_nodes": 192.5, "norm_scale_degree": 21.0}
        found = checkpoints.load(save(content, tmp_path / "a.pt")).model_config
        assert (found.avg_num_nodes, found.avg_degree) == (192.5, 21.0)

    def test_normalisers_of_the_config(self, tmp_path):
        """fairchem's trainers use them where the checkpoint has none."""
        content = content_of(FLAT)
        content["normalizers"] = {}
        given = {"energy": {"mean": 0.5, "stdev": 2.0}, "forces": {"mean": 0.0, "rmsd": 3.0}}
        content["config"]["dataset"]["transforms"] = {"normalizer": given}
        found = checkpoints.load(save(content, tmp_path / "a.pt")).normalizers
        assert found["energy"] == checkpoints.Normalizer(0.5, 2.0)
        assert found["forces"] == checkpoints.Normalizer(0.0, 3.0)

    def test_targets_without_a_head_are_left_out(self, tmp_path, caplog):
        content = content_of(FLAT)
        content["config"]["outputs"]["stress"] = STRESS
        found = checkpoints.load(save(content, tmp_path / "a.pt"))
        assert set(found.outputs) == {"energy", "forces"}
        assert "stress" in caplog.text

    def test_dotted_names(self, tmp_path):
        content = content_of(*FORMS["hydra"])
        stock = "fairchem.core.models.equiformer_v2."
        model = content["config"]["model"]
        model["backbone"]["model"] = stock + "equiformer_v2.EquiformerV2Backbone"
        model["heads"]["stress"]["module"] = stock + "heads.rank2.Rank2SymmetricTensorHead"
        model["heads"]["energy"]["module"] = "fairchem_equiformer.EnergyHead"
        assert checkpoints.load(save(content, tmp_path / "a.pt")).heads["stress"][0] is StressHead


def break_name(content):
    content["config"]["model"]["name"] = "gemnet_oc"


def break_key(content):
    content["config"]["model"]["num_layer"] = 3


def break_config(content):
    content["config"]["model"] = None


def break_all(content):
    content.clear()


def break_state(content):
    content["state_dict"] = None


def break_references(content):
    content["elementrefs"]["energy"] = {"coeff": torch.zeros(3)}


def break_backbone(content):
    content["config"]["model"] = {
        "name": "hydra",
        "backbone": {"num_layers": 2},
        "heads": {"a": {}},
    }


def break_heads(content):
    backbone = {"model": "equiformer_v2_backbone"}
    content["config"]["model"] = {"name": "hydra", "backbone": backbone, "heads": {"a": {}}}


def break_finetuned(content):
    start = {"starting_checkpoint": "gone/start.pt"}
    content["config"]["model"] = {"name": "hydra", "finetune_config": start}


def break_output_names(content):
    head = {"module": "equiformerV2_scalar_head"}
    backbone = {"model": "equiformer_v2_backbone"}
    heads = {"a": head, "b": head}
    content["config"]["model"] = {"name": "hydra", "backbone": backbone, "heads": heads}


def break_normalizer(content):
    content["normalizers"]["energy"] = {"mean": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (break_name, "config.model.name is 'gemnet_oc'; known are equiformer_v2"),
        (break_key, "num_layer"),
        (break_config, "names no model"),
        (break_all, "no state_dict and config"),
        (break_normalizer, "normaliser of energy"),
        (break_state, "no state_dict and config"),
        (break_references, "element references of energy"),
        (break_backbone, "config.model.backbone.model is None"),
        (break_heads, "config.model.heads.a.module is None"),
        (break_finetuned, "fine-tuned from gone/start.pt"),
        (break_output_names, "two heads of config.model give 'energy' (output_name)"),
    ],
)
def test_what_is_not_understood_is_one_line(change, part, tmp_path):
    content = content_of(FLAT)
    change(content)
    path = save(content, tmp_path / "a.pt")
    with pytest.raises(checkpoints.CheckpointError) as error:
        checkpoints.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def break_size(content):
    content["config"]["model"]["sphere_channels"] = 24


def break_weights(content):
    del content["state_dict"]["blocks.0.ga.alpha_dot"]


def break_depth(content):
    content["state_dict"]["blocks.7.ga.beta"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (break_size, "sphere_channels: checkpoint 16, config 24"),
        (break_weights, "lack blocks.0.ga.alpha_dot"),
        (break_depth, "num_layers: checkpoint 3, config 2"),
    ],
)
def test_weights_of_another_model(change, part, tmp_path):
    content = content_of(FLAT)
    change(content)
    checkpoint = checkpoints.load(save(content, tmp_path / "a.pt"))
    with pytest.raises(checkpoints.CheckpointError) as error:
        checkpoint.potential()
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_other_targets_make_no_potential(tmp_path):
    content = content_of(FLAT)
    content["config"]["outputs"] = {"gap": {"level": "system"}}
    checkpoint = checkpoints.load(save(content, tmp_path / "a.pt"))
    with pytest.raises(checkpoints.CheckpointError, match="neither of energy, forces, stress"):
        checkpoint.potential()
