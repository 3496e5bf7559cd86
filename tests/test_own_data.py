"""A database of one's own, from statistics to a trained model, and what goes wrong on the way."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.neighborlist import neighbor_list
from fairchem.core import OCPCalculator
from fairchem.core.common.tutorial_utils import generate_yml_config
from fairchem.core.common.utils import load_config
from fairchem.core.scripts import fit_normalizers, fit_references

from fairchem_equiformer.fairchem1 import cli, statistics
from tests.conftest import TINY_MODEL
from tests.test_configs import CONFIGS, trainable_parameters

CONFIG = CONFIGS / "own_data" / "eqv2_31M.yml"
PARAMETERS = 31_058_690
OC20_CONFIG = CONFIGS / "oc20" / "all_md" / "eqv2_31M.yml"
# Electronvolts an atom, as far from zero as totals are.
REFERENCES = {"Cu": -1300.0, "Au": -3000.0}


def alloy(seed: int) -> Atoms:
    """A rattled cell of one, two or four atoms."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True) if seed % 3 == 0 else bulk("Cu") * (1, 1, seed % 3)
    atoms.symbols[:] = rng.choice(list(REFERENCES), len(atoms))
    atoms.rattle(0.1, rng=rng)
    return atoms


def total_energy(atoms: Atoms) -> float:
    atoms = atoms.copy()
    atoms.calc = EMT()
    return atoms.get_potential_energy() + sum(REFERENCES[symbol] for symbol in atoms.symbols)


def write_database(path, seeds):
    with connect(path) as database:
        for seed in seeds:
            atoms = alloy(seed)
            atoms.calc = EMT()
            labels = {"energy": total_energy(atoms), "forces": atoms.get_forces()}
            atoms.calc = SinglePointCalculator(atoms, **labels)
            database.write(atoms)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The config and the databases that it names."""
    folder = tmp_path_factory.mktemp("own")
    write_database(folder / "train.db", range(12))
    write_database(folder / "val.db", range(12, 16))
    config = yaml.safe_load(CONFIG.read_text())
    config["model"] |= {key: TINY_MODEL[key] for key in TINY_MODEL if key != "name"}
    config["optim"] |= {"max_epochs": 2, "num_workers": 0, "batch_size": 4}
    (folder / "own.yml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """The `fairchem` command in the folder: status and message."""
    monkeypatch.chdir(folder)

    def run(*overrides, config="own.yml"):
        options = ["--config-yml", config, "--cpu", "--run-dir", ".", "--timestamp-id", "own"]
        status = cli.main(["main", "--mode", "train", *options, *overrides])
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["--config-yml", "own.yml", "--cpu", "--run-dir", ".", "--timestamp-id", "own"]
        assert cli.main(["main", "--mode", "train", *options]) == 0
    return folder / "checkpoints" / "own"


def test_the_config_is_of_oc20s_small_model():
    """So that its published checkpoint fits."""
    models = [load_config(path)[0]["model"] for path in (CONFIG, OC20_CONFIG)]
    own, oc20 = (trainable_parameters(json.dumps(model)) for model in models)
    assert own == oc20 == PARAMETERS


def test_the_config_trains_on_totals(trained):
    """References are fitted: a model of two epochs is off by less than the energy of an atom."""
    checkpoint = torch.load(trained / "best_checkpoint.pt", weights_only=False)
    references = checkpoint["elementrefs"]["energy"]["element_references"]
    for symbol, number in (("Cu", 29), ("Au", 79)):
        assert references[number].item() == pytest.approx(REFERENCES[symbol], abs=2.0)
    forces = []
    for atoms in map(alloy, range(12)):
        atoms.calc = EMT()
        forces.append(atoms.get_forces())
    length = np.linalg.norm(np.concatenate(forces), axis=1)
    found = checkpoint["normalizers"]["forces"]["rmsd"].item()
    assert found == pytest.approx(np.sqrt(np.mean(length**2)), rel=0.05)  # over N - 1 there
    atoms = alloy(20)
    atoms.calc = OCPCalculator(checkpoint_path=trained / "best_checkpoint.pt", cpu=True)
    assert atoms.get_potential_energy() == pytest.approx(total_energy(atoms), abs=5.0)


def test_statistics_are_those_of_the_training_data(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    # All neighbours up to 3.2 Angstrom, few enough that none is left out.
    overrides = ["--model.max_radius=3.2", "--model.max_neighbors=50"]
    assert statistics.main(["own.yml", *overrides]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    structures = [alloy(seed) for seed in range(12)]
    atoms = sum(len(structure) for structure in structures)
    edges = sum(len(neighbor_list("i", structure, 3.2)) for structure in structures)
    expected = {"avg_num_nodes": atoms / 12, "avg_degree": edges / atoms}
    assert printed == {"model": pytest.approx(expected, rel=1e-4)}


def test_statistics_of_a_hydra_stand_under_its_backbone(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    keys = yaml.safe_load((folder / "own.yml").read_text())
    backbone = keys["model"] | {"model": "fairchem_equiformer.EquiformerV2Backbone"}
    del backbone["name"]
    keys["model"] = {"name": "hydra", "backbone": backbone}
    (folder / "hydra.yml").write_text(yaml.safe_dump(keys))
    assert statistics.main(["hydra.yml", "--structures", "3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["backbone"].keys() == {"avg_num_nodes", "avg_degree"}
    del keys["model"]["backbone"]
    (folder / "hydra.yml").write_text(yaml.safe_dump(keys))
    assert statistics.main(["hydra.yml"]) == 2
    assert "statistics: error: hydra.yml: model.backbone is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "override"),
    [
        ("train", "--dataset.train.a2g_args.r_forces=False"),
        ("val", "--dataset.val.a2g_args.r_energy=True"),  # in place of those of training
    ],
)
def test_labels_that_are_not_read_are_named(run, split, override):
    status, message = run(override)
    assert status == 2
    assert message.count("\n") == 1
    assert f"dataset.{split}: loss_functions has forces" in message
    assert "a2g_args: {r_forces: True}" in message


def test_a_config_from_a_checkpoint_is_named(trained, run, folder):
    """fairchem's tutorial on fine-tuning makes one by `generate_yml_config`."""
    update = {"dataset.train.src": "train.db", "dataset.val.src": "val.db", "optim.max_epochs": 1}
    update["dataset.train.format"] = update["dataset.val.format"] = "ase_db"
    for split in ("train", "val"):
        update[f"dataset.{split}.a2g_args"] = {"r_energy": True, "r_forces": True}
    generate_yml_config(
        trained / "best_checkpoint.pt",
        folder / "generated.yml",
        delete=["slurm", "cmd", "logger", "task", "dataset", "val_dataset", "test_dataset"],
        update=update | {"logger": "tensorboard"},
    )
    status, message = run(config="generated.yml")
    assert status == 2
    assert message.count("\n") == 1
    assert "the trainer s2ef" in message
    assert "equiformerv2_forces" in message
    status, message = run("--trainer=equiformerv2_forces", config="generated.yml")
    assert status == 2
    assert message.count("\n") == 1
    assert "warmup_epochs (1) counts steps" in message
    text = yaml.safe_load((folder / "generated.yml").read_text())
    times = text["optim"]["scheduler_params"]
    del times["epochs"], times["lr"]
    (folder / "mended.yml").write_text(yaml.safe_dump(text))
    mended = [
        "--timestamp-id=mended",
        "--trainer=equiformerv2_forces",
        "--optim.scheduler_params.warmup_epochs=0.1",
    ]
    assert run(*mended, config="mended.yml")[0] == 0


