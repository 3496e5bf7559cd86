"""fairchem-core's LBFGS and OCPCalculator, on frozen weights; trajectories with their last frame.

fairchem-core decides which systems of a batch have converged before it writes them, and writes only
the others: the last frame of a converged system is one step old, and one that starts relaxed has no
frame at all. IS2RE energies are read off the last frames.

Each prediction of a trainer puts the moving averages in place of the weights and back. In a
relaxation they stay in place, and with them what is made of the weights alone (nn/frozen.py).
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from ase.io import Trajectory
from fairchem.core.common.relaxation.optimizers import lbfgs_torch

from fairchem_equiformer.nn.frozen import FrozenWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fairchem.core.common.relaxation.ase_utils import OCPCalculator
    from fairchem.core.trainers import BaseTrainer


@contextmanager
def averaged_weights(trainer: BaseTrainer) -> Iterator[None]:
    """Within, the trainer's model has the moving averages for weights, if the trainer has any."""
    average = trainer.ema
    if average is None:
        yield
        return
    average.store()
    average.copy_to()
    trainer.ema = None  # each prediction would do the same again
    try:
        yield
    finally:
        trainer.ema = average
        average.restore()


def frozen_calculate(calculate: Callable[..., None]) -> Callable[..., None]:
    """Make ``OCPCalculator.calculate`` work on frozen weights: nobody trains them there."""

    @functools.wraps(calculate)
    def frozen(calculator: OCPCalculator, *arguments: Any, **options: Any) -> None:
        weights = calculator.__dict__.setdefault("frozen_weights", FrozenWeights())
        with weights.used_by(calculator.trainer.model):
            calculate(calculator, *arguments, **options)

    return frozen


def last_frame_lbfgs(_: type) -> type:
    """What takes the place of fairchem-core's LBFGS."""
    return LBFGS


class LBFGS(lbfgs_torch.LBFGS):
    """Takes the same steps; a frame is written of each system that is not where it was last."""

    def run(self, fmax: float, steps: int) -> bool:
        """Relax the batch until no force is above `fmax` (eV/Angstrom) or for `steps` steps."""
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None
        trainer = self.optimizable.trainer
        with averaged_weights(trainer), FrozenWeights().used_by(trainer.model):
            converged = super().run(fmax, steps)
        if self.trajectories is not None and self._written is None:
            self._write_only_frames()  # all systems started relaxed
        return converged

    def write(self) -> None:
        """Append a frame to the trajectory of each system that moved, or has none yet."""
        frames = self.optimizable.get_atoms_list()
        for frame, trajectory, moved in zip(
            frames, self.trajectories, self._moved().tolist(), strict=True
        ):
            if moved:
                trajectory.write(frame)

    def _moved(self) -> torch.Tensor:
        """Whether each system [B] differs from its last frame."""
        batch = self.optimizable.batch
        now = batch.pos.clone(), batch.cell.clone()
        before, self._written = self._written, now
        if before is None:
            return torch.ones(batch.num_graphs, dtype=torch.bool)
        moved = (now[1] != before[1]).flatten(1).any(1)
        atoms = (now[0] != before[0]).any(1)
        moved[self.optimizable.batch_indices[atoms]] = True
        return moved

    def _write_only_frames(self) -> None:
        frames = self.optimizable.get_atoms_list()
        for frame, name in zip(frames, self.traj_names, strict=True):
            path = self.traj_dir / f"{name}.traj_tmp"
            with Trajectory(path, mode="w") as trajectory:
                trajectory.write(frame)
            path.replace(path.with_suffix(".traj"))
