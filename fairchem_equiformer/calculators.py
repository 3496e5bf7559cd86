"""Calculators of ASE by their dotted names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator


def make_calculator(name: str) -> Calculator:
    """Call the class or function of this name without arguments.

    Args:
        name: such as ``ase.calculators.emt.EMT``. One with settings of its own is a function in a
            file of the user's: ``my_dft.calculator`` for ``def calculator()`` in ``my_dft.py``.

    Raises:
        InputError: if there is none, or it does not work without arguments.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--calculator {name}: {error}; it is the dotted name of a class or function, such as "
            "ase.calculators.emt.EMT or, for calculator() in ./my_dft.py, my_dft.calculator"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--calculator {name}: {type(error).__name__}: {reason}; it is called without "
            "arguments: name a function of your own that makes it with its settings"
        ) from error
