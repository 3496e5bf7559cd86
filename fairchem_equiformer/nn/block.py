"""Transformer block (paper, Fig. 1a)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fairchem_equiformer.nn.attention import AttentionConfig, GraphAttention
from fairchem_equiformer.nn.edge_inputs import EdgeInputs
from fairchem_equiformer.nn.feed_forward import FeedForward, FeedForwardConfig
from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.nn.regularization import ChannelDropout, GraphDropPath
from fairchem_equiformer.ops.edges import Edges


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes and regularisation of a block."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm: str  # key of nn.norm.NORMS
    alpha_drop: float  # dropout of attention weights
    drop_path: float  # stochastic depth
    channel_drop: float  # dropout of either branch's result


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        lmax, channels = config.feed_forward.lmax, config.feed_forward.channels
        self.norm_1 = NORMS[config.norm](lmax, channels)
        self.ga = GraphAttention(config.attention, channels, config.alpha_drop)
        self.drop_path = GraphDropPath(config.drop_path)
        self.proj_drop = ChannelDropout(config.channel_drop)
        self.norm_2 = NORMS[config.norm](lmax, channels)
        self.ffn = FeedForward(config.feed_forward, channels)

    def forward(self, x: Tensor, inputs: EdgeInputs) -> Tensor:
        """[rows, (lmax + 1)^2, C] to the same."""
        x = x + self._drop(self.ga(self.norm_1(x), inputs), inputs.edges)
        return x + self._drop(self.ffn(self.norm_2(x)), inputs.edges)

    def _drop(self, branch: Tensor, edges: Edges) -> Tensor:
        if not self.training:
            return branch
        dropped: Tensor = self.proj_drop(self.drop_path(branch, edges.batch, edges.num_graphs))
        return dropped
