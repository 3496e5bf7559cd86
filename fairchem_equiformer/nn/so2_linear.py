"""Parameters of the SO(2) linear layers (paper, Eq. 8)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fairchem_equiformer.nn.radial import RadialFunction
from fairchem_equiformer.so3.layout import Layout


class SO2Order(nn.Module):
    """Weights of one order m > 0, the two matrices of Eq. 8 one over the other."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, 2 * out_features, bias=False)
        # Each output is a sum of two products.
        self.fc.weight.data.mul_(1 / math.sqrt(2))


class SO2Convolution(nn.Module):
    """Weights of an SO(2) linear layer, with its radial function if it has one.

    The computation is ops/so2_linear.py; this holds the parameters.

    Args:
        layout: of the edge frame.
        in_channels: per coefficient.
        out_channels: per coefficient.
        extra_channels: further scalars, put before the coefficients.
        radial: (inputs, hidden) of a radial function with one weight per order, degree and channel,
            or None.
    """

    def __init__(
        self,
        layout: Layout,
        in_channels: int,
        out_channels: int,
        extra_channels: int = 0,
        radial: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.out_channels = out_channels
        degrees = [layout.num_degrees(m) for m in range(layout.mmax + 1)]
        self.fc_m0 = nn.Linear(degrees[0] * in_channels, degrees[0] * out_channels + extra_channels)
        self.so2_m_conv = nn.ModuleList(
            SO2Order(count * in_channels, count * out_channels) for count in degrees[1:]
        )
        self.rad_func = None
        if radial is not None:
            self.rad_func = RadialFunction(*radial, sum(degrees) * in_channels)

    def weights(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Matrices of m = 0, 1, ... and the bias, as ops/so2_linear.py takes them."""
        matrices = (self.fc_m0.weight, *(order.fc.weight for order in self.so2_m_conv))
        return matrices, self.fc_m0.bias

    def weights_of_degree(self, degree: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The rows of :meth:`weights` that make the outputs of one degree.

        Args:
            degree: l; orders m > l have no such rows and are left out.
        """
        width = self.out_channels
        matrices, bias = self.weights()
        first = slice(degree * width, (degree + 1) * width)
        chosen = [matrices[0][first]]
        for m in range(1, min(degree, self.layout.mmax) + 1):
            halves = matrices[m].unflatten(0, (2, -1))  # m runs over l = m..lmax in each half
            rows = slice((degree - m) * width, (degree - m + 1) * width)
            chosen.append(halves[:, rows].flatten(0, 1))
        return tuple(chosen), bias[first]
