"""Dropout that keeps equivariance. All are the identity outside training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GraphDropPath(nn.Module):
    """Stochastic depth: leave out the branch for whole structures, scale the others up.

    Args:
        drop_prob: probability to leave a structure out.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        """[N, ...], with the structure of each atom [N]."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = x.new_full((num_graphs,), 1 - self.drop_prob)
        factor = torch.bernoulli(keep) / (1 - self.drop_prob)
        return x * factor[batch].view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"drop_prob={self.drop_prob}"


class ChannelDropout(nn.Module):
    """Dropout of whole irreps: all coefficients of one atom and channel together.

    Args:
        drop_prob: probability to drop a channel of an atom.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """[N, K, C]."""
        mask = torch.ones_like(x[:, :1])
        return x * nn.functional.dropout(mask, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"drop_prob={self.drop_prob}"
