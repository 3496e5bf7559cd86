"""Training, resuming and fine-tuning by 2.x's own command, on the configs of this repository."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from fairchem.core import FAIRChemCalculator
from fairchem.core._cli import get_hydra_config_from_yaml, main
from fairchem.core.units.mlip_unit import InferenceSettings
from fairchem.core.units.mlip_unit.mlip_unit import _get_optimizer_wd
from hydra.utils import instantiate

from fairchem_equiformer.fairchem2 import convert, load_predict_unit, tasks
from tests import golden

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "fairchem2"
sys.path.insert(0, str(ROOT / "examples" / "emt"))


def run(config, folder, *overrides):
    """Run fairchem's command; return the folder of its checkpoints."""
    options = [f"job.run_dir={folder}", "+job.timestamp_id=run", *overrides]
    main(argparse.Namespace(config=str(config)), options)
    return folder / "run" / "checkpoints"


def weights(checkpoint):
    """Averaged weights of the inference checkpoint in a folder."""
    content = torch.load(checkpoint / "inference_ckpt.pt", weights_only=False)
    return content.ema_state_dict


@pytest.fixture(scope="module")
def slabs(tmp_path_factory):
    """The demo's data as ASE databases: few of it."""
    from ase_databases import write

    folder = tmp_path_factory.mktemp("slabs")
    write(folder, {"train": 3, "val_id": 1})
    return [f"train_src={folder}/train.db", f"val_src={folder}/val_id.db", "max_atoms=108"]


@pytest.fixture(scope="module")
def trained(slabs, tmp_path_factory):
    """Checkpoints of a training of the small model: one before each fourth step, and the last."""
    return run(
        CONFIGS / "emt.yaml",
        tmp_path_factory.mktemp("emt"),
        *slabs,
        "epochs=2",
        "checkpoint_every_n_steps=4",
        "runner.callbacks.0.max_saved_checkpoints=20",
    )


def test_checkpoint_goes_into_the_calculator(trained):
    calculator = FAIRChemCalculator.from_model_checkpoint(
        str(trained / "final" / "inference_ckpt.pt"), device="cpu"
    )
    atoms = golden.structure("CO on Cu")
    atoms.calc = calculator
    assert np.isfinite(atoms.get_potential_energy())
    assert atoms.get_forces().shape == (14, 3)
    assert np.abs(atoms.get_forces()).max() > 1e-3


def test_training_moves_weights_and_averages_them(trained):
    first, last = weights(trained / "step_4"), weights(trained / "final")
    content = torch.load(trained / "final" / "inference_ckpt.pt", weights_only=False)
    moved = [name for name in last if not torch.equal(first[name], last[name])]
    assert len(moved) > 0.9 * len(last)
    name = "backbone.blocks.0.ga.alpha_dot"
    average = next(value for key, value in last.items() if key.endswith(name))
    assert not torch.equal(average, content.model_state_dict[name])


def test_resumed_training_ends_where_an_unbroken_one_does(trained, tmp_path):
    broken = trained / "step_4"
    config = yaml.safe_load((broken / "resume.yaml").read_text())
    assert config["job"]["runner_state_path"] == str(broken)
    config["job"] |= {"run_dir": str(tmp_path), "metadata": None}
    path = tmp_path / "resume.yaml"
    path.write_text(yaml.safe_dump(config))
    main(argparse.Namespace(config=str(path)), [])
    found, expected = weights(tmp_path / "run/checkpoints/final"), weights(trained / "final")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_bfloat16(slabs, tmp_path):
    checkpoints = run(
        CONFIGS / "emt.yaml",
        tmp_path,
        *slabs,
        "epochs=1",
        "bf16=True",
        "checkpoint_every_n_steps=50",
    )
    assert all(value.isfinite().all() for value in weights(checkpoints / "final").values())


