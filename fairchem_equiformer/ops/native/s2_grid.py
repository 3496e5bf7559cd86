"""SiLU on the sphere (s2_grid.cpp)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fairchem_equiformer.ops.native.interface import Floats, GridStruct, Indices, LatitudesStruct
from fairchem_equiformer.ops.native.loader import dense_items, fits, usable
from fairchem_equiformer.ops.native.matrix_products import Packed
from fairchem_equiformer.ops.native.together import dense
from fairchem_equiformer.so3.grid import Grid, GridFactors, LatitudeFactor


def _latitudes(factor: LatitudeFactor) -> LatitudesStruct:
    values, row, starts = factor
    addresses = Floats.address(values), Indices.address(row), Indices.address(starts)
    return LatitudesStruct(*addresses, len(row))


def _struct(factors: GridFactors) -> GridStruct:
    latitude_in, latitude_out, longitude, num_pairs, num_same = factors
    return GridStruct(
        _latitudes(latitude_in),
        _latitudes(latitude_out),
        Floats.address(longitude),
        len(latitude_in.values),
        num_pairs,
        len(longitude) - num_pairs,
        longitude.shape[1],
        num_same,
    )


class GridKernels:
    """SiLU on the sphere (s2_grid.cpp) for one grid; x is [B, R, C] in all of them."""

    def __init__(self, kernels: ctypes.CDLL, grid: Grid) -> None:
        self._kernels = kernels
        self._factors = grid.factors  # must outlive the pointers
        self.shape = len(grid.to_grid), grid.from_grid.shape[1]  # P, S
        self.struct = _struct(grid.factors)

    def _call(self, name: str, x: Tensor, *arguments: Any) -> None:
        end = len(x), x.shape[2], torch.get_num_threads()
        getattr(self._kernels, name)(self.struct, *arguments, *end)

    def silu(self, x: Tensor, y: Tensor) -> None:
        """Write SiLU(x) to y, both [B, C], whose rows must be dense."""
        x, sizes = _dense_rows(x), (*x.shape, torch.get_num_threads())
        if _dense_rows(y) is not y:
            raise ValueError(f"rows lie at strides {y.stride()}")
        self._kernels.silu(x, x.stride(0), y, y.stride(0), *sizes)

    def silu_backward(self, x: Tensor, grad: Tensor, x_grad: Tensor) -> None:
        """Write the gradient of :meth:`silu` to ``x_grad`` [B, C], whose rows must be dense."""
        x, grad = _dense_rows(x), _dense_rows(grad)
        if _dense_rows(x_grad) is not x_grad:
            raise ValueError(f"rows lie at strides {x_grad.stride()}")
        places = [part for t in (x, grad, x_grad) for part in (t, t.stride(0))]
        self._kernels.silu_backward(*places, *x.shape, torch.get_num_threads())

    def activation(self, x: Tensor, y: Tensor) -> None:
        """Write G^-1 SiLU(G x) to y [B, S, C], whose items must be dense."""
        if dense_items(y) is not y:
            raise ValueError(f"items of shape {y.shape[1:]} lie at strides {y.stride()[1:]}")
        x = dense_items(x)
        self._call("s2_activation", x, x, x.stride(0), y, y.stride(0))

    def activation_backward(self, x: Tensor, grad: Tensor, x_grad: Tensor | None = None) -> Tensor:
        """Gradient of :meth:`activation`: [B, R, C], in ``x_grad``, if given, of dense items."""
        x, grad = dense_items(x), dense_items(grad)
        if x_grad is None:
            x_grad = x.new_empty(x.shape)
        elif dense_items(x_grad) is not x_grad:
            raise ValueError(f"items of shape {x.shape[1:]} lie at strides {x_grad.stride()[1:]}")
        places = [part for t in (x, grad, x_grad) for part in (t, t.stride(0))]
        self._call("s2_activation_backward", x, *places)
        return x_grad

    def samples(self, x: Tensor) -> Tensor:
        """SiLU(G x): [B, P, C]."""
        x = dense_items(x)
        out = x.new_empty(len(x), self.shape[0], x.shape[2])
        self._call("silu_samples", x, x, x.stride(0), out)
        return out

    def samples_backward(self, x: Tensor, grad: Tensor, x_grad: Tensor) -> None:
        """Write the gradient of :meth:`samples`, given that of its result, to ``x_grad``, dense."""
        if not x_grad.is_contiguous():
            raise ValueError(f"a gradient of shape {x_grad.shape} lies at {x_grad.stride()}")
        x, grad = dense_items(x), dense(grad)
        self._call("silu_samples_backward", x, x, x.stride(0), grad, x_grad)

    def integral(self, samples: Tensor) -> Tensor:
        """G^-1 SiLU(s): [B, P, C] to [B, S, C]."""
        samples = dense(samples)
        out = samples.new_empty(len(samples), self.shape[1], samples.shape[2])
        self._call("integrate_silu", samples, samples, out)
        return out

    def integral_backward(self, samples: Tensor, grad: Tensor) -> Tensor:
        """Gradient of :meth:`integral`, given that of its result: [B, P, C]."""
        samples, grad = dense(samples), dense_items(grad)
        out = torch.empty_like(samples)
        self._call("integrate_silu_backward", samples, samples, grad, grad.stride(0), out)
        return out

    def mlp(self, x: Tensor, weight: Packed) -> Tensor:
        """G^-1 SiLU(W SiLU(G x)): [B, S, C]; W [C, C] as a product takes it, see ``pack``."""
        x, (points, rows) = dense_items(x), self.shape
        out = x.new_empty(len(x), rows, weight.n)
        buffers = x.new_empty(torch.get_num_threads(), 2, points, weight.n)
        self._call("grid_mlp", x, x, x.stride(0), weight.panels, buffers, points, out)
        return out


def _dense_rows(x: Tensor) -> Tensor:
    """[B, C] whose rows are dense; they may lie apart. It itself, where it is so."""
    return x if x.stride(1) == 1 else dense(x)


def grid_kernels(grid: Grid, x: Tensor) -> GridKernels | None:
    """Kernels for such a grid and such an x [B, R, C]; None where the reference has to run."""
    kernels = usable(x)
    if kernels is None:
        return None
    found = GridKernels(kernels, grid)
    channels = x.shape[2]
    misfit = kernels.s2_grid_misfit(found.struct, channels)
    return found if fits("non-linearities on the grid", channels, misfit) else None
