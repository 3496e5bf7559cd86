"""OC20 IS2RE direct: the configs are the paper's (tables 9 and 10), and they run end to end."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import BFGS
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from torch_geometric.data import Batch, Data

from fairchem_equiformer.fairchem1 import cli
from fairchem_equiformer.fairchem1.trainer import AuxiliaryTaskTrainer
from tests.conftest import write_lmdb
from tests.models import scatter_weights
from tests.structures import from_atoms, in_double, moved
from tests.test_configs import CONFIGS, config_of, trainable_parameters
from tests.tolerances import assert_close

PLAIN, NOISY = "eqv2_36M", "eqv2_95M_noisy_nodes"


class Paper(NamedTuple):
    """One column of table 9, and the size that section D.5 prints."""

    parameters: int
    printed: str
    depth: int
    lr: float
    total_batch: int
    gpus: int
    epochs: int
    stochastic_depth: float


EXPERIMENTS = {
    PLAIN: Paper(36_034_307, "36.03M", 6, 4e-4, 32, 16, 20, 0.05),
    NOISY: Paper(95_239_044, "95.24M", 15, 5e-4, 64, 32, 40, 0.1),
}
every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


def config_named(name: str) -> dict[str, Any]:
    return config_of(f"oc20/is2re/{name}.yml")


class TestConfigs:
    def test_every_config_is_an_experiment_of_the_table(self):
        files = {path.stem for path in (CONFIGS / "oc20" / "is2re").glob("*.yml")}
        assert files - {"base"} == set(EXPERIMENTS)

    @every_experiment
    def test_the_model_has_the_papers_size(self, name):
        count = trainable_parameters(json.dumps(config_named(name)["model"]))
        assert count == EXPERIMENTS[name].parameters
        assert f"{count / 1e6:.2f}M" == EXPERIMENTS[name].printed

    @every_experiment
    def test_the_model_is_the_papers(self, name):
        paper, model = EXPERIMENTS[name], config_named(name)["model"]
        wanted = {
            "num_layers": paper.depth,
            "drop_path_rate": paper.stochastic_depth,
            "alpha_drop": 0.2,
            "max_radius": 5.0,
            "max_neighbors": 50,
            "distance_function": "learnable_gaussian",
            "num_distance_basis": 128,
            "edge_channels": 64,
            "lmax_list": [6],
            "mmax_list": [2],
            "grid_resolution": 18,
            "sphere_channels": 128,
            "attn_hidden_channels": 64,
            "num_heads": 8,
            "attn_alpha_channels": 64,
            "attn_value_channels": 16,
            "ffn_hidden_channels": 128,
            "use_atom_edge_embedding": False,
            "use_tag_embedding": True,
            "norm_type": "layer_norm_sh",
            "use_sep_s2_act": True,
            "use_gate_act": False,
            "use_attn_renorm": True,
        }
        assert {key: model["backbone"][key] for key in wanted} == wanted
        heads = {"energy"} | ({"displacement"} if name == NOISY else set())
        assert set(model["heads"]) == heads

    @every_experiment
    def test_training_is_the_papers(self, name):
        paper, config = EXPERIMENTS[name], config_named(name)
        optim = config["optim"]
        assert (optim["lr_initial"], optim["max_epochs"]) == (paper.lr, paper.epochs)
        assert optim["batch_size"] * paper.gpus == paper.total_batch
        assert optim["optimizer_params"] == {"weight_decay": 1e-3}
        assert (optim["clip_grad_norm"], optim["ema_decay"]) == (100, 0.999)
        assert optim["scheduler_params"] == {
            "lambda_type": "cosine",
            "warmup_epochs": 2,
            "warmup_factor": 0.2,
            "lr_min_factor": 0.01,
        }
        losses = [{"energy": {"fn": "mae", "coefficient": 1}}]
        scales = {"energy": {"mean": -1.525913953781128, "rmsd": 2.279365062713623}}
        if name == NOISY:
            losses.append({"displacement": {"fn": "masked_mae", "coefficient": [15, 1]}})
            scales["displacement"] = {"mean": 0.0, "rmsd": 0.87716}
            noise = config["dataset"]["train"]["train_split_settings"]["noisy_nodes"]
            assert noise == {"std": 0.3, "probability": 0.5, "interpolate": True}
        assert config["loss_functions"] == losses
        assert config["dataset"]["train"]["transforms"]["normalizer"] == scales


# The whole of each config but for its size: one block, and a few structures.
TINY = {
    "num_layers": 1,
    "avg_num_nodes": 9.0,
    "max_neighbors": 12,
    "lmax_list": [2],
    "mmax_list": [1],
    "grid_resolution": 10,
    "sphere_channels": 16,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 16,
    "num_distance_basis": 16,
    "edge_channels": 16,
}
STRUCTURES, BATCH, EPOCHS = 6, 2, 4
STEPS = EPOCHS * STRUCTURES // BATCH


def slab_of(index: int) -> Atoms:
    """A slab of one of the metals that EMT knows with hydrogen on it, tagged as OC20's."""
    metal = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt")[index]
    atoms = fcc111(metal, (2, 2, 2), vacuum=6.0, periodic=True)
    add_adsorbate(atoms, "H", 1.2, "fcc")
    atoms.rattle(0.1, seed=index)
    # ASE counts layers from the top, and the adsorbate has 0.
    atoms.set_tags([{2: 0, 1: 1, 0: 2}[tag] for tag in atoms.get_tags()])
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 0))
    atoms.calc = EMT()
    return atoms


