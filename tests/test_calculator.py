"""EquiformerCalculator and fairchem-core 1.10's OCPCalculator on the same checkpoints.

tests/plain/test_calculator.py has all that needs no fairchem.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms
from fairchem.core import OCPCalculator

from fairchem_equiformer import EquiformerCalculator
from fairchem_equiformer.models.config import ModelConfig
from tests.models import KEYS, fix_roll
from tests.stock_checkpoints import OUTPUTS, STRESS, content_of, grids_of, save

pytestmark = pytest.mark.filterwarnings("ignore:equiformer_v2_:DeprecationWarning")

FLAT = {"name": "equiformer_v2", **KEYS}
HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "backbone": {"model": "equiformer_v2_backbone", **KEYS},
    "heads": {
        "energy": {"module": "equiformer_v2_energy_head"},
        "forces": {"module": "equiformer_v2_force_head"},
        "stress": {
            "module": "rank2_symmetric_head",
            "output_name": "stress",
            "use_source_target_embedding": True,
            "decompose": True,
        },
    },
}
FORMS = {"flat": (FLAT, OUTPUTS), "hydra": (HYDRA, {**OUTPUTS, "stress": STRESS})}


def slab(*, periodic: bool, vacuum: float, rattle: float = 0.05) -> Atoms:
    """Two layers of copper with CO; the lower one is fixed."""
    atoms = fcc111("Cu", (2, 2, 2), vacuum=vacuum)
    add_adsorbate(atoms, molecule("CO"), 1.9, "ontop")
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 2))
    atoms.pbc = (True, True, periodic)
    atoms.positions += np.random.default_rng(0).normal(scale=rattle, size=(len(atoms), 3))
    return atoms


def unwrapped(atoms: Atoms) -> Atoms:
    atoms.positions += np.array([3, -2, 1]) @ atoms.cell.array
    return atoms


STRUCTURES = {
    "slab": slab(periodic=True, vacuum=8.0),
    # Nearer to its image than the cutoff: atoms.pbc decides whether it is seen.
    "slab under its image": slab(periodic=True, vacuum=1.5),
    "the same, open above": slab(periodic=False, vacuum=1.5),
    "outside its cell": unwrapped(slab(periodic=True, vacuum=1.5)),
    "perfect surface": slab(periodic=True, vacuum=8.0, rattle=0.0),
    "perfect crystal": bulk("NaCl", "rocksalt", a=5.6, cubic=True),
    "molecule without a cell": molecule("CH3OH"),
    "molecule in a cell": molecule("H2O", vacuum=2.0),
}


@pytest.fixture(scope="module", params=FORMS)
def calculators(request, tmp_path_factory):
    """Ours and fairchem's of one checkpoint, the latter without the roll of its edge frames."""
    torch.manual_seed(0)
    model, outputs = FORMS[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    path = save(content_of(model, outputs), Path(folder) / "best_checkpoint.pt")
    with grids_of(model):
        stock = OCPCalculator(checkpoint_path=path, trainer="ocp", cpu=True)
    fix_roll(getattr(stock.trainer.model, "backbone", stock.trainer.model))
    return EquiformerCalculator(path, device="cpu"), stock


def predictions(atoms: Atoms, calculator) -> dict[str, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator
    found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if "stress" in calculator.implemented_properties:
        found["stress"] = atoms.get_stress()
    return {key: np.asarray(value) for key, value in found.items()}


@pytest.mark.parametrize("name", STRUCTURES)
def test_same_numbers(name, calculators):
    ours, stock = (predictions(STRUCTURES[name], one) for one in calculators)
    assert ours.keys() == stock.keys()
    for key, expected in stock.items():
        assert np.abs(ours[key] - expected).max() < 1e-5 * np.abs(expected).max(), key


def test_the_structures_tell_periodicities_apart(calculators):
    assert ModelConfig.from_keys(KEYS).max_radius > 2 * 1.5
    ours, _ = calculators
    closed, opened = (
        predictions(STRUCTURES[name], ours)["energy"]
        for name in ("slab under its image", "the same, open above")
    )
    assert abs(closed - opened) > 1e-2


def test_a_model_of_energies_alone(tmp_path):
    content = content_of(FLAT | {"regress_forces": False}, {"energy": OUTPUTS["energy"]})
    calculator = EquiformerCalculator(save(content, tmp_path / "energy.pt"))
    assert calculator.implemented_properties == ["energy", "free_energy"]
    atoms = STRUCTURES["slab"].copy()
    atoms.calc = calculator
    assert np.isfinite(atoms.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_forces()
