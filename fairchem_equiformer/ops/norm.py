"""Equivariant normalisation (paper, section 3.4 and Fig. 3). All take x [N, (lmax + 1)^2, C].

They keep their input alone for the backward pass and compute the rest again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library, native, triton
from fairchem_equiformer.ops.segments import take
from fairchem_equiformer.so3.layout import degree_slices, layout

EPSILON = 1e-5


@cache
def _degree_of_coefficient(lmax: int, device: torch.device) -> Tensor:
    degrees = [degree for degree, _ in layout(lmax, lmax).l_major]
    with torch.inference_mode(mode=False):  # it outlives the mode that it is made in
        return torch.tensor(degrees, device=device)


def _lmax(x: Tensor) -> int:
    return math.isqrt(x.shape[1]) - 1


def _mean_square_by_degree(x: Tensor, lmin: int = 0) -> Tensor:
    """Mean over orders and channels of x^2, for each degree from lmin: [N, lmax + 1 - lmin]."""
    per_coefficient = x.square().mean(dim=2)
    slices = degree_slices(_lmax(x))[lmin:]
    return torch.stack([per_coefficient[:, rows].mean(dim=1) for rows in slices], dim=1)


def _center(x: Tensor) -> Tensor:
    """Subtract the mean over channels from l = 0."""
    return torch.cat([x[:, :1] - x[:, :1].mean(dim=2, keepdim=True), x[:, 1:]], dim=1)


def _scaled(x: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x * inverse_std * weight[l], plus a bias on l = 0; inverse_std is [N, lmax + 1] or [N, 1]."""
    degree = _degree_of_coefficient(_lmax(x), x.device)
    spread = take(inverse_std, 1, degree) if inverse_std.shape[1] > 1 else inverse_std
    y = x * spread[:, :, None] * take(weight, 0, degree)
    return torch.cat([y[:, :1] + bias, y[:, 1:]], dim=1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = _center(x)
    return _scaled(x, (_mean_square_by_degree(x) + EPSILON).rsqrt(), weight, bias)


def _layer_norm_sh(x: Tensor, weight: Tensor, scalar_weight: Tensor, scalar_bias: Tensor) -> Tensor:
    scalars = F.layer_norm(x[:, :1], x.shape[2:], scalar_weight, scalar_bias, EPSILON)
    mean_square = _mean_square_by_degree(x, lmin=1).mean(dim=1, keepdim=True)
    inverse_std = (mean_square + EPSILON).rsqrt()  # [N, 1]
    degree = _degree_of_coefficient(_lmax(x), x.device)[1:] - 1
    vectors = x[:, 1:] * inverse_std[:, :, None] * take(weight, 0, degree)
    return torch.cat([scalars, vectors], dim=1)


def _rms_norm_sh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = _center(x)
    mean_square = _mean_square_by_degree(x).mean(dim=1, keepdim=True)
    return _scaled(x, (mean_square + EPSILON).rsqrt(), weight, bias)


_NORMS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "layer_norm_sh": _layer_norm_sh,
    "rms_norm_sh": _rms_norm_sh,
}


def _by_kernels(kind: str, x: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """By Triton's kernels where they run."""
    if kind == "layer_norm_sh":
        others, of_scalars, bias = parameters
    else:
        weight, bias = parameters
        of_scalars, others = weight[0], weight[1:]
    return triton.equivariant_norm(kind, x, of_scalars, bias, others, EPSILON)


class _Compiled(NamedTuple):
    """The compiled kernels of a norm, and its parameters as they take them."""

    kernels: native.EquivariantNormKernels
    weights: list[Tensor]  # [C], of each degree
    bias: Tensor

    @classmethod
    def of(cls, kind: str, x: Tensor, parameters: Sequence[Tensor]) -> _Compiled | None:
        """None where PyTorch has to run."""
        degrees = range(_lmax(x) + 1)
        if kind == "layer_norm_sh":
            weight, scalar_weight, bias = parameters
            weights, groups = [scalar_weight, *weight], tuple(degrees[:2])
        else:
            weight, bias = parameters
            weights, groups = list(weight), tuple(degrees if kind == "layer_norm" else (0,))
        kernels = native.equivariant_norm_kernels(x, weights, bias, groups, EPSILON)
        return None if kernels is None else cls(kernels, weights, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.forward(x, self.weights, self.bias)

    def backward(self, kind: str, x: Tensor, grad: Tensor) -> list[Tensor]:
        """Gradients of x and of the parameters."""
        x_grad, weights_grad, bias_grad = self.kernels.backward(x, self.weights, self.bias, grad)
        if kind == "layer_norm_sh":
            return [x_grad, weights_grad[1:], weights_grad[0], bias_grad]
        return [x_grad, weights_grad, bias_grad]


def _differentiated(
    kind: str,
    grad: Tensor,
    inputs: Sequence[Tensor],
    wanted: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Gradients of x and of the parameters, of those that are wanted."""
    x, *parameters = inputs
    compiled = _Compiled.of(kind, x, parameters)
    if compiled is None:
        return library.by_autograd(lambda *t: _normalized(kind, *t), grad, inputs, wanted)
    found = compiled.backward(kind, x, grad)
    wanted = wanted or [True] * len(found)
    return [part if want else None for part, want in zip(found, wanted, strict=True)]


def _normalized(kind: str, x: Tensor, *parameters: Tensor) -> Tensor:
    by_kernels = _by_kernels(kind, x, parameters)
    if by_kernels is not None:
        return by_kernels
    if not torch.is_grad_enabled():
        compiled = _Compiled.of(kind, x, parameters)
        if compiled is not None:
            return compiled.forward(x)
    with torch.autocast(x.device.type, enabled=False):
        return _NORMS[kind](x, *parameters)


class _KeepInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x, *parameters)
        return _normalized(kind, x, *parameters)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_differentiated(ctx.kind, grad, ctx.saved_tensors, ctx.needs_input_grad[1:])


_operation = library.register(
    "norm",
    "str kind, Tensor x, Tensor[] parameters",
    lambda kind, x, parameters: _normalized(kind, x, *parameters),
    lambda _, x, __: x.new_empty(x.shape),
    lambda grad, kind, x, parameters: _differentiated(kind, grad, (x, *parameters)),
    "x parameters",
)


def norm(kind: str, x: Tensor, *parameters: Tensor) -> Tensor:
    """Normalise.

    Args:
        kind: ``layer_norm``: every degree is divided by its own RMS, l = 0 is centred first.
            ``layer_norm_sh``: layer norm on l = 0; one RMS, averaged over degrees, for all l > 0.
            ``rms_norm_sh``: one RMS, averaged over degrees, for all l; l = 0 is centred first.
        x: [N, (lmax + 1)^2, C].
        parameters: a weight [lmax + 1, C] and a bias [C] for l = 0. For ``layer_norm_sh`` a weight
            [lmax, C] for l > 0, then weight and bias [C] for l = 0.

    Returns:
        As x.
    """
    if torch.compiler.is_compiling():
        out: Tensor = _operation(kind, x, list(parameters))
        return out
    by_kernels = _by_kernels(kind, x, parameters)
    return _KeepInput.apply(kind, x, *parameters) if by_kernels is None else by_kernels
