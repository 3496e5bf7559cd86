"""Equivariant normalisation (paper, section 3.4 and Fig. 3). All take [N, (lmax + 1)^2, C]."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import triton
from fairchem_equiformer.ops.segments import take
from fairchem_equiformer.so3.layout import degree_slices, layout

_EPSILON = 1e-5


@cache
def _degree_of_coefficient(lmax: int, device: torch.device) -> Tensor:
    degrees = [degree for degree, _ in layout(lmax, lmax).l_major]
    with torch.inference_mode(mode=False):  # it outlives the mode that it is made in
        return torch.tensor(degrees, device=device)


def _mean_square_by_degree(x: Tensor, lmax: int, lmin: int = 0) -> Tensor:
    """Mean over orders and channels of x^2, for each degree from lmin: [N, lmax + 1 - lmin]."""
    per_coefficient = x.square().mean(dim=2)
    slices = degree_slices(lmax)[lmin:]
    return torch.stack([per_coefficient[:, rows].mean(dim=1) for rows in slices], dim=1)


def _center(x: Tensor) -> Tensor:
    """Subtract the mean over channels from l = 0."""
    return torch.cat([x[:, :1] - x[:, :1].mean(dim=2, keepdim=True), x[:, 1:]], dim=1)


def _scaled(x: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, lmax: int) -> Tensor:
    """x * inverse_std * weight[l], plus a bias on l = 0; inverse_std is [N, lmax + 1] or [N, 1]."""
    degree = _degree_of_coefficient(lmax, x.device)
    spread = take(inverse_std, 1, degree) if inverse_std.shape[1] > 1 else inverse_std
    y = x * spread[:, :, None] * take(weight, 0, degree)
    return torch.cat([y[:, :1] + bias, y[:, 1:]], dim=1)


class _KeepInput(torch.autograd.Function):
    """A norm that keeps its input alone for the backward pass and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, norm: _Norm, x: Tensor, *_: Tensor) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        with torch.autocast(x.device.type, enabled=False):
            return norm.normalize(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        inputs = (x, *ctx.norm.parameters())
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            found = iter(torch.autograd.grad(ctx.norm.normalize(x), wanted, grad))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


class _Norm(nn.Module):
    """Runs in float32 at least, also under autocast."""

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.lmax = lmax
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, (lmax + 1)^2, C]."""
        parameters = tuple(self.parameters())
        y: Tensor = _KeepInput.apply(self, x.to(parameters[0].dtype), *parameters)
        return y

    def normalize(self, x: Tensor) -> Tensor:
        """The norm itself, by differentiable operations."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"lmax={self.lmax}, channels={self.channels}"


class DegreeLayerNorm(_Norm):
    """``layer_norm``: every degree is divided by its own RMS; l = 0 is centred first."""

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__(lmax, channels)
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.affine_bias = nn.Parameter(torch.zeros(channels))

    def normalize(self, x: Tensor) -> Tensor:
        """As the class says."""
        x = _center(x)
        inverse_std = (_mean_square_by_degree(x, self.lmax) + _EPSILON).rsqrt()
        return _scaled(x, inverse_std, self.affine_weight, self.affine_bias, self.lmax)


class SeparableLayerNorm(_Norm):
    """``layer_norm_sh``: layer norm on l = 0; one RMS, averaged over degrees, for all l > 0."""

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__(lmax, channels)
        self.norm_l0 = nn.LayerNorm(channels, eps=_EPSILON)
        self.affine_weight = nn.Parameter(torch.ones(lmax, channels))

    def forward(self, x: Tensor) -> Tensor:
        """By Triton's kernels where they run."""
        parameters = self.norm_l0.weight, self.norm_l0.bias, self.affine_weight
        by_kernels = triton.separable_layer_norm(x.to(parameters[0].dtype), *parameters, _EPSILON)
        return super().forward(x) if by_kernels is None else by_kernels

    def normalize(self, x: Tensor) -> Tensor:
        """As the class says."""
        scalars = F.layer_norm(
            x[:, :1], (self.channels,), self.norm_l0.weight, self.norm_l0.bias, _EPSILON
        )
        mean_square = _mean_square_by_degree(x, self.lmax, lmin=1).mean(dim=1, keepdim=True)
        inverse_std = (mean_square + _EPSILON).rsqrt()  # [N, 1]
        degree = _degree_of_coefficient(self.lmax, x.device)[1:] - 1
        vectors = x[:, 1:] * inverse_std[:, :, None] * take(self.affine_weight, 0, degree)
        return torch.cat([scalars, vectors], dim=1)


class RMSNorm(_Norm):
    """``rms_norm_sh``: one RMS, averaged over degrees, for all l; l = 0 is centred first."""

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__(lmax, channels)
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.affine_bias = nn.Parameter(torch.zeros(channels))

    def normalize(self, x: Tensor) -> Tensor:
        """As the class says."""
        x = _center(x)
        mean_square = _mean_square_by_degree(x, self.lmax).mean(dim=1, keepdim=True)
        inverse_std = (mean_square + _EPSILON).rsqrt()
        return _scaled(x, inverse_std, self.affine_weight, self.affine_bias, self.lmax)


NORMS: dict[str, type[_Norm]] = {
    "layer_norm": DegreeLayerNorm,
    "layer_norm_sh": SeparableLayerNorm,
    "rms_norm_sh": RMSNorm,
}
