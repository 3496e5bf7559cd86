"""Checkpoints that fairchem's own models wrote, turned into ours and back."""

from __future__ import annotations

import copy
import subprocess
import sys
from datetime import date
from typing import Any

import pytest
import torch
import yaml
from fairchem.core import OCPCalculator
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.eqv2_to_eqv2_hydra import (
    convert_checkpoint_and_config_to_hydra,
)

from fairchem_equiformer import convert as convert_command
from fairchem_equiformer.checkpoints import CheckpointError
from fairchem_equiformer.fairchem1 import cli, convert
from tests.conftest import make_atoms, make_tiny_config
from tests.structures import three_slabs
from tests.tolerances import assert_close, relative_error

# Gate activation: its results do not depend on the roll that the stock model draws.
OPTIONS = {"use_gate_act": True, "use_grid_mlp": False, "alpha_drop": 0.0, "drop_path_rate": 0.0}
HEADS = {
    "energy": {"module": "equiformerV2_scalar_head"},
    "forces": {"module": "equiformerV2_vector_head"},
}
FORMS = ("flat", "hydra")


def stock_config(form, data):
    """A config of `make_tiny_config` with fairchem's own model."""
    config = make_tiny_config(data)
    keys = config["model"] | OPTIONS
    del keys["name"]
    if form == "flat":
        config["model"] = {"name": "equiformer_v2", **keys}
    else:
        config["model"] = {
            "name": "hydra",
            "backbone": {"model": "equiformer_v2_backbone", **keys},
            "heads": copy.deepcopy(HEADS),
            "pass_through_head_outputs": True,
        }
    return config


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train by `fairchem main` for some epochs; return the folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("training")

    def run(config, name, epochs, checkpoint=None):
        path = folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(config))
        options = [f"--run-dir={folder}", f"--timestamp-id={name}", "--seed=1", "--cpu"]
        if checkpoint is not None:
            options.append(f"--checkpoint={checkpoint}")
        overrides = [f"--optim.max_epochs={epochs}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            given = ["main", "--mode=train", f"--config-yml={path}", *options, *overrides]
            assert cli.main(given) == 0
        return folder / "checkpoints" / name

    return run


@pytest.fixture(scope="module", params=FORMS)
def trained(request, train, tiny_lmdb):
    """Form, config, and folder with what fairchem's model wrote after four steps with EMA."""
    config = stock_config(request.param, tiny_lmdb)
    return request.param, config, train(config, f"{request.param}-stock", epochs=2)


def load(path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def assert_equal(value, expected):
    """The same, whatever is nested in what."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected)
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_equal(value[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(value) == len(expected)
        for item, other in zip(value, expected, strict=True):
            assert_equal(item, other)
    else:
        assert value == expected


def test_there_and_back(trained):
    _, _, folder = trained
    original = load(folder / "checkpoint.pt")
    before = copy.deepcopy(original)
    ours = convert.convert(original, "fairchem_equiformer")
    assert_equal(original, before)  # the caller's is left alone
    assert "fairchem_equiformer" in str(ours["config"]["model"])
    assert not [name for name in ours["state_dict"] if "SO3" in name]
    back = convert.convert(ours, "fairchem")
    assert_equal(back, original)


def test_resumed_training_goes_on_as_fairchems(trained, train):
    form, config, folder = trained
    converted = folder / "converted.pt"
    assert convert_command.main([str(folder / "checkpoint.pt"), str(converted)]) == 0
    theirs = load(train(config, f"{form}-on", 4, folder / "checkpoint.pt") / "checkpoint.pt")
    own_config = config | {"model": load(converted)["config"]["model"]}
    own = load(train(own_config, f"{form}-ours", 4, converted) / "checkpoint.pt")
    assert own["step"] == theirs["step"] == 8
    start = load(folder / "checkpoint.pt")["state_dict"]
    moved = 0.0
    for name, value in own["state_dict"].items():
        assert_close(value, theirs["state_dict"][name], "after 8 steps", torch.float32, name)
        moved = max(moved, relative_error(value, start[name]))
    assert moved > 1e-2
    for value, expected in zip(
        own["ema"]["shadow_params"], theirs["ema"]["shadow_params"], strict=True
    ):
        assert_close(value, expected, "after 8 steps")


def test_calculator_predicts_the_same(trained, tmp_path):
    _, _, folder = trained
    converted = tmp_path / "ours.pt"
    assert convert_command.main([str(folder / "best_checkpoint.pt"), str(converted)]) == 0
    results = []
    for path in (folder / "best_checkpoint.pt", converted):
        atoms = make_atoms(3)
        atoms.calc = OCPCalculator(checkpoint_path=path, cpu=True)
        results.append((atoms.get_potential_energy(), torch.tensor(atoms.get_forces())))
    (energy, forces), (own_energy, own_forces) = results
    assert own_energy == pytest.approx(energy, rel=1e-5)
    assert_close(own_forces, forces, "outputs")


def flat_checkpoint():
    """A checkpoint with weights and config alone, small and quick to make."""
    model = stock_config("flat", "none")["model"]
    return {
        "config": {"model": model},
        "state_dict": convert._build(model).state_dict(),
        "normalizers": {"target": {"mean": torch.tensor(1.5), "std": torch.tensor(2.0)}},
    }


@pytest.mark.parametrize("prefix", ["module.", "module.module."])
def test_original_release(prefix):
    """Keys apart from the model's name, and weights as data-parallel training names them."""
    checkpoint = flat_checkpoint()
    keys = checkpoint["config"]["model"]
    name = keys.pop("name")
    checkpoint["config"] = {"model": name, "model_attributes": keys, "trainer": "forces"}
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {prefix + key: value for key, value in state.items()}
    ours = convert.convert(checkpoint, "fairchem_equiformer")
    assert ours["config"] == {
        "model": {"name": "fairchem_equiformer.EquiformerV2", **keys},
        "trainer": "forces",
    }
    assert ours["normalizers"] == checkpoint["normalizers"]
    for key, value in ours["state_dict"].items():
        assert torch.equal(value, state[key.removeprefix(prefix)])


@pytest.mark.filterwarnings("ignore:equiformer_v2_:DeprecationWarning")
def test_fairchems_deprecated_heads():
    model = stock_config("hydra", "none")["model"]
    model["heads"] = {"energy": {"module": "equiformer_v2_energy_head", "reduce": "mean"}}
    checkpoint = {"config": {"model": model}, "state_dict": convert._build(model).state_dict()}
    ours = convert.convert(checkpoint, "fairchem_equiformer")["config"]["model"]["heads"]
    assert ours == {"energy": {"module": "fairchem_equiformer.EnergyHead", "reduce": "mean"}}


def our_checkpoint(form, **keys):
    """A checkpoint of ours with these keys beside those of `stock_config`."""
    config = stock_config(form, "none")["model"]
    model = convert._rename(config, "fairchem_equiformer")
    (model["backbone"] if form == "hydra" else model).update(keys)
    return {"config": {"model": model}, "state_dict": convert._build(model).state_dict()}


@pytest.mark.parametrize("form", FORMS)
def test_fairchems_class_loads_a_checkpoint_with_keys_of_ours(form):
    keys = {"edges_per_chunk": 64, "activation_checkpoint": True, "use_tag_embedding": False}
    ours = our_checkpoint(form, **keys)
    theirs = convert.convert(ours, "fairchem")
    model = dict(theirs["config"]["model"])
    stock = registry.get_model_class(model.pop("name"))(**model)
    stock.load_state_dict(theirs["state_dict"])  # strict: every name and shape
    saved = ours["state_dict"]
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, saved[name])
    kept = {"activation_checkpoint"} if form == "hydra" else set()
    assert keys.keys() & model.get("backbone", model).keys() == kept


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("key", "value"), [("use_tag_embedding", True), ("distance_function", "learnable_gaussian")]
)
def test_what_fairchems_model_does_not_have_is_named(form, key, value):
    ours = our_checkpoint(form, **{key: value})
    with pytest.raises(CheckpointError, match=rf"{key} is '?{value}.*does not have"):
        convert.convert(ours, "fairchem")


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_that_names_this_package_already(form):
    with pytest.raises(CheckpointError, match="already; --to fairchem turns it back"):
        convert.convert(our_checkpoint(form), "fairchem_equiformer")


