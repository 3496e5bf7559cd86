"""EquiformerV2 by its formulas: dense, in one piece, differentiated by autograd.

Nothing here is shared with the package but the names of parameters and config keys. Coefficients
stay in e3nn's order throughout, (l, m) at ``l^2 + l + m``; orders |m| > mmax are zeros. Sections
and equations are those of the EquiformerV2 paper (Liao et al., ICLR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from e3nn import o3
from torch import Tensor
from torch.distributions import Normal

if TYPE_CHECKING:
    from fairchem_equiformer import EquiformerV2
    from fairchem_equiformer.graph.edge_graph import EdgeGraph
    from fairchem_equiformer.models.config import ModelConfig

Parameters = dict[str, Tensor]


def under(parameters: Parameters, prefix: str) -> Parameters:
    """Parameters whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in parameters.items()
        if name.startswith(prefix)
    }


# Geometry


def index(degree: int, order: int) -> int:
    """Position of (l, m) among the coefficients."""
    return degree**2 + degree + order


def per_coefficient(per_degree: Tensor) -> Tensor:
    """Repeat entry l of the first axis 2l + 1 times: [lmax + 1, ...] to [(lmax + 1)^2, ...]."""
    repeats = torch.arange(len(per_degree), device=per_degree.device) * 2 + 1
    return per_degree.repeat_interleave(repeats, dim=0)


@cache
def _harmonics(lmax: int) -> o3.SphericalHarmonics:
    return o3.SphericalHarmonics(list(range(lmax + 1)), normalize=True, normalization="norm")


def harmonics(lmax: int, vector: Tensor) -> Tensor:
    """Real harmonics of directions [..., 3], each degree of norm 1: [..., (lmax + 1)^2]."""
    return _harmonics(lmax)(vector)


def edge_frame(vector: Tensor) -> Tensor:
    """R with R v = |v| y whose x axis is horizontal: rows y × v, v and their cross product."""
    direction = vector / vector.norm(dim=-1, keepdim=True)
    x, _, z = direction.unbind(-1)
    length = torch.hypot(x, z)[:, None]
    horizontal = torch.stack([z, torch.zeros_like(x), -x], dim=-1) / length
    horizontal = torch.where(length == 0, horizontal.new_tensor([1.0, 0.0, 0.0]), horizontal)
    third = torch.linalg.cross(horizontal, direction)
    return torch.stack([horizontal, direction, third], dim=-2)


def wigner(rotation: Tensor, lmax: int) -> Tensor:
    """D with Y(R p) = D Y(p), solved at points p: [E, (lmax + 1)^2, (lmax + 1)^2]."""
    generator = torch.Generator().manual_seed(lmax)
    points = torch.randn(8 * lmax + 8, 3, generator=generator, dtype=torch.float64)
    points = points.to(rotation.device)
    before, after = harmonics(lmax, points), harmonics(lmax, points @ rotation.transpose(-1, -2))
    blocks = rotation.new_zeros(len(rotation), (lmax + 1) ** 2, (lmax + 1) ** 2)
    for degree in range(lmax + 1):
        rows = slice(degree**2, (degree + 1) ** 2)
        solution = torch.linalg.pinv(before[:, rows]) @ after[..., rows]
        blocks[:, rows, rows] = solution.transpose(-1, -2)
    return blocks


def truncation_rescale(lmax: int, mmax: int) -> Tensor:
    """sqrt((2l + 1) / (2 mmax + 1)) for degrees with orders left out, else 1."""
    factors = [math.sqrt(max(1, (2 * degree + 1) / (2 * mmax + 1))) for degree in range(lmax + 1)]
    return per_coefficient(torch.tensor(factors, dtype=torch.float64))


def kept_orders(lmax: int, mmax: int) -> Tensor:
    """1 for |m| <= mmax, else 0."""
    kept = [abs(m) <= mmax for degree in range(lmax + 1) for m in range(-degree, degree + 1)]
    return torch.tensor(kept, dtype=torch.float64)


class Sphere(NamedTuple):
    """The maps G and G^-1 of section A.4, between coefficients and samples at P points."""

    to_grid: Tensor  # [P, K] float64
    from_grid: Tensor  # [K, P] float64

    def to(self, x: Tensor) -> Tensor:
        """G: [B, K, C] to [B, P, C]."""
        return torch.einsum("pk,bkc->bpc", self.to_grid.to(x), x)

    def back(self, samples: Tensor) -> Tensor:
        """G^-1: the inverse of :meth:`to`."""
        return torch.einsum("kp,bpc->bkc", self.from_grid.to(samples), samples)


