"""The radial function: from distance and elements of an edge to weights (paper, section 3.5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library, native, triton
from fairchem_equiformer.ops.linear import Linear, linear
from fairchem_equiformer.ops.native import (
    GaussianKernels,
    NormSiLUKernels,
    gaussian_kernels,
    norm_silu_kernels,
)
from fairchem_equiformer.ops.segments import add_rows

if TYPE_CHECKING:
    from fairchem_equiformer.ops.triton.gaussians import GaussianKernels as TritonGaussianKernels

# Negligible beside 1 (4e-18). Smaller values lead to subnormal numbers, ten times as slow.
_LEAST_EXPONENT = -40.0
_EPSILON = 1e-5  # of the layer norms


class GaussianBasis(NamedTuple):
    """Gaussians at equal spacing from 0 to the cutoff."""

    centers: Tensor  # [B] Angstrom
    coefficient: float  # of (d - center)^2 in the exponent, 1 / Angstrom^2


class LearnedGaussians(NamedTuple):
    """Gaussians height * exp(-(slope d - shift)^2), which training moves."""

    slope: Tensor  # [B] 1 / Angstrom
    shift: Tensor  # [B]
    height: Tensor  # [B]


Basis = GaussianBasis | LearnedGaussians


class RadialWeights(NamedTuple):
    """Weights of the two hidden layers and the last one; H hidden, A embedding channels."""

    source_embedding: Tensor | None  # [elements, A]
    target_embedding: Tensor | None  # [elements, A]
    weight_1: Tensor  # [H, B + 2 A], or [H, B] without embeddings
    bias_1: Tensor
    norm_1_weight: Tensor
    norm_1_bias: Tensor
    weight_2: Tensor  # [H, H]
    bias_2: Tensor
    norm_2_weight: Tensor
    norm_2_bias: Tensor
    weight_3: Tensor  # [out, H]
    bias_3: Tensor
    # Of learned Gaussians, here to get gradients as the weights do; None for fixed ones.
    slope: Tensor | None = None  # [B]
    shift: Tensor | None = None
    height: Tensor | None = None

    def including(self, basis: Basis) -> RadialWeights:
        """With the parameters of learned Gaussians; the same for fixed ones."""
        if isinstance(basis, GaussianBasis):
            return self
        first: Any = self[: -len(basis)]
        learned: Any = basis
        return RadialWeights(*first, *learned)


# The types of what :func:`radial_arguments` gives.
RADIAL_SCHEMA = "Tensor[] weights, bool[] present, Tensor? centers, float coefficient"


def radial_arguments(
    weights: Sequence[Tensor | None], basis: Basis
) -> tuple[list[Tensor], list[bool], Tensor | None, float]:
    """Weights, those of the radial function first, and basis, in types that an operation takes."""
    fixed = isinstance(basis, GaussianBasis)
    return *library.present(weights), *(basis if fixed else (None, 0.0))


def radial_of(
    tensors: Sequence[Tensor], present: Sequence[bool], centers: Tensor | None, coefficient: float
) -> tuple[list[Tensor | None], Basis]:
    """Inverse of :func:`radial_arguments`."""
    weights = library.with_missing(tensors, present)
    if centers is not None:
        return weights, GaussianBasis(centers, coefficient)
    learned = RadialWeights(*weights[: len(RadialWeights._fields)])[-3:]  # type: ignore[arg-type]
    return weights, LearnedGaussians(*learned)  # type: ignore[arg-type]


class EdgeScalars(NamedTuple):
    """What the radial function knows of an edge."""

    distance: Tensor  # [E] Angstrom
    source_element: Tensor  # [E]
    target_element: Tensor  # [E]

    def select(self, edges: slice) -> EdgeScalars:
        """The same for some of the edges."""
        return EdgeScalars(*(field[edges] for field in self))

    @property
    def elements(self) -> tuple[Tensor, Tensor]:
        """Of source and target."""
        return self.source_element, self.target_element


def gaussians(distance: Tensor, basis: Basis) -> Tensor:
    """All Gaussians of the basis at each distance: [E] Angstrom to [E, B]."""
    if isinstance(basis, GaussianBasis):
        offset = distance[:, None] - basis.centers
        return torch.exp((basis.coefficient * offset.square()).clamp(min=_LEAST_EXPONENT))
    offset = distance[:, None] * basis.slope - basis.shift
    return basis.height * torch.exp((-offset.square()).clamp(min=_LEAST_EXPONENT))


class _Tables(NamedTuple):
    """Fields as above."""

    gaussians: Tensor  # [B, H], weights of the first layer
    source: Tensor | None  # [elements, H], embedding times weight
    target: Tensor | None
    bias_1: Tensor
    norm_1_weight: Tensor
    norm_1_bias: Tensor
    weight_2: Tensor
    bias_2: Tensor
    norm_2_weight: Tensor
    norm_2_bias: Tensor
    weight_3: Tensor
    bias_3: Tensor
    slope: Tensor | None
    shift: Tensor | None
    height: Tensor | None


class RadialTables(_Tables):
    """What the edges read of the weights, made once for all of them."""

    @cached_property
    def second_layer(self) -> Linear:
        """To the second hidden layer."""
        return Linear(self.weight_2, self.bias_2)

    @cached_property
    def last_layer(self) -> Linear:
        """To the radial weights."""
        return Linear(self.weight_3, self.bias_3)

    @property
    def looked_up(self) -> list[Tensor]:
        """Those of elements."""
        return [table for table in (self.source, self.target) if table is not None]

    @classmethod
    def of(cls, weights: RadialWeights) -> RadialTables:
        """Differentiable."""
        first, rest = weights.weight_1, weights[3:]
        if weights.source_embedding is None or weights.target_embedding is None:
            return cls(first.t().contiguous(), None, None, *rest)
        width = weights.source_embedding.shape[1]
        parts = first.split([first.shape[1] - 2 * width, width, width], dim=1)
        source = linear(weights.source_embedding, parts[1])
        target = linear(weights.target_embedding, parts[2])
        return cls(parts[0].t().contiguous(), source, target, *rest)


class RadialGradient:
    """Gradient of the weights: summed over the edges for the tables, then taken through them."""

    def __init__(self, weights: RadialWeights) -> None:
        self._leaves = _leaves(weights)
        with torch.enable_grad():
            self._made = RadialTables.of(RadialWeights(*self._leaves))  # type: ignore[arg-type]
        self.tables = RadialTables(*_leaves(self._made))  # type: ignore[arg-type]
        sums = [None if t is None else torch.zeros_like(t) for t in self.tables]
        self._sums = RadialTables(*sums)  # type: ignore[arg-type]

    def evaluate(self, edges: EdgeScalars, basis: Basis) -> Evaluated:
        """The radial function of some edges, for :meth:`add`."""
        with torch.no_grad():
            layers = _Layers.of(edges, self.tables, basis)
        if layers is not None:
            return Evaluated(layers.out, layers)
        with torch.enable_grad():
            return Evaluated(radial_function(edges, self.tables, basis))

    def add(self, radial: Evaluated, grad: Tensor) -> None:
        """Add what some edges contribute: their radial function of the tables, and its gradient."""
        if radial.layers is not None:
            with native.together():
                radial.layers.add_backward(grad.flatten(1), self.tables, self._sums)
        else:
            self.add_by_autograd(radial.out, grad.view(radial.out.shape))

    def add_by_autograd(self, function: Tensor, grad: Tensor) -> None:
        """The same, of any function of the tables."""
        wanted = [t for t in self.tables if t is not None]
        found = torch.autograd.grad(function, wanted, grad)
        totals = [t for t in self._sums if t is not None]
        for total, part in zip(totals, found, strict=True):
            total.add_(part)

    def total(self) -> list[Tensor | None]:
        """In the order of the weights."""
        made = [t for t in self._made if t is not None]
        wanted = [t for t in self._leaves if t is not None]
        totals = [t for t in self._sums if t is not None]
        found = iter(torch.autograd.grad(made, wanted, totals))
        return [None if t is None else next(found) for t in self._leaves]


def _leaves(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


class _FirstLayer(torch.autograd.Function):
    """With the compiled kernels, or Triton's."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: GaussianKernels | TritonGaussianKernels,
        edges: EdgeScalars,
        matrix: Tensor,
        bias: Tensor,
        *tables: Tensor,
    ) -> Tensor:
        ctx.kernels, ctx.edges = kernels, edges
        ctx.save_for_backward(*tables)
        return kernels.forward(
            edges.distance, matrix, bias, list(zip(tables, edges.elements, strict=False))
        )

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        edges = ctx.edges
        found = [torch.zeros_like(table) for table in ctx.saved_tensors]
        for total, element in zip(found, edges.elements, strict=False):
            add_rows(total, element, grad)
        return None, None, ctx.kernels.backward(edges.distance, grad), grad.sum(0), *found


