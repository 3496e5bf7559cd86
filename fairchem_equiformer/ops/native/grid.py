"""SiLU on the sphere (s2_grid.cpp)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.loader import pointer, usable
from fairchem_equiformer.so3.grid import Grid


def _rows_contiguous(x: Tensor) -> Tensor:
    """[B, R, C] whose items are dense; they may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _with_stride(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return pointer(x), ctypes.c_int64(x.stride(0))


class _GridStruct(ctypes.Structure):
    """``struct Grid`` of s2_grid.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("latitude_in", "latitude_out", "longitude")),
        *((name, ctypes.c_void_p) for name in ("order_in", "order_out")),
        *((name, ctypes.c_int64) for name in ("latitudes", "longitudes", "orders")),
        *((name, ctypes.c_int64) for name in ("rows_in", "rows_out")),
    )


class GridKernels:
    """SiLU on the sphere (s2_grid.cpp) for one grid; x is [B, R, C] in all of them."""

    def __init__(self, kernels: ctypes.CDLL, grid: Grid) -> None:
        self._kernels = kernels
        self._tensors = grid.factors  # must outlive the pointers
        self.shape = len(grid.to_grid), *grid.from_grid.shape[1:]  # P, S
        latitudes, rows_in = grid.factors.latitude_in.shape
        longitudes, orders = grid.factors.longitude.shape
        rows_out = grid.factors.latitude_out.shape[1]
        sizes = (latitudes, longitudes, orders, rows_in, rows_out)
        self.struct = _GridStruct(*(t.data_ptr() for t in grid.factors), *sizes)

    def _call(self, name: str, x: Tensor, *arguments: Any) -> None:
        items, channels, threads = len(x), x.shape[2], torch.get_num_threads()
        end = ctypes.c_int64(items), ctypes.c_int64(channels), threads
        getattr(self._kernels, name)(ctypes.byref(self.struct), *arguments, *end)

    def activation(self, x: Tensor, y: Tensor) -> None:
        """Write G^-1 SiLU(G x) to y [B, S, C], whose items are dense."""
        x = _rows_contiguous(x)
        assert _rows_contiguous(y) is y  # noqa: S101
        self._call("s2_activation", x, *_with_stride(x), *_with_stride(y))

    def activation_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of :meth:`activation`: [B, R, C]."""
        x, grad = _rows_contiguous(x), _rows_contiguous(grad)
        x_grad = x.new_empty(x.shape)
        self._call(
            "s2_activation_backward",
            x,
            *_with_stride(x),
            *_with_stride(grad),
            pointer(x_grad),
        )
        return x_grad

    def samples(self, x: Tensor) -> Tensor:
        """SiLU(G x): [B, P, C]."""
        x = _rows_contiguous(x)
        out = x.new_empty(len(x), self.shape[0], x.shape[2])
        self._call("silu_samples", x, *_with_stride(x), pointer(out))
        return out

    def samples_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of :meth:`samples`, given that of its result: [B, R, C]."""
        x, grad = _rows_contiguous(x), grad.contiguous()
        x_grad = x.new_empty(x.shape)
        self._call("silu_samples_backward", x, *_with_stride(x), *map(pointer, (grad, x_grad)))
        return x_grad

    def integral(self, samples: Tensor) -> Tensor:
        """G^-1 SiLU(s): [B, P, C] to [B, S, C]."""
        samples = samples.contiguous()
        out = samples.new_empty(len(samples), self.shape[1], samples.shape[2])
        self._call("integrate_silu", samples, *map(pointer, (samples, out)))
        return out

    def integral_backward(self, samples: Tensor, grad: Tensor) -> Tensor:
        """Gradient of :meth:`integral`, given that of its result: [B, P, C]."""
        samples, grad = samples.contiguous(), _rows_contiguous(grad)
        out = torch.empty_like(samples)
        flow = _with_stride(grad)
        self._call("integrate_silu_backward", samples, pointer(samples), *flow, pointer(out))
        return out


def grid_kernels(grid: Grid, x: Tensor) -> GridKernels | None:
    """Kernels for such a grid and such an x [B, R, C]; None where the reference has to run."""
    kernels = usable(x)
    if kernels is None:
        return None
    found = GridKernels(kernels, grid)
    fits = kernels.s2_grid_fits(ctypes.byref(found.struct), ctypes.c_int64(x.shape[2]))
    return found if fits else None
