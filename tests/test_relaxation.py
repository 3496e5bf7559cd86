"""Trajectories of relaxations end where the relaxation ends."""

from __future__ import annotations

import ase.io
import pytest
import torch
from ase.calculators.emt import EMT
from fairchem.core.common.relaxation import ml_relaxation
from fairchem.core.common.relaxation.optimizers import lbfgs_torch
from fairchem.core.datasets import data_list_collater
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage

from fairchem_equiformer.errors import StoppedError
from fairchem_equiformer.fairchem1 import trajectories
from fairchem_equiformer.fairchem1.relaxation import LBFGS, RelaxationError
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


def test_no_steps_give_one_frame(tmp_path):
    """The structures as they are, and what the model says of them."""
    relaxed = relax(tmp_path, MIXED, steps=0)
    check_ends(tmp_path, relaxed)
    assert [count_frames(tmp_path, sid) for sid in range(4)] == [1] * 4
    assert float(relaxed.energy[3]) == pytest.approx(
        float(relaxed.energy[2]) * (3.0 / 0.4) ** 2, rel=1e-5
    )


class Failing(Springs):
    """Of the second system, forces are not finite from the third step on."""

    value = torch.nan
    calls = 0

    def predict(self, batch, **_):
        out = super().predict(batch)
        self.calls += 1
        if self.calls >= 3:
            out["forces"][batch.batch == 1] = self.value
        return out


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_system_whose_forces_are_not_finite_is_named_and_left(
    tmp_path, monkeypatch, caplog, value
):
    monkeypatch.setattr(Failing, "value", value)
    displacements = [0.1, 0.4, 0.4, 0.0]
    expected = relax(tmp_path / "all", displacements).pos.split(9)
    found = relax(tmp_path / "one failed", displacements, trainer=Failing).pos.split(9)
    for system in (0, 2, 3):
        assert torch.equal(found[system], expected[system])
    assert found[1].isfinite().all()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("sid 1: its forces are not finite after 2 steps")


class Buggy(Springs):
    """Raises at its second call, and never again."""

    message = "mat1 and mat2 shapes cannot be multiplied"
    calls = 0

    def predict(self, batch, **_):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError(self.message)
        return super().predict(batch)


def test_a_bug_is_not_taken_for_a_lack_of_memory(tmp_path):
    with pytest.raises(RelaxationError, match="in a batch of sids 0, 1") as caught:
        relax(tmp_path, [0.1, 0.2], trainer=Buggy)
    assert str(caught.value.__cause__) == Buggy.message


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_a_lack_of_memory_makes_the_batch_smaller(tmp_path, monkeypatch, caplog, message):
    caplog.set_level("INFO")
    monkeypatch.setattr(Buggy, "message", message)
    relaxed = relax(tmp_path, [0.1, 0.2], trainer=HalfOfIt)
    assert "splitting into two" in caplog.text
    assert sorted(relaxed.sid.tolist()) == [0, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"0.traj", "1.traj"}


class HalfOfIt(Buggy):
    """Its springs take any part of the batch."""

    def predict(self, batch, **_):
        self.home = torch.cat([make_data(sid).pos for sid in batch.sid.tolist()])
        out = super().predict(batch)
        return {**out, "energy": out["energy"][:, None]}  # as trainers give it


@pytest.fixture
def again(tmp_path):
    """Relax four systems, those without a trajectory; the sids that were relaxed, and all ends."""

    def run():
        relaxed = []

        def noting(batch, **settings):
            relaxed.extend(batch.sid.tolist())
            return ml_relaxation.ml_relax(batch, **settings)

        batch = data_list_collater([make_data(sid) for sid in range(4)], otf_graph=True)
        batch.pos += torch.tensor(MIXED).repeat_interleave(9)[:, None] * (batch.fixed == 0)[:, None]
        found = trajectories.only_the_rest(noting)(
            batch=batch,
            model=HalfOfIt(batch),
            steps=20,
            fmax=0.05,
            relax_opt=OPTIONS | {"traj_dir": tmp_path},
        )
        ends = dict(zip(found.sid.tolist(), found.pos.split(found.natoms.tolist()), strict=True))
        energies = dict(zip(found.sid.tolist(), found.energy.tolist(), strict=True))
        return relaxed, ends, energies

    return run


def test_what_is_relaxed_is_not_relaxed_again(again, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Buggy, "message", "out of memory")
    first, expected, energies = again()
    assert first == [0, 1, 2, 3]
    (tmp_path / "1.traj").unlink()
    (tmp_path / "2.traj").write_bytes((tmp_path / "2.traj").read_bytes()[:300])
    second, found, same_energies = again()
    assert second == [1, 2]
    assert "2.traj cannot be read" in caplog.text
    assert again()[0] == []
    for sid, pos in expected.items():
        assert (found[sid] - pos).abs().max() < 1e-5
        assert same_energies[sid] == pytest.approx(energies[sid], abs=1e-6)


def test_the_trajectory_of_another_system_is_not_taken(again, tmp_path):
    atoms = ase.Atoms("CO", [(0, 0, 0), (0, 0, 1)], calculator=EMT())
    atoms.get_forces()
    ase.io.write(tmp_path / "2.traj", atoms)
    with pytest.raises(StoppedError, match=r"2\.traj is the trajectory of another system, CO"):
        again()


def test_it_is_what_fairchem_relaxes_with():
    assert ml_relaxation.LBFGS is LBFGS
