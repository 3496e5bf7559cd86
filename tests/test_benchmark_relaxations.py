"""Relaxations and calculator compared, at their smallest; times are nobody's test."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
import torch
import yaml

from benchmarks import calculator, relax_by, relaxations
from fairchem_equiformer.checkpoints.frozen import FrozenPotential
from tests.conftest import TINY_MODEL, make_atoms, make_data, write_lmdb
from tests.stock_checkpoints import content_of, save

STEPS = 2


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Three slabs and the checkpoint of a tiny model, in batches of two."""
    monkeypatch.setattr(FrozenPotential, "__call__", FrozenPotential.__call__)  # put back later
    slabs = [make_atoms(index) for index in range(3)]
    for slab in slabs:
        slab.calc = None
    ase.io.write(tmp_path / "slabs.traj", slabs)
    checkpoint = save(content_of(TINY_MODEL), tmp_path / "best_checkpoint.pt")
    return relax_by.Settings(
        slabs=str(tmp_path / "slabs.traj"),
        checkpoint=str(checkpoint),
        fmax=1e-6,
        steps=STEPS,
        batch=2,
        threads=torch.get_num_threads(),
    )


def relax(settings, way):
    result = relax_by.Result()
    relax_by.WAYS[way](settings, ase.io.read(settings.slabs, ":"), result)
    assert result.converged == [False] * 3
    assert np.isfinite(result.energies).all()
    assert result.seconds > 0
    return result


def test_one_by_one(settings):
    found = relax(settings, "ASE, one by one")
    assert found.calls == found.evaluations == 3 * (STEPS + 1)


def test_in_batches(settings):
    found = relax(settings, "fairchem-core 1.10, batches")
    batches = 2  # of two and of one
    assert found.calls % batches == 0
    assert found.evaluations == 3 * found.calls // batches
    assert STEPS + 1 <= found.calls // batches <= STEPS + 2


def test_what_ends_below_the_largest_force_counts_as_relaxed():
    slab, result = make_atoms(0), relax_by.Result()
    forces = np.full((len(slab), 3), 0.01)
    forces[slab.constraints[0].index] = 1.0  # fixed
    result.end(-1.0, forces, slab, 0.05)
    result.end(-2.0, 10 * forces, slab, 0.05)
    assert result.converged == [True, False]
    assert result.energies == [-1.0, -2.0]


def test_slabs_of_the_demo(tmp_path):
    for number, split in enumerate(relaxations.SPLITS):
        write_lmdb(tmp_path / "is2re" / split / "data.0000.lmdb", [make_data(number)])
    found = relaxations.read_slabs(tmp_path, 3)
    assert len(found) == 3
    for index, slab in enumerate(found):
        expected = make_atoms(index)
        assert np.abs(slab.positions - expected.positions).max() < 1e-5
        assert slab.constraints[0].index.tolist() == expected.constraints[0].index.tolist()


def test_calculator(tmp_path, capsys):
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump({"model": TINY_MODEL}))
    forward, step = calculator.main(["--config", str(config), "--repeat", "1"])
    assert forward > 0
    assert step > 0
    assert "ratio" in capsys.readouterr().out
