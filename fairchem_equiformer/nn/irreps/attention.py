"""Equivariant graph attention of Equiformer: with non-linear or linear messages, or dot products.

    m      = DTP(source linear(x_source) + target linear(x_target), harmonics; radial weights)
    alpha  = softmax over the edges of a target of z
    result = linear(sum over the edges of alpha v)

MLP attention has z = a . SmoothLeakyReLU(scalars of m), dot-product attention z = q . k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.nn.irreps.activation import Gate, moment_scale
from fairchem_equiformer.nn.irreps.edges import IrrepsEdges
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
from fairchem_equiformer.nn.irreps.tensor_product import RadialTensorProduct, TensorProduct
from fairchem_equiformer.ops.attention_softmax import attention_logits
from fairchem_equiformer.ops.depthwise_tensor_product import Ends
from fairchem_equiformer.ops.segments import segment_softmax, segment_sum, take
from fairchem_equiformer.so3.irreps import SCALAR, blocks, channels_of, copies, joined


@dataclass(frozen=True, kw_only=True)
class IrrepsAttentionConfig:
    """Sizes of graph attention."""

    irreps: o3.Irreps  # of messages, those of the node embedding
    irreps_sh: o3.Irreps  # of the harmonics
    irreps_head: o3.Irreps  # of the values of one head; alpha has as many scalars
    num_heads: int
    attention: str  # "mlp" or "dot_product"
    nonlinear_message: bool
    num_basis: int  # of the radial basis
    edge_channels: int  # of the radial functions' hidden layers
    alpha_drop: float  # dropout of attention weights

    @property
    def irreps_values(self) -> o3.Irreps:
        """Values of all heads."""
        return copies(self.num_heads, self.irreps_head)

    @property
    def alpha_channels(self) -> int:
        """Scalars of one head that its logit is made of."""
        return channels_of(self.irreps_head, SCALAR)


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """0.6 x + 0.4 x (2 sigmoid(x) - 1): of slope 0.2 on the left."""
    return 0.6 * x + 0.4 * x * (2 * torch.sigmoid(x) - 1)


class MLPLogits(nn.Module):
    """z = a . SmoothLeakyReLU(scalars), for each head; the activation's second moment is one."""

    def __init__(self, num_heads: int, channels: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (num_heads + channels))  # Glorot's
        self.dot = nn.Parameter(torch.empty(num_heads, channels).uniform_(-bound, bound))

    def forward(self, scalars: Tensor, *, twice: bool) -> Tensor:
        """[E, heads * channels] to [E, heads]; ``twice`` as of IrrepsEdges."""
        dot = self.dot * moment_scale(smooth_leaky_relu)
        return attention_logits(scalars.unflatten(1, self.dot.shape), None, dot, twice=twice)


