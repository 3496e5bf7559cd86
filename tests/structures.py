"""Slabs with adsorbates as fairchem's batches."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, bcc110, fcc100, fcc111, molecule
from ase.spacegroup import crystal
from torch_geometric.data import Batch, Data

_SURFACES = {"Cu": fcc111, "Pt": fcc111, "Ni": fcc100, "Fe": bcc110}


def slab_atoms(metal: str = "Cu", adsorbate: str = "CO", seed: int = 0) -> Atoms:
    """A rattled slab of two layers (2 x 2) with one molecule on it, periodic in all directions."""
    atoms = _SURFACES[metal](metal, (2, 2, 2), vacuum=5.0)
    add_adsorbate(atoms, molecule(adsorbate), 1.9, "ontop")
    atoms.rattle(0.08, seed=seed)
    atoms.pbc = True
    return atoms


def slab(metal: str = "Cu", adsorbate: str = "CO", sid: int = 0) -> Data:
    """The same as fairchem's datasets give it, rattled by its sid."""
    return from_atoms(slab_atoms(metal, adsorbate, sid), sid)


def from_atoms(atoms: Atoms, sid: int = 0) -> Data:
    """One structure in the fields that fairchem's datasets give a model."""
    return Data(
        pos=torch.tensor(atoms.positions, dtype=torch.float32),
        cell=torch.tensor(np.array(atoms.cell), dtype=torch.float32)[None],
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.float32),
        natoms=len(atoms),
        tags=torch.zeros(len(atoms), dtype=torch.long),
        fixed=torch.zeros(len(atoms)),
        sid=sid,
        fid=0,
    )


def rutile() -> Atoms:
    """V2O4, unrattled: several neighbours at each distance, and not the same for all atoms."""
    return crystal(
        ("V", "O"),
        basis=[(0, 0, 0), (0.3, 0.3, 0)],
        spacegroup=136,
        cellpar=[4.55, 4.55, 2.86, 90, 90, 90],
    )


def single_atom(symbol: str = "Cu", sid: int = 0, box: float = 30.0) -> Data:
    """An atom with no other, nor any image of itself, within reach."""
    return from_atoms(Atoms(symbol, [(1.0, 2.0, 3.0)], cell=[box] * 3), sid)


def batch_of(*structures: Data) -> Batch:
    """One batch; structures stay as they are."""
    return Batch.from_data_list([structure.clone() for structure in structures])


def three_slabs() -> Batch:
    """Three structures of unlike metals, cells, adsorbates and sizes: 36 atoms."""
    return batch_of(slab("Cu", "CO", 11), slab("Pt", "CH3OH", 12), slab("Fe", "NH3", 13))


def in_double(data):
    """The same structure, positions and cell in float64."""
    data.pos, data.cell = data.pos.double(), data.cell.double()
    return data


def moved(data: Data, rotation: torch.Tensor | None = None, shift: torch.Tensor | None = None):
    """The same structure rotated, then shifted: positions and cell rows are R v + s and R a."""
    data = data.clone()
    if rotation is not None:
        data.pos = data.pos @ rotation.T
        data.cell = data.cell @ rotation.T
    if shift is not None:
        data.pos = data.pos + shift
    return data


def noisy(batch: Batch, mask: float | None = None) -> Batch:
    """The batch with what fairchem's DeNS trainer adds in a noisy step; `mask` noisy of all."""
    generator = torch.Generator().manual_seed(3)
    shape = batch.pos.shape
    batch.forces = torch.randn(shape, generator=generator)
    batch.forces[2] = 0.0
    batch.sigmas = torch.rand((shape[0], 1), generator=generator)
    batch.denoising_pos_forward = True
    if mask is not None:
        batch.noise_mask = torch.rand(shape[0], generator=generator) < mask
    return batch
