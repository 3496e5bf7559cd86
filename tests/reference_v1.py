"""Equiformer (V1) once more, as it reads: e3nn's modules and order, an edge and an atom at a time.

Only the parameters are the model's own, and the order in which it writes channels. Everything is
in float64, and slow.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from e3nn import o3
from e3nn.math import normalize2mom
from e3nn.nn import Gate

if TYPE_CHECKING:
    from torch import Tensor

    from fairchem_equiformer.graph.edge_graph import EdgeGraph
    from fairchem_equiformer.models import Equiformer
    from fairchem_equiformer.nn.irreps.attention import GraphAttention
    from fairchem_equiformer.nn.irreps.linear import IrrepsLinear
    from fairchem_equiformer.nn.irreps.norm import IrrepsLayerNorm

SCALAR = o3.Irrep("0e")


@cache
def made(module: Any, *args: Any, **keys: Any) -> Any:
    """One of e3nn's modules with its tables in float64; made once, for that takes long."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return module(*args, **keys)
    finally:
        torch.set_default_dtype(before)


def linear(layer: IrrepsLinear, x: Tensor) -> Tensor:
    """e3nn's linear layer, which divides by the square root of its inputs."""
    irreps_in, irreps_out = layer.irreps_in.simplify(), layer.irreps_out
    biases = [ir == SCALAR and layer.bias is not None for _, ir in irreps_out]
    theirs = made(o3.Linear, irreps_in, irreps_out, biases=tuple(biases))
    weights = []
    for instruction in theirs.instructions:
        if instruction.i_in >= 0:
            own = layer.weight[str(irreps_out[instruction.i_out].ir)]
            weights.append((own.t() / instruction.path_weight).flatten())
    bias = layer.bias if layer.bias is not None else x.new_zeros(0)
    return theirs(x, torch.cat(weights), bias)


def norm(layer: IrrepsLayerNorm, x: Tensor) -> Tensor:
    """Every irrep of every atom by itself."""
    parts, first = [], 0
    for (mul, ir), columns in zip(layer.irreps, layer.irreps.slices(), strict=True):
        field = x[:, columns].view(-1, mul, ir.dim)
        if ir == SCALAR:
            field = field - field.mean(dim=1, keepdim=True)
        variance = (field**2).sum(dim=(1, 2), keepdim=True) / (mul * ir.dim)
        field = field / (variance + 1e-5).sqrt() * layer.weight[first : first + mul, None]
        if ir == SCALAR:
            field = field + layer.bias[:, None]
        parts.append(field.flatten(1))
        first += mul
    return torch.cat(parts, dim=1)


def gate(irreps: o3.Irreps, x: Tensor) -> Tensor:
    gated = irreps[1:]
    gates = o3.Irreps([(gated.num_irreps, SCALAR)])
    silu = torch.nn.functional.silu
    theirs = made(Gate, irreps[:1], (silu,), gates, (torch.sigmoid,), gated)
    own = o3.Irreps([(irreps.num_irreps, SCALAR), *gated])
    x = reordered(x, own, theirs.irreps_in.simplify())
    return reordered(theirs(x), theirs.irreps_out.simplify(), irreps)


def reordered(x: Tensor, irreps: o3.Irreps, wanted: o3.Irreps) -> Tensor:
    """The same irreps in another order."""
    parts = {ir: x[:, columns] for (_, ir), columns in zip(irreps, irreps.slices(), strict=True)}
    return torch.cat([parts[ir] for _, ir in wanted], dim=1)


def tensor_product(
    irreps: o3.Irreps, irreps_sh: o3.Irreps, wanted: o3.Irreps, x: Tensor, sh: Tensor, w: Tensor
) -> Tensor:
    """e3nn's, channel by channel, sorted so that each irrep of the result stands once."""
    paths = [
        (i, j, mul, ir)
        for i, (mul, ir_x) in enumerate(irreps)
        for j, (_, ir_sh) in enumerate(irreps_sh)
        for ir in ir_x * ir_sh
        if ir in [kind for _, kind in wanted] or ir == SCALAR
    ]
    irreps_out = o3.Irreps([(mul, ir) for _, _, mul, ir in paths])
    product = made(
        o3.TensorProduct,
        irreps,
        irreps_sh,
        irreps_out,
        tuple((i, j, k, "uvu", True) for k, (i, j, _, _) in enumerate(paths)),
        irrep_normalization="component",
        path_normalization="none",
        shared_weights=False,
        internal_weights=False,
    )
    out = product(x, sh, w.expand(len(x), -1))
    found = {}
    for (_, ir), columns in zip(irreps_out, irreps_out.slices(), strict=True):
        found.setdefault(ir, []).append(out[:, columns])
    ordered = sorted(found, key=lambda ir: (ir.l, -ir.p))
    return torch.cat([torch.cat(found[ir], dim=1) for ir in ordered], dim=1)


