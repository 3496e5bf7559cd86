"""MD17: its data, its configs, and training with forces by autograd on a made trajectory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.fd import calculate_numerical_forces
from fairchem.core import OCPCalculator
from fairchem.core.common import distutils
from fairchem.core.common.utils import load_config
from fairchem.core.datasets import data_list_collater
from fairchem.core.datasets.base_dataset import create_dataset

from benchmarks import molecule, nve
from fairchem_equiformer import EquiformerCalculator, checkpoints
from fairchem_equiformer.checkpoints.__main__ import description
from fairchem_equiformer.fairchem1 import cli
from fairchem_equiformer.fairchem1.data import md17
from tests.conftest import write_lmdb
from tests.test_configs import CONFIGS, trainable_parameters

FORMAT = "fairchem_equiformer.MD17Dataset"
COUNT = 40
SIZES = {"num_train": 24, "num_val": 8}
TOTAL = -97_000.0  # kcal/mol, added to energies: DFT's totals are large


@pytest.fixture(scope="module")
def arrays():
    """A trajectory as it is published."""
    found = molecule.frames(molecule.elastic(), COUNT)
    found["E"] += TOTAL
    return found


@pytest.fixture(scope="module")
def src(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("md17")
    molecule.write(folder / "md17_ethanol.npz", arrays)
    return folder


@pytest.fixture
def dataset(src):
    def make(split="train", **settings):
        return md17.MD17Dataset(
            {"src": str(src), "molecule": "ethanol", "split": split, **SIZES, **settings}
        )

    return make


def frame_of(entry) -> int:
    return int(entry.sid.removeprefix("ethanol_"))


class TestMolecule:
    """The stand-in for MD17's molecules."""

    def test_forces_are_the_energys_gradient(self):
        atoms = molecule.elastic()
        atoms.rattle(0.1, seed=1)
        expected = calculate_numerical_forces(atoms, eps=1e-5)
        np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-7)

    def test_keeps_its_shape_and_moves(self, arrays):
        distances = np.linalg.norm(arrays["R"][:, :1] - arrays["R"], axis=2)
        rest = molecule.elastic().get_distances(0, range(9))
        assert abs(distances - rest).max() < 0.6
        assert distances.std(axis=0)[1:].min() > 0.02


class TestEntries:
    def test_are_the_frames_in_electronvolt(self, dataset, arrays):
        """Energies to the rounding of small numbers, though the totals are large."""
        part = dataset()
        kcal = 0.0433641  # eV
        for entry in part:
            frame = frame_of(entry)
            np.testing.assert_allclose(entry.pos, arrays["R"][frame], atol=1e-6)
            np.testing.assert_allclose(entry.forces, arrays["F"][frame] * kcal, atol=1e-4)
            relative = (arrays["E"][frame, 0] - arrays["E"].mean()) * kcal
            expected = relative + arrays["E"].mean() * md17.KCAL_PER_MOL - part.mean_energy
            assert entry.energy.item() == pytest.approx(expected, abs=1e-5)
            assert entry.atomic_numbers.tolist() == arrays["z"].tolist()
            assert entry.natoms == len(arrays["z"])
        assert torch.cat([entry.energy for entry in part]).mean().abs() < 1e-6

    def test_forces_are_the_energys_gradient_in_their_units(self, dataset):
        """Along one step of the trajectory, by the potential that made it."""
        entry = dataset()[0]
        atoms = molecule.elastic()
        atoms.positions = entry.pos.double().numpy()
        np.testing.assert_allclose(entry.forces, atoms.get_forces(), atol=1e-3)

    def test_partition_is_equiformers(self, dataset):
        parts = {split: [frame_of(entry) for entry in dataset(split)] for split in md17.SPLITS}
        order = np.random.default_rng(1).permutation(COUNT).tolist()
        assert parts["train"] + parts["val"] + parts["test"] == order
        assert [len(part) for part in parts.values()] == [24, 8, 8]

    def test_energies_of_all_parts_have_one_zero(self, dataset):
        assert dataset("test").mean_energy == dataset("train").mean_energy

    def test_default_sizes_are_the_papers(self):
        assert (md17.NUM_TRAIN, md17.NUM_VAL) == (950, 50)

    def test_do_not_share_memory_with_the_data(self, dataset):
        part = dataset()
        before = part[0].pos.clone()
        part[0].pos.add_(1.0)
        assert torch.equal(part[0].pos, before)

    def test_make_a_batch_and_know_their_sizes(self, src):
        settings = {"src": str(src), "format": FORMAT, "split": "val", "molecule": "ethanol"}
        part = create_dataset({**settings, **SIZES}, "val")
        batch = data_list_collater([part[index] for index in range(len(part))], otf_graph=True)
        assert batch.energy.shape == (8,)
        assert batch.forces.shape == batch.pos.shape
        assert part.get_metadata("natoms", list(range(8)))[0].tolist() == batch.natoms.tolist()

    def test_name_a_bad_key(self, dataset):
        with pytest.raises(ValueError, match=r"molecule is 'Etanol', .*; did you mean 'ethanol'\?"):
            dataset(molecule="Etanol")
        with pytest.raises(ValueError, match="split is 'valid', it must be one of train, val"):
            dataset("valid")
        with pytest.raises(ValueError, match="which leaves nothing for testing: src holds 40"):
            dataset(num_train=32)


