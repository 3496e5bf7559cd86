"""Which compiled kernels a test ran."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from fairchem_equiformer.ops.native import loader
from fairchem_equiformer.ops.native.interface import SIGNATURES

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterator


# Matrix products of our own, which some processors have better ones for.
PRODUCTS = {"matrix_products", "pack_matrix"}
# Sums of what other kernels made, and what has several run in one parallel region.
HELPERS = {"add_rows", "sum_and_difference", "begin_together", "run_together", "end_together"}
# What needs them, and what runs where PyTorch's products are taken.
WITH_PRODUCTS, WITHOUT_PRODUCTS = {"grid_mlp"}, {"integrate_silu"}
IN_BFLOAT16 = {"pack_bfloat16"}
OF_EITHER = PRODUCTS | HELPERS | WITH_PRODUCTS | WITHOUT_PRODUCTS | IN_BFLOAT16


class _Watched:
    """The library; remembers which of the functions that compute were called."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)
        result, _ = SIGNATURES[name]
        if result is not None:  # says something about sizes, and computes nothing
            return function

        def call(*arguments: Any) -> None:
            self.called.add(name)
            function(*arguments)

        return call


@contextmanager
def compiled_for(generation: int) -> Iterator[None]:
    """Within, the library for a generation of processors, or the one for any (0), is loaded.

    Skips the test on a processor before it.
    """
    known = {0, *loader.GENERATIONS}
    assert generation in known
    if generation > loader._load(loader._file(0)).generation():
        pytest.skip(f"needs a processor of x86-64-v{generation}")
    with mock.patch.object(loader, "GENERATIONS", (generation,) if generation else ()):
        loader.library.cache_clear()
        library = loader.library()
        assert library is not None
        assert Path(library._name) == loader._file(generation)
        yield
    loader.library.cache_clear()


@contextmanager
def called_kernels() -> Iterator[set[str]]:
    """Names of the compiled functions that were called within, complete at the end."""
    library = loader.library()
    assert library is not None
    watched = _Watched(library)
    with mock.patch.object(loader, "library", return_value=watched):
        yield watched.called


def with_backward(*names: str) -> set[str]:
    """Kernels and those of their gradients."""
    return {name + end for name in names for end in ("", "_backward")}
