"""Depth-wise tensor product of features with an edge's harmonics (Equiformer, section 4.1).

For each path p from irrep a of the features and b of the harmonics to c of the result, and each
channel u of a, with coefficients C of so3/depthwise.py:

    out_c[u, k] = w_p[u] sum over i, j of C_p[i, j, k] x_a[u, i] y_b[j]

This is e3nn's ``TensorProduct`` of "uvu" paths, component-normalised, without path normalisation.
An edge's harmonics are contracted with the coefficients first, which leaves one matrix [dim_c,
dim_a] for each path, the same for all channels. What is left is one product with x and one with w.

Channels last
-------------
e3nn keeps the 2l + 1 components of a channel beside each other. With ``channels_last``, components
come first, [2l + 1, channels] within each irrep, in x and in the result: so a linear layer over
channels reads the result as the rows of a matrix, and the compiled kernel whole vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from fairchem_equiformer.ops.segments import take
from fairchem_equiformer.so3.depthwise import DepthwisePaths


class Ends(NamedTuple):
    """Features of edges, given as those of their ends: source_features[source] + the other's."""

    source_features: Tensor  # [N, irreps_in.dim]
    target_features: Tensor  # [N, irreps_in.dim]
    source: Tensor  # [E] int64
    target: Tensor  # [E] int64


def depthwise_tensor_product(
    x: Tensor | Ends,
    harmonics: Tensor,
    weights: Tensor,
    paths: DepthwisePaths,
    *,
    channels_last: bool = False,
) -> Tensor:
    """Product of features, harmonics and weights; differentiable in each, twice.

    Args:
        x: [E, irreps_in.dim], or what it is the sum of.
        harmonics: [E, irreps_sh.dim].
        weights: [E, weight_numel], or [weight_numel] for all edges.
        paths: of the product.
        channels_last: order of x and of the result, see above.

    Returns:
        [E, irreps_out.dim].

    Raises:
        ValueError: if the shapes do not belong to the paths or to each other.
    """
    _check(x, harmonics, weights, paths)
    if isinstance(x, Ends):
        x = take(x.source_features, 0, x.source) + take(x.target_features, 0, x.target)
    return _product(x, harmonics, weights, paths, channels_last=channels_last)


def _product(
    x: Tensor, harmonics: Tensor, weights: Tensor, paths: DepthwisePaths, *, channels_last: bool
) -> Tensor:
    """In PyTorch, for every device and dtype."""
    features = _components_first(x, paths.irreps_in, channels_last=channels_last)
    matrices = harmonics @ paths.couplings(x.dtype, x.device)
    parts: list[list[Tensor]] = [[] for _ in paths.irreps_out]
    for path, weight, columns in zip(
        paths.paths, paths.weight_slices, paths.coupling_slices, strict=True
    ):
        size = paths.irreps_out[path.out].ir.dim
        coupled = matrices[:, columns].unflatten(1, (size, -1)) @ features[path.feature]
        weighted = coupled * weights[..., None, weight]
        parts[path.out].append(weighted if channels_last else weighted.transpose(1, 2))
    channels = 2 if channels_last else 1
    irreps = [torch.cat(part, dim=channels).flatten(1) for part in parts]
    return torch.cat(irreps, dim=1) if irreps else x[:, :0]


def _components_first(x: Tensor, irreps: o3.Irreps, *, channels_last: bool) -> list[Tensor]:
    """Each irrep of x as [E, 2l + 1, channels]."""
    found = []
    for (mul, ir), columns in zip(irreps, irreps.slices(), strict=True):
        part = x[:, columns]
        if channels_last:
            found.append(part.unflatten(1, (ir.dim, mul)))
        else:
            found.append(part.unflatten(1, (mul, ir.dim)).transpose(1, 2))
    return found


def to_channels_last(x: Tensor, irreps: o3.Irreps) -> Tensor:
    """From e3nn's order of [..., irreps.dim] to components first, within each irrep."""
    parts = [
        x[..., columns].unflatten(-1, (mul, ir.dim)).transpose(-1, -2).flatten(-2)
        for (mul, ir), columns in zip(irreps, irreps.slices(), strict=True)
    ]
    return torch.cat(parts, dim=-1)


def from_channels_last(x: Tensor, irreps: o3.Irreps) -> Tensor:
    """Inverse of :func:`to_channels_last`."""
    parts = [
        x[..., columns].unflatten(-1, (ir.dim, mul)).transpose(-1, -2).flatten(-2)
        for (mul, ir), columns in zip(irreps, irreps.slices(), strict=True)
    ]
    return torch.cat(parts, dim=-1)


def _check(x: Tensor | Ends, harmonics: Tensor, weights: Tensor, paths: DepthwisePaths) -> None:
    edges = len(harmonics)
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "harmonics": (harmonics, (edges, paths.irreps_sh.dim))
    }
    if isinstance(x, Ends):
        atoms = len(x.source_features)
        wanted |= {
            "source features": (x.source_features, (atoms, paths.irreps_in.dim)),
            "target features": (x.target_features, (atoms, paths.irreps_in.dim)),
            "source": (x.source, (edges,)),
            "target": (x.target, (edges,)),
        }
    else:
        wanted["features"] = x, (edges, paths.irreps_in.dim)
    shared = weights.dim() == 1
    wanted["weights"] = weights, (paths.weight_numel,) if shared else (edges, paths.weight_numel)
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of a depth-wise tensor product of {paths.irreps_in} with "
                f"{paths.irreps_sh}: shape {tuple(tensor.shape)}, it must be {shape}"
            )