class TestFile:
    @pytest.fixture
    def message(self, tmp_path, arrays):
        """Why a file is refused: `message(name=array)`, where None leaves an array out."""

        def of(**changes):
            changed = {
                key: value for key, value in {**arrays, **changes}.items() if value is not None
            }
            path = molecule.write(tmp_path / "md17_ethanol.npz", changed)
            with pytest.raises(OSError, match=str(path)) as error:
                md17.read(path, "train", 24, 8)
            return str(error.value).removeprefix(str(path))

        return of

    def test_of_another_kind_is_named(self, message, arrays):
        assert message(F=None).startswith(" has no array F: a file of MD17 has z, atomic numbers")
        assert message(F=arrays["F"][:, :3]) == (
            ": F has shape [40, 3, 3], where E has 40 frames and z 9 atoms: [40, 9, 3] was expected"
        )

    def test_with_a_number_that_is_none_names_the_frame(self, message, arrays):
        frame = np.random.default_rng(1).permutation(COUNT)[5]
        forces = arrays["F"].copy()
        forces[frame, 2, 1] = np.nan
        assert message(F=forces) == f": F of frame {frame} is not finite: download it again"

    def test_damaged_is_named(self, src, tmp_path):
        path = tmp_path / "md17_ethanol.npz"
        path.write_bytes((src / "md17_ethanol.npz").read_bytes()[:2000])
        with pytest.raises(OSError, match=f"{path} cannot be read .*: delete it, or download it"):
            md17.read(path, "train", 24, 8)


class TestDownload:
    def test_names_are_the_authors(self):
        base = "http://quantum-machine.org/gdml/data/npz/md17_"
        assert md17.url("aspirin") == f"{base}aspirin.npz"
        assert md17.url("benzene") == f"{base}benzene2017.npz"
        assert md17.url("salicylic_acid") == f"{base}salicylic.npz"
        assert len({md17.url(name) for name in md17.MOLECULES}) == 8

    def test_happens_once(self, src, tmp_path, monkeypatch, dataset):
        """From a server in this process's place."""
        downloads = []

        def download(url, file):
            downloads.append(url)
            shutil.copy(src / "md17_ethanol.npz", file)

        monkeypatch.setattr(md17, "download_url_to_file", download)
        folder = tmp_path / "new" / "md17"
        assert len(dataset(src=str(folder))) == len(dataset("train", src=str(folder))) == 24
        assert downloads == [md17.url("ethanol")]
        assert [path.name for path in folder.iterdir()] == ["md17_ethanol.npz"]

    def test_that_fails_says_what_to_put_where(self, tmp_path, monkeypatch):
        def fail(url, file):  # noqa: ARG001
            raise URLError("no route to host")

        monkeypatch.setattr(md17, "download_url_to_file", fail)
        message = (
            f"src: no md17_uracil.npz in {tmp_path}, and downloading it failed (<urlopen error no "
            f"route to host>). By hand: download {md17.url('uracil')} into {tmp_path}"
        )
        with pytest.raises(OSError, match=re.escape(message)):
            md17.prepare(tmp_path, "uracil")
        assert list(tmp_path.iterdir()) == []

    def test_of_half_a_file_leaves_none(self, tmp_path, monkeypatch):
        def half(url, file):  # noqa: ARG001
            Path(file).write_bytes(b"half a download")

        monkeypatch.setattr(md17, "download_url_to_file", half)
        with pytest.raises(OSError, match=r"no md17_uracil.npz in .* cannot be read"):
            md17.prepare(tmp_path, "uracil")
        assert list(tmp_path.iterdir()) == []


