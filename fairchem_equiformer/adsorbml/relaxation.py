"""Relaxes placements with a calculator of ASE, one by one, or with whatever relaxes batches.

A relaxation leaves one file, its relaxed structure; where that exists, it is not done again.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import ase.io
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import LBFGS
from tqdm import tqdm

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms
    from ase.calculators.calculator import Calculator

    from fairchem_equiformer.adsorbml.placements import Placement

STEPS, FMAX = 300, 0.02  # eV/Angstrom; AdsorbML's, and EquiformerV2's in its appendix D.3


@dataclass(frozen=True)
class Settings:
    """What all relaxations of a folder have in common.

    Attributes:
        by: the checkpoint and how it is used, or the calculator's dotted name.
        device: ``GPU`` or ``CPU``, what `seconds` of the relaxations are of.
        steps: at most so many steps.
        fmax: largest force in eV/Angstrom at which a relaxation ends.
    """

    by: str
    device: str
    steps: int = STEPS
    fmax: float = FMAX


@dataclass(frozen=True)
class Relaxed:
    """A relaxed placement.

    Attributes:
        atoms: the last structure, with energy in eV and forces in eV/Angstrom.
        seconds: on the device; of a batch, each system has its equal share.
        evaluations: how often energy and forces were computed; None for a system of a batch.
        converged: whether its largest force on a free atom was below `fmax`.
    """

    atoms: Atoms
    seconds: float
    evaluations: int | None
    converged: bool


class Clock:
    """Seconds of a device: of a GPU the time that it is held, of CPUs the time that they work."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = self._now()

    def seconds(self) -> float:
        """Time since this clock was made."""
        return self._now() - self._start

    def _now(self) -> float:
        if self._device == "CPU":
            return sum(os.times()[:4])  # of all threads, and of programs that a calculator ran
        torch.cuda.synchronize()
        return time.monotonic()


class Relaxer(Protocol):
    """What relaxes structures together."""

    settings: Settings

    def __call__(self, structures: Sequence[Atoms]) -> list[Relaxed]:
        """Relax structures, in the order given."""


class CalculatorRelaxer:
    """Relaxes structures one after the other with a calculator of ASE and its LBFGS."""

    def __init__(self, calculator: Calculator, settings: Settings) -> None:
        self.settings = settings
        self._calculator = calculator

    def __call__(self, structures: Sequence[Atoms]) -> list[Relaxed]:
        """Relax structures, in the order given."""
        return [self._relax(atoms.copy()) for atoms in structures]

    def _relax(self, atoms: Atoms) -> Relaxed:
        clock = Clock(self.settings.device)
        atoms.calc = self._calculator
        optimizer = LBFGS(atoms, logfile=None)
        converged = optimizer.run(fmax=self.settings.fmax, steps=self.settings.steps)
        energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
        seconds = clock.seconds()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        return Relaxed(atoms, seconds, optimizer.nsteps + 1, bool(converged))


def relax(
    placements: Sequence[Placement],
    run: Path,
    relaxer: Relaxer,
    batch_size: int = 1,
) -> int:
    """Relax what is not relaxed yet, batch by batch, behind a progress bar.

    Args:
        placements: the initial structures.
        run: folder to write to, ``relaxed/PAIR/PLACEMENT.traj`` and ``relaxed.json``.
        relaxer: what relaxes a batch.
        batch_size: structures a batch.

    Returns:
        How many were relaxed now.

    Raises:
        InputError: if a structure cannot be read or computed, or if the folder holds relaxations
            with other settings.
    """
    _claim(run, relaxer.settings)
    todo = [one for one in placements if not _file(run, one).exists()]
    with tqdm(
        total=len(placements), initial=len(placements) - len(todo), desc="relaxing", unit="system"
    ) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            structures = [one.atoms() for one in batch]
            try:
                relaxed = relaxer(structures)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                others = f", or one of the {len(batch) - 1} after it" if len(batch) > 1 else ""
                raise InputError(f"{batch[0]}{others}: cannot be relaxed: {reason}") from error
            for one, result in zip(batch, relaxed, strict=True):
                _write(_file(run, one), result)
            bar.update(len(batch))
    return len(todo)


def read_relaxed(run: Path, placement: Placement) -> Relaxed | None:
    """Read a relaxed placement; None if it is not relaxed yet."""
    path = _file(run, placement)
    if not path.exists():
        return None
    atoms = ase.io.read(path)
    facts = atoms.info.pop("relaxation")
    return Relaxed(atoms, facts["seconds"], facts["evaluations"], facts["converged"])


def read_settings(run: Path) -> Settings:
    """Settings of the relaxations of a folder.

    Raises:
        InputError: if there are none.
    """
    return Settings(**read_json(run / "relaxed.json", "relax"))


def _claim(run: Path, settings: Settings) -> None:
    """Keep relaxations of different kinds in different folders."""
    path = run / "relaxed.json"
    if not path.exists():
        write_json(path, vars(settings))
    elif (other := read_settings(run)) != settings:
        differing = [
            f"{key} {value!r}, now {vars(settings)[key]!r}"
            for key, value in vars(other).items()
            if value != vars(settings)[key]
        ]
        raise InputError(
            f"{run} holds relaxations with {'; '.join(differing)}: name another folder"
        )


def _file(run: Path, placement: Placement) -> Path:
    return run / "relaxed" / placement.pair / f"{placement.name}.traj"


def _write(path: Path, relaxed: Relaxed) -> None:
    atoms = relaxed.atoms
    atoms.info = {
        "relaxation": {
            "seconds": relaxed.seconds,
            "evaluations": relaxed.evaluations,
            "converged": relaxed.converged,
        }
    }
    with replacing(path) as partial:
        ase.io.write(partial, atoms, format="traj")
