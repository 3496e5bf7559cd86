"""Edge-aligned frames: the rotation that takes an edge's direction to the y axis."""

from __future__ import annotations

import torch
from torch import Tensor


def edge_angles(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Azimuth and polar angle of edge vectors about the y axis.

    The unit vector is Ry(alpha) Rx(beta) y, as in e3nn's ``xyz_to_angles``. Computed in float64
    with atan2, which keeps full precision for edges along the axis, where acos loses half the
    digits.

    Args:
        vector: [E, 3], any length above zero.

    Returns:
        alpha, beta: [E] float64, radians. alpha is 0 for an edge along the axis.
    """
    x, y, z = vector.to(torch.float64).unbind(-1)
    return torch.atan2(x, z), torch.atan2(torch.hypot(x, z), y)


def edge_rotation_matrices(vector: Tensor) -> Tensor:
    """Rotation matrices R with R v = |v| y and no roll: R = Rx(-beta) Ry(-alpha).

    The roll about the edge is a free choice of eSCN models; fixing it makes results repeatable.

    Args:
        vector: [E, 3].

    Returns:
        [E, 3, 3] float64.
    """
    alpha, beta = edge_angles(vector)
    ca, sa, cb, sb = alpha.cos(), alpha.sin(), beta.cos(), beta.sin()
    zero = torch.zeros_like(ca)
    rows = [ca, zero, -sa, sa * sb, cb, ca * sb, sa * cb, -sb, ca * cb]
    return torch.stack(rows, dim=-1).view(-1, 3, 3)
