"""Matrix products (matrix_products.cpp), where they are faster than those of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops.choice import chosen
from fairchem_equiformer.ops.native.interface import Floats, MatrixProductStruct, NormStruct
from fairchem_equiformer.ops.native.loader import usable

_LANES = 16
# Less than this is done before a second thread has begun.
_LEAST_FLOP = 2_000_000
_LEAST_PACKED = 32_768


class Packed(NamedTuple):
    """A matrix [k, n] in the order in which products read it."""

    panels: Tensor  # [k n]
    k: int
    n: int


def pack(
    kernels: ctypes.CDLL, matrix: Tensor, other: Tensor | None = None, factor: float = 1
) -> Packed:
    """A matrix [k, n] of any strides, or ``matrix + factor other``, as products read it."""
    k, n = matrix.shape
    panels = matrix.new_empty(k * n)
    sizes = (*matrix.stride(), k, n)
    threads = torch.get_num_threads() if k * n >= _LEAST_PACKED else 1
    kernels.pack_matrix(matrix, other, factor, *sizes, panels, threads)
    return Packed(panels, k, n)


class MatrixProducts:
    """Products that one parallel region computes, one after the other.

    A product may read what an earlier one wrote, if all have the same number of rows.
    """

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._kernels = kernels
        self._products: list[MatrixProductStruct] = []
        self._kept: list[Any] = []  # must outlive the call

    def add(
        self,
        a: Tensor,
        b: Packed | Tensor,
        out: Tensor,
        *,
        plus: Tensor | None = None,
        norm: NormStruct | None = None,
        sums: Tensor | None = None,
        also: Tensor | None = None,
        bias: Tensor | None = None,
        sign: int = 1,
        accumulate: bool = False,
    ) -> None:
        """Take in ``out = [out +] [bias +] sign (a + plus) b``.

        Args:
            a: [rows, k], of any strides.
            b: [k, n], packed or with dense rows.
            out: [rows, n], with dense rows.
            plus: [rows, k], of the strides of ``a``, both with dense rows.
            norm: ``a`` [rows, k], dense, goes through this layer norm and SiLU, see
                ``norm_silu_kernels``.
            sums: [rows, k] dense, where ``a + plus``, or what ``norm`` makes, is written.
            also: [rows, n], of the strides of ``out``: a second result.
            bias: [n].
            sign: 1 or -1.
            accumulate: add to ``out`` and ``also``.

        Raises:
            ValueError: if rows that must be dense are not.
        """
        unpacked = None if isinstance(b, Packed) else b
        for name, dense in (("b", unpacked), ("out", out), ("plus", plus)):
            if dense is not None and dense.stride(1) != 1:
                raise ValueError(f"rows of {name} lie at strides {dense.stride()}")
        matrix = b.panels if isinstance(b, Packed) else b
        b_row = 0 if isinstance(b, Packed) else b.stride(0)
        rows, k = a.shape
        self._kept += (a, plus, norm, sums, matrix, bias, out, also)
        before, after = map(_address, (a, plus)), map(_address, (sums, matrix, bias, out, also))
        through = None if norm is None else ctypes.addressof(norm)
        sizes = (rows, out.shape[1], k, *a.stride(), b_row, out.stride(0), accumulate, sign)
        self._products.append(MatrixProductStruct(*before, through, *after, *sizes))

    @property
    def flop(self) -> int:
        """What they cost."""
        return sum(2 * p.rows * p.n * p.k for p in self._products)

    def run(self) -> None:
        """Compute them."""
        count = len(self._products)
        array = (MatrixProductStruct * count)(*self._products)
        threads = torch.get_num_threads() if self.flop >= _LEAST_FLOP else 1
        self._kernels.matrix_products(array, count, threads)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else Floats.address(tensor)


def product_kernels(*tensors: Tensor, widths: Iterable[int]) -> ctypes.CDLL | None:
    """The library where its products are to be taken; None where torch's are.

    Args:
        tensors: what is multiplied.
        widths: numbers of columns of the results.
    """
    kernels = usable(*tensors)
    if kernels is None or any(width % _LANES for width in widths):
        return None
    return kernels if chosen() == "native" or kernels.prefers_own_products() else None
