"""What processes that share a graph (--gp-gpus) tell each other where forces are derivatives.

Everything is a sum over the processes, whose gradient is a sum over the processes: so it can be
differentiated as often as one likes. Of what all processes compute alike each has a copy, and the
derivative by one is by all; with P processes, each of which computes the whole loss, gradients are
P times those of one, and data-parallel training, which averages over processes, puts that right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairchem.core.common import gp_utils

from fairchem_equiformer.ops.edges import NodeShare

if TYPE_CHECKING:
    from torch import Tensor


class _Sum(torch.autograd.Function):
    """Over the processes that share the graph. All of them must call it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=gp_utils.get_gp_group())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        total: Tensor = _Sum.apply(grad)
        return total


def differentiable_share(rows: slice, atoms: int) -> NodeShare:
    """This process' atoms, with a way to those of all that is differentiated any number of times.

    It sends twice the bytes of a gather, as zeros of the other processes.

    Args:
        rows: atoms whose features this process computes.
        atoms: of all processes.
    """

    def gather(x: Tensor) -> Tensor:
        around = [0, 0] * (x.dim() - 1) + [rows.start, atoms - rows.stop]
        total: Tensor = _Sum.apply(F.pad(x, around))
        return total

    def sum_derivatives(derivative: Tensor) -> Tensor:
        """Of the energy, a copy of which each process has differentiated by its own variables."""
        total: Tensor = _Sum.apply(derivative)
        return total / gp_utils.get_gp_world_size()

    return NodeShare(rows, gather, gather, sum_derivatives)
