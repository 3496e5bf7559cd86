"""Radial basis and radial function with their parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fairchem_equiformer.ops import triton
from fairchem_equiformer.ops.linear import linear
from fairchem_equiformer.ops.radial import GaussianBasis, LearnedGaussians, RadialWeights, gaussians

_WIDTH_IN_SPACINGS = 2.0
_LEAST_DEVIATION = 1e-5


class GaussianSmearing(nn.Module):
    """``num_basis`` Gaussians at equal spacing from 0 to ``cutoff``, two spacings wide.

    Args:
        cutoff: Angstrom.
        num_basis: 600 in all published models.
    """

    def __init__(self, cutoff: float, num_basis: int = 600) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(0, cutoff, num_basis), persistent=False)
        self.centers: Tensor
        spacing = (self.centers[1] - self.centers[0]).item()
        self.coefficient = -0.5 / (_WIDTH_IN_SPACINGS * spacing) ** 2

    def basis(self) -> GaussianBasis:
        """The constants that ops/radial.py takes."""
        return GaussianBasis(self.centers, self.coefficient)

    @property
    def num_basis(self) -> int:
        """Number of Gaussians."""
        return len(self.centers)


class LearnableGaussianSmearing(nn.Module):
    """``num_basis`` normalised Gaussians of weight * d / cutoff + bias: the basis of Equiformer.

        exp(-((weight d / cutoff + bias - mean) / s)^2 / 2) / (sqrt(2 pi) s),  s = |std| + 1e-5

    All 2 num_basis + 2 numbers are learned; their names and shapes are those of fairchem's
    ``GaussianRadialBasisLayer``. No envelope takes the functions to zero at the cutoff.

    Args:
        cutoff: Angstrom.
        num_basis: 128 in all published models.
    """

    def __init__(self, cutoff: float, num_basis: int = 128) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.num_basis = num_basis
        self.mean = nn.Parameter(torch.empty(1, num_basis).uniform_(0, 1))
        self.std = nn.Parameter(torch.empty(1, num_basis).uniform_(1 / num_basis, 1))
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.bias = nn.Parameter(torch.zeros(1, 1))

    def basis(self) -> LearnedGaussians:
        """What ops/radial.py takes, in terms of the distance itself."""
        width = math.sqrt(2) * (self.std.abs() + _LEAST_DEVIATION)
        slope = self.weight / (self.cutoff * width)
        shift = (self.mean - self.bias) / width
        return LearnedGaussians(slope[0], shift[0], 1 / (math.sqrt(math.pi) * width[0]))

    def forward(self, distance: Tensor) -> Tensor:
        """All Gaussians at each distance: [E] Angstrom to [E, num_basis]."""
        return gaussians(distance, self.basis())


class ExponentialNormalSmearing(nn.Module):
    """Gaussians of exp(-5 d / cutoff), times a cosine that takes them to zero at the cutoff.

        exp(-beta (exp(-5 d / cutoff) - mean)^2) (cos(pi d / cutoff) + 1) / 2

    Means are at equal spacing from exp(-cutoff) to 1, and beta = (num_basis / (2 (1 -
    exp(-cutoff))))^2 (PhysNet, arXiv:1902.08408, equation 7). Nothing is learned.

    Args:
        cutoff: Angstrom.
        num_basis: 32 in Equiformer's models of MD17.
    """

    def __init__(self, cutoff: float, num_basis: int = 32) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.num_basis = num_basis
        first = math.exp(-cutoff)
        self.beta = (num_basis / (2 * (1 - first))) ** 2
        self.register_buffer("means", torch.linspace(first, 1, num_basis), persistent=False)
        self.means: Tensor

    def forward(self, distance: Tensor) -> Tensor:
        """All functions at each distance below the cutoff: [E] Angstrom to [E, num_basis]."""
        scaled = distance[:, None] / self.cutoff
        offset = torch.exp(-5 * scaled) - self.means
        return torch.exp(-self.beta * offset.square()) * (torch.cos(math.pi * scaled) + 1) / 2


class SphericalBesselBasis(nn.Module):
    """Spherical Bessel functions of order 0 under a polynomial envelope: the basis of DimeNet.

        u(d / cutoff) sqrt(2 / cutoff) sin(frequency d / cutoff) / d

    (arXiv:2003.03123, equations 7 and 8), with the envelope u of power 5. Frequencies start as
    n pi, where the functions are orthonormal in the sphere, and are learned.

    Args:
        cutoff: Angstrom.
        num_basis: 8 in Equiformer's models of QM9.
    """

    def __init__(self, cutoff: float, num_basis: int = 8) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.num_basis = num_basis
        self.frequencies = nn.Parameter(math.pi * torch.arange(1.0, num_basis + 1))

    def forward(self, distance: Tensor) -> Tensor:
        """All functions at each distance, which is not zero: [E] Angstrom to [E, num_basis]."""
        x = distance[:, None] / self.cutoff
        scale = math.sqrt(2 / self.cutoff**3)
        out: Tensor = scale * envelope(x, 5) / x * torch.sin(self.frequencies * x)
        return out


def envelope(x: Tensor, power: int) -> Tensor:
    """1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2), and zero from 1 on; p is the power.

    It is zero at 1 with its first two derivatives (DimeNet, arXiv:2003.03123, equation 8). In
    factors, (1 - x)^3 times the sum over k < p of (k+1)(k+2)/2 x^k, since the terms cancel near 1.
    """
    coefficients = [(k + 1) * (k + 2) // 2 for k in range(power)]
    rest = torch.full_like(x, coefficients.pop())
    for coefficient in reversed(coefficients):
        rest = coefficient + x * rest
    out: Tensor = (1 - x).clamp(min=0) ** 3 * rest
    return out


class ElementEmbedding(nn.Embedding):
    """One vector per element, small at first."""

    def reset_parameters(self) -> None:
        """Uniform in +-0.001."""
        nn.init.uniform_(self.weight, -0.001, 0.001)


class RadialFunction(nn.Module):
    """Two hidden layers, each with layer norm and SiLU, and a last linear layer.

    The computation is ops/radial.py; this holds the parameters.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, out_features),
        )

    def forward(self, basis: Tensor) -> Tensor:
        """[E, in_features] to [E, out_features], differentiable any number of times."""
        x, (*hidden, last) = basis, self.net
        for layer, norm, silu in (hidden[:3], hidden[3:]):
            x = linear(x, layer.weight, layer.bias)
            by_kernels = None
            if not torch.compiler.is_compiling():  # which sees PyTorch's operations alone
                by_kernels = triton.norm_silu(x, norm.weight, norm.bias, norm.eps)
            x = silu(norm(x)) if by_kernels is None else by_kernels
        return linear(x, last.weight, last.bias)

    def weights(self, source: nn.Embedding | None, target: nn.Embedding | None) -> RadialWeights:
        """Parameters as ops/radial.py takes them.

        Args:
            source, target: element embeddings that the first layer reads after the Gaussians.
        """
        linear_and_norm = (self.net[index] for index in (0, 1, 3, 4, 6))
        parameters = [tensor for layer in linear_and_norm for tensor in (layer.weight, layer.bias)]
        return RadialWeights(
            None if source is None else source.weight,
            None if target is None else target.weight,
            *parameters,
        )
