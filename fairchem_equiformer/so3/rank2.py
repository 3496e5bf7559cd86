"""Symmetric second-rank tensors by their parts of degree 0 and 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Row by row the orthonormal tensors T_k in T = sum_k t_k T_k: one of degree 0, five of degree 2, in
# the order of e3nn's harmonics: xz, xy, y^2 - (x^2 + z^2) / 2, yz, (z^2 - x^2) / 2.
_TENSORS = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, 0, 1), (0, 0, 0), (1, 0, 0)),
    ((0, 1, 0), (1, 0, 0), (0, 0, 0)),
    ((-1, 0, 0), (0, 2, 0), (0, 0, -1)),
    ((0, 0, 0), (0, 0, 1), (0, 1, 0)),
    ((-1, 0, 0), (0, 0, 0), (0, 0, 1)),
)
_SQUARES = (3, 2, 2, 6, 2, 2)  # of the norms of the integer tensors above


def symmetric_tensor(isotropic: Tensor, anisotropic: Tensor) -> Tensor:
    """Put a symmetric tensor together.

    Args:
        isotropic: [B] or [B, 1], the trace over sqrt(3).
        anisotropic: [B, 5], components of degree 2.

    Returns:
        [B, 3, 3].
    """
    parts = torch.cat([isotropic.reshape(-1, 1), anisotropic], dim=1)
    norms = parts.new_tensor([math.sqrt(square) for square in _SQUARES])
    tensors = parts.new_tensor(_TENSORS) / norms[:, None, None]
    return torch.einsum("bk,kij->bij", parts, tensors)
