"""The calculator of ASE: fairchem-core 1.10's numbers, without it, in all that ASE does with it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from fairchem_equiformer import EquiformerCalculator, calculator, checkpoints
from fairchem_equiformer.ops import edge_attention
from tests import golden


@pytest.fixture(scope="module")
def calculators():
    return {form: EquiformerCalculator(golden.checkpoint(form)) for form in golden.FORMS}


@pytest.fixture
def hydra(calculators):
    return copy.deepcopy(calculators["hydra"])


@pytest.fixture
def count(monkeypatch):
    """Forward passes since this was asked for."""
    calls = []
    forward = checkpoints.Potential.forward
    counted = lambda self, batch: calls.append(0) or forward(self, batch)  # noqa: E731
    monkeypatch.setattr(checkpoints.Potential, "forward", counted)
    return calls


def properties(atoms, form):
    found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if "stress" in golden.PROPERTIES[form]:
        found["stress"] = atoms.get_stress(voigt=False)
    return found


@pytest.mark.parametrize(("form", "name"), golden.EVERY)
def test_numbers_of_fairchem(form, name, calculators):
    """Slabs, crystals, a molecule without a cell and an atom alone."""
    atoms = golden.structure(name)
    atoms.calc = calculators[form]
    found = properties(atoms, form)
    for key, expected in golden.predicted(name, form).items():
        assert golden.error(found[key], expected) < golden.TOLERANCE, key


def test_needs_no_framework():
    program = (
        "import sys; from fairchem_equiformer import EquiformerCalculator as E;"
        f"E({str(golden.checkpoint('flat'))!r}); print(*sys.modules)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "ase" in loaded
    assert not {"fairchem.core", "torch_geometric", "torch_scatter", "torch_sim"} & set(loaded)


class TestProperties:
    def test_of_each_form(self, calculators):
        flat, hydra = calculators["flat"], calculators["hydra"]
        assert set(flat.implemented_properties) == {"energy", "free_energy", "forces"}
        assert set(hydra.implemented_properties) == {"energy", "free_energy", "forces", "stress"}

    def test_free_energy_is_the_energy(self, hydra):
        atoms = golden.structure("Si")
        atoms.calc = hydra
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()

    def test_stress_in_voigts_order(self, hydra):
        atoms = golden.structure("CuAu, sheared")
        atoms.calc = hydra
        whole = golden.predicted("CuAu, sheared", "hydra")["stress"]
        xx, yy, zz, yz, xz, xy = atoms.get_stress()
        found = [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]
        assert golden.error(found, whole) < golden.TOLERANCE

    @pytest.mark.parametrize("ask", [Atoms.get_stress, Atoms.get_magnetic_moment])
    def test_what_is_not_predicted(self, ask, calculators):
        atoms = golden.structure("Si")
        atoms.calc = calculators["flat"]
        with pytest.raises(PropertyNotImplementedError):
            ask(atoms)


class TestInput:
    def test_periodic_without_a_cell(self, hydra):
        atoms = molecule("H2O", pbc=(True, False, True), calculator=hydra)
        with pytest.raises(ValueError, match=r"no vector in direction 0, 2: give the atoms a cell"):
            atoms.get_potential_energy()

    def test_slab_without_a_third_vector(self, hydra):
        """As one in a cell that is high enough."""
        slab = fcc111("Cu", (2, 2, 2), periodic=False, vacuum=20.0)
        slab.rattle(0.1, seed=0)
        flat = slab.copy()
        flat.cell[2] = 0
        flat.pbc = slab.pbc = (True, True, False)
        flat.calc = slab.calc = hydra
        assert golden.error(flat.get_forces(), slab.get_forces()) < 1e-6

    def test_unknown_element(self, hydra):
        atoms = Atoms("CuOg", [(0, 0, 0), (2, 0, 0)], calculator=hydra)
        with pytest.raises(ValueError, match=r"atom 1: atomic number 118 .* knows 0 to 89"):
            atoms.get_forces()

    def test_an_error_is_not_kept(self, hydra):
        atoms = golden.structure("Si")
        atoms.calc = hydra
        energy = atoms.get_potential_energy()
        atoms.numbers[0] = 118
        for _ in range(2):
            with pytest.raises(ValueError, match="118"):
                atoms.get_potential_energy()
        atoms.numbers[0] = 14
        assert atoms.get_potential_energy() == energy

    def test_far_outside_the_cell(self, hydra):
        """float32 would round positions by 1e-4 Angstrom there."""
        atoms = golden.structure("MgO")
        moved = atoms.copy()
        moved.positions += [500, -700, 300] @ atoms.cell.array
        atoms.calc = hydra
        forces = atoms.get_forces()
        moved.calc = hydra
        assert golden.error(moved.get_forces(), forces) < golden.TOLERANCE


class TestPrecision:
    def test_float64(self, calculators):
        exact = EquiformerCalculator(golden.checkpoint("hydra"), dtype="float64")
        atoms = golden.structure("NH3 on Fe")
        atoms.calc = exact
        found = properties(atoms, "hydra")
        atoms.calc = calculators["hydra"]
        for key, expected in properties(atoms, "hydra").items():
            assert 1e-10 < golden.error(found[key], np.asarray(expected)) < golden.TOLERANCE

    def test_products_in_bfloat16(self, calculators):
        atoms = golden.structure("NH3 on Fe")
        atoms.calc = EquiformerCalculator(golden.checkpoint("flat"), dtype=torch.bfloat16)
        found = properties(atoms, "flat")
        atoms.calc = calculators["flat"]
        for key, expected in properties(atoms, "flat").items():
            assert 1e-6 < golden.error(found[key], np.asarray(expected)) < 3e-2

    def test_another(self):
        with pytest.raises(ValueError, match="dtype is 'float16', it must be float32, float64"):
            EquiformerCalculator(golden.checkpoint("flat"), dtype="float16")


class TestRepeatedCalls:
    def test_unchanged_atoms_are_predicted_once(self, hydra, count):
        atoms = golden.structure("Si")
        atoms.calc = hydra
        properties(atoms, "hydra")
        assert len(count) == 1
        atoms.positions[0, 0] += 0.01
        properties(atoms, "hydra")
        assert len(count) == 2

    def test_other_tags_are_a_change(self, hydra, count):
        atoms = golden.structure("Si")
        atoms.calc = hydra
        atoms.get_potential_energy()
        atoms.set_tags(2)
        atoms.get_potential_energy()
        assert len(count) == 2

    def test_what_is_predicted_is_what_there_is(self, hydra, monkeypatch):
        """After moves, of which nothing but the positions is read, and all other changes."""
        batches = []
        forward = checkpoints.Potential.forward
        remember = lambda self, batch: batches.append(batch) or forward(self, batch)  # noqa: E731
        monkeypatch.setattr(checkpoints.Potential, "forward", remember)
        atoms = golden.structure("Si")
        atoms.calc = hydra

        def no_cell():
            atoms.pbc, atoms.cell[2] = True, 0.0

        def a_cell():
            atoms.cell[2] = (0.0, 0.0, 9.0)
            atoms.rattle(0.01, seed=1)

        changes = {
            "moved": lambda: atoms.rattle(0.01, seed=2),
            "tags": lambda: atoms.set_tags(1),
            "pbc": lambda: atoms.set_pbc((True, True, False)),
            "elements": lambda: atoms.set_atomic_numbers(atoms.numbers[::-1] - 1),
            "refused": no_cell,
            "mended": a_cell,
            "moved again": lambda: atoms.rattle(0.01, seed=3),
            "another structure": lambda: atoms.append("C"),
        }
        atoms.get_forces()
        for name, change in changes.items():
            change()
            if name == "refused":
                with pytest.raises(ValueError, match="no vector in direction 2"):
                    atoms.get_forces()
                continue
            atoms.get_forces()
            expected = calculator.batch_of(atoms, torch.device("cpu"), torch.float32)
            for field, value in vars(expected).items():
                assert torch.equal(getattr(batches[-1], field), value), (name, field)
        first, moved = batches[:2]
        assert moved.cell is first.cell
        assert moved.pos is not first.pos

    def test_weights_are_prepared_once(self, hydra, monkeypatch):
        made = []
        original = edge_attention.SO2Weights.of
        of = lambda *weights: made.append(0) or original(*weights)  # noqa: E731
        monkeypatch.setattr(edge_attention.SO2Weights, "of", staticmethod(of))
        for name in ("Si", "MgO", "Si"):
            atoms = golden.structure(name)
            atoms.calc = hydra
            atoms.get_forces()
        assert len(made) == 2 * 2  # two layers of one block and of the force head


class TestWithAse:
    def test_relaxation_of_cell_and_atoms(self, hydra, count):
        atoms = golden.structure("MgO")
        atoms.calc = hydra
        cell, positions = atoms.cell.array.copy(), atoms.positions.copy()
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0, steps=3)
        assert np.abs(atoms.cell.array - cell).max() > 1e-3
        assert np.abs(atoms.positions - positions).max() > 1e-3
        assert len(count) == 4

    def test_dynamics(self, hydra, count):
        atoms = golden.structure("CO on Cu")
        atoms.calc = hydra
        VelocityVerlet(atoms, 1 * units.fs).run(3)
        assert len(count) == 4
        assert np.isfinite(atoms.get_velocities()).all()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_copies(self, copied, hydra):
        atoms = golden.structure("Si")
        atoms.calc = hydra
        forces = atoms.get_forces()
        twin = atoms.copy()
        twin.calc = copied(hydra)
        twin.positions += 1.0
        twin.positions -= 1.0
        twin.calc.reset()
        assert golden.error(twin.get_forces(), forces) < 1e-6
        assert twin.calc is not hydra


class TestFile:
    def test_a_checkpoint_that_is_there(self, calculators):
        atoms = golden.structure("Si")
        atoms.calc = EquiformerCalculator(checkpoints.load(golden.checkpoint("flat")))
        energy = atoms.get_potential_energy()
        atoms.calc = calculators["flat"]
        assert atoms.get_potential_energy() == energy

    def test_a_file_that_runs_something(self, tmp_path):
        content = torch.load(golden.checkpoint("flat"), weights_only=True)
        path = tmp_path / "foreign.pt"
        torch.save({**content, "extra": SimpleNamespace()}, path)
        with pytest.raises(checkpoints.CheckpointError, match=r"SimpleNamespace.*trusted=True"):
            EquiformerCalculator(path)
        assert EquiformerCalculator(path, trusted=True).implemented_properties

    def test_none(self, tmp_path):
        with pytest.raises(checkpoints.CheckpointError, match="no such file"):
            EquiformerCalculator(tmp_path / "nowhere.pt")
