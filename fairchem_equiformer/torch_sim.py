"""torch-sim: a model of a checkpoint, for batches of structures.

    import torch_sim
    from fairchem_equiformer.torch_sim import EquiformerModel

    model = EquiformerModel("eqV2_31M_omat.pt")
    relaxed = torch_sim.optimize(structures, model, optimizer=torch_sim.Optimizer.fire)

No other framework is needed. docs/ase.md tells more.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from ase.geometry import complete_cell
from torch import Tensor
from torch_sim.models.interface import ModelInterface

from fairchem_equiformer.checkpoints.checkpoint import Checkpoint, load
from fairchem_equiformer.checkpoints.frozen import FrozenPotential
from fairchem_equiformer.graph.batch import Batch

if TYPE_CHECKING:
    from pathlib import Path

    from torch_sim import SimState

_ROUNDING = 1e-7  # of a position in units of the cell


class EquiformerModel(ModelInterface):
    """Energies, forces and, where the checkpoint predicts them, stresses of a batch.

    Positions, cells, elements and periodic directions are read of a state; fixed atoms have the
    forces that the model predicts. Of EquiformerV2 forces and stress are predicted, not derived
    from the energy; of Equiformer with ``direct_forces: False`` in its config they are derivatives.
    What a structure gets does not depend on the others in its batch: of equally far neighbours, of
    which a model with ``enforce_max_neighbors_strictly`` has to choose, it keeps those that it
    keeps alone (``use_pbc_single`` in the config).

    Args:
        checkpoint: the file, or what :func:`~fairchem_equiformer.checkpoints.load` made of it.
        device: by default the GPU if there is one, else the CPU.
        dtype: ``float32``, ``float64``, or ``bfloat16`` for matrix products in it and all else in
            float32; a name, or PyTorch's dtype. States of the other precision work, too.
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
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load(checkpoint, trusted=trusted)
        alone = replace(checkpoint, backbone={**checkpoint.backbone, "use_pbc_single": True})
        self._potential = FrozenPotential(alone, device=device, dtype=dtype)
        self._device = self._potential.device
        self._dtype = self._potential.dtype
        self._compute_forces = "forces" in self._potential.outputs
        self._compute_stress = "stress" in self._potential.outputs
        self._memory_scales_with = "n_atoms"  # an atom has so many neighbours at most

    def forward(self, state: SimState | dict[str, Any], **_: Any) -> dict[str, Tensor]:
        """Predict.

        Returns:
            ``energy`` [B] in eV, ``forces`` [N, 3] in eV/Angstrom, ``stress`` [B, 3, 3] in
            eV/Angstrom^3, in the state's precision.

        Raises:
            StructureError: if the model cannot predict a structure; names it, atom and value.
        """
        if isinstance(state, dict):
            state = SimpleNamespace(**state)
        predicted = self._potential(batch_of(state, self._device, self._dtype))
        return {key: value.to(state.positions) for key, value in predicted.items()}


def batch_of(state: Any, device: torch.device, dtype: torch.dtype) -> Batch:
    """The structures of a state, atoms wrapped into their cells in float64.

    A state has cells of column vectors, and one ``pbc`` for all structures: a bool or three.
    """
    cell = state.cell.double().mT.to(device)  # [B, 3, 3], vectors as rows
    count = len(cell)
    pbc = torch.as_tensor(state.pbc, device=device).bool().expand(count, 3)
    system = state.system_idx.to(device)
    pos = state.positions.to(device).double()
    return Batch(
        pos=_wrapped(pos, cell, pbc, system).to(dtype),
        cell=cell.to(dtype),
        pbc=pbc,
        natoms=torch.bincount(system, minlength=count),
        atomic_numbers=state.atomic_numbers.to(device).long(),
    )


def _wrapped(pos: Tensor, cell: Tensor, pbc: Tensor, system: Tensor) -> Tensor:
    """Positions [N, 3] moved into their cells along the periodic directions.

    An atom that is already inside, or less than rounding outside, keeps every bit.
    """
    if not pbc.any():
        return pos
    whole = torch.stack([torch.as_tensor(complete_cell(one.cpu().numpy())) for one in cell])
    fractional = torch.linalg.solve(whole.to(pos)[system].mT, pos)
    home = torch.floor(fractional + _ROUNDING) * pbc[system]
    return pos - torch.einsum("ni,nij->nj", home, cell[system])