class Scripts(NamedTuple):
    """One training as in the authors' public scripts, typed from there."""

    force_coefficient: float
    lr: float
    batch_size: int
    epochs: int
    parameters: int


LMAX_2 = Scripts(80, 5e-4, 8, 1500, 3_496_001)
LMAX_3 = Scripts(100, 2e-4, 5, 2000, 5_500_865)
EXPERIMENTS = {
    **{
        f"lmax_2/{name}.yml": LMAX_2 for name in ("aspirin", "ethanol", "salicylic_acid", "toluene")
    },
    "lmax_2/benzene.yml": LMAX_2._replace(lr=1e-4),
    "lmax_2/malonaldehyde.yml": LMAX_2._replace(force_coefficient=100),
    "lmax_2/naphthalene.yml": LMAX_2._replace(force_coefficient=20),
    "lmax_2/uracil.yml": LMAX_2._replace(force_coefficient=20),
    **{f"lmax_3/{name}.yml": LMAX_3 for name in md17.MOLECULES},
    "lmax_3/benzene.yml": LMAX_3._replace(lr=1e-4, force_coefficient=80),
    "lmax_3/ethanol.yml": LMAX_3._replace(force_coefficient=80),
}
# Irreps of features, harmonics, heads and feed-forward networks.
IRREPS = {
    "lmax_2": (
        *("128x0e+64x1e+32x2e", "1x0e+1x1e+1x2e"),
        *("32x0e+16x1e+8x2e", "384x0e+192x1e+96x2e"),
    ),
    "lmax_3": (
        *("128x0e+64x1e+64x2e+32x3e", "1x0e+1x1e+1x2e+1x3e"),
        *("32x0e+16x1e+16x2e+8x3e", "384x0e+192x1e+192x2e+96x3e"),
    ),
}

every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


def config_of(name):
    config, _, conflicts = load_config(CONFIGS / "md17" / name)
    assert conflicts == []
    return config


class TestConfigs:
    def test_every_file_is_an_experiment(self):
        folder = CONFIGS / "md17"
        files = {str(path.relative_to(folder)) for path in folder.rglob("*.yml")}
        assert {name for name in files if not name.endswith("base.yml")} == set(EXPERIMENTS)
        assert len(EXPERIMENTS) == 2 * len(md17.MOLECULES)

    @every_experiment
    def test_the_model_is_the_papers(self, name):
        model = config_of(name)["model"]
        assert trainable_parameters(json.dumps(model)) == EXPERIMENTS[name].parameters
        kinds = ("node_embedding", "sh", "head", "mlp_mid")
        assert tuple(model[f"irreps_{kind}"] for kind in kinds) == IRREPS[name.split("/")[0]]
        same_in_all = {
            "num_layers": 6,
            "num_heads": 4,
            "irreps_feature": "512x0e",
            "max_num_elements": 64,
            "distance_function": "exponential_normal",
            "num_distance_basis": 32,
            "max_radius": 5.0,
            "alpha_drop": 0.0,
            "attention": "mlp",
            "nonlinear_message": True,
            "regress_forces": True,
            "direct_forces": False,
        }
        assert {key: model[key] for key in same_in_all} == same_in_all

    @every_experiment
    def test_training_is_the_scripts(self, name):
        config, scripts = config_of(name), EXPERIMENTS[name]
        optim, train = config["optim"], config["dataset"]["train"]
        assert (optim["batch_size"], optim["max_epochs"]) == (scripts.batch_size, scripts.epochs)
        assert optim["lr_initial"] == scripts.lr
        assert optim["optimizer_params"] == {"weight_decay": 1e-6}
        schedule = optim["scheduler_params"]
        assert (schedule["lambda_type"], schedule["warmup_epochs"]) == ("cosine", 10)
        assert schedule["warmup_factor"] * scripts.lr == pytest.approx(1e-6)
        assert schedule["lr_min_factor"] * scripts.lr == pytest.approx(1e-6)
        assert config["loss_functions"] == [
            {"energy": {"fn": "mae", "coefficient": 1}},
            {"forces": {"fn": "l2mae", "coefficient": scripts.force_coefficient}},
        ]
        assert train["molecule"] == Path(name).stem
        assert not {"num_train", "num_val"} & set(train)