def latitude_weights(cosines: Tensor) -> Tensor:
    """Weights at which the mean over the latitudes is exact for as many degrees as there are."""
    legendre = np.polynomial.legendre.legvander(cosines.numpy(), len(cosines) - 1).T
    wanted = torch.zeros(len(cosines), dtype=torch.float64)
    wanted[0] = 1  # the mean of P_l over the sphere is 0 for l > 0
    return torch.linalg.solve(torch.from_numpy(legendre.copy()), wanted)


@cache
def sphere(lmax: int, mmax: int, resolution: int | None) -> Sphere:
    """Grid with ``resolution`` latitudes and longitudes, or the fewest that resolve lmax, mmax.

    Samples are sums of harmonics of norm 1, divided by sqrt(lmax + 1).
    """
    rows, columns = 2 * (lmax + 1), 2 * mmax + 1 + (2 if mmax == lmax else 0)
    rows, columns = (resolution, resolution) if resolution else (rows, columns)
    polar = (torch.arange(rows, dtype=torch.float64) + 0.5) * math.pi / rows
    azimuth = torch.arange(columns, dtype=torch.float64) * 2 * math.pi / columns
    points = o3.angles_to_xyz(*torch.meshgrid(azimuth, polar, indexing="ij"))  # [columns, rows, 3]
    values = harmonics(lmax, points).flatten(0, 1)  # [P, K]
    weights = latitude_weights(polar.cos()).repeat(columns) / columns  # [P]
    degrees = torch.arange(lmax + 1, dtype=torch.float64)
    scale = truncation_rescale(lmax, mmax) * kept_orders(lmax, mmax)
    to_grid = values * scale / math.sqrt(lmax + 1)
    from_grid = values * weights[:, None] * per_coefficient(2 * degrees + 1) * scale
    return Sphere(to_grid, from_grid.t() * math.sqrt(lmax + 1))


# Layers


def linear(x: Tensor, parameters: Parameters) -> Tensor:
    """W x + b, b where there is one."""
    return F.linear(x, parameters["weight"], parameters.get("bias"))


def equivariant_linear(x: Tensor, parameters: Parameters) -> Tensor:
    """y[l, m] = W[l] x[l, m], plus b on l = 0."""
    y = torch.einsum("nkc,kdc->nkd", x, per_coefficient(parameters["weight"]))
    bias = torch.zeros_like(y)
    bias[:, 0] = parameters["bias"]
    return y + bias


