"""Trajectories of relaxations end where the relaxation ends."""

from __future__ import annotations

import ase.io
import pytest
import torch
from fairchem.core.common.relaxation import ml_relaxation
from fairchem.core.common.relaxation.optimizers import lbfgs_torch
from fairchem.core.datasets import data_list_collater
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage

from fairchem_equiformer.fairchem1.relaxation import LBFGS
from tests.conftest import make_data

# fairchem calls ASE by an old name when it writes a frame.
pytestmark = pytest.mark.filterwarnings("ignore:Please use atoms.calc = calc:FutureWarning")

OPTIONS = {"maxstep": 0.04, "memory": 50, "damping": 1.0, "alpha": 70.0}


class Springs:
    """In place of a trainer: each atom on a spring to its place in the first of these systems."""

    device = torch.device("cpu")
    ema = None
    model = torch.nn.Identity()

    def __init__(self, batch):
        self.home = batch.pos.clone()

    def predict(self, batch, **_):
        away = batch.pos - self.home
        energy = torch.zeros(batch.num_graphs).index_add(0, batch.batch, (away**2).sum(1))
        return {"energy": energy, "forces": -2 * away}


def relax(folder, displacements, steps=100, optimizer=LBFGS, trainer=Springs, **options):
    """Relax systems whose free atoms begin so many Angstrom away; return the relaxed batch."""
    batch = data_list_collater([make_data(sid) for sid in range(len(displacements))], True)
    springs = trainer(batch)
    batch.pos[:, 2] += torch.tensor(displacements)[batch.batch] * (batch.fixed == 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ml_relaxation, "LBFGS", optimizer)
        return ml_relaxation.ml_relax(
            batch, springs, steps, 0.05, OPTIONS | {"traj_dir": folder}, **options
        )


def count_frames(folder, sid):
    with ase.io.Trajectory(folder / f"{sid}.traj") as frames:
        return len(frames)


def check_ends(folder, relaxed):
    """The last frames have the positions, energies and forces of the relaxed batch."""
    positions = relaxed.pos.split(relaxed.natoms.tolist())
    for sid, (pos, energy) in enumerate(zip(positions, relaxed.energy, strict=True)):
        last = ase.io.read(folder / f"{sid}.traj", index=-1)
        moved = last.positions - pos.numpy()
        fractions = last.cell.scaled_positions(moved)
        assert abs(fractions - fractions.round()).max() < 1e-6
        assert last.get_potential_energy() == pytest.approx(float(energy), abs=1e-7)


# One system starts relaxed, two converge after different numbers of steps, one runs out of steps.
MIXED = [0.0, 0.1, 0.4, 3.0]


@pytest.mark.parametrize("save_full_traj", [True, False])
def test_the_last_frame_is_the_relaxed_structure(tmp_path, save_full_traj):
    relaxed = relax(tmp_path, MIXED, steps=30, save_full_traj=save_full_traj)
    check_ends(tmp_path, relaxed)
    frames = [count_frames(tmp_path, sid) for sid in range(4)]
    if save_full_traj:
        assert frames[0] == 1
        assert frames == sorted(frames)
        assert frames[-1] == 31
    else:
        assert frames == [1, 2, 2, 2]


@pytest.mark.parametrize("displacements", [[0.0], [0.0, 0.01], [0.1], [3.0, 3.0]])
def test_so_it_is_where_all_end_together(tmp_path, displacements):
    check_ends(tmp_path, relax(tmp_path, displacements, steps=30))
    assert {path.suffix for path in tmp_path.iterdir()} == {".traj"}


def test_the_steps_are_fairchems(tmp_path):
    ours = relax(tmp_path / "ours", MIXED, steps=30)
    stock = relax(tmp_path / "stock", MIXED, steps=30, optimizer=lbfgs_torch.LBFGS)
    assert torch.equal(ours.pos, stock.pos)
    assert torch.equal(ours.energy, stock.energy)


def test_fairchem_still_leaves_the_last_frame_out(tmp_path):
    """Fails when it no longer does; then our optimizer can go."""
    relaxed = relax(tmp_path, MIXED, steps=30, optimizer=lbfgs_torch.LBFGS)
    last = ase.io.read(tmp_path / "1.traj", index=-1)
    assert last.get_potential_energy() > 2 * float(relaxed.energy[1])
    assert count_frames(tmp_path, 0) == 0


def test_relaxations_without_trajectories(tmp_path):
    assert relax(None, [0.0, 0.1]).pos.isfinite().all()
    assert not list(tmp_path.iterdir())


class Weak(Springs):
    """Half as strong springs, or as a moving average has it; looks at both as a trainer does."""

    def __init__(self, batch):
        super().__init__(batch)
        self.model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.model.weight, 0.5)
        self.ema = ExponentialMovingAverage(self.model.parameters(), 0.9)
        self.ema.shadow_params[0].fill_(0.25)
        self.copies = 0

    def predict(self, batch, **_):
        if self.ema is not None:
            self.ema.store()
            self.ema.copy_to()
            self.copies += 1
        strength = self.model.weight.item()
        if self.ema is not None:
            self.ema.restore()
        return {key: strength * value for key, value in super().predict(batch).items()}


def relax_weakly(optimizer):
    """Relax a system on weak springs; return their trainer and the relaxed positions."""
    trainers = []

    def trainer(batch):
        trainers.append(Weak(batch))
        return trainers[0]

    try:
        relaxed = relax(None, [0.4], steps=9, optimizer=optimizer, trainer=trainer)
    finally:
        assert trainers[0].ema is not None
        assert trainers[0].model.weight.item() == 0.5
    return trainers[0], relaxed.pos


def test_averages_are_put_in_place_once():
    ours, relaxed = relax_weakly(LBFGS)
    stock, expected = relax_weakly(lbfgs_torch.LBFGS)
    assert torch.equal(relaxed, expected)
    assert ours.copies <= 1 < stock.copies  # ml_relax asks once more at the end


def test_averages_are_put_back_after_an_error(monkeypatch):
    def step(*_):
        raise ArithmeticError

    monkeypatch.setattr(lbfgs_torch.LBFGS, "step", step)
    with pytest.raises(ArithmeticError):
        relax_weakly(LBFGS)


def test_it_is_what_fairchem_relaxes_with():
    assert ml_relaxation.LBFGS is LBFGS
