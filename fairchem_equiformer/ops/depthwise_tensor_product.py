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

from typing import Any, NamedTuple

import torch
from e3nn import o3
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library, native
from fairchem_equiformer.ops.native import DepthwiseKernels
from fairchem_equiformer.ops.segments import take
from fairchem_equiformer.so3.depthwise import DepthwisePaths, depthwise_paths
from fairchem_equiformer.so3.irreps import Place, width


class Ends(NamedTuple):
    """Features of edges, given as those of their ends: source_features[source] + the other's."""

    source_features: Tensor  # [N, irreps_in.dim]
    target_features: Tensor  # [M, irreps_in.dim]
    source: Tensor | None  # [E] int64; None where edge e has row e
    target: Tensor | None  # likewise


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
        x: [E, irreps_in.dim], or what it is the sum of, which is then not kept for each edge.
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
    rows: tuple[Tensor, ...] = x[:2] if isinstance(x, Ends) else (x,)
    index: Index = x[2:] if isinstance(x, Ends) else (None,)
    kernels = None
    if not torch.compiler.is_compiling():  # which sees PyTorch's operations alone
        kernels = native.depthwise_kernels(paths, *rows, harmonics, weights)
    if kernels is not None and not channels_last:
        rows = tuple(to_channels_last(part, paths.irreps_in) for part in rows)
    matrices = _matrices(harmonics, paths)
    if kernels is None:
        summed = _sum_of_rows(rows, index)
        return _product(summed, matrices, weights, paths, channels_last=channels_last)
    out: Tensor = _Product.apply(kernels, index, matrices, weights, *rows)
    return out if channels_last else from_channels_last(out, paths.irreps_out)


def _matrices(harmonics: Tensor, paths: DepthwisePaths) -> Tensor:
    """Of each path [E, sum over paths of dim_c dim_a]; in a compiled graph not differentiable."""
    if torch.compiler.is_compiling():
        found: Tensor = _operation(harmonics, *paths.names)
        return found
    return _contracted(harmonics, paths)


def _contracted(harmonics: Tensor, paths: DepthwisePaths) -> Tensor:
    with torch.autocast(harmonics.device.type, enabled=False):
        return harmonics @ paths.couplings(harmonics.dtype, harmonics.device)


def _named_paths(*names: str) -> DepthwisePaths:
    return depthwise_paths(*map(o3.Irreps, names))


_operation = library.register(
    "depthwise_matrices",
    "Tensor harmonics, str irreps_in, str irreps_sh, str irreps_out",
    lambda harmonics, *names: _contracted(harmonics, _named_paths(*names)),
    lambda harmonics, *names: harmonics.new_empty(
        harmonics.shape[0], _named_paths(*names).coupling_slices[-1].stop
    ),
)


Index = tuple[Tensor | None, ...]  # of each tensor of rows; None where every edge has its own


def _sum_of_rows(rows: tuple[Tensor, ...], index: Index) -> Tensor:
    """Features of the edges [E, irreps_in.dim]."""
    found = [x if i is None else take(x, 0, i) for x, i in zip(rows, index, strict=True)]
    return found[0] if len(found) == 1 else found[0] + found[1]


def _sums_over_edges(
    grad: Tensor | None, rows: tuple[Tensor, ...], index: Index
) -> list[Tensor | None]:
    """What each row gets of a gradient [E, irreps_in.dim] of its edges."""
    if grad is None:
        return [None] * len(rows)
    return [
        grad if i is None else torch.zeros_like(x).index_add(0, i, grad)
        for x, i in zip(rows, index, strict=True)
    ]


def _product(
    x: Tensor, matrices: Tensor, weights: Tensor, paths: DepthwisePaths, *, channels_last: bool
) -> Tensor:
    """In PyTorch, for every device and dtype; ``matrices`` [E, entries] of the paths."""
    features = _components_first(x, paths.places_in, channels_last=channels_last)
    parts: list[list[Tensor]] = [[] for _ in paths.places_out]
    for path, weight, columns in zip(
        paths.paths, paths.weight_slices, paths.coupling_slices, strict=True
    ):
        size = paths.places_out[path.out].dim
        coupled = matrices[:, columns].unflatten(1, (size, -1)) @ features[path.feature]
        weighted = coupled * weights[..., None, weight]
        parts[path.out].append(weighted if channels_last else weighted.transpose(1, 2))
    channels = 2 if channels_last else 1
    irreps = [torch.cat(part, dim=channels).flatten(1) for part in parts]
    return torch.cat(irreps, dim=1) if irreps else x[:, :0]