def layer_norm(x: Tensor, parameters: Parameters) -> Tensor:
    """(x - mean) / std * weight + bias over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / std * parameters["weight"] + parameters["bias"]


def equivariant_norm(x: Tensor, parameters: Parameters, kind: str) -> Tensor:
    """Section 3.4: ``layer_norm``, ``layer_norm_sh`` (separable) or ``rms_norm_sh``."""
    lmax = math.isqrt(x.shape[1]) - 1
    scalars = x[:, :1]
    if kind == "layer_norm_sh":
        mean_squares = [degree_mean_square(x, degree) for degree in range(1, lmax + 1)]
        std = (torch.stack(mean_squares).mean(0) + 1e-5).sqrt()
        unused = parameters["affine_weight"].new_zeros(1, x.shape[2])
        weight = per_coefficient(torch.cat([unused, parameters["affine_weight"]]))[1:]
        return torch.cat(
            [layer_norm(scalars, under(parameters, "norm_l0.")), x[:, 1:] / std * weight], dim=1
        )
    x = torch.cat([scalars - scalars.mean(-1, keepdim=True), x[:, 1:]], dim=1)
    squares = torch.cat([degree_mean_square(x, degree) for degree in range(lmax + 1)], dim=1)
    if kind == "rms_norm_sh":
        squares = squares.mean(1, keepdim=True).expand_as(squares)
    std = per_coefficient((squares + 1e-5).sqrt().transpose(0, 1)).transpose(0, 1)  # [N, K, 1]
    y = x / std * per_coefficient(parameters["affine_weight"])
    return torch.cat([y[:, :1] + parameters["affine_bias"], y[:, 1:]], dim=1)


def degree_mean_square(x: Tensor, degree: int) -> Tensor:
    """Mean of the squares of one degree over orders and channels: [N, 1, 1]."""
    return x[:, degree**2 : (degree + 1) ** 2].square().mean(dim=(1, 2), keepdim=True)


def smooth_leaky_relu(x: Tensor, slope: float = 0.2) -> Tensor:
    """Leaky ReLU with |x| replaced by x tanh(x / 2)."""
    return (1 + slope) / 2 * x + (1 - slope) / 2 * x * torch.tanh(x / 2)


def gate_activation(x: Tensor, gates: Tensor) -> Tensor:
    """SiLU on scalars; every higher degree times the sigmoid of its own gates."""
    lmax = math.isqrt(x.shape[1]) - 1
    factors = torch.sigmoid(gates).view(len(x), lmax, x.shape[2]).transpose(0, 1)
    first = torch.zeros_like(factors[:1])
    factors = per_coefficient(torch.cat([first, factors])).transpose(0, 1)[:, 1:]
    return torch.cat([F.silu(x[:, :1]), x[:, 1:] * factors], dim=1)


def activation(x: Tensor, scalars: Tensor, kind: str, grid: Sphere) -> Tensor:
    """Fig. 2: ``gate``, ``s2`` or ``separable_s2``, with the extra scalars of the first and last.

    Args:
        x: [B, (lmax + 1)^2, C].
        scalars: [B, lmax C], nothing, or [B, C].
    """
    if kind == "gate":
        return gate_activation(x, scalars)
    y = grid.back(F.silu(grid.to(x)))
    return y if kind == "s2" else torch.cat([F.silu(scalars)[:, None], y[:, 1:]], dim=1)


def so2_linear(
    x: Tensor, parameters: Parameters, mmax: int, num_scalars: int
) -> tuple[Tensor, Tensor]:
    """Eq. 8: for each m, (y[m], y[-m]) = (A x[m] - B x[-m], B x[m] + A x[-m]).

    Args:
        x: [E, (lmax + 1)^2, C].
        parameters: ``fc_m0`` and, for m = 1.., ``so2_m_conv.{m - 1}.fc`` with A over B.
        mmax: orders.
        num_scalars: outputs of ``fc_m0`` before the coefficients.

    Returns:
        Scalars [E, num_scalars] and coefficients [E, (lmax + 1)^2, D].
    """
    lmax = math.isqrt(x.shape[1]) - 1
    zonal = [index(degree, 0) for degree in range(lmax + 1)]
    first = linear(x[:, zonal].flatten(1), under(parameters, "fc_m0."))
    scalars, coefficients = first[:, :num_scalars], first[:, num_scalars:]
    coefficients = coefficients.unflatten(1, (lmax + 1, -1))
    y = x.new_zeros(*x.shape[:2], coefficients.shape[2])
    y[:, zonal] = coefficients
    for m in range(1, mmax + 1):
        plus = [index(degree, m) for degree in range(m, lmax + 1)]
        minus = [index(degree, -m) for degree in range(m, lmax + 1)]
        a, b = parameters[f"so2_m_conv.{m - 1}.fc.weight"].chunk(2)
        x_plus, x_minus = x[:, plus].flatten(1), x[:, minus].flatten(1)
        y[:, plus] = (x_plus @ a.t() - x_minus @ b.t()).unflatten(1, (len(plus), -1))
        y[:, minus] = (x_plus @ b.t() + x_minus @ a.t()).unflatten(1, (len(minus), -1))
    return scalars, y


def segment_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax over the edges of each target."""
    out = torch.zeros_like(logits)
    for atom in target.unique():
        edges = target == atom
        out[edges] = torch.softmax(logits[edges], dim=0)
    return out


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sum over the rows of each segment."""
    return torch.stack([values[segment == number].sum(0) for number in range(num_segments)])


# Radial function

# Centres [B] and the coefficient of the squared difference in the exponent; or any function.
Basis = tuple[Tensor, float] | Callable[[Tensor], Tensor]


def learnable_gaussians(cutoff: float, parameters: Parameters) -> Basis:
    """Normal densities of w d / cutoff + b, by ``mean``, ``std``, ``weight`` (w), ``bias`` (b)."""

    def basis(distance: Tensor) -> Tensor:
        x = parameters["weight"] * distance[:, None] / cutoff + parameters["bias"]
        return Normal(parameters["mean"], parameters["std"].abs() + 1e-5).log_prob(x).exp()

    return basis


def edge_features(graph: EdgeGraph, basis: Basis) -> Tensor:
    """All functions of the distance: [E, B]."""
    if not isinstance(basis, tuple):
        return basis(graph.distance)
    centers, coefficient = basis
    return torch.exp(coefficient * (graph.distance.to(centers)[:, None] - centers).square())


def radial_function(
    graph: EdgeGraph, basis: Basis, parameters: Parameters, shared: Parameters
) -> Tensor:
    """Gaussians and element embeddings through a perceptron: [E, outputs].

    Args:
        basis: of the distance.
        parameters: ``rad_func.net`` and, where the layer has its own, the embeddings.
        shared: the model's embeddings, or empty.
    """
    inputs = [edge_features(graph, basis)]
    tables = shared | parameters
    if "source_embedding.weight" in tables:
        inputs.append(tables["source_embedding.weight"][graph.atomic_numbers[graph.source]])
        inputs.append(tables["target_embedding.weight"][graph.atomic_numbers[graph.target]])
    hidden = torch.cat(inputs, dim=1)
    for first in (0, 3):
        hidden = linear(hidden, under(parameters, f"rad_func.net.{first}."))
        hidden = F.silu(layer_norm(hidden, under(parameters, f"rad_func.net.{first + 1}.")))
    return linear(hidden, under(parameters, "rad_func.net.6."))


def spread_over_orders(weights: Tensor, lmax: int, mmax: int, *, by_degree: bool) -> Tensor:
    """Radial weights [E, W, C], one per l or per (|m|, l), to [E, (lmax + 1)^2, C]."""
    out = weights.new_zeros(len(weights), (lmax + 1) ** 2, weights.shape[2])
    position = 0
    for m in range(mmax + 1):
        for degree in range(m, lmax + 1):
            weight = weights[:, degree if by_degree else position]
            out[:, index(degree, m)] = out[:, index(degree, -m)] = weight
            position += 1
    return out


# Attention, feed-forward network, embedding


@dataclass(frozen=True)
class AttentionSizes:
    """What an attention layer's parameters do not say."""

    lmax: int
    mmax: int
    num_heads: int
    alpha_channels: int
    activation: str
    grid_resolution: int | None
    radial_by_degree: bool


