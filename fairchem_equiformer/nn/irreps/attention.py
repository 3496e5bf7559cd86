"""Equivariant graph attention of Equiformer: with non-linear or linear messages, or dot products.

    m      = DTP(source linear(x_source) + target linear(x_target), harmonics; radial weights)
    alpha  = softmax over the edges of a target of z
    result = linear(sum over the edges of alpha v)

MLP attention has z = a . SmoothLeakyReLU(scalars of m), dot-product attention z = q . k. Values are
linear in what they are made of, and so are keys: their linear layers run once for each atom and
head, after the sum and before the dot product (ops/head_sums.py), not once for each edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.nn.irreps.activation import Gate, moment_scale
from fairchem_equiformer.nn.irreps.edges import IrrepsEdges
from fairchem_equiformer.nn.irreps.linear import IrrepsLinear, LinearLayers, PreparedLayers
from fairchem_equiformer.nn.irreps.tensor_product import RadialTensorProduct, TensorProduct
from fairchem_equiformer.ops.attention_softmax import attention_logits, edge_softmax
from fairchem_equiformer.ops.depthwise_tensor_product import Ends
from fairchem_equiformer.ops.head_sums import Targets, head_dot, head_sum
from fairchem_equiformer.ops.over_chunks import Part
from fairchem_equiformer.ops.segments import segment_sum, take
from fairchem_equiformer.so3.irreps import SCALAR, blocks, channels_of, copies, joined, places


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
        self._scale = moment_scale(smooth_leaky_relu)

    def forward(self, scalars: Tensor, *, twice: bool) -> Tensor:
        """[E, heads * channels] to [E, heads]; ``twice`` as of IrrepsEdges."""
        dot = self.dot * self._scale
        return attention_logits(scalars.unflatten(1, self.dot.shape), None, dot, twice=twice)


class Read(NamedTuple):
    """What messages are made of beside the tensor product."""

    harmonics: Tensor  # [e, irreps_sh.dim]
    rows: tuple[Tensor, ...]  # [n, ...], what Message.rows gave, of the targets
    targets: Targets
    layers: PreparedLayers | None  # what Message.prepared gave
    kept: list[Tensor] | None  # as of Part
    twice: bool  # as of IrrepsEdges


class Message(nn.Module):
    """What attention makes of the tensor product m of each edge [E, irreps.dim].

    Attributes:
        values: linear layer whose last channels are the values. It follows the sum over edges.
    """

    values: IrrepsLinear

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """What is read of the targets' features [rows, irreps_x.dim]."""
        return ()

    def edge_parameters(self) -> list[nn.Parameter]:
        """Parameters that the edges read."""
        return list(self.parameters())

    def prepared(self) -> PreparedLayers | None:
        """Layers of m that run on edges, if any, made ready for all of them."""
        return None

    def forward(self, m: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """Logits [e, heads], and what the values are linear in [e, values.irreps_in.dim]."""
        raise NotImplementedError


class NonLinearMessage(Message):
    """Logits from the scalars of m; values from a gate and a second tensor product."""

    def __init__(self, config: IrrepsAttentionConfig, irreps_in: o3.Irreps) -> None:
        super().__init__()
        scalars = o3.Irreps([(config.num_heads * config.alpha_channels, SCALAR)])
        self.alpha = IrrepsLinear(irreps_in, scalars)
        self.logits = MLPLogits(config.num_heads, config.alpha_channels)
        gate = Gate(config.irreps)
        self.linear = IrrepsLinear(irreps_in, gate.irreps_in)
        self._places = places(irreps_in)
        self._both = LinearLayers(self.alpha, self.linear)
        self.gate = gate
        self.product = TensorProduct(config.irreps, config.irreps_sh, config.irreps_values)
        self.value = IrrepsLinear(self.product.irreps_out, config.irreps_values)

    @property
    def values(self) -> IrrepsLinear:  # type: ignore[override]
        """See :class:`Message`."""
        return self.value

    def prepared(self) -> PreparedLayers | None:
        """See :class:`Message`."""
        return None if torch.compiler.is_compiling() else self._both.prepared()

    def forward(self, m: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """See :class:`Message`."""
        if read.layers is None:
            parts = blocks(m, self._places)
            scalars, hidden = self.alpha.of_blocks(parts), self.linear.of_blocks(parts)
        else:
            scalars, hidden = read.layers(m, read.kept)
        logits = self.logits(scalars, twice=read.twice)
        return logits, self.product(self.gate(hidden), read.harmonics)


class LinearMessage(Message):
    """Logits and values from one linear layer on m."""

    def __init__(self, config: IrrepsAttentionConfig, irreps_in: o3.Irreps) -> None:
        super().__init__()
        self.num_alpha = config.num_heads * config.alpha_channels
        (scalars, _), *others = config.irreps_values
        both = o3.Irreps([(self.num_alpha + scalars, SCALAR), *others])
        self.linear = IrrepsLinear(irreps_in, both)
        self.logits = MLPLogits(config.num_heads, config.alpha_channels)

    @property
    def values(self) -> IrrepsLinear:  # type: ignore[override]
        """See :class:`Message`."""
        return self.linear

    def forward(self, m: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """See :class:`Message`."""
        return self.logits(self.linear.first(m, self.num_alpha), twice=read.twice), m


class DotProductMessage(Message):
    """Logits q . k with queries from the target's features; keys and values from one linear on m.

    Each irrep of a query is divided by sqrt(irreps of a head * (2l + 1)), so that components of
    variance one make logits of variance one. The keys' bias adds the same to all logits of a target
    and head, which the softmax takes away again: it is left out.
    """

    def __init__(
        self, config: IrrepsAttentionConfig, irreps_in: o3.Irreps, irreps_x: o3.Irreps
    ) -> None:
        super().__init__()
        self.irreps = config.irreps_values
        self._places = places(self.irreps)
        self.num_heads = config.num_heads
        self.irreps_per_head = config.irreps_head.num_irreps
        self.query = IrrepsLinear(irreps_x, self.irreps)
        self.key_value = IrrepsLinear(irreps_in, copies(2, self.irreps))

    @property
    def values(self) -> IrrepsLinear:  # type: ignore[override]
        """See :class:`Message`."""
        return self.key_value

    def edge_parameters(self) -> list[nn.Parameter]:
        """See :class:`Message`."""
        return list(self.key_value.parameters())

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries [rows, irreps.dim]."""
        parts = blocks(self.query(x), self._places)
        return (joined([p / math.sqrt(self.irreps_per_head * p.shape[1]) for p in parts]),)

    def forward(self, m: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """See :class:`Message`."""
        (queries,) = read.rows
        taken_through = self.key_value.through(queries, self._places, self.num_heads)
        return head_dot(m, taken_through.to(m.dtype), read.targets), m


def cut_off(alpha: Tensor, envelope: Tensor, part: Part) -> Tensor:
    """Attention weights that go to zero smoothly where the envelope does, also those of one edge.

        c_ij c_ij alpha_ij / (sum over j of c_ij alpha_ij)

    Args:
        alpha: [e, heads].
        envelope: c [e].
        part: which has these edges.
    """
    c = envelope[:, None]
    weights = c * alpha
    total = segment_sum(weights, part.target, part.num_rows).clamp(min=1e-30)
    return c * weights / take(total, 0, part.target)


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
        self._values = places(config.irreps_values)
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

    def _message(self, config: IrrepsAttentionConfig, irreps_x: o3.Irreps) -> Message:
        irreps = self.product.irreps_out
        if config.attention == "dot_product":
            return DotProductMessage(config, irreps, irreps_x)
        return (NonLinearMessage if config.nonlinear_message else LinearMessage)(config, irreps)

    def forward(self, x: Tensor, edges: IrrepsEdges) -> Tensor:
        """[rows, irreps_in.dim] to [rows, irreps_out.dim]."""
        read = [edges.basis, edges.harmonics]
        if edges.envelope is not None:
            read.append(edges.envelope)
        if self.training and self.alpha_drop.p > 0:
            read.append(self.alpha_drop(x.new_ones(edges.num_edges, self.num_heads)))
        layers = self.message.prepared()
        sums: Tensor = edges.sum(
            partial(
                self._attend,
                layers=layers,
                twice=edges.twice,
                smooth=edges.envelope is not None,
            ),
            edges.of_all_atoms(self.source(x)),
            edges=read,
            rows=(self.target(x), *self.message.rows(x)),
            parameters=(*self.product.parameters(), *self.message.edge_parameters()),
        )
        if layers is not None:
            layers.forget()
        projected: Tensor = self.projection(sums)
        return projected

    def _attend(
        self, part: Part, *, layers: PreparedLayers | None, twice: bool, smooth: bool
    ) -> Tensor:
        """Sum over some atoms' edges of alpha times the values: [n, irreps_values.dim]."""
        basis, harmonics, *others = part.edges
        features, *rows = part.rows
        ends = Ends(part.sources, features, part.source, part.target)
        m = self.product(ends, harmonics, basis)
        first_edges = torch.arange(part.num_rows + 1, device=m.device)
        targets = Targets(part.target, torch.searchsorted(part.target, first_edges))
        read = Read(harmonics, tuple(rows), targets, layers, part.kept, twice)
        logits, x = self.message(m, read)
        alpha = edge_softmax(logits, targets)
        if smooth:
            envelope, *others = others
            alpha = cut_off(alpha, envelope, part)
        if others:
            alpha = alpha * others[0]  # dropout
        sums = head_sum(alpha.to(x.dtype), x, targets)
        total = segment_sum(alpha, part.target, part.num_rows)
        return self.message.values.of_heads(sums, total, self._values)
