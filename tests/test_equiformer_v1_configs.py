"""Equiformer (V1) on OC20: the configs are the poster's, and they run end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from fairchem.core.common.relaxation.ase_utils import OCPCalculator

from fairchem_equiformer import EquiformerCalculator
from fairchem_equiformer.checkpoints import load
from fairchem_equiformer.checkpoints.__main__ import description
from fairchem_equiformer.fairchem1 import cli
from tests.conftest import make_data, write_lmdb
from tests.test_configs import CONFIGS, config_of, trainable_parameters
from tests.test_is2re import relaxed_slab, slab_of

IS2RE = "oc20/is2re/equiformer"
NOISY, S2EF = f"{IS2RE}/noisy_nodes.yml", "oc20/2M/equiformer_lmax_2.yml"


class Poster(NamedTuple):
    """One row of the poster's tables, and what it is trained with."""

    parameters: int
    printed: str | None  # as the poster prints them, where it does
    attention: str = "mlp"
    nonlinear: bool = True
    depth: int = 6
    feature: str = "512x0e"
    stochastic_depth: float = 0.0
    lr: float = 2e-4
    epochs: int = 20
    gpus: int = 2


EXPERIMENTS = {
    f"{IS2RE}/nonlinear.yml": Poster(9_123_331, "9.12M"),
    f"{IS2RE}/linear.yml": Poster(7_837_699, "7.84M", nonlinear=False),
    f"{IS2RE}/dot_product.yml": Poster(
        8_722_435, "8.72M", "dot_product", nonlinear=False, lr=1.5e-4
    ),
    f"{IS2RE}/e3.yml": Poster(8_766_851, None),
    NOISY: Poster(
        26_773_379,
        None,
        depth=18,
        feature="512x0e+256x1e",
        stochastic_depth=0.05,
        lr=5e-4,
        epochs=40,
        gpus=4,
    ),
}
PARAMETERS = {name: row.parameters for name, row in EXPERIMENTS.items()} | {S2EF: 19_763_459}
every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


class TestConfigs:
    def test_every_config_is_an_experiment(self):
        files = {str(path.relative_to(CONFIGS)) for path in (CONFIGS / IS2RE).glob("*.yml")}
        assert files - {f"{IS2RE}/base.yml"} == set(EXPERIMENTS)

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_size(self, name):
        count = trainable_parameters(json.dumps(config_of(name)["model"]))
        assert count == PARAMETERS[name]
        printed = EXPERIMENTS[name].printed if name in EXPERIMENTS else None
        assert printed in (None, f"{count / 1e6:.2f}M")

    @every_experiment
    def test_the_model_is_the_posters(self, name):
        row, model = EXPERIMENTS[name], config_of(name)["model"]
        wanted = {
            "name": "fairchem_equiformer.Equiformer",
            "attention": row.attention,
            "nonlinear_message": row.nonlinear,
            "num_layers": row.depth,
            "irreps_feature": row.feature,
            "drop_path_rate": row.stochastic_depth,
            "alpha_drop": 0.2,
            "max_radius": 5.0,
            "max_neighbors": 500,
            "max_num_elements": 84,
            "use_tag_embedding": True,
            "num_heads": 8,
            "distance_function": "learnable_gaussian",
            "num_distance_basis": 128,
            "edge_channels": 64,
        }
        assert {key: model[key] for key in wanted} == wanted
        assert model.get("vector_outputs", []) == (["displacement"] if name == NOISY else [])
        if not name.endswith("e3.yml"):
            assert model["irreps_node_embedding"] == "256x0e+128x1e"
            assert model["irreps_sh"] == "1x0e+1x1e"
            assert model["irreps_head"] == "32x0e+16x1e"
            assert model["irreps_mlp_mid"] == "768x0e+384x1e"

    @every_experiment
    def test_training_is_the_posters(self, name):
        row, config = EXPERIMENTS[name], config_of(name)
        optim = config["optim"]
        assert (optim["lr_initial"], optim["max_epochs"]) == (row.lr, row.epochs)
        assert optim["batch_size"] * row.gpus == 32
        assert optim["optimizer"] == "AdamW"
        assert optim["optimizer_params"] == {"weight_decay": 1e-3}
        assert optim["scheduler_params"] == {
            "lambda_type": "cosine",
            "warmup_epochs": 2,
            "warmup_factor": 0.2,
            "lr_min_factor": 0.01,
        }
        losses = [{"energy": {"fn": "mae", "coefficient": 1}}]
        if name == NOISY:
            losses.append({"displacement": {"fn": "masked_mae", "coefficient": [15, 1]}})
        assert config["loss_functions"] == losses

    def test_s2ef_is_trained_as_equiformer_v2(self):
        """Table 6 compares the two."""
        own, other = config_of(S2EF), config_of("oc20/2M/eqv2_83M.yml")
        for section in own.keys() - {"model"}:
            assert own[section] == other[section], section
        for key in ("max_radius", "max_neighbors", "num_layers", "alpha_drop", "drop_path_rate"):
            assert own["model"][key] == other["model"][key], key
        assert own["model"]["direct_forces"] is True
        assert own["model"]["irreps_sh"] == "1x0e+1x1e+1x2e"


