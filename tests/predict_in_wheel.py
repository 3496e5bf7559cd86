"""Predict with an installed package alone: `python -I tests/predict_in_wheel.py WEIGHTS`.

Prints JSON: energy and forces of two slabs, the version of torch, where the kernels lie, and what
was said of ops that had to do without them. WEIGHTS are drawn and written where there is no such
file, so that a second environment predicts with those of the first.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["FAIRCHEM_EQUIFORMER_KERNELS"] = "native"  # an error, if they cannot be loaded

import torch
from ase.build import add_adsorbate, fcc111

from fairchem_equiformer.models import EquiformerV2
from fairchem_equiformer.ops.native import loader

KEYS = {
    "max_neighbors": 12,
    "max_radius": 6.0,
    "num_layers": 2,
    "lmax_list": [3],
    "mmax_list": [2],
    "grid_resolution": 12,
    "sphere_channels": 16,
    "attn_hidden_channels": 16,
    "num_heads": 2,
    "attn_alpha_channels": 16,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 16,
    "edge_channels": 16,
    "regress_forces": True,
}


def batch() -> SimpleNamespace:
    """Two rattled slabs with an adsorbed hydrogen, as the fields that the model reads."""
    slabs = []
    for seed, metal in enumerate(("Cu", "Pd")):
        atoms = fcc111(metal, (2, 2, 3), vacuum=8.0, periodic=True)
        add_adsorbate(atoms, "H", 1.2, "fcc")
        atoms.rattle(0.05, seed=seed)
        slabs.append(atoms)
    return SimpleNamespace(
        pos=torch.cat([torch.tensor(atoms.positions).float() for atoms in slabs]),
        cell=torch.stack([torch.tensor(atoms.cell.array).float() for atoms in slabs]),
        pbc=torch.ones(2, 3, dtype=torch.bool),
        natoms=torch.tensor([len(atoms) for atoms in slabs]),
        atomic_numbers=torch.cat([torch.tensor(atoms.numbers) for atoms in slabs]),
        tags=torch.cat([torch.tensor(atoms.get_tags()) for atoms in slabs]),
        batch=torch.tensor([0] * len(slabs[0]) + [1] * len(slabs[1])),
        sid=[0, 1],
    )


def main() -> None:
    """Print what this environment predicts."""
    told: list[str] = []
    logger = logging.getLogger(loader.__name__)
    logger.setLevel(logging.INFO)
    logger.addFilter(lambda record: told.append(record.getMessage()))
    torch.manual_seed(0)
    model = EquiformerV2(**KEYS).eval()
    weights = Path(sys.argv[1])
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        torch.save(model.state_dict(), weights)
    with torch.no_grad():
        out = model(batch())
    found = {name: value.tolist() for name, value in out.items()}
    print(
        json.dumps(found | {"torch": torch.__version__, "kernels": loader.status(), "told": told})
    )


if __name__ == "__main__":
    main()
