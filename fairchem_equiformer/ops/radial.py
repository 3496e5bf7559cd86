"""The radial function: from distance and elements of an edge to weights (paper, section 3.5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Nothing beside 1 (4e-18). Of smaller values come subnormal numbers, ten times as slow.
_LEAST_EXPONENT = -40.0


class GaussianBasis(NamedTuple):
    """Gaussians at equal spacing from 0 to the cutoff."""

    centers: Tensor  # [B] Angstrom
    coefficient: float  # of (d - center)^2 in the exponent, 1 / Angstrom^2


class RadialWeights(NamedTuple):
    """Weights of the two hidden layers and the last one; H hidden, A embedding channels."""

    source_embedding: Tensor | None  # [elements, A]
    target_embedding: Tensor | None  # [elements, A]
    weight_1: Tensor  # [H, B + 2 A], or [H, B] without embeddings
    bias_1: Tensor
    norm_1_weight: Tensor
    norm_1_bias: Tensor
    weight_2: Tensor  # [H, H]
    bias_2: Tensor
    norm_2_weight: Tensor
    norm_2_bias: Tensor
    weight_3: Tensor  # [out, H]
    bias_3: Tensor


class EdgeScalars(NamedTuple):
    """What the radial function knows of an edge."""

    distance: Tensor  # [E] Angstrom
    source_element: Tensor  # [E]
    target_element: Tensor  # [E]

    def of(self, edges: slice) -> EdgeScalars:
        """The same for some of the edges."""
        return EdgeScalars(*(field[edges] for field in self))


def gaussians(distance: Tensor, basis: GaussianBasis) -> Tensor:
    """All Gaussians of the basis at each distance: [E] Angstrom to [E, B]."""
    offset = distance[:, None] - basis.centers
    return torch.exp((basis.coefficient * offset.square()).clamp(min=_LEAST_EXPONENT))


def radial_function(edges: EdgeScalars, weights: RadialWeights, basis: GaussianBasis) -> Tensor:
    """Two hidden layers with layer norm and SiLU on (Gaussians, source and target embedding).

    Of the first layer, the part of the embeddings is a lookup in two tables, embedding times
    weight, with a row per element.

    Returns:
        [E, out].
    """
    num_basis = len(basis.centers)
    hidden = gaussians(edges.distance, basis) @ weights.weight_1[:, :num_basis].t()
    if weights.source_embedding is not None and weights.target_embedding is not None:
        width = weights.source_embedding.shape[1]
        source_weight, target_weight = weights.weight_1[:, num_basis:].split(width, dim=1)
        hidden = hidden + (weights.source_embedding @ source_weight.t())[edges.source_element]
        hidden = hidden + (weights.target_embedding @ target_weight.t())[edges.target_element]
    hidden = hidden + weights.bias_1
    size = hidden.shape[1:]
    hidden = F.silu(F.layer_norm(hidden, size, weights.norm_1_weight, weights.norm_1_bias))
    hidden = F.linear(hidden, weights.weight_2, weights.bias_2)
    hidden = F.silu(F.layer_norm(hidden, size, weights.norm_2_weight, weights.norm_2_bias))
    return F.linear(hidden, weights.weight_3, weights.bias_3)
