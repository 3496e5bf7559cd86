"""Attention logits and their softmax (attention.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import Floats, LogitsStruct, NormStruct
from fairchem_equiformer.ops.native.loader import fits, usable


class LogitKernels:
    """a . SmoothLeakyReLU(LN(s)) for every head; s is [E, heads, A] in all of them."""

    def __init__(
        self, kernels: ctypes.CDLL, norm: tuple[Tensor, Tensor] | None, dot: Tensor, epsilon: float
    ) -> None:
        self._kernels = kernels
        self._tensors = (*(norm or ()), dot.contiguous())  # must outlive the pointers
        self.shape = dot.shape
        norm_struct = NormStruct(*map(Floats.of, norm or ()), epsilon=epsilon)
        self.struct = LogitsStruct(norm_struct, Floats.of(self._tensors[-1]), *dot.shape)

    def forward(self, scalars: Tensor) -> Tensor:
        """Logits [E, heads]."""
        scalars = _heads_contiguous(scalars)
        out = scalars.new_empty(scalars.shape[:2])
        self._kernels.attention_logits(
            self.struct, scalars, scalars.stride(0), out, len(scalars), torch.get_num_threads()
        )
        return out

    def backward(self, scalars: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the scalars, of weight and bias of the norm [A], and of a [heads, A]."""
        scalars, grad = _heads_contiguous(scalars), grad.contiguous()
        scalars_grad = scalars.new_empty(scalars.shape)
        sums = scalars.new_zeros(self.shape[0], 3, self.shape[1])
        self._kernels.attention_logits_backward(
            self.struct,
            scalars,
            scalars.stride(0),
            grad,
            scalars_grad,
            sums,
            len(scalars),
            torch.get_num_threads(),
        )
        weight, bias = sums[:, :2].sum(0)
        return scalars_grad, weight, bias, sums[:, 2]


def _heads_contiguous(scalars: Tensor) -> Tensor:
    """[E, heads, A] whose items are dense; they may lie apart."""
    dense = scalars.stride()[1:] == (scalars.shape[2], 1)
    return scalars if dense else scalars.contiguous()


def logit_kernels(
    scalars: Tensor, norm: tuple[Tensor, Tensor] | None, dot: Tensor, epsilon: float
) -> LogitKernels | None:
    """Kernels for such scalars and weights; None where the reference has to run."""
    kernels = usable(scalars, dot, *(norm or ()))
    channels = dot.shape[1]
    if kernels is None or not fits("attention logits", channels, kernels.logits_misfit(channels)):
        return None
    return LogitKernels(kernels, norm, dot, epsilon)


@dataclass(frozen=True)
class SoftmaxKernels:
    """Softmax over the edges of each target; ``target_ptr`` [n + 1] says where they begin."""

    kernels: ctypes.CDLL

    def forward(self, logits: Tensor, target_ptr: Tensor) -> Tensor:
        """[E, heads]."""
        logits = logits.contiguous()
        out = torch.empty_like(logits)
        self.kernels.edge_softmax(
            logits,
            logits.shape[1],
            target_ptr,
            out,
            len(target_ptr) - 1,
            torch.get_num_threads(),
        )
        return out

    def backward(self, alpha: Tensor, grad: Tensor, target_ptr: Tensor) -> Tensor:
        """Gradient of the logits [E, heads], given the softmax alpha and its gradient."""
        alpha, grad = alpha.contiguous(), grad.contiguous()
        out = torch.empty_like(alpha)
        self.kernels.edge_softmax_backward(
            alpha,
            grad,
            alpha.shape[1],
            target_ptr,
            out,
            len(target_ptr) - 1,
            torch.get_num_threads(),
        )
        return out


def softmax_kernels(logits: Tensor) -> SoftmaxKernels | None:
    """Kernels for such logits; None where the reference has to run."""
    kernels = usable(logits)
    return None if kernels is None else SoftmaxKernels(kernels)