# The whole architecture at a size that trains in seconds; beside it the data, and few epochs.
TINY = {
    "model": {
        "num_layers": 1,
        "irreps_node_embedding": "16x0e+8x1e",
        "irreps_sh": "1x0e+1x1e",
        "irreps_head": "8x0e+4x1e",
        "irreps_mlp_mid": "32x0e+16x1e",
        "irreps_feature": "32x0e",
        "num_distance_basis": 16,
        "edge_channels": 16,
    },
    "dataset.train": SIZES,
    "optim": {
        "lr_initial": 0.005,
        "eval_batch_size": 8,
        "num_workers": 0,
        "max_epochs": 12,
        "eval_every": 36,  # the last step
        "scheduler_params.warmup_epochs": 1,
    },
}


def command_of(mode, src):
    config = CONFIGS / "md17" / "lmax_2" / "ethanol.yml"
    command = ["main", "--mode", mode, "--config-yml", str(config), "--cpu"]
    command += [f"--dataset.{split}.src={src}" for split in ("train", "val")]
    return command + [
        f"--{section}.{key}={value}"
        for section, keys in TINY.items()
        for key, value in keys.items()
    ]


@pytest.fixture(scope="module")
def fairchem(src, tmp_path_factory):
    """`fairchem main` on the trajectory with a model cut down: `run(mode)` returns its folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(mode, *overrides):
        command = [*command_of(mode, src), "--run-dir", str(folder), "--seed", "0"]
        command += ["--timestamp-id", mode]
        if mode != "train":
            checkpoint = folder / "checkpoints" / "train" / "best_checkpoint.pt"
            command += ["--checkpoint", str(checkpoint)]
        assert cli.main([*command, *overrides]) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def trained(fairchem):
    """The checkpoint of a training."""
    return fairchem("train") / "checkpoints" / "train" / "best_checkpoint.pt"


class TestTraining:
    """Forces by autograd in every mode of fairchem, which evaluates under `torch.no_grad`."""

    def test_forces_are_scaled_as_the_energy(self, trained, dataset):
        scales = torch.load(trained, weights_only=False)["normalizers"]
        energies = torch.cat([entry.energy for entry in dataset()])
        assert scales["energy"]["rmsd"].item() == pytest.approx(energies.std().item(), rel=1e-5)
        assert scales["forces"]["rmsd"] == scales["energy"]["rmsd"]
        assert scales["forces"]["mean"] == 0

    @pytest.mark.usefixtures("trained")
    def test_prediction_is_what_was_learnt(self, fairchem, dataset, src, caplog):
        caplog.set_level("INFO")
        fairchem("validate", "--dataset.val.split=test")
        folder = fairchem("predict", f"--dataset.test.src={src}")
        with np.load(folder / "results" / "predict" / "s2ef_predictions.npz") as file:
            sids, forces = file["ids"].tolist(), np.split(file["forces"], file["chunk_idx"])
        labels = {entry.sid: entry.forces.numpy() for entry in dataset("test")}
        assert sorted(sids) == sorted(labels)
        wrong = [abs(found - labels[sid]) for sid, found in zip(sids, forces, strict=True)]
        (logged,) = re.findall(r"forces_mae: (\d+\.\d+), loss", caplog.text)
        assert float(logged) == pytest.approx(np.mean(wrong), abs=1e-4)
        assert np.mean(wrong) < 0.7 * np.mean([abs(force) for force in labels.values()])

    def test_calculators_give_the_gradient(self, trained, dataset):
        """fairchem's own, in single precision; ours in double, where differences are exact."""
        atoms = molecule.elastic()
        atoms.positions = dataset("test")[0].pos.numpy()
        atoms.calc = OCPCalculator(checkpoint_path=str(trained), cpu=True)
        single = atoms.get_forces()
        atoms.calc = EquiformerCalculator(trained, dtype="float64", device="cpu")
        np.testing.assert_allclose(single, atoms.get_forces(), atol=1e-4)
        gradient = calculate_numerical_forces(atoms, eps=1e-5)
        np.testing.assert_allclose(atoms.get_forces(), gradient, rtol=0, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:Please use atoms.calc = calc:FutureWarning")
    def test_relaxation_follows_the_gradient(self, trained, fairchem, dataset, tmp_path):
        """In fairchem's batches; its LBFGS moves the atoms in place."""
        entries = [entry.update({"sid": index}) for index, entry in enumerate(dataset("test"))]
        for entry in entries[:2]:
            entry.cell, entry.tags = 20 * torch.eye(3)[None], torch.ones(entry.natoms)
            entry.pos += 10  # frames are written with atoms in the cell
        write_lmdb(tmp_path / "data.lmdb", entries[:2])
        options = {"maxstep": 0.04, "memory": 50, "damping": 1.0, "alpha": 70.0}
        fairchem(
            "run-relaxations",
            f"--dataset.relax.src={tmp_path / 'data.lmdb'}",
            "--dataset.relax.format=lmdb",
            "--dataset.relax.use_train_settings=False",
            f"--task.relax_opt.traj_dir={tmp_path / 'relaxed'}",
            *(f"--task.relax_opt.{key}={value}" for key, value in options.items()),
            "--task.relaxation_steps=4",
            "--task.relaxation_fmax=0.01",
        )
        calculator = EquiformerCalculator(trained, device="cpu")
        for index in range(2):
            frames = ase.io.read(tmp_path / "relaxed" / f"{index}.traj", ":")
            energies = [frame.get_potential_energy() for frame in frames]
            assert len(frames) == 5
            assert energies[-1] < energies[0]
            alone = frames[-1].copy()
            alone.calc = calculator
            np.testing.assert_allclose(frames[-1].get_forces(), alone.get_forces(), atol=1e-4)

    def test_checkpoint_says_what_it_is(self, trained):
        text = "\n".join(description(checkpoints.load(trained)))
        assert "1 blocks, irreps 16x0e+8x1e, 12,993 parameters" in text
        assert "500 neighbours within 5 Angstrom, atomic numbers up to 63" in text
        assert re.search(r"predicts +forces \(mean 0, std 0\.", text)
        assert "none of the published ones" in text

    def test_refuses_a_scale_of_forces_of_their_own(self, src, tmp_path, capsys):
        command = [*command_of("train", src), "--run-dir", str(tmp_path)]
        fit = "--dataset.train.transforms.normalizer.fit.targets.forces.mean=0.0"
        assert cli.main([*command, fit]) == 1
        distutils.cleanup()  # which the end of the process would do
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"normalizer has `forces`, .*: delete it", error)


