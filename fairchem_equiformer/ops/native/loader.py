"""Loading of the compiled kernels."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

VARIABLE = "FAIRCHEM_EQUIFORMER_KERNELS"
CHOICES = ("auto", "reference", "native")


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels, once.

    Returns:
        None where the reference runs; the log says why, unless it was asked for.

    Raises:
        ValueError: for another value of the variable than those above.
        RuntimeError: if ``native`` was asked for and the library cannot be loaded.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} is {choice!r}, it must be {', '.join(CHOICES)}")
    if choice == "reference":
        return None
    try:
        return ctypes.CDLL(str(_file()))
    except OSError as error:
        reason = (
            f"the compiled kernels cannot be loaded ({error}); to build them, install this package "
            "again where there is a C++ compiler"
        )
    if choice == "native":
        raise RuntimeError(f"{VARIABLE} is 'native', but {reason}")
    logger.warning("%s. Until then the model is slower, with the same numbers", reason)
    return None


def _file() -> Path:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := folder / f"_kernels{suffix}").exists():
            return path
    raise FileNotFoundError(f"no _kernels{EXTENSION_SUFFIXES[0]} in {folder}")


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """Give the library where it can work on these tensors; None where the reference has to run."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    return library()


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Address of a tensor, which must outlive the call."""
    return ctypes.c_void_p(tensor.data_ptr())


class NormStruct(ctypes.Structure):
    """``struct Norm`` of norm.h; weight and bias are null where there is no norm."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("epsilon", ctypes.c_float),
    )
