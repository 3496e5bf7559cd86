"""Equivariant graph attention over edges (paper, section 3.5 and Fig. 1b), without its projection.

For an edge from j to i, with D its rotation, w its radial weights and h heads:

    f, s   = SO2_1(w * D (x_j, x_i))                    first SO(2) layer: features and scalars
    z      = a . SmoothLeakyReLU(LN(s_alpha))           one logit a head
    alpha  = softmax over the edges of i of z
    v      = SO2_2(activation(f, s_gate))               second SO(2) layer: values
    y_i    = sum over j of D^T (alpha * v)

The edges are worked through in chunks of whole targets, so that memory is bounded. For the backward
pass only f and s, what the largest matrix product made, are kept; the rest is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_equiformer.ops import library, native
from fairchem_equiformer.ops.aggregate import aggregate, aggregate_backward
from fairchem_equiformer.ops.attention_softmax import (
    EPSILON,
    attention_logits,
    attention_softmax,
    attention_softmax_backward,
)
from fairchem_equiformer.ops.edges import (
    EDGES_SCHEMA,
    ChunkFrames,
    Edges,
    chunk_frames,
    edge_arguments,
    edges_of,
)
from fairchem_equiformer.ops.gate import gate_activation
from fairchem_equiformer.ops.message import Message, message, message_backward
from fairchem_equiformer.ops.radial import (
    RADIAL_SCHEMA,
    Basis,
    RadialGradient,
    RadialTables,
    RadialWeights,
    radial_arguments,
    radial_function,
    radial_of,
)
from fairchem_equiformer.ops.s2_activation import s2_activation, separable_s2_activation
from fairchem_equiformer.ops.segments import Chunk
from fairchem_equiformer.ops.so2_linear import SO2Weights, so2_linear, so2_linear_backward
from fairchem_equiformer.ops.so2_packed import PackedSO2Weights
from fairchem_equiformer.so3.grid import GridSpec
from fairchem_equiformer.so3.layout import Layout, layout


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What does not change from call to call."""

    num_heads: int
    alpha_channels: int
    value_channels: int
    hidden_channels: int
    activation: str  # "gate", "s2" or "separable_s2"
    grid_resolution: int | None
    radial_by_degree: bool  # one radial weight per l instead of one per (l, |m|)
    out_layout: Layout  # degrees wanted of the result

    def constants(self) -> tuple[Any, ...]:
        """Itself in types that an operation of PyTorch takes, ``SPEC_SCHEMA``."""
        sizes = self.out_layout
        return (
            self.num_heads,
            self.alpha_channels,
            self.value_channels,
            self.hidden_channels,
            self.activation,
            self.grid_resolution,
            self.radial_by_degree,
            [sizes.lmax, sizes.mmax, sizes.lmin],
        )

    @property
    def is_separable(self) -> bool:
        """Whether scalars have an activation of their own."""
        return self.activation == "separable_s2"

    def grid(self, layout: Layout) -> GridSpec:
        """Of the activation."""
        wanted = "others" if self.is_separable else "all"
        return GridSpec(layout, self.grid_resolution, wanted=wanted)

    def split(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Parts of the first SO(2) layer's output, or of its gradient.

        Args:
            hidden: [E, heads alpha_channels + gate channels + R H].

        Returns:
            s_alpha [E, heads, alpha_channels], s_gate [E, gate channels] and f [E, R, H]: views.
        """
        num_alpha = self.num_heads * self.alpha_channels
        num_features = layout.num_rows * self.hidden_channels
        num_gates = hidden.shape[1] - num_alpha - num_features
        alpha, gates, features = hidden.split([num_alpha, num_gates, num_features], dim=1)
        x = features.unflatten(1, (layout.num_rows, self.hidden_channels))
        return alpha.unflatten(1, (self.num_heads, -1)), gates, x

    @classmethod
    def of(cls, *constants: Any) -> AttentionSpec:
        """Inverse of :meth:`constants`."""
        *rest, sizes = constants
        names = [field.name for field in fields(cls)]
        return cls(**dict(zip(names, [*rest, layout(*sizes)], strict=True)))


SPEC_SCHEMA = (
    "int num_heads, int alpha_channels, int value_channels, int hidden_channels, str activation, "
    "int? grid_resolution, bool radial_by_degree, int[] out_layout"
)


class AttentionWeights(NamedTuple):
    """Tensors of one attention layer; shapes as in ops/radial.py and ops/so2_linear.py."""

    radial: RadialWeights
    conv_1: tuple[Tensor, ...]
    conv_1_bias: Tensor
    alpha_norm: tuple[Tensor, Tensor] | None  # weight and bias [alpha_channels]
    alpha_dot: Tensor  # [heads, alpha_channels]
    conv_2: tuple[Tensor, ...]
    conv_2_bias: Tensor

    def including(self, basis: Basis) -> AttentionWeights:
        """With the parameters of learned Gaussians among the radial weights."""
        return AttentionWeights(self.radial.including(basis), *self[1:])

    def flatten(self) -> list[Tensor | None]:
        """All tensors in a fixed order."""
        norm: tuple[Tensor | None, ...] = self.alpha_norm or (None, None)
        return [
            *self.radial,
            *norm,
            self.alpha_dot,
            self.conv_1_bias,
            self.conv_2_bias,
            *self.conv_1,
            *self.conv_2,
        ]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor | None], num_conv_1: int) -> AttentionWeights:
        """Inverse of :meth:`flatten`, given the number of weights of the first convolution."""
        split = len(RadialWeights._fields)
        norm_weight, norm_bias, alpha_dot, bias_1, bias_2 = tensors[split : split + 5]
        convs = tuple(tensors[split + 5 :])
        norm = None if norm_weight is None else (norm_weight, norm_bias)
        return cls(
            RadialWeights(*tensors[:split]),  # type: ignore[arg-type]
            convs[:num_conv_1],  # type: ignore[arg-type]
            bias_1,  # type: ignore[arg-type]
            norm,  # type: ignore[arg-type]
            alpha_dot,  # type: ignore[arg-type]
            convs[num_conv_1:],  # type: ignore[arg-type]
            bias_2,  # type: ignore[arg-type]
        )


def activate(
    hidden: Tensor, spec: AttentionSpec, weights: AttentionWeights, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Activation of the first SO(2) layer's output, and the attention logits.

    Args:
        hidden: [E, heads alpha_channels + gate channels + R H]: scalars s_alpha and s_gate, then f.

    Returns:
        Features [E, R H] and logits [E, heads].
    """
    scalars, gates, x = spec.split(hidden, layout)
    logits = attention_logits(scalars, weights.alpha_norm, weights.alpha_dot)
    if spec.activation == "gate":
        native.flush()
        return gate_activation(x, gates, layout.m_major).flatten(1), logits
    if spec.activation == "s2":
        return s2_activation(x, spec.grid(layout)).flatten(1), logits
    return separable_s2_activation(x, gates, spec.grid(layout)).flatten(1), logits


class _ActivationKernels(NamedTuple):
    """The compiled kernels of :func:`activate` and of its gradient, without autograd."""

    spec: AttentionSpec
    layout: Layout
    norm: tuple[Tensor, Tensor] | None
    dot: Tensor
    logits: native.LogitKernels
    sphere: native.GridKernels

    @classmethod
    def of(
        cls, hidden: Tensor, spec: AttentionSpec, weights: AttentionWeights, layout: Layout
    ) -> _ActivationKernels | None:
        """None where autograd has to differentiate it."""
        if spec.activation == "gate":
            return None
        norm, dot = weights.alpha_norm, weights.alpha_dot
        scalars, _, x = spec.split(hidden, layout)
        logits = native.logit_kernels(scalars, norm, dot, EPSILON)
        grid = spec.grid(layout).matrices(x.dtype, x.device)
        sphere = native.grid_kernels(grid, x)
        if logits is None or sphere is None:
            return None
        return cls(spec, layout, norm, dot, logits, sphere)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Features [E, R H] and logits [E, heads]."""
        scalars, gates, x = self.spec.split(hidden, self.layout)
        logits = self.logits.forward(scalars, self.norm, self.dot)
        features = torch.empty_like(x, memory_format=torch.contiguous_format)
        if self.spec.is_separable:
            self.sphere.silu(gates, features[:, 0])
            self.sphere.activation(x, features[:, 1:])
        else:
            self.sphere.activation(x, features)
        return features.flatten(1), logits

    def backward(
        self, hidden: Tensor, features_grad: Tensor, logits_grad: Tensor, sums: Tensor
    ) -> Tensor:
        """Gradient of ``hidden``; those of norm and dot are added to ``sums`` [heads, 3, A]."""
        hidden_grad = torch.empty_like(hidden)
        scalars, gates, x = self.spec.split(hidden, self.layout)
        scalars_grad, gates_grad, x_grad = self.spec.split(hidden_grad, self.layout)
        self.logits.add_backward(scalars, self.norm, self.dot, logits_grad, scalars_grad, sums)
        grad = features_grad.view(x.shape)
        if self.spec.is_separable:
            self.sphere.silu_backward(gates, grad[:, 0], gates_grad)
            grad = grad[:, 1:]
        self.sphere.activation_backward(x, grad, x_grad)
        return hidden_grad


@dataclass(frozen=True)
class _Layer:
    """One call: the layer's constants and the batch's edges."""

    spec: AttentionSpec
    edges: Edges
    basis: Basis
    dtype: torch.dtype  # of the matrix products; rotations, softmax and sums keep the features'

    def between(self, x: Tensor) -> torch.dtype:
        """The dtype of what lies between products: theirs, but on a CPU that of the features x.

        There it saves little, and the kernels read float32.
        """
        return x.dtype if x.device.type == "cpu" else self.dtype

    def message(self, x: Tensor, chunk: Chunk, radial: Tensor) -> tuple[Tensor, Message]:
        """Input of the first SO(2) layer [e, R 2 C], and what it was made of.

        Args:
            x: features.
            chunk: of edges.
            radial: the radial function of the edges.
        """
        width = 2 * x.shape[2]
        radial = radial.view(len(radial), radial.shape[1] // width, width)
        frames, by_degree = chunk_frames(self.edges, chunk), self.spec.radial_by_degree
        layout = self.edges.layout
        dtype = self.between(x)
        scaled, sent = message(x, frames, radial, layout, by_degree=by_degree, dtype=dtype)
        return scaled.flatten(1), sent

    @staticmethod
    def first(scaled: Tensor, conv: _Convolutions, kept: Tensor | None) -> Tensor:
        """The first SO(2) layer, whose result is kept in the dtype of ``kept``, if it is given."""
        if kept is None or kept.dtype == scaled.dtype:
            return so2_linear(scaled, conv.first, conv.first_bias, kept)
        hidden = so2_linear(scaled, conv.first, conv.first_bias)
        native.flush()
        kept.copy_(hidden)
        return hidden

    def message_backward(self, grad: Tensor, sent: Message, x: Tensor, x_grad: Tensor) -> Tensor:
        layout, by_degree = self.edges.layout, self.spec.radial_by_degree
        grad = grad.view(len(grad), layout.num_rows, 2 * x.shape[2])
        return message_backward(grad, sent, x, x_grad, layout, by_degree=by_degree)

    def by_head(self, values: Tensor) -> Tensor:
        """[e, S heads value_channels] to [e, S, heads, value_channels]."""
        spec = self.spec
        rows = spec.out_layout.num_rows
        return values.view(len(values), rows, spec.num_heads, spec.value_channels)


class _Convolutions(NamedTuple):
    """Weights, in the dtype of the matrix products, and biases of the SO(2) layers."""

    first: SO2Weights | PackedSO2Weights
    first_bias: Tensor
    second: SO2Weights | PackedSO2Weights
    second_bias: Tensor

    @classmethod
    def of(cls, weights: AttentionWeights, dtype: torch.dtype) -> _Convolutions:
        return cls(
            SO2Weights.of(weights.conv_1, dtype),
            weights.conv_1_bias.detach(),
            SO2Weights.of(weights.conv_2, dtype),
            weights.conv_2_bias.detach(),
        )


class PreparedWeights(NamedTuple):
    """What the edges read of a layer's weights, made once for all of them. Has no gradient."""

    convolutions: _Convolutions
    radial: RadialTables

    @classmethod
    def of(cls, weights: AttentionWeights, dtype: torch.dtype) -> PreparedWeights:
        """For matrix products in a dtype, see :func:`product_dtype`."""
        with torch.no_grad(), torch.autocast(weights.alpha_dot.device.type, enabled=False):
            return cls(_Convolutions.of(weights, dtype), RadialTables.of(weights.radial))


def product_dtype(weights: AttentionWeights) -> torch.dtype:
    """The dtype of a layer's matrix products: autocast's, or that of its weights."""
    device = weights.alpha_dot.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weights.conv_1_bias.dtype


def _forward(
    layer: _Layer,
    x: Tensor,
    weights: AttentionWeights,
    prepared: PreparedWeights,
    mask: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    """All chunks. ``kept`` [E, ...], if given, receives the first SO(2) layer's output."""
    spec, out_layout = layer.spec, layer.spec.out_layout
    channels = spec.num_heads * spec.value_channels
    out = x.new_empty(layer.edges.num_rows, out_layout.num_coefficients, channels)
    conv, tables = prepared
    for chunk in layer.edges.chunks:
        with native.together():
            scalars = layer.edges.scalars.select(chunk.edges)
            radial = radial_function(scalars, tables, layer.basis)
            scaled, (frames, *_) = layer.message(x, chunk, radial)
            to = None if kept is None else kept[chunk.edges]
            hidden = layer.first(scaled, conv, to)
            features, logits = activate(hidden, spec, weights, layer.edges.layout)
            values = layer.by_head(so2_linear(features, conv.second, conv.second_bias))
            alpha = attention_softmax(logits, frames)
            if mask is not None:
                native.flush()
                alpha = alpha * mask[chunk.edges]
            aggregate(values, alpha, frames, out_layout, out[chunk.rows])
    return out


def _forward_to_train(
    layer: _Layer, num_conv_1: int, mask: Tensor | None, x: Tensor, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The result, and what is kept for the backward pass."""
    weights = AttentionWeights.unflatten(tensors, num_conv_1)
    kept = x.new_empty(layer.edges.num_edges, _width(weights), dtype=layer.dtype)
    prepared = PreparedWeights.of(weights, layer.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _forward(layer, x, weights, prepared, mask, kept), kept


def _width(weights: AttentionWeights) -> int:
    """Columns of the first SO(2) layer's output."""
    return sum(len(weight) for weight in weights.conv_1)


def _backward(
    grad: Tensor,
    layer: _Layer,
    num_conv_1: int,
    mask: Tensor | None,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    kept: Tensor,
) -> list[Tensor | None]:
    """Gradients of x and of the weights."""
    with torch.autocast(x.device.type, enabled=False):
        backward = _Backward(layer, num_conv_1, x, tensors)
        for chunk in layer.edges.chunks:
            chunk_mask = None if mask is None else mask[chunk.edges]
            backward.add(chunk, grad[chunk.rows], kept[chunk.edges], chunk_mask)
    return [backward.x_grad, *backward.total()]


class _EdgeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: _Layer,
        num_conv_1: int,
        mask: Tensor | None,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        out, kept = _forward_to_train(layer, num_conv_1, mask, x, tensors)
        ctx.layer, ctx.num_conv_1 = layer, num_conv_1
        ctx.save_for_backward(mask, x, kept, *tensors)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, x, kept, *tensors = ctx.saved_tensors
        found = _backward(grad, ctx.layer, ctx.num_conv_1, mask, x, tensors, kept)
        return None, None, None, *found


class _Backward:
    """Gradients of one call, added up chunk by chunk."""

    def __init__(
        self, layer: _Layer, num_conv_1: int, x: Tensor, tensors: Sequence[Tensor | None]
    ) -> None:
        self.layer = layer
        self.x = x
        self.x_grad = torch.zeros_like(x)
        # The radial function's weights, the first of them, have sums of their own.
        later = range(len(RadialWeights._fields), len(tensors))
        sums = [
            torch.zeros_like(t) if t is not None and place in later else None
            for place, t in enumerate(tensors)
        ]
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        self._sums = AttentionWeights.unflatten(sums, num_conv_1)
        self._weights = AttentionWeights.unflatten(leaves, num_conv_1)
        self._conv = _Convolutions.of(self._weights, layer.dtype)
        self._radial = RadialGradient(self._weights.radial)
        heads, channels = self._weights.alpha_dot.shape
        self._logit_sums = x.new_zeros(heads, 3, channels)  # of norm weight, norm bias and dot

    def total(self) -> list[Tensor | None]:
        """Gradients of the weights, in their fixed order."""
        weight_and_bias, dot = self._logit_sums[:, :2].sum(0), self._logit_sums[:, 2]
        for total, part in zip(self._sums.alpha_norm or (), weight_and_bias, strict=False):
            total.add_(part)
        self._sums.alpha_dot.add_(dot)
        radial = RadialWeights(*self._radial.total())  # type: ignore[arg-type]
        return self._sums._replace(radial=radial).flatten()

    def add(self, chunk: Chunk, grad: Tensor, hidden: Tensor, mask: Tensor | None) -> None:
        """Add what one chunk contributes.

        Args:
            grad: [n, K, channels], gradient of the chunk's result.
            hidden: [e, ...], the first SO(2) layer's output.
            mask: [e, heads] or None.
        """
        layer = self.layer
        hidden = hidden.detach().to(layer.between(self.x))
        kernels = _ActivationKernels.of(hidden, layer.spec, self._weights, layer.edges.layout)
        # Autograd's own steps would not wait for kernels.
        with nullcontext() if kernels is None else native.together():
            radial = self._radial.evaluate(layer.edges.scalars.select(chunk.edges), layer.basis)
            scaled, sent = layer.message(self.x, chunk, radial.out.detach())
            if kernels is None:
                hidden_grad = self._through_values(sent.frames, grad, hidden, mask)
            else:
                hidden_grad = self._by_kernels(kernels, sent.frames, grad, hidden, mask)
        with native.together():
            scaled_grad = self._linear(
                hidden_grad, scaled, self._conv.first, self._sums.conv_1, self._sums.conv_1_bias
            )
        del scaled, hidden_grad  # a tenth of a chunk's memory at its peak, which follows
        radial_grad = layer.message_backward(scaled_grad, sent, self.x, self.x_grad)
        self._radial.add(radial, radial_grad)

    def _through_values(
        self, frames: ChunkFrames, grad: Tensor, hidden: Tensor, mask: Tensor | None
    ) -> Tensor:
        """From the gradient of the result to that of the first SO(2) layer's output."""
        layer, weights, second = self.layer, self._weights, self._conv.second
        with torch.enable_grad():
            hidden = hidden.requires_grad_()
            features, logits = activate(hidden, layer.spec, weights, layer.edges.layout)
        values = so2_linear(features.detach(), second, self._conv.second_bias)
        values_grad, logits_grad = self._weighting(frames, grad, values, logits, mask)
        features_grad = self._linear(
            values_grad, features.detach(), second, self._sums.conv_2, self._sums.conv_2_bias
        )
        (hidden_grad,) = self._differentiate(
            (features, logits),
            (features_grad, logits_grad),
            (*(weights.alpha_norm or ()), weights.alpha_dot),
            (*(self._sums.alpha_norm or ()), self._sums.alpha_dot),
            hidden,
        )
        return hidden_grad

    def _by_kernels(
        self,
        kernels: _ActivationKernels,
        frames: ChunkFrames,
        grad: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The same without autograd."""
        second = self._conv.second
        features, logits = kernels.forward(hidden)
        values = so2_linear(features, second, self._conv.second_bias)
        values_grad, logits_grad = self._weighting(frames, grad, values, logits, mask)
        features_grad = self._linear(
            values_grad, features, second, self._sums.conv_2, self._sums.conv_2_bias
        )
        return kernels.backward(hidden, features_grad, logits_grad, self._logit_sums)

    def _weighting(
        self,
        frames: ChunkFrames,
        grad: Tensor,
        values: Tensor,
        logits: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Backward of softmax, product with the values, and sum: gradients of values and logits."""
        layer = self.layer
        alpha = factor = attention_softmax(logits.detach(), frames)
        if mask is not None:
            native.flush()
            factor = alpha * mask
        values_grad, alpha_grad = aggregate_backward(
            grad, layer.by_head(values), factor, frames, layer.spec.out_layout
        )
        if mask is not None:
            native.flush()
            alpha_grad = alpha_grad * mask
        logits_grad = attention_softmax_backward(alpha, alpha_grad, frames)
        return values_grad.flatten(1).to(layer.between(self.x)), logits_grad

    def _linear(
        self,
        grad: Tensor,
        x: Tensor,
        weights: SO2Weights | PackedSO2Weights,
        sums: Sequence[Tensor],
        bias_sum: Tensor,
    ) -> Tensor:
        """Backward of an SO(2) layer: add to the sums, return the gradient of its input."""
        bias_grad = grad[:, : len(bias_sum)]
        if not native.add_rows(bias_sum, None, bias_grad):
            bias_sum += bias_grad.sum(0)
        return so2_linear_backward(grad, x, weights, sums)

    @staticmethod
    def _differentiate(
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        leaves: Sequence[Tensor | None],
        sums: Sequence[Tensor | None],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Backward by autograd: add to the sums of the leaves, return the inputs' gradients."""
        wanted = [leaf for leaf in leaves if leaf is not None]
        totals = [total for total in sums if total is not None]
        parts = torch.autograd.grad(outputs, [*wanted, *inputs], grads)
        for total, part in zip(totals, parts[: len(totals)], strict=True):
            total.add_(part)
        return parts[len(totals) :]


def _decoded(
    x: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    num_conv_1: int,
    *rest: Any,
    fake: bool = False,
) -> tuple[_Layer, int, Tensor | None, Tensor, list[Tensor | None]]:
    """What the operation's arguments say, ``_ARGUMENTS`` but the first."""
    tensors, basis = radial_of(*rest[:4])
    edges = edges_of(*rest[4:8], fake=fake)
    layer = _Layer(AttentionSpec.of(*rest[8:]), edges, basis, dtype)
    return layer, num_conv_1, mask, x, tensors


def _run(to_train: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    layer, num_conv_1, mask, x, tensors = _decoded(*arguments)
    if to_train:
        return _forward_to_train(layer, num_conv_1, mask, x, tensors)
    weights = AttentionWeights.unflatten(tensors, num_conv_1)
    prepared = PreparedWeights.of(weights, layer.dtype)
    with torch.autocast(x.device.type, enabled=False):
        out = _forward(layer, x, weights, prepared, mask, kept=None)
    return out, x.new_empty(0, _width(weights), dtype=layer.dtype)


def _fake(to_train: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    layer, num_conv_1, _, x, tensors = _decoded(*arguments, fake=True)
    spec, edges = layer.spec, layer.edges
    width = _width(AttentionWeights.unflatten(tensors, num_conv_1))
    channels = spec.num_heads * spec.value_channels
    out = x.new_empty(edges.num_rows, spec.out_layout.num_coefficients, channels)
    return out, x.new_empty(edges.num_edges if to_train else 0, width, dtype=layer.dtype)


_ARGUMENTS = (
    "bool to_train, Tensor x, Tensor? mask, ScalarType dtype, int num_conv_1, "
    f"{RADIAL_SCHEMA}, {EDGES_SCHEMA}, {SPEC_SCHEMA}"
)
_operation = library.register(
    "edge_attention",
    _ARGUMENTS,
    _run,
    _fake,
    lambda grad, _, *rest: _backward(grad, *_decoded(*rest[:-1]), rest[-1]),
    "x weights",
    keeps=True,
)


def edge_attention(
    x: Tensor,
    edges: Edges,
    basis: Basis,
    weights: AttentionWeights,
    spec: AttentionSpec,
    mask: Tensor | None = None,
    prepared: PreparedWeights | None = None,
) -> Tensor:
    """Attention-weighted, rotated sums of non-linear messages; see the module's formula.

    Under autocast the matrix products run in its dtype; rotations, softmax and sums stay in x's.

    Args:
        x: [N, K, C] node features, l-major.
        edges: sorted by target, with rotations.
        basis: of the radial function.
        weights: of the layer.
        spec: of the layer.
        mask: [E, heads], factors on the attention weights (dropout), or None.
        prepared: of these weights, if it was made before; read where no gradient is wanted.

    Returns:
        [rows, coefficients of spec.out_layout, heads value_channels]; zero for atoms without edges.
    """
    x = x.to(weights.conv_1_bias.dtype)
    weights = weights.including(basis)
    layer = _Layer(spec, edges, basis, product_dtype(weights))
    tensors = weights.flatten()
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *tensors)
    )
    if torch.compiler.is_compiling():
        result: tuple[Tensor, Tensor] = _operation(
            wanted,
            x,
            mask,
            layer.dtype,
            len(weights.conv_1),
            *radial_arguments(tensors, basis),
            *edge_arguments(edges),
            *spec.constants(),
        )
        return result[0]
    if not wanted:
        prepared = prepared or PreparedWeights.of(weights, layer.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _forward(layer, x, weights, prepared, mask, kept=None)
    out: Tensor = _EdgeAttention.apply(layer, len(weights.conv_1), mask, x, *tensors)
    return out
