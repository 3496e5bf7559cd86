"""Loading of the compiled kernels."""

from __future__ import annotations

import ctypes
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fairchem_equiformer.ops.choice import VARIABLE, chosen
from fairchem_equiformer.ops.native.interface import declare
from fairchem_equiformer.ops.native.sources import fingerprint
from fairchem_equiformer.ops.native.together import deferred, dense, flush

logger = logging.getLogger(__name__)

GENERATIONS = (4, 3)  # of x86-64: with AVX-512, and with AVX2


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels, once.

    Returns:
        None where the reference runs; the log says why, unless it was asked for.

    Raises:
        ValueError: for a value of the variable that there is not (ops/choice.py).
        RuntimeError: if ``native`` was asked for and the library cannot be used.
    """
    choice = chosen()
    if choice in ("reference", "triton"):
        return None
    try:
        return _load(_file())
    except OSError as error:
        reason = f"the compiled kernels cannot be used: {error}"
    if choice == "native":
        raise RuntimeError(f"{VARIABLE} is 'native', but {reason}")
    logger.warning("%s. Until then the model is slower, with the same numbers", reason)
    return None


def status() -> str:
    """Which kernels run on the CPU, and where these are not the compiled ones, why."""
    try:
        choice = chosen()
        if choice in ("reference", "triton"):
            return f"PyTorch's, as {VARIABLE}={choice} asks"
        path = _file()
        _load(path)
    except ValueError as error:
        return f"none: {error}"
    except OSError as error:
        return f"PyTorch's, slower with the same numbers: {error}"
    return f"compiled ({path})"


def _load(path: Path) -> ctypes.CDLL:
    """Load a library of this version and of the sources beside it.

    Raises:
        OSError: that says why this cannot be done, and what to do.
    """
    rebuild = "run `make install`, or install this package again where there is a C++ compiler"
    try:
        kernels = ctypes.CDLL(str(path))
        declare(kernels)
    except OSError as error:
        raise OSError(f"{error}; {rebuild}") from error
    except AttributeError as error:
        raise OSError(f"{path} is of another version ({error}); {rebuild}") from error
    sources = fingerprint(path.parent)
    if sources is not None and kernels.built_from().decode() != sources:
        raise OSError(f"{path} was built from other sources than those beside it; {rebuild}")
    return kernels


def _file(generation: int | None = None) -> Path:
    """Where the library is, or would be: of no version of Python, which ctypes does not ask for.

    Args:
        generation: of x86-64, that it is compiled for; 0 for any processor. By default the newest
            that this processor belongs to and that there is.
    """
    folder = Path(__file__).parent
    if generation is not None:
        return folder / (f"_kernels_v{generation}.so" if generation else "_kernels.so")
    plain = _file(0)
    if not plain.exists():
        return plain
    newest = _load(plain).generation()
    found = (_file(generation) for generation in GENERATIONS if generation <= newest)
    return next((path for path in found if path.exists()), plain)


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """Give the library where it can work on these tensors; None where the reference has to run.

    Kernels that wait (:func:`together`) have then run.
    """
    kernels = None
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors):
        kernels = library()
    if kernels is None:
        flush()
    return kernels


def together() -> AbstractContextManager[None]:
    """Within, compiled kernels wait; at the end they have run, in one parallel region.

    Until then nothing else may read what they write, but after ``flush``. Who asks for kernels and
    gets none, so that PyTorch runs, has flushed.
    """
    kernels = library()
    return nullcontext() if kernels is None else deferred(kernels)


def dense_items(x: Tensor) -> Tensor:
    """[B, R, C] whose items are dense; they may lie apart. It itself, where it is so."""
    return x if x.stride()[1:] == (x.shape[2], 1) else dense(x)


def fits(kernel: str, channels: int, misfit: bytes | None) -> bool:
    """Whether a kernel takes such sizes; if not, the log says so once.

    Args:
        kernel: what it computes, in plural.
        channels: of what it computes.
        misfit: what the library says against the sizes.
    """
    if misfit is not None:
        flush()
        _log_misfit(kernel, channels, misfit.decode())
    return misfit is None


@cache
def _log_misfit(kernel: str, channels: int, misfit: str) -> None:
    message = "%s of %d channels run in PyTorch, slower than in a compiled kernel: %s"
    logger.info(message, kernel, channels, misfit)