def _gaussian_kernels(
    edges: EdgeScalars, tables: RadialTables, basis: Basis
) -> GaussianKernels | None:
    """Those of the first layer; None where the reference has to run."""
    if not isinstance(basis, GaussianBasis):
        native.flush()
        return None
    weights = tables.gaussians, tables.bias_1, *tables.looked_up
    constants = basis.centers, basis.coefficient, _LEAST_EXPONENT
    return gaussian_kernels(edges.distance, *constants, *weights)


def _first_layer(edges: EdgeScalars, tables: RadialTables, basis: Basis) -> Tensor:
    """Weights times (Gaussians, source and target embedding), plus bias: [E, H]."""
    weights = tables.gaussians, tables.bias_1, *tables.looked_up
    kernels: GaussianKernels | TritonGaussianKernels | None = None
    if isinstance(basis, GaussianBasis):
        constants = basis.centers, basis.coefficient, _LEAST_EXPONENT
        kernels = triton.gaussian_kernels(edges.distance, *constants, *weights)
    kernels = kernels or _gaussian_kernels(edges, tables, basis)
    if kernels is not None:
        out: Tensor = _FirstLayer.apply(kernels, edges, *weights)
        return out
    hidden = gaussians(edges.distance, basis) @ tables.gaussians
    for table, element in zip(tables.looked_up, edges.elements, strict=False):
        hidden = hidden + table[element]
    return hidden + tables.bias_1


