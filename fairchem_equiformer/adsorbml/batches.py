"""Relaxes batches of placements with fairchem-core 1.10's own `ml_relax` (LBFGS in torch).

That is what `fairchem --mode run-relaxations` does, which would tell no time and write whole
trajectories. This is the only part of AdsorbML that needs fairchem-core 1.10, beside OC20's LMDBs.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core import OCPCalculator
from fairchem.core.common.relaxation.ml_relaxation import ml_relax
from fairchem.core.datasets import data_list_collater
from fairchem.core.preprocessing import AtomsToGraphs

import fairchem_equiformer.fairchem1  # noqa: F401  # its changes: the LBFGS, and names of trainers
from fairchem_equiformer.adsorbml.relaxation import Clock, Relaxed, Settings
from fairchem_equiformer.checkpoints import read
from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ase import Atoms
    from torch_geometric.data import Data

# fairchem's LBFGS as in the configs of OC20.
LBFGS_OPTIONS = {"maxstep": 0.04, "memory": 50, "damping": 1.0, "alpha": 70.0}


class ModelRelaxer:
    """Relaxes batches of structures with a checkpoint of fairchem.

    Args:
        checkpoint: of fairchem-core 1.10.
        config_yml: of the model, if it is not the checkpoint's.
        settings: of the relaxation.
        trusted: see :func:`~fairchem_equiformer.checkpoints.read`.

    Raises:
        InputError: if checkpoint or config cannot be used.
    """

    def __init__(
        self,
        checkpoint: Path,
        config_yml: Path | None,
        settings: Settings,
        *,
        trusted: bool = False,
    ) -> None:
        self.settings = settings
        read(checkpoint, trusted=trusted, mapped=True)  # since fairchem-core runs what it asks for
        try:
            with _quiet():
                self._trainer = OCPCalculator(
                    config_yml=None if config_yml is None else str(config_yml),
                    checkpoint_path=checkpoint,
                    cpu=settings.device == "CPU",
                    seed=0,
                ).trainer
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"--checkpoint: {checkpoint} cannot be used: {reason}") from error
        self._to_data = AtomsToGraphs(
            r_energy=False, r_forces=False, r_distances=False, r_pbc=True, r_edges=False
        )

    def __call__(self, structures: Sequence[Atoms]) -> list[Relaxed]:
        """Relax structures together, in the order given."""
        clock = Clock(self.settings.device)
        data = [self._data(*item) for item in enumerate(structures)]
        with _quiet():
            batch = ml_relax(
                data_list_collater(data, otf_graph=True),
                self._trainer,
                steps=self.settings.steps,
                fmax=self.settings.fmax,
                relax_opt=dict(LBFGS_OPTIONS),
            )
        seconds = clock.seconds() / len(structures)
        natoms = batch.natoms.tolist()
        rows = zip(
            batch.sid.tolist(),  # halves of a batch that needs too much memory come out swapped
            batch.energy.flatten().tolist(),
            batch.pos.cpu().split(natoms),
            batch.forces.cpu().split(natoms),
            strict=True,
        )
        relaxed = {}
        for sid, energy, positions, forces in rows:
            atoms = structures[sid].copy()
            # fairchem wrapped the atoms into the cell; the way that they went is what counts.
            atoms.positions += (positions - data[sid].pos).double().numpy()
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces.double().numpy())
            converged = _largest(atoms.get_forces()) < self.settings.fmax
            relaxed[sid] = Relaxed(atoms, seconds, None, converged)
        return [relaxed[sid] for sid in range(len(structures))]

    def _data(self, sid: int, atoms: Atoms) -> Data:
        data = self._to_data.convert(atoms)
        data.sid = sid
        return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep fairchem from logging the whole config and every step; warnings stay."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _largest(forces: Any) -> float:
    return float(np.linalg.norm(forces, axis=1).max())