@cache
def relaxed_slab(index: int) -> Data:
    """One entry of an IS2RE LMDB, with OC20's names and EMT's relaxation."""
    atoms = slab_of(index)
    data = from_atoms(atoms, sid=index)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=100)
    del data.fid
    data.tags = torch.tensor(atoms.get_tags())
    data.fixed = (data.tags == 0).float()
    data.pos_relaxed = torch.tensor(atoms.positions, dtype=torch.float32)
    data.y_relaxed = atoms.get_potential_energy() - 4.5  # near OC20's mean
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with training data, and test data without labels."""
    folder = tmp_path_factory.mktemp("is2re")
    write_lmdb(folder / "train.lmdb", [relaxed_slab(index) for index in range(STRUCTURES)])
    unlabelled = [relaxed_slab(index).clone() for index in range(3)]
    for data in unlabelled:
        del data.y_relaxed, data.pos_relaxed
    write_lmdb(folder / "test.lmdb", unlabelled)
    return folder


@pytest.fixture(scope="module")
def fairchem(folder):
    """`fairchem main` on a small form of one of the configs."""

    def run(mode, name, timestamp, *options):
        config = {
            "includes": [str(CONFIGS / "oc20" / "is2re" / f"{name}.yml")],
            "model": {"backbone": TINY},
            "dataset": {
                "train": {"src": str(folder / "train.lmdb")},
                "val": {"src": str(folder / "train.lmdb")},
            },
            "optim": {
                "batch_size": BATCH,
                "eval_batch_size": BATCH,
                "num_workers": 0,
                "max_epochs": EPOCHS,
                "scheduler_params": {"warmup_epochs": 1},
                "lr_initial": 0.005,
                "ema_decay": 0.9,
                "eval_every": 3,
            },
        }
        path = folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(config))
        command = ["main", f"--mode={mode}", f"--config-yml={path}", "--cpu"]
        folders = [f"--run-dir={folder}", f"--timestamp-id={timestamp}"]
        assert cli.main([*command, *folders, *options]) == 0
        return folder / "checkpoints" / timestamp

    return run


class Call(NamedTuple):
    """What one computation of the loss met."""

    training: bool
    step: int
    coefficient: float
    sids: list[int]
    pos: list[torch.Tensor]
    displacement: list[torch.Tensor]


@pytest.fixture
def calls(monkeypatch):
    """The losses computed; `stop_at` is a step at which the training is cut off."""
    compute, found = AuxiliaryTaskTrainer._compute_loss, Calls()

    def watched(self, out, batch):
        if self.step == found.stop_at:
            raise Interrupted
        loss = compute(self, out, batch)
        coefficient = dict(self.loss_functions)["displacement"]["coefficient"]
        sizes = batch.natoms.tolist()
        parts = batch.pos.split(sizes), batch.displacement.split(sizes)
        found.append(Call(self.model.training, self.step, coefficient, batch.sid.tolist(), *parts))
        return loss

    monkeypatch.setattr(AuxiliaryTaskTrainer, "_compute_loss", watched)
    return found


class Calls(list):
    stop_at = None


class Interrupted(Exception):  # noqa: N818  # nothing has gone wrong
    pass


@pytest.fixture(scope="module")
def trained(fairchem):
    """The checkpoints of a training that has long enough to learn."""
    longer = ("--optim.max_epochs=24", "--optim.batch_size=3", "--optim.eval_every=48")
    return fairchem("train", NOISY, "trained", *longer, "--optim.lr_initial=0.01")


class TestAuxiliaryTask:
    def test_trains_is_cut_off_and_goes_on(self, fairchem, folder, calls):
        """Weights 15 - 14 step / steps throughout; noise in training, and in training alone."""
        calls.stop_at = 8
        with pytest.raises(Interrupted):
            fairchem("train", NOISY, "cut")
        calls.stop_at = None
        distutils.cleanup()  # which the end of the process would do
        checkpoint = folder / "checkpoints" / "cut" / "checkpoint.pt"
        assert torch.load(checkpoint, weights_only=False)["step"] == 6
        fairchem("train", NOISY, "resumed", f"--checkpoint={checkpoint}")

        trained = [call for call in calls if call.training]
        assert [call.step for call in trained] == [*range(1, 8), *range(7, STEPS + 1)]
        for call in calls:
            assert call.coefficient == pytest.approx(15 - 14 * call.step / STEPS)
        assert trained[-1].coefficient == 1

        noised = 0
        for call in calls:
            for sid, pos, displacement in zip(call.sids, call.pos, call.displacement, strict=True):
                data = relaxed_slab(sid)
                moving = data.tags > 0
                torch.testing.assert_close(
                    (pos + displacement)[moving], data.pos_relaxed[moving], atol=1e-5, rtol=0
                )
                assert displacement[~moving].isnan().all()
                changed = not torch.equal(pos, data.pos)
                assert call.training or not changed
                noised += changed
        assert 0.2 < noised / (len(trained) * BATCH) < 0.8

    def test_learns(self, trained):
        """Energies better than the best constant."""
        checkpoint = torch.load(trained / "best_checkpoint.pt", weights_only=False)
        energies = np.array([relaxed_slab(index).y_relaxed for index in range(STRUCTURES)])
        spread = np.abs(energies - np.median(energies)).mean()
        assert checkpoint["val_metrics"]["energy_mae"]["metric"] < spread

    def test_validates(self, fairchem, trained):
        fairchem("validate", NOISY, "validated", f"--checkpoint={trained / 'best_checkpoint.pt'}")

    def test_predicts_structures_without_labels(self, fairchem, trained, folder):
        found = []
        for name in ("first", "second"):
            fairchem(
                "predict",
                NOISY,
                name,
                f"--checkpoint={trained / 'best_checkpoint.pt'}",
                f"--dataset.test.src={folder / 'test.lmdb'}",
            )
            found.append(np.load(folder / "results" / name / "is2re_predictions.npz"))
        assert found[0]["ids"].tolist() == ["0", "1", "2"]
        assert found[0]["energy"].dtype == np.float32
        assert found[0]["energy"].shape == (3, 1)
        free = sum(int((relaxed_slab(index).fixed == 0).sum()) for index in range(3))
        assert found[0]["displacement"].shape == (free, 3)
        for key in found[0].files:
            assert np.array_equal(found[0][key], found[1][key])

    def test_calculator_reads_the_checkpoint(self, trained):
        atoms = slab_of(0)
        atoms.calc = OCPCalculator(checkpoint_path=trained / "best_checkpoint.pt", cpu=True)
        assert math.isfinite(atoms.get_potential_energy())

    def test_displacements_turn_with_the_structure(self):
        """With the gate activation to rounding; the grid's own error is the models' tests'."""
        model = config_named(NOISY)["model"]
        name, backbone = model.pop("name"), model["backbone"] | TINY | {"use_gate_act": True}
        backbone |= {"use_grid_mlp": False}
        net = registry.get_model_class(name)(**{**model, "backbone": backbone})
        net = scatter_weights(net).double().eval()
        data = in_double(relaxed_slab(0).clone())
        rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
        rotation = rotation * torch.linalg.det(rotation)
        straight, turned = (
            net(Batch.from_data_list([structure])) for structure in (data, moved(data, rotation))
        )
        wanted = straight["displacement"] @ rotation.T
        assert_close(turned["displacement"], wanted, "outputs")
        assert_close(turned["energy"], straight["energy"], "outputs")


