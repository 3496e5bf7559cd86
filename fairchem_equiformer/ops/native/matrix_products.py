"""Matrix products (matrix_products.cpp), where they are faster than those of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops.choice import chosen
from fairchem_equiformer.ops.native.interface import (
    Bfloat16s,
    Floats,
    MatrixProductStruct,
    NormStruct,
)
from fairchem_equiformer.ops.native.loader import usable
from fairchem_equiformer.ops.native.together import flush, keep

_WIDTH = 16
# Less than this is done before a second thread has begun.
_LEAST_FLOP = 2_000_000
_LEAST_PACKED = 32_768


class Packed(NamedTuple):
    """A matrix [k, n] in the order in which products read it."""

    panels: Tensor  # [k n], in float32; or in bfloat16, where an odd k has a row of zeros more
    k: int
    n: int


def pack(
    kernels: ctypes.CDLL, matrix: Tensor, other: Tensor | None = None, factor: float = 1
) -> Packed:
    """A matrix [k, n] of any strides, or ``matrix + factor other``, as products read it."""
    k, n = matrix.shape
    panels = matrix.new_empty(k * n)
    sizes = (*matrix.stride(), k, n)
    kernels.pack_matrix(matrix, other, factor, *sizes, panels, _threads_to_pack(panels))
    return Packed(panels, k, n)


def pack_in_bfloat16(kernels: ctypes.CDLL, matrix: Tensor) -> Packed:
    """A matrix [k, n] with dense rows or dense columns, in bfloat16.

    Raises:
        ValueError: if neither are dense.
    """
    k, n = matrix.shape
    if 1 not in matrix.stride():
        raise ValueError(f"a matrix to be packed lies at strides {matrix.stride()}")
    panels = matrix.new_empty((k + 1) // 2 * 2 * n, dtype=torch.bfloat16)
    sizes = (*matrix.stride(), k, n)
    kernels.pack_bfloat16(matrix, *sizes, panels, _threads_to_pack(panels))
    return Packed(panels, k, n)


def _threads_to_pack(panels: Tensor) -> int:
    return torch.get_num_threads() if panels.numel() >= _LEAST_PACKED else 1


class Rounded(NamedTuple):
    """A matrix [rows, k] in bfloat16, as products read it: every other two numbers side by side."""

    pairs: Tensor
    shape: tuple[int, int]
    row: int  # from a row's pair to that of the next, in pairs
    column: int  # from a pair to the next of the row

    @classmethod
    def room(cls, a: Tensor) -> Rounded:
        """For a matrix whose rows are dense, or whose columns are.

        Raises:
            ValueError: if neither are.
        """
        rows, k = a.shape
        if 1 not in a.stride():
            raise ValueError(f"a matrix to be rounded lies at strides {a.stride()}")
        width = (k + 1) // 2
        pairs = a.new_empty(2 * rows * width, dtype=torch.bfloat16)
        return cls(pairs, (rows, k), *((width, 1) if a.stride(1) == 1 else (1, rows)))


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
        a: Tensor | Rounded,
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

        Where ``b`` is in bfloat16 the factors are, and sums and results are in float32.

        Args:
            a: [rows, k], of any strides; rounded where ``b`` is in bfloat16, or it will be.
            b: [k, n], packed or with dense rows.
            out: [rows, n], with dense rows.
            plus: [rows, k], of the strides of ``a``, both with dense rows. Not in bfloat16.
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
        low = _room(a) if matrix.dtype == torch.bfloat16 else None
        self._kept += (a, plus, norm, sums, low, matrix, bias, out, also)
        self._products.append(
            MatrixProductStruct(
                plus=_address(plus),
                norm=None if norm is None else ctypes.addressof(norm),
                sum=_address(sums),
                b=(Floats if low is None else Bfloat16s).address(matrix),
                bias=_address(bias),
                c=_address(out),
                also=_address(also),
                n=out.shape[1],
                b_row=0 if isinstance(b, Packed) else b.stride(0),
                c_row=out.stride(0),
                accumulate=accumulate,
                sign=sign,
                **_operand(a, low),
            )
        )

    def rounded(self, a: Tensor) -> Rounded:
        """Take in that ``a`` [rows, k], with dense rows or columns, is rounded to bfloat16.

        Returns:
            It, for the products to come.
        """
        low = Rounded.room(a)
        self._kept += (a, low)
        self._products.append(MatrixProductStruct(**_operand(a, low)))
        return low

    @property
    def flop(self) -> int:
        """What they cost."""
        return sum(2 * p.rows * p.n * p.k for p in self._products)

    def run(self, *, edges: int = 0) -> None:
        """Compute them.

        Args:
            edges: the number of rows, where all of them have one for each edge of a chunk.
        """
        count = len(self._products)
        array = (MatrixProductStruct * count)(*self._products)
        threads = torch.get_num_threads() if self.flop >= _LEAST_FLOP else 1
        keep(array, self._kept)
        self._kernels.matrix_products(array, count, edges, threads)


def _room(a: Tensor | Rounded) -> Rounded:
    return a if isinstance(a, Rounded) else Rounded.room(a)


def _operand(a: Tensor | Rounded, low: Rounded | None) -> dict[str, Any]:
    """The fields of a product that say where its first factor is, and in which room to round it."""
    rows, k = a.shape
    found: dict[str, Any] = {"rows": rows, "k": k}
    if isinstance(a, Tensor):
        found |= {"a": _address(a), "a_row": a.stride(0), "a_column": a.stride(1)}
    if low is not None:
        pairs = Bfloat16s.address(low.pairs)
        found |= {"pairs": pairs, "pair_row": low.row, "pair_column": low.column}
    return found


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else Floats.address(tensor)


def product_kernels(
    *tensors: Tensor, widths: Iterable[int], reduced: bool = False
) -> ctypes.CDLL | None:
    """The library where its products are to be taken; None where torch's are.

    Args:
        tensors: what is multiplied, in float32.
        widths: numbers of columns of the results.
        reduced: rounded to bfloat16.
    """
    kernels = usable(*tensors)
    if kernels is not None and _taken(kernels, widths, reduced):
        return kernels
    flush()
    return None


def _taken(kernels: ctypes.CDLL, widths: Iterable[int], reduced: bool) -> bool:
    if any(width % _WIDTH for width in widths):
        return False
    if reduced and not kernels.has_bfloat16_products():
        return False
    return chosen() == "native" or bool(kernels.prefers_own_products())
