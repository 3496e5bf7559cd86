"""A molecule whose energy is known in closed form, in the raw format of MD17.

Every pair of atoms is held at its distance by a Morse potential, stiff where it is a bond: smooth,
bound, and as fast in its vibrations as a real molecule. Files of it stand in for MD17's where these
cannot be downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from ase import units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms

Array = npt.NDArray[np.float64]

KCAL_PER_MOL = units.kcal / units.mol
BOND = 1.25  # of the sum of covalent radii
DEPTH = {True: 100.0, False: 10.0}  # kcal/mol: of a bond, of any other pair
STEEPNESS = 2.0  # 1/Angstrom


class ElasticMolecule(Calculator):
    """Energy and forces of a molecule that is held at the shape it is made with.

    The sum over pairs of ``D (1 - exp(-a (r - r0)))**2``, with r0 the pair's distance in that
    shape and D by whether it is a bond.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, shape: Atoms) -> None:
        super().__init__()
        self._first, self._second = np.triu_indices(len(shape), k=1)
        self._rest = np.linalg.norm(self._vectors(shape.positions), axis=1)
        radii = covalent_radii[shape.numbers]
        bonded = self._rest < BOND * (radii[self._first] + radii[self._second])
        self._depth = np.where(bonded, DEPTH[True], DEPTH[False]) * KCAL_PER_MOL

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Energy in eV and forces in eV/Angstrom."""
        super().calculate(atoms, properties, system_changes)
        vectors = self._vectors(self.atoms.positions)
        distances = np.linalg.norm(vectors, axis=1)
        decay = np.exp(-STEEPNESS * (distances - self._rest))
        slope = 2 * self._depth * (1 - decay) * decay * STEEPNESS
        pull = (slope / distances)[:, None] * vectors
        forces = np.zeros_like(self.atoms.positions)
        np.add.at(forces, self._first, pull)
        np.add.at(forces, self._second, -pull)
        self.results = {"energy": float(self._depth @ (1 - decay) ** 2), "forces": forces}

    def _vectors(self, positions: Array) -> Array:
        """From the first atom of each pair to the second [pairs, 3]."""
        return positions[self._second] - positions[self._first]


def elastic(formula: str = "CH3CH2OH") -> Atoms:
    """A molecule of ASE's database with its calculator, at rest."""
    atoms = molecule(formula)
    atoms.calc = ElasticMolecule(atoms)
    return atoms


def heat(atoms: Atoms, kelvin: float, seed: int) -> np.random.Generator:
    """Give the atoms velocities of a temperature, without drift and rotation."""
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=rng)
    Stationary(atoms)
    ZeroRotation(atoms)
    return rng


def frames(atoms: Atoms, count: int, *, kelvin: float = 500.0, seed: int = 0) -> dict[str, Any]:
    """Molecular dynamics at a temperature, every tenth step of 0.5 fs.

    Returns:
        The arrays of a file of MD17: z [n], R [M, n, 3] in Angstrom, E [M, 1] in kcal/mol and
        F [M, n, 3] in kcal/mol/Angstrom.
    """
    rng = heat(atoms, kelvin, seed)
    dynamics = Langevin(
        atoms, 0.5 * units.fs, temperature_K=kelvin, friction=0.02 / units.fs, rng=rng
    )
    positions, energies, forces = [], [], []
    for _ in range(count):
        dynamics.run(10)
        positions.append(atoms.get_positions())
        energies.append([atoms.get_potential_energy() / KCAL_PER_MOL])
        forces.append(atoms.get_forces() / KCAL_PER_MOL)
    return {
        "z": atoms.numbers.astype(np.uint8),
        "R": np.array(positions),
        "E": np.array(energies),
        "F": np.array(forces),
    }


def write(path: Path, arrays: dict[str, Any]) -> Path:
    """Write a file of MD17."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path
