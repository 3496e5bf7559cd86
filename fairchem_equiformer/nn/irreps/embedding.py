"""What Equiformer's node features start from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fairchem_equiformer.nn.irreps.attention import IrrepsAttentionConfig
from fairchem_equiformer.nn.irreps.edges import IrrepsEdges
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
from fairchem_equiformer.nn.irreps.tensor_product import RadialTensorProduct
from fairchem_equiformer.ops.over_chunks import Part
from fairchem_equiformer.ops.segments import segment_sum, take
from fairchem_equiformer.so3.irreps import SCALAR, channels_of


class KindEmbedding(nn.Embedding):
    """Linear layer with a bias on a one-hot vector: N(0, 1) at first, and the bias zero."""

    def __init__(self, kinds: int, channels: int) -> None:
        super().__init__(kinds, channels)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, kind: Tensor) -> Tensor:
        """[n] to [n, channels]."""
        return super().forward(kind) + self.bias


class IrrepsEdgeDegreeEmbedding(nn.Module):
    """Sum over an atom's edges of a tensor product of learned scalars with the harmonics.

    Args:
        config: sizes.
        average_degree: the sum is divided by its square root.
    """

    def __init__(self, config: IrrepsAttentionConfig, average_degree: float) -> None:
        super().__init__()
        self.width = config.irreps.dim
        self.scalars = KindEmbedding(1, channels_of(config.irreps, SCALAR))
        self.product = RadialTensorProduct(
            config.irreps, config.irreps_sh, config.irreps, config.num_basis, config.edge_channels
        )
        self.linear = IrrepsLinear(self.product.irreps_out, config.irreps)
        self.divisor = math.sqrt(average_degree)

    def forward(self, edges: IrrepsEdges) -> Tensor:
        """[rows, irreps.dim]."""
        scalars = self.scalars(edges.source.new_zeros(1))
        x = nn.functional.pad(scalars, (0, self.width - scalars.shape[1]))
        harmonics = edges.harmonics
        if edges.envelope is not None:  # the products are linear in them
            harmonics = harmonics * edges.envelope[:, None]
        sums = edges.sum(
            self._sum,
            x,
            edges=(edges.basis, harmonics),
            rows=(),
            parameters=tuple(self.product.parameters()),
        )
        out: Tensor = self.linear(sums, edges.degree.to(sums.dtype)) / self.divisor
        return out

    def _sum(self, part: Part) -> Tensor:
        """Products of some edges, summed over each target: [n, product.irreps_out.dim]."""
        basis, harmonics = part.edges
        x = part.sources if part.source is None else take(part.sources, 0, part.source)
        products = self.product(x, harmonics, basis)
        return segment_sum(products, part.target, part.num_rows)
