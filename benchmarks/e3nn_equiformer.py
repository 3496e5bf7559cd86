"""Equiformer as its authors compute it: every product over irreps by e3nn's modules, for all edges.

What :mod:`benchmarks.equiformer_v1` compares with, and an independent check of the numbers. It has
the parameters of our ``Equiformer``, under the same names, and nothing else of its layers: tensor
products are e3nn's generated ``TensorProduct``, linear layers its ``o3.Linear`` (the authors' own
is a ``FullyConnectedTensorProduct`` with a scalar, which does more work), gates its ``Gate``.
Features have e3nn's order, the 2l + 1 components of a channel beside each other. Edges come from
our search, which is not what is compared.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from e3nn import nn as e3nn_nn
from e3nn import o3
from e3nn.math import normalize2mom
from fairchem.core.common.registry import registry
from torch import Tensor

from fairchem_equiformer.graph.build import build_graph
from fairchem_equiformer.models.equiformer_v1 import Equiformer

if TYPE_CHECKING:
    from fairchem_equiformer.nn.irreps.activation import Gate
    from fairchem_equiformer.nn.irreps.attention import GraphAttention
    from fairchem_equiformer.nn.irreps.block import IrrepsBlock
    from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
    from fairchem_equiformer.nn.irreps.norm import IrrepsLayerNorm
    from fairchem_equiformer.so3.depthwise import DepthwisePaths

SCALAR = o3.Irrep(0, 1)
SLOPE = 0.2  # of the smooth leaky ReLU, on the left


class Edges(NamedTuple):
    """What all layers read of the edges."""

    source: Tensor
    target: Tensor
    basis: Tensor  # [E, num_basis]
    harmonics: Tensor  # [E, irreps_sh.dim]
    num_atoms: int


@registry.register_model("e3nn_equiformer")
class E3nnEquiformer(Equiformer):
    """Parameters of ours, arithmetic of e3nn's.

    Raises:
        ValueError: where something was asked for that the comparison leaves out.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        config = self.config
        if config.alpha_drop or config.drop_path_rate or config.regress_forces:
            raise ValueError("only energies, without dropout, are compared with e3nn's way")

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Energies [B], as ours."""
        config = self.config
        graph = build_graph(data, config.graph(otf=self.otf_graph))
        harmonics = o3.spherical_harmonics(
            config.irreps("irreps_sh"), graph.vector, normalize=True, normalization="component"
        )
        distance = graph.distance.to(self.norm.weight.dtype)
        basis = self.distance_expansion(distance)
        edges = Edges(graph.source, graph.target, basis, harmonics.to(basis), graph.num_nodes)
        x = self._embedding(graph.atomic_numbers, graph.tags, edges)
        for block in self.blocks:
            x = _block(block, x, edges)
        x = _norm(self.norm, x)
        head = self.energy_head
        hidden = normalize2mom(F.silu)(head.linear_1(x[:, : head.channels]))
        energy = hidden.new_zeros(graph.num_graphs)
        energy = energy.index_add(0, graph.batch, head.linear_2(hidden)[:, 0])
        return {"energy": energy / math.sqrt(config.avg_num_nodes)}

    def _embedding(self, elements: Tensor, tags: Tensor, edges: Edges) -> Tensor:
        embedding = self.edge_degree_embedding
        paths = embedding.product.paths
        scalars = embedding.scalars.weight[0] + embedding.scalars.bias
        ones = F.pad(scalars, (0, paths.irreps_in.dim - len(scalars)))
        weights = embedding.product.radial.net(edges.basis)
        product = product_module(paths, shared=False)
        messages = product(ones.expand(len(edges.source), -1), edges.harmonics, weights)
        x = _sum(linear(embedding.linear, messages), edges) / embedding.divisor
        one_hots = [(self.atom_embedding, elements)]
        if self.tag_embedding is not None:
            one_hots.append((self.tag_embedding, tags))
        for table, kind in one_hots:
            atoms = F.one_hot(kind.long(), len(table.weight)).to(x) @ table.weight + table.bias
            x = x + F.pad(atoms, (0, x.shape[1] - atoms.shape[1]))
        return x


def _block(block: IrrepsBlock, x: Tensor, edges: Edges) -> Tensor:
    x = x + _attention(block.ga, _norm(block.norm_1, x), edges)
    hidden = linear(block.ffn.linear_1, _norm(block.norm_2, x))
    branch = linear(block.ffn.linear_2, _gated(block.ffn.gate, hidden))
    return branch + (x if block.shortcut is None else linear(block.shortcut, x))


def _attention(ga: GraphAttention, x: Tensor, edges: Edges) -> Tensor:
    sent = linear(ga.source, x)[edges.source] + linear(ga.target, x)[edges.target]
    weights = ga.product.radial.net(edges.basis)
    message = product_module(ga.product.paths, shared=False)(sent, edges.harmonics, weights)
    values_of = {
        "NonLinearMessage": _nonlinear_message,
        "LinearMessage": _linear_message,
        "DotProductMessage": _dot_product_message,
    }[type(ga.message).__name__]
    logits, values = values_of(ga, message, edges, x)
    index = edges.target[:, None].expand_as(logits)
    peak = logits.new_full((edges.num_atoms, ga.num_heads), -torch.inf)
    peak = peak.scatter_reduce(0, index, logits.detach(), "amax")
    alpha = torch.exp(logits - peak[edges.target])
    alpha = alpha / _sum(alpha, edges)[edges.target]
    weighted = [
        (part.unflatten(1, (ga.num_heads, -1)) * alpha[:, :, None, None]).flatten(1)
        for part in _parts(values, ga.irreps_values)
    ]
    return linear(ga.projection, _sum(torch.cat(weighted, dim=1), edges))


def _nonlinear_message(
    ga: GraphAttention, message: Tensor, edges: Edges, _: Tensor
) -> tuple[Tensor, Tensor]:
    made = ga.message
    logits = _mlp_logits(made.logits.dot, linear(made.alpha, message))
    hidden = _gated(made.gate, linear(made.linear, message))
    product = product_module(made.product.paths, shared=True)
    values = product(hidden, edges.harmonics, made.product.weight)
    return logits, linear(made.value, values)


def _linear_message(
    ga: GraphAttention, message: Tensor, _: Edges, __: Tensor
) -> tuple[Tensor, Tensor]:
    both = linear(ga.message.linear, message)
    alpha, values = both.tensor_split([ga.message.num_alpha], dim=1)
    return _mlp_logits(ga.message.logits.dot, alpha), values


def _dot_product_message(
    ga: GraphAttention, message: Tensor, edges: Edges, x: Tensor
) -> tuple[Tensor, Tensor]:
    made = ga.message
    queries = linear(made.query, x)[edges.target]
    both = _parts(linear(made.key_value, message), made.key_value.irreps_out)
    keys, values = zip(*(part.chunk(2, dim=1) for part in both), strict=True)
    logits = message.new_zeros(len(message), ga.num_heads)
    for query, key in zip(_parts(queries, made.irreps), keys, strict=True):
        scale = math.sqrt(made.irreps_per_head * query.shape[2])
        by_head = (query * key / scale).unflatten(1, (ga.num_heads, -1))
        logits = logits + by_head.sum((2, 3))
    return logits, torch.cat([value.flatten(1) for value in values], dim=1)


def _mlp_logits(dot: Tensor, scalars: Tensor) -> Tensor:
    activated = _smooth_leaky_relu()(scalars.unflatten(1, dot.shape))
    return torch.einsum("ehc,hc->eh", activated, dot)


@cache
def _smooth_leaky_relu() -> Any:
    def function(x: Tensor) -> Tensor:
        return (1 + SLOPE) / 2 * x + (1 - SLOPE) / 2 * x * (2 * torch.sigmoid(x) - 1)

    return normalize2mom(function)


def _norm(norm: IrrepsLayerNorm, x: Tensor) -> Tensor:
    weights = norm.weight.split([mul for mul, _ in norm.irreps])
    found = []
    for part, (_, ir), weight in zip(_parts(x, norm.irreps), norm.irreps, weights, strict=True):
        centred = part - part.mean(1, keepdim=True) if ir == SCALAR else part
        scaled = centred * (centred.square().mean((1, 2), keepdim=True) + 1e-5).rsqrt()
        scaled = scaled * weight[:, None]
        found.append((scaled + norm.bias[:, None] if ir == SCALAR else scaled).flatten(1))
    return torch.cat(found, dim=1)


def _parts(x: Tensor, irreps: o3.Irreps) -> list[Tensor]:
    """Each irrep as [n, channels, 2l + 1]."""
    return [
        x[:, columns].unflatten(1, (mul, ir.dim))
        for (mul, ir), columns in zip(irreps, irreps.slices(), strict=True)
    ]


def _sum(x: Tensor, edges: Edges) -> Tensor:
    return x.new_zeros(edges.num_atoms, x.shape[1]).index_add(0, edges.target, x)


def linear(layer: IrrepsLinear, x: Tensor) -> Tensor:
    """Evaluate e3nn's linear layer with the weights of ours.

    It divides by the root of the inputs' number, which our weights have in them.
    """
    module = _linear_module(layer.irreps_in, layer.irreps_out, bias=layer.bias is not None)
    weights = [
        layer.weight[str(ir)].t().flatten() * math.sqrt(mul)
        for mul, ir in layer.irreps_in
        if str(ir) in layer.weight
    ]
    return module(x, torch.cat(weights), layer.bias)


@cache
def _linear_module(irreps_in: o3.Irreps, irreps_out: o3.Irreps, *, bias: bool) -> o3.Linear:
    biases = [bias and ir == SCALAR for _, ir in irreps_out]
    return o3.Linear(
        irreps_in, irreps_out, internal_weights=False, shared_weights=True, biases=biases
    )


@cache
def product_module(paths: DepthwisePaths, *, shared: bool) -> o3.TensorProduct:
    """Return e3nn's product, with an irrep of the result for each path, in the order of ours."""
    order = sorted(paths.paths, key=lambda path: (path.out, path.channel))
    irreps_out = [(paths.irreps_in[p.feature].mul, paths.irreps_out[p.out].ir) for p in order]
    return o3.TensorProduct(
        paths.irreps_in,
        paths.irreps_sh,
        irreps_out,
        [(p.feature, p.harmonic, order.index(p), "uvu", True) for p in paths.paths],
        irrep_normalization="component",
        path_normalization="none",
        internal_weights=False,
        shared_weights=shared,
    )


def _gated(gate: Gate, x: Tensor) -> Tensor:
    """e3nn's gate, which reads irreps in the order that e3nn sorts them in."""
    module = _gate_module(gate.irreps_out)
    places = [ir for _, ir in gate.irreps_in]
    slices = gate.irreps_in.slices()
    sorted_ = [x[:, slices[places.index(ir)]] for _, ir in module.irreps_in.simplify()]
    return module(torch.cat(sorted_, dim=1))


@cache
def _gate_module(irreps_out: o3.Irreps) -> e3nn_nn.Gate:
    scalars, gated = irreps_out[:1], irreps_out[1:]
    gates = o3.Irreps([(mul, SCALAR) for mul, _ in gated])
    sigmoids = [torch.sigmoid] * len(gates)
    return e3nn_nn.Gate(scalars, [F.silu], gates, sigmoids, gated)
