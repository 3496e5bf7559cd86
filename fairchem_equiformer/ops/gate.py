"""Gate activation (paper, Fig. 2a)."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fairchem_equiformer.ops import triton
from fairchem_equiformer.ops.segments import take

Rows = tuple[tuple[int, int], ...]


@cache
def _gate_of_row(rows: Rows, device: torch.device) -> Tensor:
    """Which gate each row but the first is multiplied with."""
    with torch.inference_mode(mode=False):  # it outlives the mode that it is made in
        return torch.tensor([degree - 1 for degree, _ in rows[1:]], device=device)


def gate_activation(x: Tensor, gates: Tensor, rows: Rows) -> Tensor:
    """SiLU on l = 0, times sigmoid(gate of l) on l > 0.

    Args:
        x: [B, R, C].
        gates: [B, lmax C], l = 1..lmax.
        rows: (l, m) of each row of x; the first is (0, 0).

    Returns:
        [B, R, C].
    """
    by_kernels = triton.gate_activation(x, gates, rows)
    if by_kernels is not None:
        return by_kernels
    factors = torch.sigmoid(gates).unflatten(1, (-1, x.shape[2]))
    factors = take(factors, 1, _gate_of_row(rows, x.device))
    return torch.cat([F.silu(x[:, :1]), x[:, 1:] * factors], dim=1)