def heads(irreps: o3.Irreps, number: int, x: Tensor) -> list[Tensor]:
    """Features of each head, from those of all: for each irrep [E, heads, channels, 2l + 1]."""
    return [
        x[:, columns].view(len(x), number, mul // number, ir.dim)
        for (mul, ir), columns in zip(irreps, irreps.slices(), strict=True)
    ]


class Reference:
    """The model's outputs, from its parameters."""

    def __init__(self, model: Equiformer, graph: EdgeGraph) -> None:
        self.model, self.config, self.graph = model, model.config, graph
        self.irreps = o3.Irreps(self.config.irreps_node_embedding)
        self.irreps_sh = o3.Irreps(self.config.irreps_sh)
        degrees = [ir.l for _, ir in self.irreps_sh]
        self.sh = o3.spherical_harmonics(degrees, graph.vector, True, "component")
        bessel = self.config.distance_function == "bessel"
        self.basis = self.bessel_functions() if bessel else self.gaussians()

    def gaussians(self) -> Tensor:
        expansion = self.model.distance_expansion
        x = expansion.weight * self.graph.distance[:, None] / self.config.max_radius
        std = expansion.std.abs() + 1e-5
        z = (x + expansion.bias - expansion.mean) / std
        return torch.exp(-0.5 * z**2) / (math.sqrt(2 * math.pi) * std)

    def bessel_functions(self) -> Tensor:
        distance, cutoff = self.graph.distance[:, None], self.config.max_radius
        x = distance / cutoff
        envelope = 1 - 21 * x**5 + 35 * x**6 - 15 * x**7
        waves = torch.sin(self.model.distance_expansion.frequencies * x)
        return envelope * math.sqrt(2 / cutoff) * waves / distance

    def radial(self, function: torch.nn.Module) -> Tensor:
        return function.net(self.basis)

    def attention(self, layer: GraphAttention, x: Tensor) -> Tensor:
        config, graph, source, target = (
            self.config,
            self.graph,
            self.graph.source,
            self.graph.target,
        )
        message = linear(layer.source, x)[source] + linear(layer.target, x)[target]
        weights = self.radial(layer.product.radial)
        message = tensor_product(
            self.irreps, self.irreps_sh, self.irreps, message, self.sh, weights
        )
        logits, values = self.logits_and_values(layer, message, x)
        total = x.new_zeros(graph.num_nodes, values.shape[1])
        for atom in range(graph.num_nodes):
            edges = (target == atom).nonzero()[:, 0]
            alpha = torch.softmax(logits[edges], dim=0)
            parts = [
                (part * alpha[:, :, None, None]).sum(0).flatten()
                for part in heads(layer.irreps_values, config.num_heads, values[edges])
            ]
            total[atom] = torch.cat(parts)
        return linear(layer.projection, total)

    def logits_and_values(
        self, layer: GraphAttention, message: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        config, own = self.config, layer.message
        number, head = config.num_heads, o3.Irreps(config.irreps_head)
        if config.attention == "dot_product":
            queries = heads(layer.irreps_values, number, linear(own.query, x)[self.graph.target])
            both = heads(own.key_value.irreps_out, 2, linear(own.key_value, message))
            logits = 0.0
            for query, both_of, (_, ir) in zip(queries, both, head, strict=True):
                key = both_of[:, 0].view_as(query)
                logits = logits + (query * key).sum((2, 3)) / math.sqrt(head.num_irreps * ir.dim)
            return logits, torch.cat([part[:, 1].flatten(1) for part in both], dim=1)
        if config.nonlinear_message:
            alpha = linear(own.alpha, message)
            inner = gate(self.irreps, linear(own.linear, message))
            wanted = layer.irreps_values
            inner = tensor_product(
                self.irreps, self.irreps_sh, wanted, inner, self.sh, own.product.weight
            )
            values = linear(own.value, inner)
        else:
            both = linear(own.linear, message)
            width = number * head[0].mul
            alpha, values = both[:, :width], both[:, width:]
        scale = normalize2mom(leaky).cst
        scalars = scale * leaky(alpha.view(len(alpha), number, -1))
        return (scalars * own.logits.dot).sum(2), values

    def outputs(self) -> dict[str, Tensor]:
        model, config, graph = self.model, self.config, self.graph
        scalars = model.atom_embedding.weight[graph.atomic_numbers] + model.atom_embedding.bias
        if model.tag_embedding is not None:
            scalars = scalars + model.tag_embedding.weight[graph.tags] + model.tag_embedding.bias
        x = self.with_scalars(scalars) + self.edge_degree()
        for block in model.blocks:
            x = x + self.attention(block.ga, norm(block.norm_1, x))
            hidden = linear(block.ffn.linear_1, norm(block.norm_2, x))
            hidden = gate(o3.Irreps(config.irreps_mlp_mid), hidden)
            branch = linear(block.ffn.linear_2, hidden)
            x = branch + (x if block.shortcut is None else linear(block.shortcut, x))
        x = norm(model.norm, x)
        out = {"energy": self.energy(x)}
        for name, head in model.vector_heads.items():
            out[name] = self.attention(head, x)
        return out

    def with_scalars(self, scalars: Tensor) -> Tensor:
        rest = self.irreps.dim - scalars.shape[1]
        return torch.cat([scalars, scalars.new_zeros(len(scalars), rest)], dim=1)

    def edge_degree(self) -> Tensor:
        layer, graph = self.model.edge_degree_embedding, self.graph
        x = self.with_scalars(layer.scalars.weight + layer.scalars.bias)
        weights = self.radial(layer.product.radial)
        message = tensor_product(
            self.irreps,
            self.irreps_sh,
            self.irreps,
            x.expand(graph.num_edges, -1),
            self.sh,
            weights,
        )
        message = linear(layer.linear, message)
        total = message.new_zeros(graph.num_nodes, message.shape[1])
        total = total.index_add(0, graph.target, message)
        return total / math.sqrt(self.config.avg_degree)

    def energy(self, x: Tensor) -> Tensor:
        head, graph = self.model.energy_head, self.graph
        hidden = head.linear_1(x[:, : o3.Irreps(self.config.irreps_feature)[0].mul])
        atoms = head.linear_2(normalize2mom(torch.nn.functional.silu)(hidden))[:, 0]
        total = atoms.new_zeros(graph.num_graphs).index_add(0, graph.batch, atoms)
        return total / math.sqrt(self.config.avg_num_nodes)


def leaky(x: Tensor) -> Tensor:
    """Smooth leaky ReLU of slope 0.2."""
    return (1 + 0.2) / 2 * x + (1 - 0.2) / 2 * x * (2 * torch.sigmoid(x) - 1)
