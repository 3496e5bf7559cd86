"""Data files that are damaged, missing or foreign end in one line, not in a bus error."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil

import ase.db
import lmdb
import numpy as np
import pytest
from fairchem.core.datasets.ase_datasets import AseDBDataset

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import lmdb_files, preflight
from tests.conftest import make_atoms, make_data, write_lmdb


@pytest.fixture
def files(tmp_path):
    """Three numbered LMDB files of two structures, and their metadata."""
    paths = [
        write_lmdb(tmp_path / f"data.{number:04}.lmdb", [make_data(number), make_data(number + 3)])
        for number in range(3)
    ]
    np.savez(tmp_path / "metadata.npz", natoms=np.full(6, 9))
    return paths


def check(files):
    lmdb_files.check(sorted(files[0].parent.glob("*.lmdb")), files[0].parent / "metadata.npz")


def test_whole_files_pass(files):
    check(files)
    check(files[:1])


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.6, 0.99])
def test_a_file_cut_short(files, keep):
    """Its entries are a bus error away."""
    size = files[1].stat().st_size
    os.truncate(files[1], int(keep * size))
    with pytest.raises(InputError) as error:
        check(files)
    assert str(files[1]) in str(error.value)
    if keep > 0.1:
        for part in ("cut short", str(size), str(int(keep * size))):
            assert part in str(error.value)


def test_a_file_of_text(files):
    files[2].write_text("not a database, but long enough to hold a header " * 100)
    with pytest.raises(InputError, match=r"data\.0002\.lmdb is no LMDB file"):
        check(files)


def test_a_file_missing_between_others(files):
    files[1].unlink()
    with pytest.raises(InputError, match=r"data\.0001\.lmdb is missing"):
        check(files)


def test_the_last_file_missing(files):
    files[2].unlink()
    with pytest.raises(InputError, match=r"metadata\.npz describes 6 structures.* hold 4"):
        check(files)


def test_a_length_that_is_not_there(files):
    with (
        lmdb.open(str(files[0]), subdir=False, map_size=2**24) as env,
        env.begin(write=True) as transaction,
    ):
        transaction.put(b"length", pickle.dumps(7))
    with pytest.raises(InputError, match="holds 2 entries, and its key `length` says 7"):
        check(files)


def test_many_transactions_leave_a_file_that_passes(tmp_path):
    """Pages that were freed count as pages of the file."""
    path = tmp_path / "data.lmdb"
    with lmdb.open(str(path), subdir=False, map_size=2**24) as env:
        for _ in range(3):
            with env.begin(write=True) as transaction:
                for index in range(20):
                    transaction.put(f"{index}".encode(), os.urandom(20000))
        with env.begin(write=True) as transaction:
            for index in range(1, 20):
                transaction.delete(f"{index}".encode())
            for _ in range(20):
                transaction.put(b"large", os.urandom(100000))
                transaction.delete(b"large")
    lmdb_files.check([path], None)


def test_the_command_says_which_key(files, tiny_config, tmp_path):
    os.truncate(files[0], 5000)
    split = {"src": str(tmp_path), "format": "lmdb"}
    with pytest.raises(InputError, match=r"config\.yml: dataset\.val\.src: .*cut short"):
        preflight._check_data(
            tmp_path / "config.yml",
            {"train": {**tiny_config["dataset"]["train"]}, "val": split},
            "train",
        )


def test_aselmdb_is_read_or_says_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "data.aselmdb"
    path.touch()
    where = ("config.yml: dataset.train.src", str(path), "hint")
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "find_spec", lambda _: None)
        with pytest.raises(InputError, match="pip install ase-db-backends"):
            preflight._check_ase_db(*where)
    if importlib.util.find_spec("ase_db_backends") is None:
        pytest.skip("ase-db-backends is not installed here yet")
    path.unlink()
    with ase.db.connect(path) as database:
        for index in range(3):
            atoms = make_atoms(index)
            atoms.get_forces()  # what was computed is written
            database.write(atoms)
    preflight._check_ase_db(*where)
    dataset = AseDBDataset({"src": str(path), "a2g_args": {"r_energy": True, "r_forces": True}})
    assert len(dataset) == 3
    assert dataset[2].energy == pytest.approx(make_atoms(2).get_potential_energy())


def test_a_copy_passes(files, tmp_path):
    shutil.copy(files[0], tmp_path / "copy.lmdb")
    lmdb_files.check([tmp_path / "copy.lmdb"], None)
