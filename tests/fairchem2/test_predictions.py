"""Checkpoints of fairchem-core 1.10 in 2.x: the numbers of 1.10, in everything that predicts."""

from __future__ import annotations

import warnings

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from fairchem.core import FAIRChemCalculator
from fairchem.core.calculate.ase_calculator import AllZeroUnitCellError
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.units.mlip_unit import InferenceSettings

from fairchem_equiformer.fairchem2 import load_predict_unit
from tests import golden


def properties(atoms, form):
    found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if "stress" in golden.PROPERTIES[form]:
        found["stress"] = atoms.get_stress(voigt=False)
    return found


def check(found, name, form, tolerance=golden.TOLERANCE):
    for key, expected in golden.predicted(name, form).items():
        assert golden.error(found[key], expected) < tolerance, key


@pytest.mark.parametrize(("form", "name"), golden.EVERY)
def test_calculator(form, name, unit):
    """Slabs, crystals, a molecule without a cell and an atom alone, as 1.10 predicts them."""
    atoms = golden.structure(name)
    atoms.calc = FAIRChemCalculator(unit(form))
    check(properties(atoms, form), name, form)


@pytest.mark.parametrize("form", golden.FORMS)
def test_batch(form, unit):
    """All in one batch, whatever their periodicity."""
    predictor = unit(form)
    (task,) = predictor.dataset_to_tasks
    structures = [golden.structure(name) for name in golden.names()]
    batch = atomicdata_list_to_batch(
        [AtomicData.from_ase(atoms, task_name=task) for atoms in structures]
    )
    found = predictor.predict(batch)
    forces = found["forces"].split([len(atoms) for atoms in structures])
    for index, name in enumerate(golden.names()):
        one = {"energy": found["energy"][index], "forces": forces[index]}
        if "stress" in found:
            one["stress"] = found["stress"][index]
        check(one, name, form)


@pytest.mark.parametrize("form", golden.FORMS)
@pytest.mark.parametrize("settings", ["default", "high-precision", "traineval", "float64"], ids=str)
def test_settings(settings, form):
    """Under 2.x's presets, and in float64, where the golden numbers are float32's."""
    if settings == "float64":
        settings = InferenceSettings(base_precision_dtype=torch.float64)
    predictor = load_predict_unit(
        golden.checkpoint(form), device="cpu", inference_settings=settings
    )
    calculator = FAIRChemCalculator(predictor)
    for name in ("CO on Cu", "one atom alone"):
        atoms = golden.structure(name)
        atoms.calc = calculator
        check(properties(atoms, form), name, form)
    assert not predictor.inference_settings.compile
    dtypes = {parameter.dtype for parameter in predictor.model.parameters()}
    assert dtypes == {predictor.inference_settings.base_precision_dtype}


def test_presets_of_fairchem_stay_as_they_are():
    load_predict_unit(golden.checkpoint("flat"), device="cpu", inference_settings="default")
    from fairchem.core.units.mlip_unit.api.inference import NAME_TO_INFERENCE_SETTING

    assert NAME_TO_INFERENCE_SETTING["default"].compile


def test_references_can_be_left_out(unit):
    """As `undo_element_references` promises."""
    atoms = golden.structure("MgO")
    predictor = unit("flat")
    data = AtomicData.from_ase(atoms, task_name="oc20")
    whole, without = (
        predictor.predict(data, undo_element_references=choice)["energy"].item()
        for choice in (True, False)
    )
    references = torch.load(golden.checkpoint("flat"), weights_only=True)["elementrefs"]["energy"]
    added = references["element_references"][atoms.numbers].sum().item()
    assert added != 0
    assert whole - without == pytest.approx(added, abs=1e-5)


def test_other_places_of_the_same_atoms(unit):
    """Atoms outside the cell, and the cell's atoms twice: the same crystal."""
    calculator = FAIRChemCalculator(unit("hydra"))
    atoms = golden.structure("CuAu, sheared")
    moved, doubled = atoms.copy(), atoms.repeat((2, 1, 1))
    moved.positions += 3 * atoms.cell.array[0] - 7 * atoms.cell.array[2]
    for one in (atoms, moved, doubled):
        one.calc = calculator
    energy, forces, stress = (getattr(atoms, f"get_{key}")() for key in _GETTERS)
    assert moved.get_potential_energy() == pytest.approx(energy, rel=1e-5)
    assert doubled.get_potential_energy() - _offset(unit) == pytest.approx(
        2 * (energy - _offset(unit)), rel=1e-5
    )
    for one in (moved, doubled):
        assert golden.error(one.get_forces()[: len(atoms)], forces) < 2e-5
        assert golden.error(one.get_stress(), stress) < 2e-5


