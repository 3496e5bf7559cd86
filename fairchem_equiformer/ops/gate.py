"""Gate activation (paper, Fig. 2a)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fairchem_equiformer.ops import library, triton
from fairchem_equiformer.ops.segments import take

Rows = tuple[tuple[int, int], ...]


@cache
def _gate_of_row(rows: Rows, device: torch.device) -> Tensor:
    """Which gate each row but the first is multiplied with."""
    with torch.inference_mode(mode=False):  # it outlives the mode that it is made in
        return torch.tensor([degree - 1 for degree, _ in rows[1:]], device=device)


def _gated(x: Tensor, gates: Tensor, rows: Rows) -> Tensor:
    by_kernels = triton.gate_activation(x, gates, rows)
    if by_kernels is not None:
        return by_kernels
    factors = torch.sigmoid(gates).unflatten(1, (-1, x.shape[2]))
    factors = take(factors, 1, _gate_of_row(rows, x.device))
    return torch.cat([F.silu(x[:, :1]), x[:, 1:] * factors], dim=1)


def _rows(numbers: Sequence[int]) -> Rows:
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


_operation = library.register(
    "gate_activation",
    "Tensor x, Tensor gates, int[] rows",
    lambda x, gates, rows: _gated(x, gates, _rows(rows)),
    lambda x, gates, _: x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gates.dtype)),
    lambda grad, x, gates, rows: library.by_autograd(
        lambda x, gates: _gated(x, gates, _rows(rows)), grad, (x, gates)
    ),
    "x gates",
)


def gate_activation(x: Tensor, gates: Tensor, rows: Rows) -> Tensor:
    """SiLU on l = 0, times sigmoid(gate of l) on l > 0.

    Args:
        x: [B, R, C].
        gates: [B, lmax C], l = 1..lmax.
        rows: (l, m) of each row of x; the first is (0, 0).

    Returns:
        [B, R, C].
    """
    if torch.compiler.is_compiling():
        out: Tensor = _operation(x, gates, [number for row in rows for number in row])
        return out
    return _gated(x, gates, rows)