class _NormSiLU(torch.autograd.Function):
    """With the compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any, kernels: NormSiLUKernels, x: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, bias)
        return kernels.forward(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return None, *ctx.kernels.backward(x, weight, bias, grad)


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the layer norm of x [E, H]."""
    on_gpu = triton.norm_silu(x, weight, bias, _EPSILON)
    if on_gpu is not None:
        return on_gpu
    kernels = norm_silu_kernels(x, weight, bias, _EPSILON)
    if kernels is not None:
        out: Tensor = _NormSiLU.apply(kernels, x, weight, bias)
        return out
    return F.silu(F.layer_norm(x, x.shape[1:], weight, bias, _EPSILON))


class _LaterLayers(NamedTuple):
    """What the layers after the first one made of its result."""

    norms: NormSiLUKernels
    read: Tensor  # [E, H] by the second layer
    between: Tensor  # [E, H], its result
    read_again: Tensor  # [E, H] by the last layer
    out: Tensor  # [E, out]


def _later_layers_at_once(hidden: Tensor, tables: RadialTables) -> _LaterLayers | None:
    """All but the first layer in one call, not differentiable; None where it cannot be had."""
    second, last = tables.second_layer, tables.last_layer
    if torch.is_grad_enabled() or second.kernels is None or last.kernels is None:
        native.flush()
        return None
    norms = norm_silu_kernels(hidden, tables.norm_1_weight, tables.norm_1_bias, _EPSILON)
    if norms is None:
        return None
    between = hidden.new_empty(len(hidden), second.packed.n)
    out = hidden.new_empty(len(hidden), last.packed.n)
    norm_1 = norms.norm(tables.norm_1_weight, tables.norm_1_bias)
    norm_2 = norms.norm(tables.norm_2_weight, tables.norm_2_bias)
    read, read_again = torch.empty_like(hidden), torch.empty_like(between)
    products = native.MatrixProducts(second.kernels)
    products.add(
        hidden, second.packed, between, norm=norm_1, sums=read, bias=tables.bias_2.detach()
    )
    products.add(
        between, last.packed, out, norm=norm_2, sums=read_again, bias=tables.bias_3.detach()
    )
    products.run(edges=len(hidden))
    return _LaterLayers(norms, read, between, read_again, out)


