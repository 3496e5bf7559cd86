"""The structure that every benchmark measures."""

from __future__ import annotations

import math

from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.constraints import FixAtoms

SEED = 0


def slab(atoms: int) -> Atoms:
    """Return ethanol on a Cu(111) slab of four layers as :class:`ase.Atoms`.

    The slab is square, so 45, 153, 409, 1609 and 10009 atoms exist; others are rounded to the
    nearest that does. Positions are displaced by 0.05 Angstrom, from a fixed seed.
    """
    adsorbate = molecule("CH3CH2OH")
    side = max(1, round(math.sqrt((atoms - len(adsorbate)) / 4)))
    structure = fcc111("Cu", size=(side, side, 4), vacuum=10.0)
    fixed = [atom.index for atom in structure if atom.tag > 2]
    add_adsorbate(structure, adsorbate, height=2.5, position="fcc")
    # ASE counts layers from the top, 1 to 4, and the adsorbate is 0. OC20: 0 bulk, 1 surface, 2 it.
    layers = structure.get_tags()
    structure.set_tags([2 if layer == 0 else int(layer == 1) for layer in layers])
    structure.set_constraint(FixAtoms(fixed))
    structure.rattle(0.05, seed=SEED)
    structure.pbc = True
    return structure
