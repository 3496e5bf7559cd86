"""What make_golden.py wrote: checkpoints of fairchem-core 1.10 and its predictions.

Needs neither fairchem nor PyTorch, so that the tests of every environment can read it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

DATA = Path(__file__).parent / "data"
FORMS = ("flat", "hydra", "equiformer")
PROPERTIES = {
    "flat": ("energy", "forces"),
    "hydra": ("energy", "forces", "stress"),
    "equiformer": ("energy", "forces", "stress"),
}
TOLERANCE = 1e-5  # of the largest value


def checkpoint(form: str) -> Path:
    """The file of one form."""
    return DATA / f"golden_{form}.pt"


@cache
def _content() -> dict[str, Any]:
    return json.loads((DATA / "golden.json").read_text())["structures"]


def names() -> list[str]:
    """Of all structures."""
    return list(_content())


EVERY = [(form, name) for form in FORMS for name in names()]


def structure(name: str) -> Atoms:
    """A structure, without a calculator."""
    found = _content()[name]
    return Atoms(found["numbers"], found["positions"], cell=found["cell"], pbc=found["pbc"])


def predicted(name: str, form: str) -> dict[str, np.ndarray]:
    """Energy [] (eV), forces [N, 3] (eV/Angstrom), maybe stress [3, 3] (eV/Angstrom^3)."""
    return {key: np.array(value) for key, value in _content()[name][form].items()}


def error(found: Any, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value; plain difference where all are zero."""
    found = np.asarray(found).reshape(expected.shape)
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))