def attention(
    x: Tensor,
    graph: EdgeGraph,
    basis: Basis,
    parameters: Parameters,
    shared: Parameters,
    sizes: AttentionSizes,
    mask: Tensor | None = None,
) -> Tensor:
    """Section 3.5 and Fig. 1b, before the projection: [N, (lmax + 1)^2, heads value_channels].

    Args:
        x: [N, (lmax + 1)^2, C].
        mask: [E, heads], factors on the attention weights.
    """
    lmax, mmax = sizes.lmax, sizes.mmax
    rotation = wigner(edge_frame(graph.vector.double()), lmax).to(x)
    ends = torch.cat([x[graph.source], x[graph.target]], dim=2)
    message = rotation @ ends * kept_orders(lmax, mmax).to(x)[:, None]
    radial = dict(parameters)
    if not sizes.radial_by_degree:
        radial |= {f"rad_func.{k}": v for k, v in under(parameters, "so2_conv_1.rad_func.").items()}
    weights = radial_function(graph, basis, radial, shared)
    weights = weights.unflatten(1, (-1, message.shape[2]))
    message = message * spread_over_orders(weights, lmax, mmax, by_degree=sizes.radial_by_degree)

    num_alpha = sizes.num_heads * sizes.alpha_channels
    hidden = parameters["so2_conv_2.fc_m0.weight"].shape[1] // (lmax + 1)
    num_gates = {"gate": lmax, "s2": 0, "separable_s2": 1}[sizes.activation] * hidden
    scalars, features = so2_linear(
        message, under(parameters, "so2_conv_1."), mmax, num_alpha + num_gates
    )
    alpha = scalars[:, :num_alpha].unflatten(1, (sizes.num_heads, -1))
    if "alpha_norm.weight" in parameters:
        alpha = layer_norm(alpha, under(parameters, "alpha_norm."))
    logits = torch.einsum("eha,ha->eh", smooth_leaky_relu(alpha), parameters["alpha_dot"])
    alpha = segment_softmax(logits, graph.target)
    alpha = alpha if mask is None else alpha * mask

    grid = sphere(lmax, mmax, sizes.grid_resolution)
    features = activation(features, scalars[:, num_alpha:], sizes.activation, grid)
    _, values = so2_linear(features, under(parameters, "so2_conv_2."), mmax, 0)
    values = values.unflatten(2, (sizes.num_heads, -1)) * alpha[:, None, :, None]
    turned = rotation.transpose(1, 2) @ values.flatten(2)
    total = segment_sum(turned, graph.target, graph.num_nodes)
    return total * truncation_rescale(lmax, mmax).to(x)[:, None]


