"""Which kernels the ops run: the variable ``FAIRCHEM_EQUIFORMER_KERNELS``.

``auto``, the default, takes the compiled ones on a CPU, where they can run, and PyTorch elsewhere.
``reference`` runs PyTorch alone; ``native`` and ``triton`` refuse to run without the kernels that
they name. Triton's have to be named, since no GPU has run them yet.
"""

from __future__ import annotations

import os

VARIABLE = "FAIRCHEM_EQUIFORMER_KERNELS"
CHOICES = ("auto", "reference", "native", "triton")


def chosen() -> str:
    """One of the choices.

    Raises:
        ValueError: for another value of the variable.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} is {choice!r}, it must be {', '.join(CHOICES)}")
    return choice
