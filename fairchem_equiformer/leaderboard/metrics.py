"""Scores of relaxations whose relaxed structures are known.

=====  ==========================================================================================
ADwT   average distance within threshold: the share of systems whose free atoms are on average
       nearer to the reference's than a threshold, averaged over 0.01 to 0.5 Angstrom
AFbT   average forces below threshold: the share of systems whose relaxed structure has no force on
       a free atom, as the reference calculator sees it, of or above a threshold, averaged over 0.01
       to 0.4 eV/Angstrom
MAE    mean absolute error of the relaxed energy, in eV
EwT    share of systems whose relaxed energy is off by less than 0.02 eV
=====  ==========================================================================================

Thresholds are 0.001 apart, the last value of a range left out, as in fairchem's evaluator, which
has all but AFbT. (Chanussot et al., ACS Catalysis 2021, introduces them.)
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from fairchem_equiformer.errors import InputError
from fairchem_equiformer.leaderboard import split, systems

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ase import Atoms
    from ase.calculators.calculator import Calculator
    from torch_geometric.data import Data

Array = npt.NDArray[np.float64]

DISTANCES = np.arange(0.01, 0.5, 0.001)  # Angstrom
FORCES = np.arange(0.01, 0.4, 0.001)  # eV/Angstrom
ENERGY = 0.02  # eV


@dataclass(frozen=True)
class Relaxed:
    """How one relaxation ended.

    Attributes:
        sid: of the system.
        energy_error: model's less reference's relaxed energy, in eV.
        distance: mean distance of free atoms from the reference's relaxed structure, in Angstrom.
        fmax: largest force of the reference calculator on a free atom, in eV/Angstrom; None without
            one.
    """

    sid: str
    energy_error: float
    distance: float
    fmax: float | None


@dataclass(frozen=True)
class Score:
    """Means over a test set; shares are between 0 and 1. AFbT is None without a calculator."""

    systems: int
    energy_mae: float
    energy_within_threshold: float
    adwt: float
    afbt: float | None


def examine(
    trajectories: Path, reference: Iterable[Data], single_point: Calculator | None = None
) -> list[Relaxed]:
    """Compare the last frames of ``<sid>.traj`` with known relaxed structures.

    Args:
        trajectories: the folder.
        reference: IS2RE systems with ``pos_relaxed`` and ``energy_relaxed`` or ``y_relaxed``.
        single_point: the calculator that labelled them, for AFbT.

    Raises:
        InputError: a system has no relaxed structure or energy, or the calculator fails on it.
        FailedError: a trajectory is missing, damaged or of another system.
    """
    found = []
    for data in reference:
        sid = systems.name(data, frame=False)
        position, energy = _relaxed_labels(data, sid)
        atoms = split.last_frame(trajectories, data)
        free = systems.free_atoms(data)
        energy_error = float(atoms.get_potential_energy() - energy)
        away = distances(atoms.positions, position, atoms.cell.array)[free].mean()
        try:
            fmax = None if single_point is None else largest_force(atoms, free, single_point)
        except Exception as error:  # whatever calculators raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"system {sid}: no single point by the calculator: {reason}"
            ) from error
        found.append(Relaxed(sid, energy_error, float(away), fmax))
    return found


def _relaxed_labels(data: Data, sid: str) -> tuple[Array, float]:
    energy = getattr(data, "energy_relaxed", getattr(data, "y_relaxed", None))
    position = getattr(data, "pos_relaxed", None)
    if energy is None or position is None:
        raise InputError(
            f"system {sid} has no relaxed structure or energy: metrics need validation data, "
            "with pos_relaxed and energy_relaxed (or y_relaxed)"
        )
    return position.numpy().astype(np.float64), float(energy)


def distances(one: Array, other: Array, cell: Array) -> Array:
    """Distances [N] of atoms from those of another structure, across periodic boundaries."""
    return np.linalg.norm(systems.fold(one - other, cell), axis=1)


def largest_force(atoms: Atoms, free: npt.NDArray[np.bool_], single_point: Calculator) -> float:
    """Length of the largest force on a free atom, by a calculator."""
    atoms = atoms.copy()
    atoms.calc = single_point
    forces = atoms.get_forces(apply_constraint=False)
    return float(np.linalg.norm(forces[free], axis=1).max())


def average_within(values: Sequence[float], thresholds: Array) -> float:
    """Share of values below a threshold, averaged over thresholds."""
    return float((np.asarray(values)[:, None] < thresholds).mean())


def score(relaxed: Sequence[Relaxed]) -> Score:
    """Average over the systems of a test set.

    Raises:
        InputError: if there are none.
    """
    if not relaxed:
        raise InputError("no system to score")
    errors = np.abs([one.energy_error for one in relaxed])
    fmax = [one.fmax for one in relaxed if one.fmax is not None]
    return Score(
        systems=len(relaxed),
        energy_mae=float(errors.mean()),
        energy_within_threshold=float((errors < ENERGY).mean()),
        adwt=average_within([one.distance for one in relaxed], DISTANCES),
        afbt=average_within(fmax, FORCES) if fmax else None,
    )


def as_json(results: Mapping[str, Sequence[Relaxed]]) -> dict[str, Any]:
    """Scores, and how each relaxation ended, of each test set."""
    return {
        name: {**asdict(score(relaxed)), "relaxed": [asdict(one) for one in relaxed]}
        for name, relaxed in results.items()
    }


def table(scores: Mapping[str, Score]) -> str:
    """Tabulate the scores of test sets."""
    made = Table("", box=box.SIMPLE_HEAD)
    for title in ("systems", "energy MAE (meV)", "EwT (%)", "ADwT (%)", "AFbT (%)"):
        made.add_column(title, justify="right")
    for name, one in scores.items():
        shares = (one.energy_within_threshold, one.adwt, one.afbt)
        percent = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        made.add_row(name, str(one.systems), f"{1e3 * one.energy_mae:.0f}", *percent)
    text = io.StringIO()
    Console(file=text, width=100).print(made)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
