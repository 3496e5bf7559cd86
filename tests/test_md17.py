"""MD17: its data, its configs, and training with forces by autograd on a made trajectory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from ase.calculators.fd import calculate_numerical_forces
from fairchem.core.datasets import data_list_collater
from fairchem.core.datasets.base_dataset import create_dataset

from benchmarks import molecule
from fairchem_equiformer.fairchem1.data import md17

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
