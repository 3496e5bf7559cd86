"""The materials configs: sizes, and training, fine-tuning and a cell relaxation on EMT crystals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from fairchem.core import OCPCalculator
from fairchem.core.common.utils import load_config
from fairchem.core.datasets import data_list_collater

from fairchem_equiformer import checkpoints
from fairchem_equiformer.fairchem1 import cli
from fairchem_equiformer.models import DeNSBackbone
from tests.test_configs import CONFIGS, trainable_parameters
from tests.tolerances import assert_close

# Of fairchem's own classes under the same keys.
PARAMETERS = {
    "eqv2_31M": 31_207_434,
    "eqv2_86M": 86_589_068,
    "eqv2_153M": 153_769_868,
    "eqv2_31M_dens": 34_339_083,
}

TINY_BACKBONE = {
    "max_neighbors": 20,
    "max_radius": 6.0,
    "num_layers": 1,
    "lmax_list": [2],
    "mmax_list": [2],
    "grid_resolution": 8,
    "sphere_channels": 32,
    "attn_hidden_channels": 32,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 8,
    "ffn_hidden_channels": 32,
    "edge_channels": 16,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_model_has_the_size_of_fairchems(name):
    config = load_config(CONFIGS / "omat24" / f"{name}.yml")[0]
    assert trainable_parameters(json.dumps(config["model"])) == PARAMETERS[name]


def crystal(metal, seed):
    """A cubic cell of four atoms, strained by up to 4% and rattled."""
    rng = np.random.default_rng(seed)
    atoms = bulk(metal, cubic=True)
    strain = rng.uniform(-0.04, 0.04, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.rattle(0.05, rng=rng)
    return atoms


def write_database(path, count, offset):
    with connect(path) as database:
        for index in range(count):
            atoms = crystal("Cu", offset + index)
            atoms.calc = EMT()
            labels = {
                "energy": atoms.get_potential_energy(),
                "forces": atoms.get_forces(),
                "stress": atoms.get_stress(),
            }
            atoms.calc = SinglePointCalculator(atoms, **labels)
            database.write(atoms)
    return path


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train by `fairchem main` on a config that includes one of `configs/omat24`."""
    folder = tmp_path_factory.mktemp("omat24")
    sources = {
        "train": {"src": str(write_database(folder / "train.db", 96, 0))},
        "val": {"src": str(write_database(folder / "val.db", 8, 1000))},
    }
    fit = {"batch_size": 16, "num_batches": 6}
    sources["train"]["transforms"] = {
        "normalizer": {"fit": fit},
        "element_references": {"fit": fit},
    }

    def run(name, epochs, model):
        config = {
            "includes": [str(CONFIGS / "omat24" / f"{name}.yml")],
            "model": model,
            "dataset": sources,
            "optim": {
                "batch_size": 8,
                "num_workers": 0,
                "max_epochs": epochs,
                "lr_initial": 5e-3,
                "ema_decay": 0.9,
                "eval_every": 60,
            },
        }
        path = folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(config))
        options = ["--cpu", f"--run-dir={folder}", f"--timestamp-id={name}"]
        assert cli.main(["--mode=train", f"--config-yml={path}", *options]) == 0
        return folder / "checkpoints" / name / "best_checkpoint.pt"

    return run


@pytest.fixture(scope="module")
def pretrained(train):
    return train("eqv2_31M", 30, {"backbone": TINY_BACKBONE})


@pytest.mark.long
def test_predicts_energy_forces_and_stress(pretrained):
    """Energy and stress are twice as near as what knows the mean alone, on crystals not seen."""
    calculator = OCPCalculator(checkpoint_path=pretrained, cpu=True)
    found: dict[str, list] = {"energy": [], "stress": []}
    exact: dict[str, list] = {"energy": [], "stress": []}
    for seed in range(2000, 2008):
        for results, calc in ((found, calculator), (exact, EMT())):
            atoms = crystal("Cu", seed)
            atoms.calc = calc
            results["energy"].append(atoms.get_potential_energy())
            results["stress"].append(atoms.get_stress(voigt=False))
            assert atoms.get_forces().shape == (4, 3)
            assert np.allclose(results["stress"][-1], results["stress"][-1].T, atol=1e-6)
    for key, values in exact.items():
        spread = np.abs(values - np.mean(values, axis=0)).mean()
        assert np.abs(np.subtract(found[key], values)).mean() < 0.5 * spread, key


@pytest.mark.long
def test_fine_tuning_starts_from_the_checkpoints_backbone(pretrained, train):
    model = {"finetune_config": {"starting_checkpoint": str(pretrained)}}
    tuned, start = (
        torch.load(path, weights_only=False)["state_dict"]
        for path in (train("finetune", 5, model), pretrained)
    )
    name = next(name for name in start if name.endswith("sphere_embedding.weight"))
    moved = (tuned[name] - start[name]).norm() / start[name].norm()
    assert 0 < moved < 0.2


@pytest.mark.long
def test_cell_relaxation_restores_a_strained_crystal(pretrained):
    """With ASE's filter, on the predicted stress."""

    def relaxed_volume(calculator):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell.array * 1.03, scale_atoms=True)
        start = atoms.get_volume()
        atoms.calc = calculator
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.05, steps=50)
        return start, atoms.get_volume()

    start, expected = relaxed_volume(EMT())
    _, found = relaxed_volume(OCPCalculator(checkpoint_path=pretrained, cpu=True))
    assert abs(found - expected) < 0.5 * abs(start - expected)


@pytest.mark.long
def test_dens_trains_from_its_config(train):
    """By fairchem's own trainer; the calculator and the potential without fairchem agree."""
    path = train("eqv2_31M_dens", 4, {"backbone": TINY_BACKBONE})
    calculator = OCPCalculator(checkpoint_path=path, cpu=True)
    atoms = crystal("Cu", 2000)
    atoms.calc = calculator
    checkpoint = checkpoints.load(path)
    assert checkpoint.backbone_class is DeNSBackbone
    with torch.no_grad():
        found = checkpoint.potential()(data_list_collater([calculator.a2g.convert(atoms)]))
    assert float(found["energy"]) == pytest.approx(atoms.get_potential_energy(), rel=1e-5)
    for target, value in (
        ("forces", atoms.get_forces()),
        ("stress", atoms.get_stress(voigt=False)[None]),
    ):
        assert_close(found[target], torch.tensor(value), "outputs", name=target)
