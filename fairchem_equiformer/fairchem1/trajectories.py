"""Trajectories of relaxations: one writer each, and what an interrupted run has left of them.

fairchem-core has every rank write into one folder: ranks of one graph, and ranks that got the same
system to fill up their last batch, take each other's file away. Run again, it skips batches all of
whose trajectories are there, and leaves them out of ``relaxed_positions.npz``.

Here a rank writes in a folder of its own, and moves a trajectory when it is whole. A system whose
trajectory is there is not relaxed again, whichever batch or rank it is in now: its last frame is
what it was relaxed to.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.io import Trajectory
from fairchem.core.common import distutils, gp_utils
from fairchem.core.datasets import data_list_collater
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data

from fairchem_equiformer.errors import StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ase import Atoms
    from torch import Tensor
    from torch_geometric.data import Batch

logger = logging.getLogger(__name__)


@contextmanager
def growing(folder: Path | None, names: Sequence[Any]) -> Iterator[Path | None]:
    """A folder for the trajectories of one batch, which are moved to `folder` in the end.

    Args:
        folder: where ``<name>.traj`` will be; None for no trajectories.
        names: of the systems.

    Yields:
        The folder to write to; None on a rank that does not write.
    """
    if folder is None or (gp_utils.initialized() and gp_utils.get_gp_rank() > 0):
        yield None
        return
    own = folder / f".rank{distutils.get_rank()}"
    shutil.rmtree(own, ignore_errors=True)  # of a run that was interrupted
    own.mkdir(parents=True)
    yield own
    for name in names:
        (own / f"{name}.traj").replace(folder / f"{name}.traj")
    shutil.rmtree(own)


def never_skipped(_: Any) -> Callable[..., bool]:
    """For ``check_traj_files``: a batch is looked at system by system (`only_the_rest`)."""

    def check_traj_files(*_: Any) -> bool:
        return False

    return check_traj_files


def only_the_rest(original: Callable[..., Batch]) -> Callable[..., Any]:
    """For ``ml_relax`` of the trainer: relax what has no trajectory, and give it with the rest."""

    def ml_relax(batch: Batch, model: Any, **settings: Any) -> Any:
        # Its first call would wait for that of the other ranks, which may have nothing to relax.
        if isinstance(wrapped := getattr(model, "model", None), DistributedDataParallel):
            wrapped.require_forward_param_sync = False
        folder = (settings.get("relax_opt") or {}).get("traj_dir")
        frames = _known(batch, Path(folder), model.device) if folder else {}
        if not frames:
            return original(batch=batch, model=model, **settings)
        systems = batch.to_data_list()
        done = _collate([_ended(systems[index], frame) for index, frame in frames.items()])
        left = [system for index, system in enumerate(systems) if index not in frames]
        logger.info("%d of %d systems were relaxed before: %s", len(frames), len(systems), folder)
        if not left:
            return done
        return _joined(done, original(batch=_collate(left), model=model, **settings))

    return ml_relax


def _collate(systems: list[Data]) -> Batch:
    return data_list_collater(systems, otf_graph=True)


def _known(batch: Batch, folder: Path, device: torch.device) -> dict[int, Atoms]:
    """Last frames by place in the batch; the ranks of one graph go by what the first one sees."""
    found: list[Any] = [None]
    if not gp_utils.initialized() or gp_utils.get_gp_rank() == 0:
        found = [_last_frames(batch, folder)]
    if gp_utils.initialized():
        group = gp_utils.get_gp_group()
        first = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast_object_list(found, first, group, device)
    frames: dict[int, Atoms] = found[0]
    return frames


def _last_frames(batch: Batch, folder: Path) -> dict[int, Atoms]:
    sids = batch.sid.tolist() if isinstance(batch.sid, torch.Tensor) else batch.sid
    numbers = batch.atomic_numbers.cpu().split(batch.natoms.tolist())
    frames = {}
    for index, sid in enumerate(sids):
        path = folder / f"{sid}.traj"
        frame = _last_frame(path) if path.is_file() else None
        if frame is None:
            continue
        if frame.numbers.tolist() != numbers[index].long().tolist():
            raise StoppedError(
                f"{path} is the trajectory of another system, {frame.get_chemical_formula()}: set "
                "task.relax_opt.traj_dir to a folder of its own"
            )
        frames[index] = frame
    return frames


def _last_frame(path: Path) -> Atoms | None:
    """None if there is none, or if it ended in forces that are not finite: it is tried again."""
    try:
        with path.open("rb") as file, Trajectory(file) as trajectory:
            frame = trajectory[-1]
            ended = np.isfinite(frame.get_forces(apply_constraint=False)).all()
    except Exception as error:  # noqa: BLE001  # a damaged file trips ASE in many ways
        logger.warning("%s cannot be read (%s): its system is relaxed again", path, error)
        return None
    return frame if ended else None


def _ended(system: Data, frame: Atoms) -> Data:
    """A system as it was relaxed; the frame's atoms are wrapped into the cell, which it is not."""
    cell, pos = (value.double().cpu().numpy() for value in (system.cell[0], system.pos))
    moved = np.linalg.solve(cell.T, pos.T) - np.linalg.solve(frame.cell.T, frame.positions.T)
    relaxed = frame.positions + np.rint(moved).T @ frame.cell[:]
    ended = system.clone()
    ended.pos = torch.tensor(relaxed).to(system.pos)
    ended.cell = torch.tensor(frame.cell[:]).to(system.cell)[None]
    ended.energy = torch.tensor([[frame.get_potential_energy()]]).to(system.pos)
    ended.forces = torch.tensor(frame.get_forces(apply_constraint=False)).to(system.pos)
    return ended


def _joined(one: Any, other: Any) -> Data:
    """All fields of two batches that both have, those of the first before those of the other."""
    keys = set(one.keys()) & set(other.keys()) - {"batch", "ptr"}
    return Data(**{key: _both(one[key], other[key]) for key in keys})


def _both(one: Any, other: Any) -> Tensor | list[Any]:
    if isinstance(one, torch.Tensor):
        return torch.cat([one, other.to(one.device)])
    return [*one, *other]
