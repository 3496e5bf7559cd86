"""Conversion into 2.x's inference checkpoint: by command, and what becomes of its parts."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from fairchem.core import FAIRChemCalculator
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit import InferenceSettings
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from fairchem_equiformer import checkpoints, models
from fairchem_equiformer import convert as command
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem2 import (
    EquiformerBackbone,
    EquiformerHead,
    convert,
    load_predict_unit,
)
from fairchem_equiformer.models.load_hooks import is_derived
from tests import golden


@pytest.fixture(scope="module")
def inference(tmp_path_factory):
    """Inference checkpoints of both forms, written by the command."""
    folder = tmp_path_factory.mktemp("inference")
    for form in golden.FORMS:
        source, target = golden.checkpoint(form), folder / f"{form}.pt"
        assert command.main([str(source), str(target), "--to", "fairchem2"]) == 0
    return folder


@pytest.mark.parametrize("form", golden.FORMS)
def test_fairchem_loads_it_by_itself(form, inference):
    calculator = FAIRChemCalculator.from_model_checkpoint(
        str(inference / f"{form}.pt"), device="cpu"
    )
    atoms = golden.structure("NH3 on Fe")
    atoms.calc = calculator
    expected = golden.predicted("NH3 on Fe", form)
    assert golden.error(atoms.get_potential_energy(), expected["energy"]) < golden.TOLERANCE
    assert golden.error(atoms.get_forces(), expected["forces"]) < golden.TOLERANCE


def test_command_says_what_it_wrote(tmp_path, capsys):
    target = tmp_path / "inference.pt"
    source = golden.checkpoint("flat")
    assert command.main([str(source), str(target), "--to=fairchem2", "--dataset=odac"]) == 0
    written = capsys.readouterr().out
    assert written.startswith(f"{target}: model fairchem_equiformer.fairchem2.HydraModel with ")
    content = torch.load(target, weights_only=False)
    assert isinstance(content, MLIPInferenceCheckpoint)
    assert [task["datasets"] for task in content.tasks_config] == [["odac"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["inference.pt"]
    assert command.main([str(source), str(target), "--to=fairchem2"]) == 2
    assert "exists: name a file that does not" in capsys.readouterr().err


def test_names_of_data_sets():
    """Those that 2.x's interface to torch-sim takes."""
    for form, name in (("flat", "oc20"), ("hydra", "omat")):
        tasks = convert(golden.checkpoint(form)).tasks_config
        assert {tuple(task["datasets"]) for task in tasks} == {(name,)}


def test_weights_are_the_moving_averages():
    path = golden.checkpoint("flat")
    raw = torch.load(path, weights_only=True)["state_dict"]["blocks.0.ga.alpha_dot"]
    content = convert(path)
    name = "backbone.blocks.0.ga.alpha_dot"
    assert not torch.equal(content.model_state_dict[name], raw)
    assert torch.equal(content.ema_state_dict[f"module.{name}"], content.model_state_dict[name])


def test_weights_fit_without_a_rest():
    for form in golden.FORMS:
        content = convert(golden.checkpoint(form))
        model = load_predict_unit(golden.checkpoint(form), device="cpu").model.module
        assert list(content.model_state_dict) == list(model.state_dict())


@pytest.fixture
def changed(tmp_path):
    """A golden checkpoint after a change of its content, as a file."""

    def write(form, change):
        content = torch.load(golden.checkpoint(form), weights_only=True)
        content = copy.deepcopy(content)
        change(content)
        path = tmp_path / "changed.pt"
        torch.save(content, path)
        return path

    return write


def test_linear_references_in_the_flat_model(changed):
    """`use_energy_lin_ref`: energies of elements that the model adds in its normalised unit."""
    own = torch.linspace(-1, 1, 90)

    def change(content):
        content["config"]["model"] |= {"use_energy_lin_ref": True, "load_energy_lin_ref": True}
        content["state_dict"] = {"energy_lin_ref": own, **content["state_dict"]}

    atoms = golden.structure("MgO")
    atoms.calc = FAIRChemCalculator(load_predict_unit(changed("flat", change), device="cpu"))
    added = own[atoms.numbers].sum().item() * 170.25  # the normaliser's rmsd
    expected = golden.predicted("MgO", "flat")["energy"] + added
    assert atoms.get_potential_energy() == pytest.approx(expected, rel=1e-5)


def test_heads_by_other_names(changed):
    """Heads and their results may be called anything; 2.x wants them named as their tasks."""

    def change(content):
        model = content["config"]["model"]
        model["heads"] = {f"a_{name}": head for name, head in model["heads"].items()}
        content["state_dict"] = {
            name.replace("output_heads.", "output_heads.a_"): value
            for name, value in content["state_dict"].items()
        }

    atoms = golden.structure("MgO")
    atoms.calc = FAIRChemCalculator(load_predict_unit(changed("hydra", change), device="cpu"))
    expected = golden.predicted("MgO", "hydra")
    assert golden.error(atoms.get_stress(voigt=False), expected["stress"]) < golden.TOLERANCE


def test_energy_alone(changed):
    """`regress_forces: False`, as ODAC23's models for relaxed energies."""

    def change(content):
        content["config"]["model"]["regress_forces"] = False
        content["config"]["outputs"].pop("forces")
        state = content["state_dict"]
        averages = iter(content["ema"]["shadow_params"])
        by_name = {name: next(averages) for name in state if not is_derived(name)}
        for found in (state, by_name):
            for name in [name for name in found if name.startswith("force_block")]:
                del found[name]
        content["ema"]["shadow_params"] = list(by_name.values())

    atoms = golden.structure("MgO")
    atoms.calc = FAIRChemCalculator(load_predict_unit(changed("flat", change), device="cpu"))
    expected = golden.predicted("MgO", "flat")["energy"]
    assert golden.error(atoms.get_potential_energy(), expected) < golden.TOLERANCE
    with pytest.raises(NotImplementedError, match="forces"):
        atoms.get_forces()


