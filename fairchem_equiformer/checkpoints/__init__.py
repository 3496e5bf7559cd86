"""Checkpoints of EquiformerV2 in every form that fairchem and the original release wrote.

    from fairchem_equiformer import checkpoints

    checkpoint = checkpoints.load("eqV2_31M_omat.pt")
    potential = checkpoint.potential(device="cuda")
    potential(batch)  # energy (eV), forces (eV/Angstrom), stress (eV/Angstrom^3)

Nothing here needs fairchem.
"""

from fairchem_equiformer.checkpoints.checkpoint import Checkpoint, Normalizer, load
from fairchem_equiformer.checkpoints.config import Output
from fairchem_equiformer.checkpoints.potential import Potential
from fairchem_equiformer.checkpoints.reading import CheckpointError, read

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Normalizer",
    "Output",
    "Potential",
    "load",
    "read",
]
