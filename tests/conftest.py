"""Fixtures for all tests: a fixed seed, and a small real problem in fairchem's own formats."""

from __future__ import annotations

import copy
import functools
import os
import pickle
from typing import TYPE_CHECKING

import lmdb
import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from hypothesis import settings
from torch_geometric.data import Data

if TYPE_CHECKING:
    from pathlib import Path

# The machines that run the tests have two cores; more threads than cores would only wait.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# The same examples at every run: a rare one that rounding decides fails for who wrote the test, not
# for who comes by.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
# For `make soak`, by --hypothesis-profile=soak: others at every run, and ten times as many.
settings.register_profile("soak", max_examples=1000, print_blob=True)

# The whole architecture at a size that runs in milliseconds.
TINY_MODEL = {
    "name": "fairchem_equiformer.EquiformerV2",
    "otf_graph": True,
    "use_pbc": True,
    "max_neighbors": 8,
    "max_radius": 6.0,
    "num_layers": 1,
    "lmax_list": [3],
    "mmax_list": [2],
    "grid_resolution": 12,
    "sphere_channels": 16,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 16,
    "edge_channels": 16,
    "regress_forces": True,
}


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory():
    """Fresh memory is full of NaN, or of numbers beyond any index.

    What is read before it is written, or never written, then shows in the result. PyTorch's own
    switch for this needs its deterministic algorithms, which would change what is tested.
    """

    def poisoned(make):
        @functools.wraps(make)
        def fresh(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.bool:
                poison = True
            elif tensor.is_floating_point():
                poison = torch.nan
            else:
                poison = torch.iinfo(tensor.dtype).max
            with torch.no_grad():  # it may be a leaf that asks for a gradient
                return tensor.fill_(poison)

        return fresh

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if item.get_closest_marker("gpu"):  # not a folder of that name
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # fairchem draws from the global state


def make_atoms(index: int, size=(2, 2, 2)):
    """A copper slab with one hydrogen, rattled, with energy and forces of the EMT potential."""
    atoms = fcc111("Cu", size, vacuum=6.0, periodic=True)
    add_adsorbate(atoms, "H", 1.2, "fcc")
    atoms.rattle(0.05, seed=index)
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 2))
    atoms.calc = EMT()
    return atoms


def make_data(index: int, size=(2, 2, 2)) -> Data:
    """The same structure as one entry of an OC20 LMDB; `sid` is its index."""
    atoms = make_atoms(index, size)
    fixed = torch.zeros(len(atoms))
    fixed[atoms.constraints[0].index] = 1
    pos = torch.tensor(atoms.positions, dtype=torch.float32)
    energy = atoms.get_potential_energy()
    return Data(
        pos=pos,
        cell=torch.tensor(atoms.cell[:], dtype=torch.float32).unsqueeze(0),
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.float32),
        natoms=len(atoms),
        tags=torch.tensor(atoms.get_tags()),
        fixed=fixed,
        sid=index,
        fid=0,
        energy=energy,
        forces=torch.tensor(atoms.get_forces(apply_constraint=False), dtype=torch.float32),
        energy_relaxed=energy,
        pos_relaxed=pos.clone(),
    )


def write_lmdb(path: Path, entries: list[Data]) -> Path:
    """Write entries in the format that fairchem's `lmdb` datasets read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    env = lmdb.open(str(path), map_size=2**24, subdir=False, meminit=False, map_async=True)
    with env.begin(write=True) as transaction:
        for index, entry in enumerate(entries):
            transaction.put(f"{index}".encode("ascii"), pickle.dumps(entry, protocol=4))
        transaction.put(b"length", pickle.dumps(len(entries), protocol=4))
    env.close()
    return path


@pytest.fixture(scope="session")
def tiny_lmdb(tmp_path_factory) -> Path:
    """An LMDB of four slabs with adsorbate."""
    path = tmp_path_factory.mktemp("lmdb") / "data.lmdb"
    return write_lmdb(path, [make_data(index) for index in range(4)])


@pytest.fixture
def tiny_config(tiny_lmdb) -> dict:
    """The config of `make_tiny_config` on the data of `tiny_lmdb`."""
    return make_tiny_config(tiny_lmdb)


def make_tiny_config(lmdb_path: Path) -> dict:
    """A complete config of fairchem for forces and energies: two steps an epoch, two epochs."""
    src = {"src": str(lmdb_path)}
    return {
        "trainer": "equiformerv2_forces",
        "model": copy.deepcopy(TINY_MODEL),
        "dataset": {
            "train": {
                **src,
                "format": "lmdb",
                "transforms": {
                    "normalizer": {
                        "energy": {"mean": 0.0, "rmsd": 1.0},
                        "forces": {"mean": 0.0, "rmsd": 1.0},
                    }
                },
            },
            "val": dict(src),
            "test": dict(src),
            "relax": dict(src),
        },
        "outputs": {
            "energy": {"level": "system", "prediction_dtype": "float32"},
            "forces": {
                "level": "atom",
                "train_on_free_atoms": True,
                "eval_on_free_atoms": True,
                "prediction_dtype": "float32",
            },
        },
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 1}},
            {"forces": {"fn": "l2mae", "coefficient": 1}},
        ],
        "evaluation_metrics": {
            "metrics": {"energy": ["mae"], "forces": ["mae"]},
            "primary_metric": "forces_mae",
        },
        "optim": {
            "batch_size": 2,
            "eval_batch_size": 2,
            "num_workers": 0,
            "optimizer": "AdamW",
            "optimizer_params": {"weight_decay": 0.001},
            "lr_initial": 0.001,
            "max_epochs": 2,
            "scheduler": "LambdaLR",
            "scheduler_params": {
                "lambda_type": "cosine",
                "warmup_epochs": 0.5,
                "warmup_factor": 0.2,
                "lr_min_factor": 0.01,
            },
            "clip_grad_norm": 100,
            "ema_decay": 0.99,
        },
        "task": {
            "relaxation_steps": 2,
            "relaxation_fmax": 0.05,
            "relax_opt": {"maxstep": 0.04, "memory": 50, "damping": 1.0, "alpha": 70.0},
            "write_pos": True,
        },
        "logger": "tensorboard",
    }
