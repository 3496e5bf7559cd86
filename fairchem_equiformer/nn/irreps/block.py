"""Transformer block of Equiformer."""

from __future__ import annotations

from dataclasses import dataclass

from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.nn.irreps.attention import GraphAttention, IrrepsAttentionConfig
from fairchem_equiformer.nn.irreps.edges import IrrepsEdges
from fairchem_equiformer.nn.irreps.feed_forward import IrrepsFeedForward
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
from fairchem_equiformer.nn.irreps.norm import IrrepsLayerNorm
from fairchem_equiformer.nn.regularization import GraphDropPath


@dataclass(frozen=True, kw_only=True)
class IrrepsBlockConfig:
    """Sizes and regularisation of a block."""

    attention: IrrepsAttentionConfig
    irreps_mlp_mid: o3.Irreps  # within the feed-forward network
    drop_path: float  # stochastic depth


class IrrepsBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Where the result has other irreps than x, a linear layer takes x there.

    Args:
        config: sizes.
        irreps_out: of the result.
    """

    def __init__(self, config: IrrepsBlockConfig, irreps_out: o3.Irreps) -> None:
        super().__init__()
        irreps = config.attention.irreps
        self.norm_1 = IrrepsLayerNorm(irreps)
        self.ga = GraphAttention(config.attention, irreps, irreps)
        self.drop_path = GraphDropPath(config.drop_path)
        self.norm_2 = IrrepsLayerNorm(irreps)
        self.ffn = IrrepsFeedForward(irreps, config.irreps_mlp_mid, irreps_out)
        self.shortcut = None if irreps_out == irreps else IrrepsLinear(irreps, irreps_out)

    def forward(self, x: Tensor, edges: IrrepsEdges) -> Tensor:
        """[rows, irreps.dim] to [rows, irreps_out.dim]."""
        x = x + self.drop_path(self.ga(self.norm_1(x), edges), edges.batch, edges.num_graphs)
        branch = self.drop_path(self.ffn(self.norm_2(x)), edges.batch, edges.num_graphs)
        out: Tensor = branch + (x if self.shortcut is None else self.shortcut(x))
        return out