class _Layers(NamedTuple):
    """The radial function by compiled kernels, with what its backward pass reads."""

    edges: EdgeScalars
    kernels: GaussianKernels
    hidden: Tensor  # [E, H], the first layer's result
    later: _LaterLayers

    @property
    def out(self) -> Tensor:
        """[E, out]."""
        return self.later.out

    @classmethod
    def of(cls, edges: EdgeScalars, tables: RadialTables, basis: Basis) -> _Layers | None:
        """None where they cannot be had."""
        kernels = _gaussian_kernels(edges, tables, basis)
        if kernels is None:
            return None
        lookups = list(zip(tables.looked_up, edges.elements, strict=False))
        hidden = kernels.forward(edges.distance, tables.gaussians, tables.bias_1, lookups)
        later = _later_layers_at_once(hidden, tables)
        return None if later is None else cls(edges, kernels, hidden, later)

    def add_backward(self, grad: Tensor, tables: RadialTables, sums: RadialTables) -> None:
        """Add the gradients of the tables, given that of the result [E, out], to ``sums``."""
        norms, read, between, read_again, _ = self.later
        second, last = tables.second_layer, tables.last_layer
        flow = last.input_gradient(grad)
        norm = tables.norm_2_weight, tables.norm_2_bias
        flow = norms.add_backward(between, *norm, flow, sums.norm_2_weight, sums.norm_2_bias)
        hidden_grad = second.input_gradient(flow)
        norm = tables.norm_1_weight, tables.norm_1_bias
        totals = sums.norm_1_weight, sums.norm_1_bias
        hidden_grad = norms.add_backward(self.hidden, *norm, hidden_grad, *totals)
        products = native.MatrixProducts(last.kernels)
        products.add(grad.t(), read_again, sums.weight_3, accumulate=True)
        products.add(flow.t(), read, sums.weight_2, accumulate=True)
        products.run()
        for total, part in ((sums.bias_3, grad), (sums.bias_2, flow), (sums.bias_1, hidden_grad)):
            native.add_rows(total, None, part)
        self.kernels.add_backward(self.edges.distance, hidden_grad, sums.gaussians)
        for total, element in zip(sums.looked_up, self.edges.elements, strict=False):
            native.add_rows(total, element, hidden_grad)


class Evaluated(NamedTuple):
    """The radial function of some edges, and the way back."""

    out: Tensor  # [E, out]
    layers: _Layers | None = None  # None where autograd knows it


def radial_function(edges: EdgeScalars, tables: RadialTables, basis: Basis) -> Tensor:
    """Two hidden layers with layer norm and SiLU on (Gaussians, source and target embedding).

    Learned Gaussians are those of ``tables`` where it has any.

    Returns:
        [E, out].
    """
    if tables.slope is not None and tables.shift is not None and tables.height is not None:
        basis = LearnedGaussians(tables.slope, tables.shift, tables.height)
    hidden = _first_layer(edges, tables, basis)
    later = _later_layers_at_once(hidden, tables)
    if later is not None:
        return later.out
    hidden = _norm_silu(hidden, tables.norm_1_weight, tables.norm_1_bias)
    hidden = tables.second_layer(hidden)
    hidden = _norm_silu(hidden, tables.norm_2_weight, tables.norm_2_bias)
    return tables.last_layer(hidden)