_GETTERS = ("potential_energy", "forces", "stress")


def _offset(unit):
    """The normaliser's mean, which comes once for a structure."""
    return unit("hydra").tasks["energy"].normalizer.mean.item()


class TestBadInput:
    def test_periodic_without_a_cell(self, unit):
        atoms = molecule("H2O", pbc=True)
        atoms.calc = FAIRChemCalculator(unit("flat"))
        with pytest.raises(AllZeroUnitCellError):
            atoms.get_potential_energy()

    def test_unknown_element(self, unit):
        atoms = bulk("Cu", cubic=True)
        atoms.numbers[2] = 95
        atoms.calc = FAIRChemCalculator(unit("flat"))
        with pytest.raises(ValueError, match=r"structure 0 of the batch, atom 2: atomic number 95"):
            atoms.get_potential_energy()

    def test_two_atoms_on_one_point(self, unit):
        atoms = Atoms("Cu2", [(0.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
        atoms.calc = FAIRChemCalculator(unit("flat"))
        with pytest.raises(ValueError, match="on one point"):
            atoms.get_potential_energy()

    def test_graphs_from_outside(self):
        settings = InferenceSettings(external_graph_gen=True)
        with pytest.raises(ValueError, match="external_graph_gen: True"):
            load_predict_unit(golden.checkpoint("flat"), device="cpu", inference_settings=settings)

    def test_no_stress_without_a_head(self, unit):
        atoms = golden.structure("MgO")
        atoms.calc = FAIRChemCalculator(unit("flat"))
        with pytest.raises(NotImplementedError, match="stress"):
            atoms.get_stress()


def test_inference_batcher(unit):
    """2.x's server of batches: calculators in threads share one model."""
    pytest.importorskip("ray", reason="fairchem-core[ray] is not installed")
    from fairchem.core.calculate import InferenceBatcher

    names = ["MgO", "Si", "ethanol without a cell"]
    with InferenceBatcher(unit("hydra"), concurrency_backend_options={"max_workers": 2}) as batcher:

        def predict(name):
            atoms = golden.structure(name)
            atoms.calc = FAIRChemCalculator(batcher.batch_predict_unit, task_name="omat")
            return properties(atoms, "hydra")

        found = list(batcher.executor.map(predict, names))
        batcher.shutdown(shutdown_ray=True)
    for name, one in zip(names, found, strict=True):
        check(one, name, "hydra")


def test_torch_sim(tmp_path):
    """2.x's own interface, which wants a torch-sim that needs Python 3.12."""
    with warnings.catch_warnings():  # what its dependencies say while they are imported
        warnings.simplefilter("ignore")
        torch_sim = pytest.importorskip("torch_sim", reason="torch-sim is not installed")
        from fairchem.core.calculate.torchsim_interface import FairChemModel

    from fairchem_equiformer.fairchem2 import convert

    names = [name for name in golden.names() if golden.structure(name).pbc.all()]
    options = {"device": torch.device("cpu"), "dtype": torch.float64}
    state = torch_sim.initialize_state([golden.structure(name) for name in names], **options)
    if not isinstance(state.pbc, torch.Tensor):
        pytest.skip("fairchem's interface needs torch-sim 0.6, and that Python 3.12")
    path = tmp_path / "inference.pt"
    torch.save(convert(golden.checkpoint("hydra")), path)
    model = FairChemModel(path, device=torch.device("cpu"), compute_stress=True, task_name="omat")
    found = model(state)
    forces = found["forces"].split([len(golden.structure(name)) for name in names])
    for index, name in enumerate(names):
        one = {key: found[key][index] for key in ("energy", "stress")}
        check({**one, "forces": forces[index]}, name, "hydra")
    assert len(names) == 9