def equiformer(folder, **keys):
    """A checkpoint of Equiformer (V1) as it begins."""
    keys = {
        "num_layers": 1,
        "max_neighbors": 12,
        "use_tag_embedding": False,
        "irreps_node_embedding": "8x0e+4x1e",
        "irreps_head": "4x0e+2x1e",
        **keys,
    }
    model = models.Equiformer(**keys)
    outputs = {"energy": {"level": "system"}}
    outputs |= {name: {"level": "atom"} for name in ("forces", *model.config.vector_outputs)}
    config = {"model": {"name": "fairchem_equiformer.Equiformer", **keys}, "outputs": outputs}
    path = folder / "v1.pt"
    torch.save({"state_dict": model.state_dict(), "config": config}, path)
    return path


class TestEquiformer:
    def test_is_a_backbone_with_all_parameters(self):
        unit = load_predict_unit(golden.checkpoint("equiformer"), device="cpu")
        model = unit.model.module
        assert list(model.output_heads) == ["energy", "forces", "stress"]
        assert not list(model.output_heads.parameters())
        assert not model.backbone.regress_config.direct_forces
        names = model.no_weight_decay()
        assert "backbone.distance_expansion.frequencies" in names
        assert "backbone.atom_embedding.weight" not in names

    def test_forces_of_a_head(self, tmp_path):
        """And another vector of atoms, as models with IS2RS have."""
        path = equiformer(
            tmp_path, attention="dot_product", regress_forces=True, vector_outputs=["displacement"]
        )
        unit = load_predict_unit(path, device="cpu")
        assert unit.model.module.backbone.regress_config.direct_forces
        atoms = golden.structure("CO on Cu")
        found = unit.predict(AtomicData.from_ase(atoms, task_name="oc20"))
        batch = SimpleNamespace(
            pos=torch.tensor(atoms.positions, dtype=torch.float32),
            cell=torch.tensor(atoms.cell.array, dtype=torch.float32)[None],
            pbc=torch.tensor(atoms.pbc)[None],
            atomic_numbers=torch.tensor(atoms.numbers),
            natoms=torch.tensor([len(atoms)]),
        )
        with torch.no_grad():
            expected = checkpoints.load(path).model().eval()(batch)
        for key in ("energy", "forces", "displacement"):
            assert golden.error(found[key], expected[key].numpy()) < golden.TOLERANCE

    def test_no_derivative_that_it_was_not_trained_on(self, tmp_path):
        settings = InferenceSettings(predict_untrained_stress={"oc20"})
        path = equiformer(tmp_path, regress_forces=True, direct_forces=False)
        with pytest.raises(InputError, match="predict_untrained_stress: Equiformer predicts what"):
            load_predict_unit(path, device="cpu", inference_settings=settings)

    def test_a_head_for_something_else(self):
        backbone = EquiformerBackbone(num_layers=1)
        with pytest.raises(InputError, match="output_name 'forces'; there are energy"):
            EquiformerHead(backbone, "forces")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "cannot be read"),
        (None, "no such file"),
    ],
)
def test_bad_files(content, message, tmp_path, capsys):
    path = tmp_path / "source.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert(path)
    assert command.main([str(path), str(tmp_path / "target.pt"), "--to", "fairchem2"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target.pt").exists()


def test_the_other_environments_form(tmp_path, capsys):
    target = tmp_path / "target.pt"
    assert command.main([str(golden.checkpoint("flat")), str(target), "--to", "fairchem"]) == 2
    assert "this needs fairchem-core 1.10, and fairchem-core 2." in capsys.readouterr().err


def test_dens(tmp_path):
    """Models trained with DeNS, whose force encoding has parameters and reads no forces here."""
    content = torch.load(golden.checkpoint("hydra"), weights_only=True)
    model = content["config"]["model"]
    model["backbone"]["model"] = "equiformer_v2_dens_backbone"
    for name, module in (
        ("energy", "eqV2_DeNS_scalar_head"),
        ("forces", "eqV2_DeNS_vector_head"),
        ("stress", "dens_rank2_symmetric_head"),
    ):
        model["heads"][name]["module"] = module
    keys = {key: value for key, value in model["backbone"].items() if key != "model"}
    stress = {key: value for key, value in model["heads"]["stress"].items() if key != "module"}
    heads = {
        "energy": (models.DeNSEnergyHead, {}),
        "forces": (models.DeNSForceHead, {}),
        "stress": (models.DeNSStressHead, stress),
    }
    content["state_dict"] = models.EquiformerV2Hydra(keys, heads, models.DeNSBackbone).state_dict()
    path = tmp_path / "dens.pt"
    torch.save(content, path)
    atoms = golden.structure("MgO")
    atoms.calc = FAIRChemCalculator(load_predict_unit(path, device="cpu"))
    batch = SimpleNamespace(
        pos=torch.tensor(atoms.positions, dtype=torch.float32),
        cell=torch.tensor(atoms.cell.array, dtype=torch.float32)[None],
        atomic_numbers=torch.tensor(atoms.numbers),
        natoms=torch.tensor([len(atoms)]),
    )
    with torch.no_grad():
        expected = checkpoints.load(path).potential()(batch)
    for key, found in (
        ("energy", atoms.get_potential_energy()),
        ("forces", atoms.get_forces()),
        ("stress", atoms.get_stress(voigt=False)),
    ):
        wanted = expected[key] if key == "forces" else expected[key][0]
        # Atoms are not wrapped into the cell here, and round in other places.
        assert golden.error(found, wanted.numpy()) < 5e-5
