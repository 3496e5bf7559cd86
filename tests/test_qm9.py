"""QM9: its data, its configs, and training and prediction on a few molecules in its raw format."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.collections import g2
from fairchem.core.common.utils import load_config
from fairchem.core.datasets import data_list_collater
from fairchem.core.datasets.base_dataset import create_dataset
from torch_geometric import datasets

from fairchem_equiformer.fairchem1 import cli
from fairchem_equiformer.fairchem1.data import qm9
from tests.test_configs import CONFIGS, trainable_parameters

FORMAT = "fairchem_equiformer.QM9Dataset"
SIZES = {"num_train": 16, "num_val": 4}
COUNT = 24

# What torch_geometric has beside the properties that are trained on: four atomization energies and
# three rotational constants.
NUM_COLUMNS = 19


def small_molecules() -> list[Atoms]:
    """The first molecules of ASE's G2 set that are made of QM9's elements."""
    every = (molecule(name) for name in g2.names)
    return [m for m in every if set(m.numbers) <= set(qm9.ELEMENTS) and len(m) > 2][:COUNT]


MOLECULES = small_molecules()


def label(index: int, target: str) -> float:
    """What we say a molecule's property is: easy to learn, since only its elements matter."""
    places = [qm9.ELEMENTS.index(number) for number in MOLECULES[index].numbers]
    return -sum(1.5 + 0.5 * place for place in places) + 0.5 * qm9.TARGETS.index(target)


def atoms_energy(index: int, target: str) -> float:
    """Sum over the molecule of what its atoms have by themselves."""
    one = dict(zip(qm9.ELEMENTS, qm9.atom_energies(target).tolist(), strict=True))
    return sum(one[number] for number in MOLECULES[index].numbers)


def write_raw(folder, molecules):
    """Write molecules as torch_geometric publishes QM9, without what only bonds say."""
    entries = []
    for index, atoms in enumerate(molecules):
        y = torch.zeros(1, NUM_COLUMNS)
        for column, target in enumerate(qm9.TARGETS):
            y[0, column] = label(index, target) + atoms_energy(index, target)
        entries.append(
            {
                "x": torch.zeros(len(atoms), 11),
                "z": torch.tensor(atoms.numbers),
                "pos": torch.tensor(atoms.positions, dtype=torch.float32),
                "edge_index": torch.zeros(2, 0, dtype=torch.long),
                "edge_attr": torch.zeros(0, 4),
                "y": y,
                "name": f"gdb_{index + 1}",
                "idx": index,
            }
        )
    (folder / "raw").mkdir(parents=True)
    torch.save(entries, folder / "raw" / qm9.RAW)
    return folder


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("qm9"), MOLECULES)


@pytest.fixture
def dataset(src):
    """A part of the data: `dataset(split, target)`."""

    def make(split="train", target="gap", **settings):
        config = {"src": str(src), "split": split, "target": target, **SIZES, **settings}
        return qm9.QM9Dataset(config)

    return make


def index_of(entry) -> int:
    return int(entry.sid.removeprefix("gdb_")) - 1