class _Product(torch.autograd.Function):
    """With the compiled kernels. Keeps what goes in, and no features of edges but those."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: DepthwiseKernels,
        index: Index,
        matrices: Tensor,
        weights: Tensor,
        *rows: Tensor,
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(matrices, weights, *rows, *index)
        return kernels.forward(rows, index, matrices, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrices, weights, *rest = ctx.saved_tensors
        rows, index = tuple(rest[: len(rest) // 2]), tuple(rest[len(rest) // 2 :])
        x_grad, matrices_grad, weights_grad = _Gradient.apply(
            ctx.kernels, ctx.needs_input_grad[2], index, grad, matrices, weights, *rows
        )
        return None, None, matrices_grad, weights_grad, *_sums_over_edges(x_grad, rows, index)


class _Gradient(torch.autograd.Function):
    """Gradients of edges' features, matrices and weights, and their own gradients.

    The product T(x, m, w) is linear in each, so that with g the gradient of the result and
    a, b, c those of what is returned, the whole is

        <g, T(a, m, w) + T(x, b, w) + T(x, m, c)>
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: DepthwiseKernels,
        of_matrices: bool,
        index: Index,
        grad: Tensor,
        matrices: Tensor,
        weights: Tensor,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, matrices, weights, *rows, *index)
        return kernels.backward(rows, index, matrices, weights, grad, of_matrices=of_matrices)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *inner: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, matrices, weights, *rest = ctx.saved_tensors
        rows, index = tuple(rest[: len(rest) // 2]), tuple(rest[len(rest) // 2 :])
        outer = _sum_of_rows(rows, index), matrices, weights
        totals: list[Tensor | None] = [None] * 4  # of grad, x, matrices, weights
        for place, tensor in enumerate(inner):
            if tensor is None:
                continue
            x, m, w = (tensor if i == place else o for i, o in enumerate(outer))
            found = [
                ctx.kernels.forward((x,), (None,), m, w),
                *ctx.kernels.backward((x,), (None,), m, w, grad, of_matrices=place != 1),
            ]
            found[1 + place] = None  # that would be the gradient of what came in
            totals = [
                total if part is None else part if total is None else total.add_(part)
                for total, part in zip(totals, found, strict=True)
            ]
        grad_grad, x_grad, matrices_grad, weights_grad = totals
        rows_grads = _sums_over_edges(x_grad, rows, index)
        return None, None, None, grad_grad, matrices_grad, weights_grad, *rows_grads


def _components_first(x: Tensor, places: tuple[Place, ...], *, channels_last: bool) -> list[Tensor]:
    """Each irrep of x as [E, 2l + 1, channels]."""
    found = []
    for _, dim, channels, columns in places:
        part = x[:, columns]
        if channels_last:
            found.append(part.unflatten(1, (dim, channels)))
        else:
            found.append(part.unflatten(1, (channels, dim)).transpose(1, 2))
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


def _named(x: Tensor | Ends) -> list[tuple[str, Tensor, Tensor | None]]:
    if isinstance(x, Tensor):
        return [("", x, None)]
    return [
        ("source ", x.source_features, x.source),
        ("target ", x.target_features, x.target),
    ]


def _check(x: Tensor | Ends, harmonics: Tensor, weights: Tensor, paths: DepthwisePaths) -> None:
    edges = harmonics.shape[0]
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "harmonics": (harmonics, (edges, width(paths.places_sh)))
    }
    for name, rows, index in _named(x):
        wanted[f"{name}features"] = (
            rows,
            (edges if index is None else rows.shape[0], width(paths.places_in)),
        )
        if index is not None:
            wanted[f"indices of {name}features"] = index, (edges,)
    shared = weights.dim() == 1
    wanted["weights"] = weights, (paths.weight_numel,) if shared else (edges, paths.weight_numel)
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of a depth-wise tensor product of {paths.irreps_in} with "
                f"{paths.irreps_sh}: shape {tuple(tensor.shape)}, it must be {shape}"
            )
