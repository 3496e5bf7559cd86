"""fairchem-core's LBFGS and OCPCalculator, on frozen weights; trajectories with their last frame.

fairchem-core decides which systems of a batch have converged before it writes them, and writes only
the others: the last frame of a converged system is one step old, and one that starts relaxed has no
frame at all. IS2RE energies are read off the last frames.

A system whose forces become NaN counts there as converged, and one whose forces become infinite
stops all others, since its atoms are moved to nowhere; any RuntimeError is taken for a lack of
memory. Here the first two are named and stay where they are, and the third ends the run.

Each prediction of a trainer puts the moving averages in place of the weights and back. In a
relaxation they stay in place, and with them what is made of the weights alone (nn/frozen.py).
"""

from __future__ import annotations

import functools
import logging
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from ase.io import Trajectory
from fairchem.core.common.relaxation.optimizers import lbfgs_torch

from fairchem_equiformer.fairchem1 import trajectories
from fairchem_equiformer.nn.frozen import FrozenWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fairchem.core.common.relaxation.ase_utils import OCPCalculator
    from fairchem.core.trainers import BaseTrainer

logger = logging.getLogger(__name__)

# What PyTorch's allocators and the libraries under it say when there is no memory left.
NO_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|STATUS_ALLOC_FAILED")


class RelaxationError(Exception):
    """A model failed in a relaxation, and not for want of memory.

    Not a RuntimeError: fairchem-core takes those for a lack of memory, and tries smaller batches.
    """


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

    traj_dir: Any  # the folder of trajectories; None where none are written

    def run(self, fmax: float, steps: int) -> bool:
        """Relax the batch until no force is above `fmax` (eV/Angstrom) or for `steps` steps.

        Raises:
            RelaxationError: if the model fails for another reason than a lack of memory.
        """
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None
        self._lost: set[int] = set()
        folder, trainer = self.traj_dir, self.optimizable.trainer
        try:
            with (
                averaged_weights(trainer),
                FrozenWeights().used_by(trainer.model),
                trajectories.growing(folder, self.traj_names) as self.traj_dir,
            ):
                converged = super().run(fmax, steps)
                if self.trajectories is not None and self._written is None:
                    self._write_only_frames()  # all systems started relaxed, or no step was asked
        except Exception as error:
            for trajectory in self.trajectories or ():
                trajectory.close()
            if not isinstance(error, RuntimeError) or NO_MEMORY.search(str(error)):
                raise
            names = ", ".join(str(self._sid(index)) for index in range(len(self.optimizable.batch)))
            raise RelaxationError(f"the model failed in a batch of sids {names}") from error
        finally:
            self.traj_dir = folder
        self._leave_lost("at the end")
        return converged

    def step(self, iteration: int) -> None:
        """Move all systems whose forces are finite and above the limit."""
        self._leave_lost(f"after {iteration} steps")
        super().step(iteration)

    def write(self) -> None:
        """Append a frame to the trajectory of each system that moved, or has none yet."""
        frames = self.optimizable.get_atoms_list()
        for frame, trajectory, moved in zip(
            frames, self.trajectories, self._moved().tolist(), strict=True
        ):
            if moved:
                trajectory.write(frame)

    def _leave_lost(self, when: str) -> None:
        """Name each system whose forces are not finite, once, and move it no more."""
        forces = self.optimizable.get_forces(apply_constraint=True)
        bad = ~forces.isfinite().all(dim=1)
        if not bad.any():
            return
        lost = self.optimizable.batch_indices[bad].unique()
        moving = self.optimizable.update_mask
        moving[lost] = False
        for system in lost.tolist():
            if system not in self._lost:
                logger.warning(
                    "sid %s: its forces are not finite %s; it stays where it was then, and the"
                    " others go on",
                    self._sid(system),
                    when,
                )
        self._lost.update(lost.tolist())

    def _sid(self, system: int) -> Any:
        sid = self.optimizable.batch.sid[system]
        return sid.item() if isinstance(sid, torch.Tensor) else sid

    def _moved(self) -> torch.Tensor:
        """Whether each system [B] differs from its last frame."""
        batch = self.optimizable.batch
        now = batch.pos.clone(), batch.cell.clone()
        before, self._written = self._written, now
        if before is None:
            return torch.ones(batch.num_graphs, dtype=torch.bool)
        moved = (now[1] != before[1]).flatten(1).any(1)
        atoms = (now[0] != before[0]).any(1)
        moved[batch.batch[atoms]] = True
        return moved

    def _write_only_frames(self) -> None:
        frames = self.optimizable.get_atoms_list()
        for frame, name in zip(frames, self.traj_names, strict=True):
            with Trajectory(self.traj_dir / f"{name}.traj", mode="w") as trajectory:
                trajectory.write(frame)