def test_equiformer_whose_forces_are_derivatives(slabs, tmp_path):
    """Its weights move, and the checkpoint's forces are the slope of its energies."""
    checkpoints = run(
        CONFIGS / "emt_equiformer.yaml",
        tmp_path,
        *slabs,
        "epochs=1",
        "checkpoint_every_n_steps=50",
    )
    content = torch.load(checkpoints / "final" / "inference_ckpt.pt", weights_only=False)
    averages = weights(checkpoints / "final")
    moved = [
        name
        for name, value in content.model_state_dict.items()
        if not torch.equal(averages[f"module.{name}"], value)
    ]
    assert len(moved) > 0.9 * len(content.model_state_dict)
    atoms = golden.structure("ethanol without a cell")
    atoms.calc = FAIRChemCalculator.from_model_checkpoint(
        str(checkpoints / "final" / "inference_ckpt.pt"),
        device="cpu",
        inference_settings=InferenceSettings(base_precision_dtype=torch.float64),
    )
    forces, step = atoms.get_forces(), 0.01
    energies = []
    for sign in (1, -1):
        atoms.positions[2, 0] += sign * step
        energies.append(atoms.get_potential_energy())
        atoms.positions[2, 0] -= sign * step
    slope = (energies[0] - energies[1]) / (2 * step)
    assert abs(forces[2, 0] + slope) < 1e-3 * np.abs(forces).max()


@pytest.fixture(scope="module")
def crystals(tmp_path_factory):
    """Copper with energy, forces and stress."""
    folder = tmp_path_factory.mktemp("crystals")
    for split, count, seed in (("train", 6, 0), ("val", 2, 100)):
        with connect(folder / f"{split}.db") as database:
            for index in range(count):
                atoms = bulk("Cu", cubic=True)
                atoms.rattle(0.05, seed=seed + index)
                atoms.calc = EMT()
                labels = {
                    "energy": atoms.get_potential_energy(),
                    "forces": atoms.get_forces(),
                    "stress": atoms.get_stress(),
                }
                atoms.calc = SinglePointCalculator(atoms, **labels)
                database.write(atoms)
    return [f"train_src={folder}/train.db", f"val_src={folder}/val.db", "max_atoms=8"]


@pytest.mark.parametrize("form", ["hydra", "equiformer"])
def test_fine_tuning_with_stress(form, crystals, tmp_path, capsys):
    """From a converted checkpoint, with the tasks that the command prints for it."""
    configs = tmp_path / "configs"
    for file in (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*/*.yaml")):
        copy = configs / file.relative_to(CONFIGS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    start = tmp_path / "start.pt"
    torch.save(convert(golden.checkpoint(form)), start)
    assert tasks.main([str(start)]) == 0
    (configs / "tasks" / "start.yaml").write_text(capsys.readouterr().out)
    checkpoints = run(
        configs / "finetune.yaml",
        tmp_path,
        *crystals,
        "tasks=start",
        f"start={start}",
        "job.device_type=CPU",
        "num_workers=0",
        "epochs=1",
        "optimizer.lr=1e-6",
        "evaluate_every_n_steps=null",
        "checkpoint_every_n_steps=50",
    )
    start.unlink()  # what was trained stands on its own
    calculator = FAIRChemCalculator.from_model_checkpoint(
        str(checkpoints / "final" / "inference_ckpt.pt"), device="cpu"
    )
    atoms = golden.structure("MgO")
    atoms.calc = calculator
    for key, expected in golden.predicted("MgO", form).items():
        options = {"voigt": False} if key == "stress" else {}
        getter = {"energy": "get_potential_energy"}.get(key, f"get_{key}")
        found = getattr(atoms, getter)(**options)
        assert 1e-6 < golden.error(found, expected) < 0.05, key


@pytest.mark.parametrize(
    ("name", "parameters"), [("oc20_31M", 31_058_690), ("oc20_153M", 153_602_690)]
)
def test_sizes(name, parameters):
    """The paper's, of the flat model with the same keys."""
    config = get_hydra_config_from_yaml(
        str(CONFIGS / f"{name}.yaml"), ["train_src=train.db", "val_src=val.db"]
    )
    model = instantiate(config.runner.train_eval_unit.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_weight_decay_leaves_biases_and_norms_alone():
    model = load_predict_unit(golden.checkpoint("hydra"), device="cpu").model.module
    model.requires_grad_(True)

    def adamw(params):
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)

    adamw.keywords = {"weight_decay": 0.1}  # as functools.partial has them
    groups = _get_optimizer_wd(adamw, model).param_groups
    spared = {id(parameter) for parameter in groups[0]["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in spared}
    assert groups[0]["weight_decay"] == 0
    assert names == model.no_weight_decay()
    assert "backbone.norm.norm_l0.weight" in names
    assert "output_heads.energy.energy_block.so3_linear_1.bias" in names
    assert not [name for name in names if name.endswith(("embedding.weight", "alpha_dot"))]
