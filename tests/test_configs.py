"""The published configs: each loads, builds the model of its size, and says what the paper says."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fairchem.core.common.flags import flags
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import build_config, load_config, new_trainer_context
from fairchem.core.models.equiformer_v2.trainers.lr_scheduler import CosineLRLambda
from torch.overrides import TorchFunctionMode

import fairchem_equiformer  # noqa: F401  # registers the models
from tests.conftest import TINY_MODEL, make_data, write_lmdb

CONFIGS = Path(__file__).parents[1] / "configs"


class Paper(NamedTuple):
    """One experiment as the paper has it (tables 1, 7, 8 and 11), typed from there."""

    parameters: int
    depth: int = 12
    lmax: int = 6
    mmax: int = 2
    epochs: int = 12
    warmup: float = 0.1
    lr: float = 2e-4
    total_batch: int = 64
    gpus: int = 16
    energy_coefficient: float = 2
    force_coefficient: float = 100
    stochastic_depth: float = 0.05
    clip: float = 100


_ALL = Paper(153_602_690, 20, 6, 3, 1, 0.01, 4e-4, 256, 64, stochastic_depth=0.1)
_OC22 = Paper(121_526_402, 18, epochs=6, total_batch=128, gpus=32, stochastic_depth=0.1, clip=50)

EXPERIMENTS = {
    "oc20/2M/gate_ln_no_renorm.yml": Paper(91_056_322),
    "oc20/2M/gate_ln.yml": Paper(91_057_986),
    "oc20/2M/s2_ln.yml": Paper(81_458_370),
    "oc20/2M/sep_s2_ln.yml": Paper(83_164_802),
    "oc20/2M/sep_s2_ln_20_epochs.yml": Paper(83_164_802, epochs=20, lr=4e-4),
    "oc20/2M/eqv2_83M.yml": Paper(83_164_802),
    "oc20/2M/20_epochs.yml": Paper(83_164_802, epochs=20, lr=4e-4),
    "oc20/2M/30_epochs.yml": Paper(83_164_802, epochs=30, lr=4e-4),
    "oc20/2M/8_blocks.yml": Paper(57_590_402, depth=8),
    "oc20/2M/16_blocks.yml": Paper(108_739_202, depth=16),
    "oc20/2M/lmax_4.yml": Paper(44_826_882, lmax=4),
    "oc20/2M/lmax_8.yml": Paper(134_282_242, lmax=8),
    "oc20/2M/lmax_8_20_epochs.yml": Paper(134_282_242, lmax=8, epochs=20, lr=4e-4),
    "oc20/2M/mmax_3.yml": Paper(95_105_666, mmax=3),
    "oc20/2M/mmax_4.yml": Paper(102_144_386, mmax=4),
    "oc20/2M/mmax_6.yml": Paper(106_627_202, mmax=6),
    "oc20/all/eqv2_153M.yml": _ALL,
    "oc20/all_md/eqv2_153M.yml": _ALL._replace(total_batch=512, gpus=128, energy_coefficient=4),
    "oc20/all_md/eqv2_153M_ec2.yml": _ALL._replace(total_batch=512, gpus=128),
    "oc20/all_md/eqv2_31M.yml": Paper(
        31_058_690, 8, 4, 2, 3, 0.01, 4e-4, 512, 64, energy_coefficient=4, stochastic_depth=0.1
    ),
    "oc22/eqv2_121M.yml": _OC22._replace(energy_coefficient=4),
    "oc22/eqv2_121M_e1_f1.yml": _OC22._replace(energy_coefficient=1, force_coefficient=1),
}

# What sets the architecture ablations apart, in the paper's words: (re-normalised attention,
# activation, norm). Every other experiment has the base model's.
BASE = (True, "separable S2", "layer_norm_sh")
ABLATIONS = {
    "gate_ln_no_renorm": (False, "gate", "layer_norm"),
    "gate_ln": (True, "gate", "layer_norm"),
    "s2_ln": (True, "S2", "layer_norm"),
    "sep_s2_ln": (True, "separable S2", "layer_norm"),
    "sep_s2_ln_20_epochs": (True, "separable S2", "layer_norm"),
}

every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


@cache
def config_of(name: str) -> dict[str, Any]:
    """Return the merged config, as fairchem's command would have it."""
    config, _, conflicts = load_config(CONFIGS / name)
    assert conflicts == []
    return config


