"""Attention logits and their softmax (attention.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.loader import NormStruct, pointer, usable


class _LogitsStruct(ctypes.Structure):
    """``struct Logits`` of attention.cpp."""

    _fields_ = (
        ("norm", NormStruct),
        ("dot", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "channels")),
    )


class LogitKernels:
    """a . SmoothLeakyReLU(LN(s)) for every head; s is [E, heads, A] in all of them."""

    def __init__(
        self, kernels: ctypes.CDLL, norm: tuple[Tensor, Tensor] | None, dot: Tensor, epsilon: float
    ) -> None:
        self._kernels = kernels
        self._tensors = (*(norm or ()), dot.contiguous())  # must outlive the pointers
        self.shape = dot.shape
        addresses = (t.data_ptr() for t in norm or ())
        norm_struct = NormStruct(*addresses, epsilon=epsilon)
        self.struct = _LogitsStruct(norm_struct, self._tensors[-1].data_ptr(), *dot.shape)

    def forward(self, scalars: Tensor) -> Tensor:
        """Logits [E, heads]."""
        scalars = _heads_contiguous(scalars)
        out = scalars.new_empty(scalars.shape[:2])
        self._kernels.attention_logits(
            ctypes.byref(self.struct),
            pointer(scalars),
            ctypes.c_int64(scalars.stride(0)),
            pointer(out),
            ctypes.c_int64(len(scalars)),
            torch.get_num_threads(),
        )
        return out

    def backward(self, scalars: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the scalars, of weight and bias of the norm [A], and of a [heads, A]."""
        scalars, grad = _heads_contiguous(scalars), grad.contiguous()
        scalars_grad = scalars.new_empty(scalars.shape)
        sums = scalars.new_zeros(self.shape[0], 3, self.shape[1])
        self._kernels.attention_logits_backward(
            ctypes.byref(self.struct),
            pointer(scalars),
            ctypes.c_int64(scalars.stride(0)),
            *map(pointer, (grad, scalars_grad, sums)),
            ctypes.c_int64(len(scalars)),
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
    if kernels is None or not kernels.logits_fit(ctypes.c_int64(dot.shape[1])):
        return None
    return LogitKernels(kernels, norm, dot, epsilon)


@dataclass(frozen=True)
class SoftmaxKernels:
    """Softmax over the edges of each target; ``target_ptr`` [n + 1] says where they begin."""

    kernels: ctypes.CDLL

    def forward(self, logits: Tensor, target_ptr: Tensor) -> Tensor:
        """[E, heads]."""
        return self._call("edge_softmax", target_ptr, logits)

    def backward(self, alpha: Tensor, grad: Tensor, target_ptr: Tensor) -> Tensor:
        """Gradient of the logits [E, heads], given the softmax alpha and its gradient."""
        return self._call("edge_softmax_backward", target_ptr, alpha, grad)

    def _call(self, name: str, target_ptr: Tensor, *inputs: Tensor) -> Tensor:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        out = torch.empty_like(inputs[0])
        getattr(self.kernels, name)(
            *map(pointer, inputs),
            ctypes.c_int64(out.shape[1]),
            *map(pointer, (target_ptr, out)),
            ctypes.c_int64(len(target_ptr) - 1),
            torch.get_num_threads(),
        )
        return out


def softmax_kernels(logits: Tensor) -> SoftmaxKernels | None:
    """Kernels for such logits; None where the reference has to run."""
    kernels = usable(logits)
    return None if kernels is None else SoftmaxKernels(kernels)
