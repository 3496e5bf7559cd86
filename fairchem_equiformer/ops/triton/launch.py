"""How kernels are started."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first argument, which may not be the current one.

    Args:
        kernel: of Triton.
        programs: along up to three axes; none are started where there are none.
        arguments: the first is a tensor.
        options: constants and options of the kernel.
    """
    if all(programs):
        with torch.cuda.device_of(arguments[0]):
            kernel[programs](*arguments, **options)


def items_contiguous(x: Tensor) -> Tensor:
    """A tensor whose items, along the first dimension, are dense; they may lie apart."""
    return x if x[:1].is_contiguous() else x.contiguous()
