"""Attention logits and their softmax (attention_softmax.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import Floats, LogitsStruct, NormStruct
from fairchem_equiformer.ops.native.loader import dense_items, fits, usable
from fairchem_equiformer.ops.native.together import dense

Norm = tuple[Tensor, Tensor] | None  # weight and bias [A]


@dataclass(frozen=True)
class LogitKernels:
    """a . SmoothLeakyReLU(LN(s)) for every head; s is [E, heads, A] and a is [heads, A]."""

    kernels: ctypes.CDLL
    epsilon: float  # of the layer norm

    def forward(self, scalars: Tensor, norm: Norm, dot: Tensor) -> Tensor:
        """Logits [E, heads]."""
        scalars, dot = dense_items(scalars), dense(dot)
        out = scalars.new_empty(scalars.shape[:2])
        self.kernels.attention_logits(
            self._struct(norm, dot),
            scalars,
            scalars.stride(0),
            out,
            len(scalars),
            torch.get_num_threads(),
        )
        return out

    def backward(
        self, scalars: Tensor, norm: Norm, dot: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the scalars, of weight and bias of the norm [A], and of a [heads, A]."""
        scalars_grad = scalars.new_empty(scalars.shape)
        sums = scalars.new_zeros(len(dot), 3, dot.shape[1])
        self.add_backward(scalars, norm, dot, grad, scalars_grad, sums)
        weight, bias = sums[:, :2].sum(0)
        return scalars_grad, weight, bias, sums[:, 2]

    def add_backward(
        self,
        scalars: Tensor,
        norm: Norm,
        dot: Tensor,
        grad: Tensor,
        scalars_grad: Tensor,
        sums: Tensor,
    ) -> None:
        """Write the gradient of the scalars, and add to those of the weights.

        Args:
            scalars, norm, dot: as in :meth:`forward`.
            grad: [E, heads].
            scalars_grad: [E, heads, A], of which each edge is dense.
            sums: [heads, 3, A], of the weight and bias of the norm by head, and of a.

        Raises:
            ValueError: if an edge of ``scalars_grad`` is not dense.
        """
        if dense_items(scalars_grad) is not scalars_grad:
            raise ValueError(f"gradients of scalars lie at strides {scalars_grad.stride()}")
        scalars, dot, grad = dense_items(scalars), dense(dot), dense(grad)
        self.kernels.attention_logits_backward(
            self._struct(norm, dot),
            scalars,
            scalars.stride(0),
            grad,
            scalars_grad,
            scalars_grad.stride(0),
            sums,
            len(scalars),
            torch.get_num_threads(),
        )

    def _struct(self, norm: Norm, dot: Tensor) -> LogitsStruct:
        norm_struct = NormStruct(*map(Floats.address, norm or ()), epsilon=self.epsilon)
        return LogitsStruct(norm_struct, Floats.address(dot), *dot.shape)


def logit_kernels(scalars: Tensor, norm: Norm, dot: Tensor, epsilon: float) -> LogitKernels | None:
    """Kernels for such scalars and weights; None where the reference has to run."""
    kernels = usable(scalars, dot, *(norm or ()))
    channels = dot.shape[1]
    if kernels is None or not fits("attention logits", channels, kernels.logits_misfit(channels)):
        return None
    return LogitKernels(kernels, epsilon)


@dataclass(frozen=True)
class SoftmaxKernels:
    """Softmax over the edges of each target; ``target_ptr`` [n + 1] says where they begin."""

    kernels: ctypes.CDLL

    def forward(self, logits: Tensor, target_ptr: Tensor) -> Tensor:
        """[E, heads]."""
        logits = dense(logits)
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
        alpha, grad = dense(alpha), dense(grad)
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
