"""Gate of irreps: SiLU on invariants, further invariants' sigmoids on all else.

    y_s = a silu(x_s),    y_c[k] = b sigmoid(g_c) x_c[k]

A row of the input holds invariants s, a gate for each channel c of the irreps that follow, and
these, components k first (so3/irreps.py); a row of the result the same without the gates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairchem_equiformer.ops import native
from fairchem_equiformer.ops.native import Gated, IrrepsGateKernels


def irreps_gate(x: Tensor, scalars: int, gated: Gated, scales: tuple[float, float]) -> Tensor:
    """Gate rows; differentiable any number of times.

    Args:
        x: [n, columns].
        scalars: how many come first.
        gated: channels and components of each further irrep.
        scales: a and b.

    Returns:
        [n, columns less the gates].
    """
    kernels = None
    if not torch.compiler.is_compiling():  # which sees PyTorch's operations alone
        kernels = native.irreps_gate_kernels(x, scalars, gated, scales)
    if kernels is None:
        return _reference(x, scalars, gated, scales)
    out: Tensor = _Gate.apply(kernels, (scalars, gated, scales), x)
    return out


def _reference(x: Tensor, scalars: int, gated: Gated, scales: tuple[float, float]) -> Tensor:
    of_silu, of_sigmoid = scales
    sizes = [channels * components for channels, components in gated]
    gates = sum(channels for channels, _ in gated)
    kept, factors, *parts = x.split([scalars, gates, *sizes], dim=1)
    found = [F.silu(kept) * of_silu]
    own = factors.split([channels for channels, _ in gated], dim=1)
    for part, factor, (channels, components) in zip(parts, own, gated, strict=True):
        turned = part.unflatten(1, (components, channels))
        found.append((turned * (torch.sigmoid(factor) * of_sigmoid)[:, None]).flatten(1))
    return torch.cat(found, dim=1)


class _Gate(torch.autograd.Function):
    """With the compiled kernels; what is differentiated again is made by the reference."""

    @staticmethod
    def forward(ctx: Any, kernels: IrrepsGateKernels, sizes: Any, x: Tensor) -> Tensor:
        ctx.kernels, ctx.sizes = kernels, sizes
        ctx.save_for_backward(x)
        return kernels.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, ctx.kernels.backward(x, grad)
        out = _reference(x, *ctx.sizes)
        return None, None, *torch.autograd.grad(out, x, grad, create_graph=True)
