"""A loss for targets that only some atoms have; fairchem knows it by name."""

from __future__ import annotations

import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from torch import Tensor, nn


@registry.register_loss("masked_mae")
class MaskedMAE(nn.Module):
    """Mean absolute error over the entries whose target is not NaN, on all processes together.

    Where there are none the loss is zero, and so is its gradient. The mean is taken here, as
    fairchem's own would count the entries without a target; it leaves that of one number alone, so
    that ``reduction: mean`` (the default) and ``sum`` give the same.
    """

    def forward(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:  # noqa: ARG002
        """[1], times the number of processes, since these average their gradients.

        Args:
            pred: [N, n].
            target: [N, n], NaN where there is none.
            natoms: not read; fairchem hands it to every loss.
        """
        labelled = ~torch.isnan(target)
        total = (pred[labelled] - target[labelled]).abs().sum()
        count = distutils.all_reduce(int(labelled.sum()), device=total.device)
        return (total * distutils.get_world_size() / max(count, 1)).reshape(1)