class NonLinearMessage(nn.Module):
    """Logits from the scalars of m; values from a gate and a second tensor product."""

    def __init__(self, config: IrrepsAttentionConfig, irreps_in: o3.Irreps) -> None:
        super().__init__()
        scalars = o3.Irreps([(config.num_heads * config.alpha_channels, SCALAR)])
        self.alpha = IrrepsLinear(irreps_in, scalars)
        self.logits = MLPLogits(config.num_heads, config.alpha_channels)
        gate = Gate(config.irreps)
        self.linear = IrrepsLinear(irreps_in, gate.irreps_in)
        self.gate = gate
        self.product = TensorProduct(config.irreps, config.irreps_sh, config.irreps_values)
        self.value = IrrepsLinear(self.product.irreps_out, config.irreps_values)

    def forward(self, message: Tensor, edges: IrrepsEdges, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Logits [E, heads] and values of all heads."""
        logits = self.logits(self.alpha(message), twice=edges.twice)
        values = self.product(self.gate(self.linear(message)), edges)
        return logits, self.value(values)


class LinearMessage(nn.Module):
    """Logits and values from one linear layer on m."""

    def __init__(self, config: IrrepsAttentionConfig, irreps_in: o3.Irreps) -> None:
        super().__init__()
        self.num_alpha = config.num_heads * config.alpha_channels
        (scalars, _), *others = config.irreps_values
        both = o3.Irreps([(self.num_alpha + scalars, SCALAR), *others])
        self.linear = IrrepsLinear(irreps_in, both)
        self.logits = MLPLogits(config.num_heads, config.alpha_channels)

    def forward(self, message: Tensor, edges: IrrepsEdges, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Logits [E, heads] and values of all heads."""
        both = self.linear(message)
        alpha, values = both[:, : self.num_alpha], both[:, self.num_alpha :]
        return self.logits(alpha, twice=edges.twice), values


class DotProductMessage(nn.Module):
    """Logits q . k with queries from the target's features; keys and values from one linear on m.

    Each irrep of a query is divided by sqrt(irreps of a head * (2l + 1)), so that components of
    variance one make logits of variance one.
    """

    def __init__(
        self, config: IrrepsAttentionConfig, irreps_in: o3.Irreps, irreps_x: o3.Irreps
    ) -> None:
        super().__init__()
        self.irreps = config.irreps_values
        self.num_heads = config.num_heads
        self.irreps_per_head = config.irreps_head.num_irreps
        self.query = IrrepsLinear(irreps_x, self.irreps)
        self.key_value = IrrepsLinear(irreps_in, copies(2, self.irreps))

    def forward(self, message: Tensor, edges: IrrepsEdges, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [E, heads] and values of all heads."""
        queries = take(self.query(x), 0, edges.target)
        both = blocks(self.key_value(message), self.key_value.irreps_out)
        keys, values = zip(*(part.chunk(2, dim=2) for part in both), strict=True)
        logits = message.new_zeros(edges.num_edges, self.num_heads)
        for query, key in zip(blocks(queries, self.irreps), keys, strict=True):
            scale = 1 / math.sqrt(self.irreps_per_head * query.shape[1])
            product = (query * key).sum(dim=1).unflatten(1, (self.num_heads, -1))
            logits = logits + scale * product.sum(dim=2)
        return logits, joined(values)


class GraphAttention(nn.Module):
    """Attention of each atom to its neighbours.

    Args:
        config: sizes.
        irreps_in: of the features.
        irreps_out: of the result.
    """

    def __init__(
        self, config: IrrepsAttentionConfig, irreps_in: o3.Irreps, irreps_out: o3.Irreps
    ) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.irreps_values = config.irreps_values
        self.source = IrrepsLinear(irreps_in, config.irreps)
        self.target = IrrepsLinear(irreps_in, config.irreps, bias=False)
        self.product = RadialTensorProduct(
            config.irreps,
            config.irreps_sh,
            config.irreps,
            config.num_basis,
            config.edge_channels,
        )
        self.message = self._message(config, irreps_in)
        self.alpha_drop = nn.Dropout(config.alpha_drop)
        self.projection = IrrepsLinear(config.irreps_values, irreps_out)

    def _message(self, config: IrrepsAttentionConfig, irreps_x: o3.Irreps) -> nn.Module:
        irreps = self.product.irreps_out
        if config.attention == "dot_product":
            return DotProductMessage(config, irreps, irreps_x)
        return (NonLinearMessage if config.nonlinear_message else LinearMessage)(config, irreps)

    def forward(self, x: Tensor, edges: IrrepsEdges) -> Tensor:
        """[rows, irreps_in.dim] to [rows, irreps_out.dim]."""
        sources = edges.of_all_atoms(self.source(x))
        ends = Ends(sources, self.target(x), edges.source, edges.target)
        logits, values = self.message(self.product(ends, edges), edges, x)
        alpha = self.alpha_drop(segment_softmax(logits, edges.target, edges.num_rows))
        projected: Tensor = self.projection(self._sum(alpha.to(values.dtype), values, edges))
        return projected

    def _sum(self, alpha: Tensor, values: Tensor, edges: IrrepsEdges) -> Tensor:
        """Sum over each atom's edges of alpha times the values of its head."""
        weighted = [
            part.unflatten(2, (self.num_heads, -1)) * alpha[:, None, :, None]
            for part in blocks(values, self.irreps_values)
        ]
        return segment_sum(joined(weighted), edges.target, edges.num_rows)