# The whole of each config but for its size.
TINY = {
    "num_layers": 2,
    "avg_num_nodes": 9.0,
    "irreps_node_embedding": "16x0e+8x1e",
    "irreps_head": "8x0e+4x1e",
    "num_heads": 2,
    "irreps_mlp_mid": "24x0e+8x1e",
    "irreps_feature": "16x0e+8x1e",
    "num_distance_basis": 16,
    "edge_channels": 16,
}
STRUCTURES = 6


@pytest.fixture(scope="module")
def fairchem(tmp_path_factory):
    """`fairchem main` on a small form of one of the configs, and the folder that it runs in."""
    folder = tmp_path_factory.mktemp("equiformer")
    write_lmdb(folder / "is2re.lmdb", [relaxed_slab(index) for index in range(STRUCTURES)])
    entries = [make_data(index) for index in range(4)]
    for entry in entries:
        entry.y, entry.force = entry.energy, entry.forces
        del entry.energy, entry.forces
    write_lmdb(folder / "s2ef.lmdb", entries)

    def run(mode: str, name: str, timestamp: str, *options: str) -> Any:
        data = folder / ("s2ef.lmdb" if name == S2EF else "is2re.lmdb")
        val = {"src": str(data)}
        if name == S2EF:
            val["val_split_settings"] = {"sample_n": 2}
        config = {
            "includes": [str(CONFIGS / name)],
            "model": TINY,
            "dataset": {"train": {"src": str(data)}, "val": val, "test": {"src": str(data)}},
            "optim": {
                "batch_size": 2,
                "eval_batch_size": 2,
                "num_workers": 0,
                "max_epochs": 4,
                "scheduler_params": {"warmup_epochs": 1},
                "lr_initial": 0.005,
                "ema_decay": 0.9,
                "eval_every": 3,
            },
        }
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump(config))
        command = ["main", f"--mode={mode}", f"--config-yml={path}", "--cpu", *options]
        assert cli.main([*command, f"--run-dir={folder}", f"--timestamp-id={timestamp}"]) == 0
        return folder / "checkpoints" / timestamp

    run.folder = folder
    return run


class TestRuns:
    def test_auxiliary_task(self, fairchem):
        """Trains on energies and displacements, learns, goes on, predicts, relaxes."""
        options = ("--optim.max_epochs=12", "--optim.lr_initial=0.01", "--optim.eval_every=12")
        trained = fairchem("train", NOISY, "noisy", *options)
        best = torch.load(trained / "best_checkpoint.pt", weights_only=False)
        energies = np.array([relaxed_slab(index).y_relaxed for index in range(STRUCTURES)])
        spread = np.abs(energies - np.median(energies)).mean()
        assert best["val_metrics"]["energy_mae"]["metric"] < spread

        checkpoint = trained / "checkpoint.pt"
        fairchem("train", NOISY, "on", "--optim.max_epochs=13", f"--checkpoint={checkpoint}")

        fairchem("predict", NOISY, "told", f"--checkpoint={trained / 'best_checkpoint.pt'}")
        with np.load(fairchem.folder / "results" / "told" / "is2re_predictions.npz") as results:
            assert results["ids"].tolist() == [str(index) for index in range(STRUCTURES)]
            assert np.isfinite(results["energy"]).all()
            assert results["displacement"].shape[1] == 3

        best = trained / "best_checkpoint.pt"
        energies = []
        for calculator in (
            OCPCalculator(checkpoint_path=best, cpu=True),
            EquiformerCalculator(best, device="cpu"),
        ):
            atoms = slab_of(0)
            atoms.calc = calculator
            energies.append(atoms.get_potential_energy())
        assert energies[1] == pytest.approx(energies[0], rel=1e-5)
        text = "\n".join(description(load(best)))
        assert "2 blocks, irreps 16x0e+8x1e" in text

    @pytest.mark.parametrize("name", [f"{IS2RE}/dot_product.yml", S2EF])
    def test_trains(self, fairchem, name):
        harmonics = {"irreps_sh": "1x0e+1x1e"}
        options = [f"--model.{key}={value}" for key, value in harmonics.items()]
        trained = fairchem("train", name, Path(name).stem, *options)
        content = torch.load(trained / "checkpoint.pt", weights_only=False)
        assert all(value.isfinite().all() for value in content["state_dict"].values())
        assert content["config"]["model"]["name"] == "fairchem_equiformer.Equiformer"
