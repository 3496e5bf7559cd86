"""ASE: a calculator of a checkpoint, and calculators by their dotted names.

    from fairchem_equiformer import EquiformerCalculator

    atoms.calc = EquiformerCalculator("eqV2_31M_omat.pt")
    atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()

No framework is needed. docs/ase.md tells more.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.geometry import wrap_positions

from fairchem_equiformer.checkpoints.frozen import FrozenPotential
from fairchem_equiformer.errors import InputError, StructureError
from fairchem_equiformer.graph.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms

    from fairchem_equiformer.checkpoints import Checkpoint

_VOIGT = [0, 4, 8, 5, 2, 1]  # xx, yy, zz, yz, xz, xy of a 3 x 3 matrix


class EquiformerCalculator(Calculator):
    """Energy, forces and, where the checkpoint predicts it, stress of a structure.

    The numbers are those of fairchem-core 1.10's ``OCPCalculator``. As there, periodic directions
    are those of ``atoms.pbc``, and fixed atoms have the forces that the model predicts. Of
    EquiformerV2 forces and stress are predicted, not derived from the energy; of Equiformer with
    ``direct_forces: False`` in its config they are derivatives.

    Args:
        checkpoint: the file, or what :func:`~fairchem_equiformer.checkpoints.load` made of it.
        device: by default the GPU if there is one, else the CPU.
        dtype: ``float32``, ``float64``, or ``bfloat16`` for matrix products in it and all else in
            float32.
        trusted: call whatever the file asks for when it is read; see
            :func:`~fairchem_equiformer.checkpoints.read`.

    Raises:
        CheckpointError: if the checkpoint cannot be used; says why in one line.
        ValueError: for another dtype.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        trusted: bool = False,
    ) -> None:
        super().__init__()
        self._potential = FrozenPotential(checkpoint, device=device, dtype=dtype, trusted=trusted)
        self.implemented_properties = list(self._potential.outputs)
        if "energy" in self._potential.outputs:
            self.implemented_properties.append("free_energy")
        self._batch: Batch | None = None  # of the last calculation

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Predict everything at once: energy in eV, forces in eV/Angstrom, stress in eV/Angstrom^3.

        Raises:
            StructureError: if the model cannot predict the structure; names atom and value.
        """
        super().calculate(atoms, properties, system_changes)
        before = self._batch if set(system_changes) <= {"positions"} else None
        self._batch = None  # if this fails it is no longer that of self.atoms
        self._batch = batch_of(self.atoms, self._potential.device, self._potential.dtype, before)
        predicted = {key: value.cpu() for key, value in self._potential(self._batch).items()}
        if "energy" in predicted:
            energy = predicted["energy"].item()
            self.results |= {"energy": energy, "free_energy": energy}
        if "forces" in predicted:
            self.results["forces"] = predicted["forces"].double().numpy()
        if "stress" in predicted:
            self.results["stress"] = predicted["stress"][0].double().numpy().flat[_VOIGT]

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation: as in ASE, and tags, which some models read."""
        changes: list[str] = super().check_state(atoms, tol)
        if not changes and not np.array_equal(atoms.get_tags(), self.atoms.get_tags()):
            changes.append("tags")
        return changes


def batch_of(
    atoms: Atoms, device: torch.device, dtype: torch.dtype, before: Batch | None = None
) -> Batch:
    """One structure as fairchem-core 1.10 has it: atoms wrapped into the cell in float64.

    Where the cell has no vector in a direction that is not periodic, ASE's is put there. What
    differs from the structure of ``before`` in positions alone shares the rest with it.

    Raises:
        StructureError: if there is no vector in a periodic direction.
    """
    missing = atoms.pbc & ~np.any(atoms.cell.array, axis=1)
    if missing.any():
        raise StructureError(
            f"pbc is {atoms.pbc.tolist()}, but the cell has no vector in direction"
            f" {', '.join(map(str, np.flatnonzero(missing)))}: give the atoms a cell"
            " (atoms.cell, atoms.center) or set pbc to False there"
        )
    cell = atoms.cell.complete().array
    positions = wrap_positions(atoms.positions, cell, pbc=atoms.pbc, eps=0)
    pos = torch.as_tensor(positions, dtype=dtype, device=device)
    if before is not None:
        return replace(before, pos=pos)
    return Batch(
        pos=pos,
        cell=torch.as_tensor(cell[None], dtype=dtype, device=device),
        pbc=torch.as_tensor(atoms.pbc[None], device=device),
        natoms=torch.tensor([len(atoms)], device=device),
        atomic_numbers=torch.as_tensor(atoms.numbers, dtype=torch.long, device=device),
        tags=torch.as_tensor(atoms.get_tags(), dtype=torch.long, device=device),
    )


def make_calculator(name: str) -> Calculator:
    """Call the class or function of this name without arguments.

    Args:
        name: such as ``ase.calculators.emt.EMT``. One with settings of its own is a function in a
            file of the user's: ``my_dft.calculator`` for ``def calculator()`` in ``my_dft.py``.

    Raises:
        InputError: if there is none, or it does not work without arguments.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--calculator {name}: {error}; it is the dotted name of a class or function, such as "
            "ase.calculators.emt.EMT or, for calculator() in ./my_dft.py, my_dft.calculator"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--calculator {name}: {type(error).__name__}: {reason}; it is called without "
            "arguments: name a function of your own that makes it with its settings"
        ) from error