class SkipInit(TorchFunctionMode):
    """Leave new parameters unwritten: a count needs no values, and their pages stay untouched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def test_every_config_is_an_experiment_of_the_table() -> None:
    files = {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("oc*/**/*.yml")}
    experiments = {name for name in files if not name.endswith("base.yml")}
    # Of test_is2re.py and test_equiformer_v1_configs.py.
    others = {n for n in files if n.startswith("oc20/is2re/") or "/equiformer_" in n}
    assert experiments - others == set(EXPERIMENTS)


@cache
def trainable_parameters(model_section: str) -> int:
    """Count the parameters of a ``model`` section, given as JSON so that equal ones share one."""
    model_config = json.loads(model_section)
    model_class = registry.get_model_class(model_config.pop("name"))
    with SkipInit():
        model = model_class(**model_config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@every_experiment
def test_the_model_has_the_papers_size(name: str) -> None:
    assert trainable_parameters(json.dumps(config_of(name)["model"])) == (
        EXPERIMENTS[name].parameters
    )


@every_experiment
def test_the_model_is_the_papers(name: str) -> None:
    model, paper = config_of(name)["model"], EXPERIMENTS[name]
    assert model["name"] == "fairchem_equiformer.EquiformerV2"
    assert (model["num_layers"], model["lmax_list"], model["mmax_list"]) == (
        paper.depth,
        [paper.lmax],
        [paper.mmax],
    )
    activation = (
        "gate" if model["use_gate_act"] else "separable S2" if model["use_sep_s2_act"] else "S2"
    )
    ablation = (model["use_attn_renorm"], activation, model["norm_type"])
    assert ablation == ABLATIONS.get(Path(name).stem, BASE)
    assert model["use_grid_mlp"] is (activation != "gate")
    assert model["grid_resolution"] == (20 if paper.lmax == 8 else 18)
    assert model["drop_path_rate"] == paper.stochastic_depth
    assert model["alpha_drop"] == 0.1
    assert (model["max_radius"], model["max_neighbors"]) == (12.0, 20)


@every_experiment
def test_training_is_the_papers(name: str) -> None:
    config, paper = config_of(name), EXPERIMENTS[name]
    optim = config["optim"]
    assert config["trainer"] == "equiformerv2_forces"
    assert optim["optimizer"] == "AdamW"
    assert optim["optimizer_params"] == {"weight_decay": 1e-3}
    assert optim["lr_initial"] == paper.lr
    assert optim["max_epochs"] == paper.epochs
    assert optim["batch_size"] * paper.gpus == paper.total_batch
    assert optim["clip_grad_norm"] == paper.clip
    assert optim["ema_decay"] == 0.999
    assert optim["scheduler"] == "LambdaLR"
    assert optim["scheduler_params"] == {
        "lambda_type": "cosine",
        "warmup_epochs": paper.warmup,
        "warmup_factor": 0.2,
        "lr_min_factor": 0.01,
    }
    assert config["loss_functions"] == [
        {"energy": {"fn": "mae", "coefficient": paper.energy_coefficient}},
        {"forces": {"fn": "l2mae", "coefficient": paper.force_coefficient}},
    ]
    assert config["outputs"]["forces"]["train_on_free_atoms"] is True


@every_experiment
def test_labels_are_scaled_as_in_the_authors_release(name: str) -> None:
    train = config_of(name)["dataset"]["train"]
    normalizer = train["transforms"]["normalizer"]
    if name.startswith("oc22"):
        energy, forces = (0.0, 25.119809935106424), (0.0, 0.14759646356305804)
        assert list(train["transforms"]["element_references"]) == ["energy"]
    else:
        energy, forces = (-0.7554450631141663, 2.887317180633545), (0.0, 2.887317180633545)
        assert "element_references" not in train["transforms"]
    assert normalizer["energy"] == {"mean": energy[0], "rmsd": energy[1]}
    assert normalizer["forces"] == {"mean": forces[0], "rmsd": forces[1]}


@pytest.mark.parametrize("folder", ["", "configs", "configs/oc20/2M", "configs/oc22"])
def test_includes_are_found_from_any_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "oc20/2M/gate_ln_no_renorm.yml"
    expected = config_of(name)
    for cwd in (tmp_path, CONFIGS.parent / folder):
        monkeypatch.chdir(cwd)
        assert load_config(os.path.relpath(CONFIGS / name))[0] == expected


def test_learning_rate_schedule() -> None:
    """Warm-up from a fifth, then the cosine over all steps, not offset by the warm-up."""
    optim = config_of("oc20/2M/eqv2_83M.yml")["optim"]
    steps_per_epoch = 1000
    scale = CosineLRLambda(
        {
            **optim["scheduler_params"],
            "warmup_epochs": int(optim["scheduler_params"]["warmup_epochs"] * steps_per_epoch),
            "epochs": optim["max_epochs"] * steps_per_epoch,
        }
    )
    assert scale(0) == 0.2
    assert scale(50) == pytest.approx(0.6)
    assert scale(100) == 1.0
    assert scale(6000) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2)
    assert scale(12_000) == 0.01


# Electronvolts an atom, as far from zero as DFT's totals are.
REFERENCES = {1: -13.5, 29: -1300.25}


def open_catalyst_lmdb(path: Path, *, totals: bool) -> Path:
    """Write four slabs as OC20 names things, or as OC22 does, with total energies."""
    entries = [make_data(index) for index in range(4)]
    for entry in entries:
        entry.y, entry.force = entry.energy, entry.forces
        del entry.energy, entry.forces
        if totals:
            entry.oc22 = 1
            entry.y += sum(REFERENCES[int(z)] for z in entry.atomic_numbers)
    return write_lmdb(path, entries)


@pytest.mark.parametrize("name", ["oc20/2M/eqv2_83M.yml", "oc22/eqv2_121M.yml"])
def test_labels_reach_the_loss_and_predictions_the_user(name: str, tmp_path: Path) -> None:
    """The trainer that a config makes: OC22's references leave the targets and come back."""
    oc22 = name.startswith("oc22")
    lmdb = open_catalyst_lmdb(tmp_path / "data.lmdb", totals=oc22)
    overrides = [f"dataset.{split}.src={lmdb}" for split in ("train", "val")]
    overrides += ["dataset.val.val_split_settings.sample_n=2", "optim.num_workers=0"]
    overrides += [f"model.{key}={value}" for key, value in TINY_MODEL.items()]
    if oc22:
        coefficients = np.zeros(90)
        coefficients[list(REFERENCES)] = list(REFERENCES.values())
        np.savez(tmp_path / "linfit.npz", coeff=coefficients)
        file = "dataset.train.transforms.element_references.energy.file"
        overrides.append(f"{file}={tmp_path / 'linfit.npz'}")
    command = ["--mode", "train", "--config-yml", str(CONFIGS / name), "--cpu", "--debug"]
    options = flags.get_parser().parse_args([*command, "--run-dir", str(tmp_path)])
    config = build_config(options, overrides) | {"local_rank": 0}

    with new_trainer_context(config=config) as context:
        trainer = context.trainer
        assert len(trainer.val_dataset) == 2
        trainer.model.eval()
        batch = next(iter(trainer.train_loader))
        outputs = trainer._forward(batch)
        loss = trainer._compute_loss(outputs, batch).item()
        predicted = trainer.predict(batch, per_image=False, disable_tqdm=True)

    scale = config["dataset"]["train"]["transforms"]["normalizer"]
    per_atom = torch.tensor([REFERENCES[int(z)] if oc22 else 0.0 for z in batch.atomic_numbers])
    reference = torch.zeros(len(batch)).index_add(0, batch.batch, per_atom)
    target = (batch.energy - reference - scale["energy"]["mean"]) / scale["energy"]["rmsd"]
    energy_loss = (outputs["energy"].flatten() - target).abs().mean().item()
    free = batch.fixed == 0
    error = outputs["forces"] - batch.forces / scale["forces"]["rmsd"]
    force_loss = error[free].norm(dim=-1).mean().item()
    paper = EXPERIMENTS[name]
    expected = paper.energy_coefficient * energy_loss + paper.force_coefficient * force_loss
    assert loss == pytest.approx(expected, rel=1e-5)

    energy = outputs["energy"] * scale["energy"]["rmsd"] + scale["energy"]["mean"]
    torch.testing.assert_close(predicted["energy"].flatten(), energy.flatten() + reference)
    torch.testing.assert_close(predicted["forces"], outputs["forces"] * scale["forces"]["rmsd"])
