"""Gate activation (paper, Fig. 2a)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_activation(x: Tensor, gates: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """SiLU on l = 0, times sigmoid(gate of l) on l > 0.

    Args:
        x: [B, R, C].
        gates: [B, lmax C], l = 1..lmax.
        rows: (l, m) of each row of x; the first is (0, 0).

    Returns:
        [B, R, C].
    """
    degree = torch.tensor([degree for degree, _ in rows[1:]], device=x.device)
    factors = torch.sigmoid(gates).unflatten(1, (-1, x.shape[2])).index_select(1, degree - 1)
    return torch.cat([F.silu(x[:, :1]), x[:, 1:] * factors], dim=1)