@pytest.mark.long
def test_the_command_prints_no_warnings(tmp_path):
    """Such as those of `torch.load` for every file of fairchem's models."""
    torch.save(our_checkpoint("flat"), tmp_path / "ours.pt")
    command = [sys.executable, "-m", "fairchem_equiformer.convert", "--to", "fairchem"]
    done = subprocess.run(
        [*command, "ours.pt", "theirs.pt"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "theirs.pt: model equiformer_v2\n"
    assert "Warning" not in done.stderr


@pytest.mark.filterwarnings("ignore:equiformer_v2_:DeprecationWarning")
def test_a_flat_model_becomes_a_hydra_by_fairchems_converter(tmp_path):
    """It asks for fairchem's name of the flat model; docs/own_data.md says how to give it that."""
    flat = our_checkpoint("flat")
    config = yaml.safe_dump(make_tiny_config("none") | {"model": "read from the checkpoint"})
    (tmp_path / "flat.yml").write_text(config)
    torch.save(convert.convert(flat, "fairchem"), tmp_path / "flat.pt")
    names = ("flat.yml", "flat.pt", "hydra.yml", "hydra.pt")
    convert_checkpoint_and_config_to_hydra(*(str(tmp_path / name) for name in names))
    ours = convert.convert(load(tmp_path / "hydra.pt"), "fairchem_equiformer")
    hydra = convert._build(ours["config"]["model"])
    state = {name.removeprefix("module."): p for name, p in ours["state_dict"].items()}
    hydra.load_state_dict(state)
    model = convert._build(flat["config"]["model"])
    model.load_state_dict(flat["state_dict"])
    with torch.no_grad():
        expected, found = model.eval()(three_slabs()), hydra.eval()(three_slabs())
    for key, value in expected.items():
        assert torch.equal(found[key][key], value)


def break_name(checkpoint):
    checkpoint["config"]["model"]["name"] = "gemnet_oc"


def break_size(checkpoint):
    checkpoint["config"]["model"]["sphere_channels"] = 24


def break_weights(checkpoint):
    del checkpoint["state_dict"]["blocks.0.ga.alpha_dot"]


def break_hydra(checkpoint):
    checkpoint["config"]["model"] = {"name": "hydra", "heads": {}}


def break_key(checkpoint):
    checkpoint["config"]["model"]["num_layer"] = 3


def break_all(checkpoint):
    checkpoint.clear()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (break_name, ["config.model.name", "'gemnet_oc'", "equiformer_v2"]),
        (break_size, ["sphere_channels: checkpoint 16, config 24"]),
        (break_weights, ["blocks.0.ga.alpha_dot"]),
        (break_hydra, ["hydra", "backbone"]),
        (break_key, ["num_layer"]),
        (break_all, ["state_dict"]),
    ],
)
def test_what_cannot_be_converted_is_one_line(change, parts, tmp_path, capsys):
    checkpoint = flat_checkpoint()
    change(checkpoint)
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(checkpoint, source)
    assert convert_command.main([str(source), str(target)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"convert: error: {source}: ")
    assert message.count("\n") == 1
    for part in parts:
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_missing_unreadable_and_existing_files(tmp_path, capsys):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    assert convert_command.main([str(source), str(target)]) == 2
    assert "no such file" in capsys.readouterr().err
    source.write_bytes(b"no checkpoint")
    assert convert_command.main([str(source), str(target)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    target.touch()
    assert convert_command.main([str(source), str(target)]) == 2
    assert f"{target} exists" in capsys.readouterr().err


def test_what_a_checkpoint_should_not_ask_for_is_refused(tmp_path, capsys):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(flat_checkpoint() | {"written": date(2024, 1, 1)}, source)
    assert convert_command.main([str(source), str(target)]) == 2
    message = capsys.readouterr().err
    assert message.count(str(source)) == 1
    assert "asks for datetime.date" in message
    assert convert_command.main([str(source), str(target), "--trusted"]) == 0
    assert load(target)["written"] == date(2024, 1, 1)
