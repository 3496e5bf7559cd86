"""Sums over an atom's edges, weighted by each head's attention, and their derivatives.

    s_i[h] = sum over the edges e of i of alpha_e[h] x_e

A linear layer of values that follows the sum reads one row for each atom and head, where before it
would read one for each edge: the same result, and less arithmetic where an atom has more edges than
one. Likewise the dot product of a query with a linear layer of x is that of x with the query taken
through the layer's transpose, once for each atom.

The three products here are each other's derivatives, so that any of them can be differentiated as
often as one likes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairchem_equiformer.ops import native
from fairchem_equiformer.ops.native import HeadSumKernels
from fairchem_equiformer.ops.segments import segment_sum, take


class Targets(NamedTuple):
    """Edges sorted by target."""

    target: Tensor  # [e], ascending
    target_ptr: Tensor  # [n + 1], the edges of atom i are target_ptr[i]:target_ptr[i + 1]

    @property
    def num_nodes(self) -> int:
        """Number of targets, n."""
        return self.target_ptr.shape[0] - 1


def head_sum(alpha: Tensor, x: Tensor, targets: Targets) -> Tensor:
    """Sum of alpha x over each atom's edges.

    Args:
        alpha: [e, heads].
        x: [e, F].
        targets: of the edges.

    Returns:
        [n, heads, F].
    """
    kernels = _kernels(targets, alpha, x)
    if kernels is not None:
        out: Tensor = _Sum.apply(kernels, alpha, x)
        return out
    atoms = targets.target_ptr.shape[0] - 1
    sums = [segment_sum(own[:, None] * x, targets.target, atoms) for own in alpha.unbind(1)]
    return torch.stack(sums, dim=1)


def head_dot(x: Tensor, atoms: Tensor, targets: Targets) -> Tensor:
    """Dot product of each edge's x with each head of its target.

    Args:
        x: [e, F].
        atoms: [n, heads, F].
        targets: of the edges.

    Returns:
        [e, heads].
    """
    kernels = _kernels(targets, atoms, x)
    if kernels is not None:
        out: Tensor = _Dot.apply(kernels, x, atoms)
        return out
    dots = [(x * take(own, 0, targets.target)).sum(1) for own in atoms.unbind(1)]
    return torch.stack(dots, dim=1)


def _kernels(targets: Targets, other: Tensor, x: Tensor) -> HeadSumKernels | None:
    if torch.compiler.is_compiling():  # which sees PyTorch's operations alone
        return None
    return native.head_sum_kernels(*targets, x.shape[1], other, x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: HeadSumKernels, alpha: Tensor, x: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(alpha, x)
        return kernels.sum(alpha, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        alpha, x = ctx.saved_tensors
        of_alpha, of_x = ctx.needs_input_grad[1:]
        alpha_grad = _Dot.apply(ctx.kernels, x, grad) if of_alpha else None
        return None, alpha_grad, _Spread.apply(ctx.kernels, alpha, grad) if of_x else None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: HeadSumKernels, x: Tensor, atoms: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, atoms)
        return kernels.dot(x, atoms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, atoms = ctx.saved_tensors
        of_x, of_atoms = ctx.needs_input_grad[1:]
        x_grad = _Spread.apply(ctx.kernels, grad, atoms) if of_x else None
        return None, x_grad, _Sum.apply(ctx.kernels, grad, x) if of_atoms else None


class _Spread(torch.autograd.Function):
    """Sum over heads of alpha times what the edge's target has: [e, F]."""

    @staticmethod
    def forward(ctx: Any, kernels: HeadSumKernels, alpha: Tensor, atoms: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(alpha, atoms)
        return kernels.spread(alpha, atoms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        alpha, atoms = ctx.saved_tensors
        of_alpha, of_atoms = ctx.needs_input_grad[1:]
        alpha_grad = _Dot.apply(ctx.kernels, grad, atoms) if of_alpha else None
        return None, alpha_grad, _Sum.apply(ctx.kernels, alpha, grad) if of_atoms else None