def feed_forward(x: Tensor, parameters: Parameters, kind: str, grid: Sphere) -> Tensor:
    """Fig. 1d; ``kind`` is an activation or, with F a perceptron, [separable\\_]grid_mlp."""
    hidden = equivariant_linear(x, under(parameters, "so3_linear_1."))
    if kind.endswith("grid_mlp"):
        samples = grid.to(hidden)
        for layer in (0, 2, 4):
            samples = linear(samples, under(parameters, f"grid_mlp.{layer}."))
            samples = F.silu(samples) if layer < 4 else samples
        hidden = grid.back(samples)
        if kind == "separable_grid_mlp":
            scalars = F.silu(linear(x[:, :1], under(parameters, "scalar_mlp.0.")))
            hidden = torch.cat([scalars, hidden[:, 1:]], dim=1)
    else:
        gating = under(parameters, "gating_linear.")
        scalars = linear(x[:, 0], gating) if gating else x[:, 0, :0]
        hidden = activation(hidden, scalars, kind, grid)
    return equivariant_linear(hidden, under(parameters, "so3_linear_2."))


def edge_degree(
    graph: EdgeGraph,
    basis: Basis,
    parameters: Parameters,
    shared: Parameters,
    lmax: int,
    mmax: int,
) -> Tensor:
    """Fig. 1c: sum over edges of radial weight times harmonics; D^T of a zonal vector is Y."""
    weights = radial_function(graph, basis, parameters, shared)
    weights = weights.unflatten(1, (lmax + 1, -1)).transpose(0, 1)
    weights = per_coefficient(weights).transpose(0, 1)  # [E, K, C]
    directions = harmonics(lmax, graph.vector.double()).to(weights)
    total = segment_sum(weights * directions[:, :, None], graph.target, graph.num_nodes)
    return total * truncation_rescale(lmax, mmax).to(total)[:, None]


# The model


def _activation_kind(config: ModelConfig) -> str:
    if config.use_gate_act:
        return "gate"
    return "separable_s2" if config.use_sep_s2_act else "s2"


def _feed_forward_kind(config: ModelConfig) -> str:
    if config.use_grid_mlp:
        return "separable_grid_mlp" if config.use_sep_s2_act else "grid_mlp"
    return _activation_kind(config)


def reference_forward(
    model: EquiformerV2, graph: EdgeGraph, tags: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Energies [B] and forces [N, 3] of a model without dropout, by the formulas.

    Differentiable in the model's parameters, which must be float64 as the grids are.
    """
    config, parameters = model.config, dict(model.named_parameters())
    if config.distance_function == "learnable_gaussian":
        basis = learnable_gaussians(config.max_radius, under(parameters, "distance_expansion."))
    else:
        basis = (model.distance_expansion.centers, model.distance_expansion.coefficient)
    lmax, mmax = config.lmax_list[0], config.mmax_list[0]
    sizes = AttentionSizes(
        lmax,
        mmax,
        config.num_heads,
        config.attn_alpha_channels,
        _activation_kind(config),
        config.grid_resolution,
        config.use_m_share_rad,
    )
    node_grid = sphere(lmax, lmax, config.grid_resolution)
    tables = ("source_embedding.weight", "target_embedding.weight")
    shared = {name: parameters[name] for name in tables if name in parameters}
    norm, ffn = config.norm_type, _feed_forward_kind(config)

    x = edge_degree(
        graph, basis, under(parameters, "edge_degree_embedding."), shared, lmax, mmax
    ) / (config.avg_degree or 23.395238876342773)
    atoms = parameters["sphere_embedding.weight"][graph.atomic_numbers]
    if tags is not None:
        atoms = atoms + parameters["tag_embedding.weight"][tags]
    x = torch.cat([x[:, :1] + atoms[:, None], x[:, 1:]], dim=1)
    for number in range(config.num_layers):
        block = under(parameters, f"blocks.{number}.")
        y = equivariant_norm(x, under(block, "norm_1."), norm)
        y = attention(y, graph, basis, under(block, "ga."), shared, sizes)
        x = x + equivariant_linear(y, under(block, "ga.proj."))
        y = equivariant_norm(x, under(block, "norm_2."), norm)
        x = x + feed_forward(y, under(block, "ffn."), ffn, node_grid)
    x = equivariant_norm(x, under(parameters, "norm."), norm)

    node_energy = feed_forward(x, under(parameters, "energy_block."), ffn, node_grid)[:, 0, 0]
    energy = segment_sum(node_energy, graph.batch, graph.num_graphs)
    energy = energy / (config.avg_num_nodes or 77.81317)
    if config.use_energy_lin_ref:
        references = parameters["energy_lin_ref"][graph.atomic_numbers]
        energy = energy + segment_sum(references, graph.batch, graph.num_graphs)
    head = under(parameters, "force_block.")
    y = attention(x, graph, basis, head, shared, sizes)
    forces = equivariant_linear(y, under(head, "proj."))[:, 1:4, 0]
    return energy, forces