class TestEnergyConservation:
    """``benchmarks/nve.py`` at its smallest; its table is in docs/versions.md."""

    def test_fluctuation_falls_with_the_square_of_the_step(self, trained):
        calculator = EquiformerCalculator(trained, dtype="float64", device="cpu")
        motions = {}
        for femtoseconds, steps in ((1.0, 30), (0.5, 60)):
            atoms = molecule.elastic()
            atoms.calc = calculator
            motions[femtoseconds] = nve.move(atoms, steps, femtoseconds)
        ratio = motions[1.0].fluctuation / motions[0.5].fluctuation
        assert ratio == pytest.approx(4, rel=0.25)
        assert abs(motions[0.5].change) < motions[0.5].fluctuation

    @pytest.mark.long
    def test_whole_command(self, tmp_path):
        """Forces that are no gradient heat the molecule; those that are do not."""
        table = nve.compare(tmp_path, 1000, [0.5], epochs=5)
        _, _, gradient, head = (line.split("|") for line in table.splitlines())
        assert abs(float(gradient[5])) < 0.1 * abs(float(head[5]))

    def test_drift_and_fluctuation_of_known_energies(self):
        """A line of 2 meV/ps and a wave of 1 meV, for a molecule of two atoms."""
        steps = np.arange(2001)
        wave = 1e-3 * np.sin(2 * np.pi * steps / 100)
        motion = nve.Motion(0.5, 2e-3 * steps * 0.5 / 1000 + wave, 2)
        assert motion.drift == pytest.approx(1.0, abs=0.06)  # a little of the wave is in it
        assert motion.fluctuation == pytest.approx(0.5 / np.sqrt(2), rel=0.01)
        assert motion.change == pytest.approx(0.9, rel=0.01)


class TestBadInput:
    """Ends in one line, before a run has begun."""

    @pytest.fixture
    def message(self, capsys, src):
        def run(*overrides):
            assert cli.main([*command_of("train", src), *overrides]) == 2
            text = capsys.readouterr().err
            assert text.count("\n") == 1
            return text

        return run

    def test_molecule(self, message):
        text = message("--dataset.train.molecule=etanol")
        assert "dataset.train: molecule is 'etanol', it must be one of" in text

    def test_missing_file(self, message, tmp_path, monkeypatch):
        def fail(url, file):  # noqa: ARG001
            raise URLError("Name or service not known")

        monkeypatch.setattr(md17, "download_url_to_file", fail)
        text = message(f"--dataset.train.src={tmp_path}")
        assert f"dataset.train: src: no md17_ethanol.npz in {tmp_path}, and downloading" in text