class TestPlain:
    def test_trains_validates_and_predicts(self, fairchem, folder):
        # With workers, which lmdb 1.7 did not survive.
        checkpoint = (
            fairchem("train", PLAIN, "plain", "--optim.num_workers=2") / "best_checkpoint.pt"
        )
        test = f"--dataset.test.src={folder / 'test.lmdb'}"
        fairchem("predict", PLAIN, "plain", f"--checkpoint={checkpoint}", test)
        with np.load(folder / "results" / "plain" / "is2re_predictions.npz") as results:
            assert results["ids"].tolist() == ["0", "1", "2"]
            assert np.isfinite(results["energy"]).all()


class TestMistakes:
    """Each ends in one line, before anything is computed."""

    @pytest.fixture
    def refused(self, folder, capsys):
        def refused(*options):
            path = folder / "mistake.yml"
            path.write_text(
                yaml.safe_dump({"includes": [str(CONFIGS / f"oc20/is2re/{NOISY}.yml")]})
            )
            data = [f"--dataset.{n}.src={folder / 'train.lmdb'}" for n in ("train", "val")]
            command = ["--mode=train", f"--config-yml={path}", "--cpu", *data, *options]
            assert cli.main(command) == cli.EXIT_BAD_INPUT
            (line,) = capsys.readouterr().err.splitlines()
            return line

        return refused

    def test_a_changing_weight_needs_its_trainer(self, refused):
        line = refused("--trainer=equiformerv2_energy")
        assert "loss_functions: displacement: coefficient is [15, 1], which needs trainer:" in line

    def test_noise_is_for_training(self, refused):
        line = refused("--dataset.train.noisy_nodes.std=0.3")
        assert "dataset.val would be read with noisy_nodes; only training may be" in line

    def test_a_missing_file_is_named(self, refused, tmp_path):
        missing = tmp_path / "is2re" / "all" / "train" / "data.lmdb"
        line = refused(f"--dataset.train.src={missing}")
        assert f"dataset.train.src: no such file or folder: {missing}" in line
        assert "--task is2re" in line

    @pytest.mark.parametrize("coefficient", [[15], [15, 1, 0], "15", [15, None], True])
    def test_the_trainer_names_a_bad_coefficient(self, coefficient):
        trainer = AuxiliaryTaskTrainer.__new__(AuxiliaryTaskTrainer)
        trainer.config = {
            "loss_functions": [{"displacement": {"fn": "masked_mae", "coefficient": coefficient}}]
        }
        with pytest.raises(ValueError, match="loss_functions: displacement: coefficient is"):
            trainer.load_loss()