def test_training_starts_from_a_checkpoint(trained, run, folder):
    """With its scales, and without averaged weights, as docs/own_data.md says."""
    before = torch.load(trained / "best_checkpoint.pt", weights_only=False)
    before["normalizers"]["forces"]["rmsd"] = torch.tensor(7.0)
    torch.save(before, folder / "start.pt")
    options = ["--checkpoint=start.pt", "--timestamp-id=tuned", "--optim.lr_initial=1e-4"]
    assert run(*options, "--optim.max_epochs=1")[0] == 0
    after = torch.load(folder / "checkpoints/tuned/checkpoint.pt", weights_only=False)
    assert after["normalizers"]["forces"]["rmsd"] == 7.0
    assert after["ema"] is None
    name = next(name for name in before["state_dict"] if name.endswith("sphere_embedding.weight"))
    start, end = (content["state_dict"][name] for content in (before, after))
    assert 0 < (end - start).norm() / start.norm() < 0.1


def test_fairchems_scripts_fit_what_a_config_can_name(folder, run, monkeypatch):
    monkeypatch.chdir(folder)
    config = yaml.safe_load((folder / "own.yml").read_text())
    (folder / "references").mkdir()
    fit_references.fit_linref(copy.deepcopy(config), "references")
    fit_normalizers.fit_norms(
        copy.deepcopy(config), "references", "references/energy_linref.pt", "energy"
    )
    config["dataset"]["train"]["transforms"] = {
        "element_references": {"energy": {"file": "references/energy_linref.pt"}},
        "normalizer": {"file": "references/normalizers.pt"},
    }
    (folder / "files.yml").write_text(yaml.safe_dump(config))
    assert run("--timestamp-id=files", "--optim.max_epochs=1", config="files.yml")[0] == 0
    best = torch.load(folder / "checkpoints/files/best_checkpoint.pt", weights_only=False)
    references = best["elementrefs"]["energy"]["element_references"]
    assert references[29].item() == pytest.approx(REFERENCES["Cu"], abs=2.0)
    assert best["normalizers"].keys() == {"energy", "forces"}
