"""Equivariant graph attention (paper, section 3.5 and Fig. 1b)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fairchem_equiformer.nn.autocast import without_autocast
from fairchem_equiformer.nn.edge_inputs import EdgeInputs
from fairchem_equiformer.nn.frozen import kept
from fairchem_equiformer.nn.radial import ElementEmbedding, RadialFunction
from fairchem_equiformer.nn.so2_linear import SO2Convolution
from fairchem_equiformer.nn.so3_linear import SO3Linear
from fairchem_equiformer.ops.edge_attention import (
    AttentionSpec,
    AttentionWeights,
    PreparedWeights,
    edge_attention,
    product_dtype,
)
from fairchem_equiformer.ops.touch import touch
from fairchem_equiformer.so3.layout import Layout, layout


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of an attention layer, in the paper's terms (section C)."""

    layout: Layout  # lmax and mmax
    channels: int  # d_embed
    hidden_channels: int  # d_attn_hidden
    num_heads: int
    alpha_channels: int  # d_attn_alpha, per head
    value_channels: int  # d_attn_value, per head
    activation: str  # "gate", "s2" or "separable_s2"
    renormalize: bool  # layer norm before the attention logits (section 3.2)
    grid_resolution: int | None
    num_basis: int
    edge_channels: int  # d_edge
    num_elements: int  # rows of its own element embeddings; 0 for none
    shared_embedding: bool  # reads element embeddings that are handed in
    radial_by_degree: bool  # one radial weight per l instead of one per (l, |m|)

    @property
    def radial_inputs(self) -> int:
        """Inputs of the radial function."""
        embedded = self.num_elements or self.shared_embedding
        return self.num_basis + (2 * self.edge_channels if embedded else 0)

    @property
    def extra_channels(self) -> int:
        """Scalars of the first SO(2) layer: attention features, then gates."""
        gates = {"gate": self.layout.lmax, "s2": 0, "separable_s2": 1}[self.activation]
        return self.num_heads * self.alpha_channels + gates * self.hidden_channels


class GraphAttention(nn.Module):
    """SO(2) layer, activation, SO(2) layer, weighted by attention and summed; then a projection.

    Args:
        config: sizes.
        out_channels: of the projection.
        alpha_drop: dropout of attention weights.
        out_degree: compute this degree of the result only.
    """

    def __init__(
        self,
        config: AttentionConfig,
        out_channels: int,
        alpha_drop: float = 0.0,
        out_degree: int | None = None,
    ) -> None:
        super().__init__()
        edge_layout = config.layout
        self.out_degree = out_degree
        self.alpha_drop = alpha_drop
        self.source_embedding = self.target_embedding = None
        if config.num_elements:
            self.source_embedding = ElementEmbedding(config.num_elements, config.edge_channels)
            self.target_embedding = ElementEmbedding(config.num_elements, config.edge_channels)
        radial = (config.radial_inputs, config.edge_channels)
        self.rad_func = None
        if config.radial_by_degree:
            self.rad_func = RadialFunction(*radial, (edge_layout.lmax + 1) * 2 * config.channels)
        self.so2_conv_1 = SO2Convolution(
            edge_layout,
            2 * config.channels,
            config.hidden_channels,
            config.extra_channels,
            None if config.radial_by_degree else radial,
        )
        self.alpha_norm = nn.LayerNorm(config.alpha_channels) if config.renormalize else None
        bound = 1 / math.sqrt(config.alpha_channels)
        dot = torch.empty(config.num_heads, config.alpha_channels).uniform_(-bound, bound)
        self.alpha_dot = nn.Parameter(dot)
        values = config.num_heads * config.value_channels
        self.so2_conv_2 = SO2Convolution(edge_layout, config.hidden_channels, values)
        self.proj = SO3Linear(values, out_channels, edge_layout.lmax)
        out_layout = edge_layout
        if out_degree is not None:
            out_layout = layout(out_degree, min(edge_layout.mmax, out_degree), out_degree)
        self.spec = AttentionSpec(
            num_heads=config.num_heads,
            alpha_channels=config.alpha_channels,
            value_channels=config.value_channels,
            hidden_channels=config.hidden_channels,
            activation=config.activation,
            grid_resolution=config.grid_resolution,
            radial_by_degree=config.radial_by_degree,
            out_layout=out_layout,
        )

    def forward(self, x: Tensor, inputs: EdgeInputs) -> Tensor:
        """Attend to each atom's neighbours.

        Args:
            x: [rows, (lmax + 1)^2, C], features of the atoms computed here.
            inputs: what it reads of the edges.

        Returns:
            [rows, (lmax + 1)^2, out_channels], or [rows, 2 l + 1, out_channels] for one degree l.
        """
        edges = inputs.edges
        mask = None
        if self.training and self.alpha_drop > 0:
            ones = x.new_ones(edges.num_edges, self.spec.num_heads)
            mask = nn.functional.dropout(ones, self.alpha_drop)
        if edges.share is not None:
            x = edges.share.gather(x)
        weights = self._weights(inputs)
        dtype = product_dtype(weights)
        prepared = kept(
            self,
            "weights of the edges",
            dtype,
            lambda: PreparedWeights.of(weights.including(inputs.basis), dtype),
        )
        y = edge_attention(x, edges, inputs.basis, weights, self.spec, mask, prepared)
        if self.out_degree is None:
            projected: Tensor = self.proj(y)
            return projected
        with without_autocast(y.device):  # a result keeps its digits
            y = y.to(self.proj.weight.dtype) @ self.proj.weight[self.out_degree].t()
        higher_orders = self.so2_conv_2.weights()[0][self.out_degree + 1 :]
        return touch(y, self.proj.bias, *higher_orders)

    def _weights(self, inputs: EdgeInputs) -> AttentionWeights:
        radial = cast("RadialFunction", self.rad_func or self.so2_conv_1.rad_func)
        source = self.source_embedding or inputs.source_embedding
        target = self.target_embedding or inputs.target_embedding
        conv_1, conv_1_bias = self.so2_conv_1.weights()
        if self.out_degree is None:
            conv_2, conv_2_bias = self.so2_conv_2.weights()
        else:
            conv_2, conv_2_bias = self.so2_conv_2.weights_of_degree(self.out_degree)
        norm = None if self.alpha_norm is None else (self.alpha_norm.weight, self.alpha_norm.bias)
        return AttentionWeights(
            radial=radial.weights(source, target),
            conv_1=conv_1,
            conv_1_bias=conv_1_bias,
            alpha_norm=norm,
            alpha_dot=self.alpha_dot,
            conv_2=conv_2,
            conv_2_bias=conv_2_bias,
        )