class TestPartition:
    def test_is_equiformers(self):
        """Pinned, since numpy does not promise that its generators stay as they are."""
        parts = qm9.partition(qm9.NUM_MOLECULES, qm9.NUM_TRAIN, qm9.NUM_VAL)
        first = {"train": [34769, 76096], "val": [11009, 104304], "test": [63823, 99719]}
        assert {split: part[:2].tolist() for split, part in parts.items()} == first
        assert [len(parts[split]) for split in qm9.SPLITS] == [110_000, 10_000, 10_831]
        assert sorted(np.concatenate(list(parts.values()))) == list(range(130_831))

    def test_covers_every_molecule_once(self, dataset):
        found = [entry.sid for split in qm9.SPLITS for entry in dataset(split)]
        assert sorted(found) == sorted(f"gdb_{index + 1}" for index in range(COUNT))
        assert [len(dataset(split)) for split in qm9.SPLITS] == [16, 4, 4]

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((20, 4), "num_train and num_val are 20 and 4, which leaves nothing for testing"),
            ((0, 4), "num_train is 0, it must be a whole number above 0"),
            ((4, "2"), "num_val is '2', it must be a whole number above 0"),
        ],
    )
    def test_refuses_sizes_that_leave_a_part_empty(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            qm9.partition(COUNT, *sizes)


class TestEntries:
    def test_are_the_molecules(self, dataset):
        for entry in dataset():
            atoms = MOLECULES[index_of(entry)]
            assert entry.natoms == len(atoms)
            assert [qm9.ELEMENTS[place] for place in entry.atomic_numbers] == list(atoms.numbers)
            np.testing.assert_allclose(entry.pos, atoms.positions, atol=1e-6)

    @pytest.mark.parametrize("target", qm9.TARGETS)
    def test_have_the_target_without_the_atoms_energies(self, dataset, target):
        """To the rounding of totals in single precision, which the raw data have."""
        for entry in dataset("test", target):
            index = index_of(entry)
            expected = label(index, target)
            total = expected + atoms_energy(index, target)
            rounding = float(np.spacing(np.float32(abs(total))))
            assert entry.target.item() == pytest.approx(expected, abs=rounding)

    def test_only_energies_lose_the_atoms(self):
        losing = [target for target in qm9.TARGETS if qm9.atom_energies(target).any()]
        assert losing == ["u0", "u", "h", "g"]
        hartree = 27.211386246
        assert qm9.atom_energies("u0")[0].item() == pytest.approx(-0.500273 * hartree, abs=1e-4)

    def test_do_not_share_memory_with_the_data(self, dataset):
        part = dataset()
        before = part[0].pos.clone()
        part[0].pos.add_(1.0)
        assert torch.equal(part[0].pos, before)

    def test_make_a_batch_and_know_their_sizes(self, src):
        settings = {"src": str(src), "format": FORMAT, "split": "val", "target": "mu", **SIZES}
        part = create_dataset(settings, "val")
        batch = data_list_collater([part[index] for index in range(len(part))], otf_graph=True)
        assert batch.target.shape == (4,)
        assert batch.fixed.shape == batch.atomic_numbers.shape
        assert part.get_metadata("natoms", list(range(4)))[0].tolist() == batch.natoms.tolist()

    def test_have_the_names_that_they_are_given(self, dataset):
        renamed = dataset(key_mapping={"target": "energy"})
        for entry, other in zip(renamed, dataset(), strict=True):
            assert "target" not in entry
            assert torch.equal(entry.energy, other.target)

    def test_name_a_bad_key(self, dataset):
        with pytest.raises(ValueError, match=r"target is 'U_0', .*; did you mean 'u0'\?"):
            dataset(target="U_0")
        with pytest.raises(ValueError, match="split is 'valid', it must be one of train, val"):
            dataset("valid")


class TestFolder:
    def test_one_that_torch_geometric_made_is_read(self, tmp_path, dataset):
        write_raw(tmp_path, MOLECULES)
        datasets.QM9(str(tmp_path))
        expected = dataset()
        found = dataset(src=str(tmp_path))
        assert all(
            torch.equal(one.pos, other.pos) and torch.equal(one.target, other.target)
            for one, other in zip(found, expected, strict=True)
        )

    def test_holds_nothing_unfinished(self, src, dataset):
        dataset()
        files = sorted(str(path.relative_to(src)) for path in src.rglob("*") if path.is_file())
        assert files == ["processed/data_v3.pt", f"raw/{qm9.RAW}"]

    def test_says_what_to_put_where_without_internet(self, tmp_path, monkeypatch):
        def fail(url, file):  # noqa: ARG001
            raise OSError("no route to host")

        monkeypatch.setattr(qm9, "download_url_to_file", fail)
        message = (
            f"src: no QM9 in {tmp_path}, and making it failed (no route to host). By hand: "
            "download https://data.pyg.org/datasets/qm9_v3.zip and unpack qm9_v3.pt from it into "
            f"{tmp_path}/raw"
        )
        with pytest.raises(OSError, match=re.escape(message)):
            qm9.prepare(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["processed"]

    def test_is_downloaded_once(self, src, tmp_path, monkeypatch, dataset):
        """From a server in this process's place, which has the archive of the tiny file."""
        downloads = []

        def download(url, file):
            downloads.append(url)
            archive = shutil.make_archive(str(tmp_path / "qm9_v3"), "zip", src / "raw")
            shutil.move(archive, file)

        monkeypatch.setattr(qm9, "download_url_to_file", download)
        folder = tmp_path / "new" / "qm9"
        found = dataset(src=str(folder))
        qm9.read.cache_clear()
        assert len(dataset(src=str(folder))) == len(found)
        assert downloads == [datasets.QM9.processed_url]
        assert [entry.sid for entry in found] == [entry.sid for entry in dataset()]

    def test_damaged_file_is_named(self, tmp_path):
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw" / qm9.RAW).write_bytes(b"half a download")
        with pytest.raises(OSError, match=f"no QM9 in {tmp_path}, and making it failed"):
            qm9.prepare(tmp_path)

    def test_another_element_is_refused(self, tmp_path):
        write_raw(tmp_path, [*MOLECULES[:3], molecule("SiH4")])
        with pytest.raises(ValueError, match="gdb_4 has an atom of atomic number 14; QM9 has 1, 6"):
            qm9.read(tmp_path)


NOISE = {"std": 0.02, "probability": 0.5, "corrupt_ratio": 0.25}


class TestNoise:
    """What `corrupt` does is tested in test_noisy_nodes.py."""

    def test_target_is_what_was_added(self, dataset):
        noisy, clean = dataset(noisy_nodes=NOISE), dataset()
        moved, scaled = [], []
        for _ in range(40):
            for one, other in zip(noisy, clean, strict=True):
                labelled = ~one.denoising.isnan().any(dim=1)
                step = one.pos - other.pos
                assert (step[~labelled] == 0).all()
                torch.testing.assert_close(
                    step[labelled], 0.02 * one.denoising[labelled], atol=1e-6, rtol=0
                )
                moved.append(labelled.float().mean())
                scaled.append(one.denoising[labelled])
        assert torch.stack(moved).mean() == pytest.approx(0.5 * 0.25, abs=0.02)
        assert torch.cat(scaled).std() == pytest.approx(1, abs=0.05)

    def test_is_added_to_the_training_set_alone(self, src):
        settings = {
            "src": str(src),
            "format": FORMAT,
            "target": "gap",
            **SIZES,
            "splits": {"train": {"noisy_nodes": {**NOISE, "probability": 1.0}}, "val": {}},
        }
        for split, noisy in {"train": True, "val": False}.items():
            part = create_dataset({**settings, "split": split}, split)
            assert any(entry.denoising.isfinite().any() for entry in part) == noisy

    def test_names_a_bad_key(self, dataset):
        with pytest.raises(ValueError, match=r"noisy_nodes: .*'sigma'"):
            dataset(noisy_nodes={"std": 0.02, "sigma": 1})


class Paper(NamedTuple):
    """One training of QM9 as the paper has it (table 13 and section F.2), typed from there."""

    batch_size: int = 64
    lr: float = 5e-4
    blocks: int = 6
    weight_decay: float = 5e-3
    dropout: float = 0.2
    stochastic_depth: float = 0.0
    corrupt_ratio: float | None = None


SIX = Paper()
R2 = Paper(48, 1.5e-4, 5, 5e-3, 0.1)
ZPVE = Paper(48, 1.5e-4, 5, 5e-3, 0.2)
ENERGIES = Paper(48, 1.5e-4, 5, 0.0, 0.0)
NOISY_SIX = SIX._replace(stochastic_depth=0.05, corrupt_ratio=0.25)

EXPERIMENTS = {
    **{f"{target}.yml": SIX for target in ("mu", "alpha", "homo", "lumo", "gap", "cv")},
    "r2.yml": R2,
    "zpve.yml": ZPVE,
    **{f"{target}.yml": ENERGIES for target in ("g", "h", "u", "u0")},
    **{f"noisy_nodes/{target}.yml": NOISY_SIX for target in ("mu", "homo", "lumo", "gap", "cv")},
    "noisy_nodes/alpha.yml": SIX._replace(corrupt_ratio=0.25),
    "noisy_nodes/r2.yml": R2._replace(blocks=6, lr=5e-4, corrupt_ratio=0.125),
    "noisy_nodes/zpve.yml": ZPVE._replace(corrupt_ratio=0.25),
    **{
        f"noisy_nodes/{target}.yml": ENERGIES._replace(blocks=6, batch_size=64, corrupt_ratio=0.25)
        for target in ("g", "h", "u", "u0")
    },
    **{
        f"ablations/{name}.yml": SIX
        for name in ("gate_ln_no_renorm", "gate_ln", "s2_ln", "sep_s2_ln")
    },
}

# (re-normalised attention, activation, norm) of table 14; index 5 is every other experiment's.
BASE = (True, "separable S2", "layer_norm_sh")
ABLATIONS = {
    "gate_ln_no_renorm": (False, "gate", "layer_norm"),
    "gate_ln": (True, "gate", "layer_norm"),
    "s2_ln": (True, "S2", "layer_norm"),
    "sep_s2_ln": (True, "separable S2", "layer_norm"),
}
# The paper prints 11.20M and 9.35M, and nothing for Noisy Nodes and the ablations.
PARAMETERS = {(6, False): 11_197_603, (5, False): 9_352_803}
DENOISING_HEAD = 1_668_641
ABLATED = {
    "gate_ln_no_renorm": 12_029_155,
    "gate_ln": 12_029_923,
    "s2_ln": 10_855_651,
    "sep_s2_ln": 11_197_603,
}

every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


def config_of(name: str) -> dict[str, Any]:
    config, _, conflicts = load_config(CONFIGS / "qm9" / name)
    assert conflicts == []
    return config


def stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".yml")


def expected_parameters(name: str) -> int:
    paper = EXPERIMENTS[name]
    plain = ABLATED.get(stem(name)) or PARAMETERS[paper.blocks, False]
    return plain + DENOISING_HEAD * (paper.corrupt_ratio is not None)


class TestConfigs:
    def test_every_file_is_an_experiment_of_the_table(self):
        folder = CONFIGS / "qm9"
        files = {str(path.relative_to(folder)) for path in folder.rglob("*.yml")}
        experiments = {name for name in files if not name.endswith("base.yml")}
        assert experiments == set(EXPERIMENTS) | set(EQUIFORMER)
        trained_on = {config_of(name)["dataset"]["train"]["target"] for name in EXPERIMENTS}
        assert trained_on == set(qm9.TARGETS)

    @every_experiment
    def test_the_model_has_the_papers_size(self, name):
        parameters = trainable_parameters(json.dumps(config_of(name)["model"]))
        assert parameters == expected_parameters(name)

    @every_experiment
    def test_the_model_is_the_papers(self, name):
        backbone, paper = config_of(name)["model"]["backbone"], EXPERIMENTS[name]
        assert backbone["num_layers"] == paper.blocks
        assert backbone["alpha_drop"] == paper.dropout
        assert backbone["drop_path_rate"] == paper.stochastic_depth
        activation = (
            "gate"
            if backbone["use_gate_act"]
            else "separable S2"
            if backbone["use_sep_s2_act"]
            else "S2"
        )
        found = (backbone["use_attn_renorm"], activation, backbone["norm_type"])
        assert found == ABLATIONS.get(stem(name), BASE)
        assert backbone["use_grid_mlp"] is (activation != "gate")
        same_in_all = {
            "lmax_list": [4],
            "mmax_list": [4],
            "grid_resolution": 18,
            "sphere_channels": 96,
            "attn_hidden_channels": 48,
            "num_heads": 4,
            "attn_alpha_channels": 64,
            "attn_value_channels": 24,
            "ffn_hidden_channels": 96,
            "edge_channels": 64,
            "distance_function": "learnable_gaussian",
            "num_distance_basis": 128,
            "max_radius": 5.0,
            "max_neighbors": 500,
            "use_atom_edge_embedding": False,
        }
        assert {key: backbone[key] for key in same_in_all} == same_in_all

    @every_experiment
    def test_training_is_the_papers(self, name):
        config, paper = config_of(name), EXPERIMENTS[name]
        optim, train = config["optim"], config["dataset"]["train"]
        assert config["trainer"] == "equiformerv2_energy"
        assert optim["optimizer"] == "AdamW"
        assert optim["optimizer_params"] == {"weight_decay": paper.weight_decay}
        assert (optim["lr_initial"], optim["batch_size"]) == (paper.lr, paper.batch_size)
        assert optim["max_epochs"] == 300
        schedule = optim["scheduler_params"]
        assert (schedule["lambda_type"], schedule["warmup_epochs"]) == ("cosine", 5)
        assert schedule["warmup_factor"] * paper.lr == pytest.approx(1e-6, rel=0.01)
        assert schedule["lr_min_factor"] * paper.lr == pytest.approx(1e-6, rel=0.01)
        assert "clip_grad_norm" not in optim
        assert "ema_decay" not in optim
        losses = [{"target": {"fn": "mae", "coefficient": 1}}]
        noise = None
        if paper.corrupt_ratio is not None:
            losses.append({"denoising": {"fn": "masked_mae", "coefficient": 0.1}})
            noise = {"std": 0.02, "probability": 0.5, "corrupt_ratio": paper.corrupt_ratio}
        assert config["loss_functions"] == losses
        assert train.get("train_split_settings", {}).get("noisy_nodes") == noise
        assert not {"num_train", "num_val"} & set(train)

    @every_experiment
    def test_targets_are_scaled_but_for_energies(self, name):
        """As in Equiformer's release."""
        train = config_of(name)["dataset"]["train"]
        scaled = train["transforms"]["normalizer"] is not None
        assert scaled == (train["target"] not in ("u0", "u", "h", "g"))
        if stem(name) in qm9.TARGETS:
            assert train["target"] == stem(name)


class Scripts(NamedTuple):
    """One training of Equiformer (V1) as in the authors' public scripts, typed from there."""

    variant: str = "non-linear"
    batch_size: int = 128
    lr: float = 5e-4
    epochs: int = 300
    weight_decay: float = 5e-3
    dropout: float = 0.2
    basis: tuple[str, int] = ("learnable_gaussian", 128)


_BESSEL = ("bessel", 8)
_SIX = ("mu", "alpha", "homo", "lumo", "gap", "cv")
_ATOMIZATION = Scripts("Bessel", 64, 1.5e-4, 600, 0.0, 0.0, _BESSEL)
EQUIFORMER = {
    **{f"equiformer/{target}.yml": Scripts() for target in _SIX},
    "equiformer/zpve.yml": Scripts("Bessel", basis=_BESSEL),
    "equiformer/r2.yml": Scripts("Bessel", dropout=0.1, basis=_BESSEL),
    **{f"equiformer/{target}.yml": _ATOMIZATION for target in ("g", "h", "u", "u0")},
    **{f"equiformer/linear_messages/{target}.yml": Scripts("linear") for target in _SIX},
    **{f"equiformer/dot_product/{target}.yml": Scripts("dot product") for target in _SIX},
}
# (attention, non-linear messages) of each variant, and its size: 3.53M, 3.01M and 3.35M; the paper
# has no size for that with Bessel functions.
VARIANTS = {
    "non-linear": ("mlp", True, 3_531_715),
    "Bessel": ("mlp", True, 3_477_705),
    "linear": ("mlp", False, 3_008_515),
    "dot product": ("dot_product", False, 3_352_579),
}

every_equiformer = pytest.mark.parametrize("name", EQUIFORMER)


class TestEquiformerConfigs:
    @every_equiformer
    def test_the_model_is_the_papers(self, name):
        model = config_of(name)["model"]
        attention, nonlinear, parameters = VARIANTS[EQUIFORMER[name].variant]
        assert trainable_parameters(json.dumps(model)) == parameters
        same_in_all = {
            "name": "fairchem_equiformer.Equiformer",
            "num_layers": 6,
            "irreps_node_embedding": "128x0e+64x1e+32x2e",
            "irreps_sh": "1x0e+1x1e+1x2e",
            "irreps_head": "32x0e+16x1e+8x2e",
            "num_heads": 4,
            "irreps_mlp_mid": "384x0e+192x1e+96x2e",
            "irreps_feature": "512x0e",
            "max_radius": 5.0,
            "distance_function": EQUIFORMER[name].basis[0],
            "num_distance_basis": EQUIFORMER[name].basis[1],
            "max_num_elements": 5,
            "use_tag_embedding": False,
            "regress_forces": False,
            "attention": attention,
            "nonlinear_message": nonlinear,
            "alpha_drop": EQUIFORMER[name].dropout,
        }
        assert {key: model[key] for key in same_in_all} == same_in_all

    @every_equiformer
    def test_training_is_the_scripts(self, name):
        config, scripts = config_of(name), EQUIFORMER[name]
        optim, train = config["optim"], config["dataset"]["train"]
        assert (optim["batch_size"], optim["max_epochs"]) == (scripts.batch_size, scripts.epochs)
        assert optim["lr_initial"] == scripts.lr
        assert optim["optimizer_params"] == {"weight_decay": scripts.weight_decay}
        schedule = optim["scheduler_params"]
        assert schedule["warmup_epochs"] == 5
        assert schedule["warmup_factor"] * scripts.lr == pytest.approx(1e-6, rel=0.01)
        assert schedule["lr_min_factor"] * scripts.lr == pytest.approx(1e-6, rel=0.01)
        assert config["loss_functions"] == [{"energy": {"fn": "mae", "coefficient": 1}}]
        assert train["key_mapping"] == {"target": "energy"}
        assert train["target"] == stem(name)
        scaled = train["transforms"]["normalizer"] is not None
        assert scaled == (train["target"] not in ("u0", "u", "h", "g"))


# The whole architecture at a size that trains in seconds; beside it the data, and few epochs.
TINY = {
    "model.backbone": {
        "num_layers": 1,
        "lmax_list": [2],
        "mmax_list": [2],
        "grid_resolution": 8,
        "sphere_channels": 16,
        "attn_hidden_channels": 16,
        "ffn_hidden_channels": 16,
        "num_distance_basis": 16,
    },
    "dataset.train": SIZES,
    "optim": {
        "batch_size": 8,
        "num_workers": 0,
        "max_epochs": 16,
        "eval_every": 8,  # of 32 steps
        "scheduler_params.warmup_epochs": 1,
    },
}


def values(text: str) -> list[float]:
    """Every validation's error that a run logged, in the unit of the target."""
    return [float(found) for found in re.findall(r"target_mae: (\d+\.\d+), loss", text)]


def command_of(name: str, mode: str, src) -> list[str]:
    command = ["main", "--mode", mode, "--config-yml", str(CONFIGS / "qm9" / name), "--cpu"]
    command += [f"--dataset.{split}.src={src}" for split in ("train", "val")]
    return command + [
        f"--{section}.{key}={value}"
        for section, keys in TINY.items()
        for key, value in keys.items()
    ]


@pytest.fixture(scope="module")
def fairchem(src, tmp_path_factory):
    """`fairchem main` on the tiny data with one of the configs, cut down: `run(name, mode)`."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, mode, *overrides):
        run_id = name.replace("/", "_").removesuffix(".yml")
        command = [*command_of(name, mode, src), "--run-dir", str(folder), "--seed", "0"]
        command += ["--timestamp-id", f"{run_id}_{mode}"]
        if mode != "train":
            checkpoint = folder / "checkpoints" / f"{run_id}_train" / "best_checkpoint.pt"
            command += ["--checkpoint", str(checkpoint)]
        assert cli.main([*command, *overrides]) == 0
        return folder / "results" / f"{run_id}_{mode}" / "is2re_predictions.npz"

    return run


@pytest.mark.parametrize(("name", "lr"), [("u0.yml", 0.03), ("noisy_nodes/mu.yml", 0.01)])
def test_training_and_prediction(name, lr, fairchem, dataset, src, caplog):
    """On an unscaled target, and with Noisy Nodes on a scaled one."""
    caplog.set_level("INFO")
    fairchem(name, "train", f"--optim.lr_initial={lr}")
    errors = values(caplog.text)
    assert min(errors) < errors[0] / 2

    caplog.clear()
    fairchem(name, "validate", "--dataset.val.split=test")
    found = np.load(fairchem(name, "predict", f"--dataset.test.src={src}"))
    labels = {entry.sid: entry.target.item() for entry in dataset("test", stem(name))}
    assert sorted(found["ids"]) == sorted(labels)
    assert found["target"].dtype == np.float32
    predicted = dict(zip(found["ids"], found["target"].flatten().tolist(), strict=True))
    mean_error = np.mean([abs(predicted[sid] - labels[sid]) for sid in labels])
    assert values(caplog.text) == [pytest.approx(mean_error, abs=1e-3)]


def test_training_and_prediction_of_equiformer(src, tmp_path, caplog):
    """Whose flat model calls every property an energy."""
    caplog.set_level("INFO")
    sizes = {
        "num_layers": 1,
        "irreps_node_embedding": "16x0e+8x1e",
        "irreps_sh": "1x0e+1x1e",
        "irreps_head": "8x0e+4x1e",
        "irreps_mlp_mid": "32x0e+16x1e",
        "irreps_feature": "32x0e",
        "num_distance_basis": 16,
    }
    command = [
        word for word in command_of("equiformer/gap.yml", "train", src) if "model." not in word
    ]
    command += [f"--model.{key}={value}" for key, value in sizes.items()]
    command += ["--run-dir", str(tmp_path), "--timestamp-id", "equiformer", "--seed", "0"]
    command += ["--optim.lr_initial=0.01", "--optim.max_epochs=6", "--optim.eval_every=2"]
    assert cli.main([*command, f"--dataset.test.src={src}"]) == 0
    errors = [float(found) for found in re.findall(r"energy_mae: (\d+\.\d+), loss", caplog.text)]
    assert min(errors) < 0.8 * errors[0]
    with np.load(tmp_path / "results" / "equiformer" / "is2re_predictions.npz") as file:
        assert file["energy"].shape == (len(file["ids"]), 1) == (4, 1)


class TestBadInput:
    """Ends in one line, before a run has begun."""

    @pytest.fixture
    def message(self, capsys):
        def run(*overrides, src):
            assert cli.main([*command_of("gap.yml", "train", src), *overrides]) == 2
            text = capsys.readouterr().err
            assert text.startswith(f"fairchem: error: {CONFIGS / 'qm9' / 'gap.yml'}: ")
            assert text.count("\n") == 1
            return text

        return run

    def test_no_data_and_no_internet(self, message, tmp_path, monkeypatch):
        def fail(url, file):  # noqa: ARG001
            raise URLError("Name or service not known")

        monkeypatch.setattr(qm9, "download_url_to_file", fail)
        text = message(src=tmp_path)
        assert f"dataset.train: src: no QM9 in {tmp_path}, and making it failed" in text
        assert f"unpack qm9_v3.pt from it into {tmp_path}/raw" in text

    def test_bad_keys(self, message, src):
        text = message("--dataset.train.target=Gap", src=src)
        assert "dataset.train: target is 'Gap', it must be one of mu, " in text
        text = message("--dataset.train.train_split_settings.noisy_nodes.sigma=0.1", src=src)
        assert "dataset.train: noisy_nodes: " in text
        text = message("--dataset.train.num_val=8", src=src)
        assert "dataset.train: num_train and num_val are 16 and 8, which leaves nothing" in text
