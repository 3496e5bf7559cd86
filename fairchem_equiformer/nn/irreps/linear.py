"""Equivariant linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_equiformer.ops.column_products import (
    ColumnProducts,
    Layout,
    Term,
    column_kernels,
)
from fairchem_equiformer.ops.linear import linear
from fairchem_equiformer.so3.irreps import SCALAR, Place, blocks, channels_of, joined, places

_SCALAR = str(SCALAR)


class IrrepsLinear(nn.Module):
    """One matrix over the channels of each irrep, and a bias on the invariants (0e).

    An irrep that stands in several places of the input is read as one with the channels of all. One
    that the input lacks is zero in the result, and has no weights.

    Weights start as N(0, 1 / input channels), so that components keep their variance; the bias
    starts at zero.

    Args:
        irreps_in: of the input.
        irreps_out: of the result, each irrep once.
        bias: whether invariants get one.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, *, bias: bool = True) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = irreps_in, irreps_out
        self._in, self._out = places(irreps_in), places(irreps_out)
        self.weight = nn.ParameterDict()
        for mul, ir in irreps_out:
            inputs = channels_of(irreps_in, ir)
            if inputs:
                initial = torch.randn(mul, inputs) / math.sqrt(inputs)
                self.weight[str(ir)] = nn.Parameter(initial)
        scalars = channels_of(irreps_out, SCALAR) if bias else 0
        self.bias = nn.Parameter(torch.zeros(scalars)) if scalars else None
        self._alone = LinearLayers(self)

    def forward(self, x: Tensor, terms: Tensor | None = None) -> Tensor:
        """[n, irreps_in.dim] to [n, irreps_out.dim].

        Args:
            x: rows.
            terms: [n], of how many rows each is the sum: so many times the bias is added. By
                default once.
        """
        if terms is None and not torch.compiler.is_compiling():
            layers = self._alone.prepared()
            (out,) = layers(x)
            layers.forget()
            return out
        return self.of_blocks(blocks(x, self._in), terms)

    def of_blocks(self, inputs: list[Tensor], terms: Tensor | None = None) -> Tensor:
        """As :meth:`forward`, of the input's irreps [n, 2l + 1, channels], which others read too.

        The gradients of all readers are then added up irrep by irrep.
        """
        parts = []
        for place in self._out:
            own = [
                part
                for part, read in zip(inputs, self._in, strict=True)
                if read.irrep == place.irrep
            ]
            bias = self.bias if place.irrep == _SCALAR else None
            once = bias if terms is None else None
            x = inputs[0]
            zeros = x.shape[0], place.dim, place.channels
            parts.append(self._of(own, place.irrep, once) if own else x.new_zeros(zeros))
            if terms is not None and bias is not None:
                parts[-1] = parts[-1] + (terms[:, None] * bias)[:, None]
        return joined(parts)

    def _of(self, inputs: list[Tensor], irrep: str, bias: Tensor | None) -> Tensor:
        """One irrep [n, 2l + 1, channels]."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=2)
        return linear(x, self.weight[irrep], bias)

    def first(self, x: Tensor, channels: int) -> Tensor:
        """The first invariants of the result: [n, irreps_in.dim] to [n, channels].

        Invariants must stand in one place of the input.
        """
        (columns,) = [place.columns for place in self._in if place.irrep == _SCALAR]
        bias = None if self.bias is None else self.bias[:channels]
        return linear(x[:, columns], self.weight[_SCALAR][:channels], bias)

    def of_heads(self, sums: Tensor, terms: Tensor, wanted: Sequence[Place]) -> Tensor:
        """The last channels of the result, each head's from a sum of rows of its own.

        What stands in one irrep of the result: the heads' channels one after the other. Irreps of
        the input must stand there once.

        Args:
            sums: [n, heads, irreps_in.dim], weighted sums over rows.
            terms: [n, heads], sum of the weights: so many times the bias is added.
            wanted: irreps of all heads, the last channels of irreps_out.

        Returns:
            [n, dim of the wanted].
        """
        heads = sums.shape[1]
        columns = {place.irrep: place.columns for place in self._in}
        parts = []
        for irrep, dim, channels, _ in wanted:
            if irrep not in columns:
                parts.append(sums.new_zeros(sums.shape[0], dim, channels))
                continue
            weight = self.weight[irrep][-channels:].unflatten(0, (heads, -1))
            x = sums[:, :, columns[irrep]].unflatten(2, (dim, -1))
            part = torch.einsum("nhku,hcu->nkhc", x, weight)
            if irrep == _SCALAR and self.bias is not None:
                bias = self.bias[-channels:].unflatten(0, (heads, -1))
                part = part + (terms[:, :, None] * bias)[:, None]
            parts.append(part.flatten(2))
        return joined(parts)

    def through(self, queries: Tensor, wanted: Sequence[Place], heads: int) -> Tensor:
        """What to multiply the input with for the dot products of queries with each head's result.

        For the first channels of the result, without the bias; otherwise as :meth:`of_heads`.

        Args:
            queries: [n, dim of the wanted].
            wanted: irreps of all heads, the first channels of irreps_out.
            heads: how many.

        Returns:
            [n, heads, irreps_in.dim].
        """
        found = zip(wanted, blocks(queries, wanted), strict=True)
        own = {place.irrep: part for place, part in found}
        parts = []
        for irrep, dim, channels, _ in self._in:
            if irrep not in own:
                parts.append(queries.new_zeros(queries.shape[0], heads, dim * channels))
                continue
            query = own[irrep].unflatten(2, (heads, -1))
            first = query.shape[2] * query.shape[3]
            weight = self.weight[irrep][:first].unflatten(0, (heads, -1))
            parts.append(torch.einsum("nkhc,hcu->nhku", query, weight).flatten(2))
        return torch.cat(parts, dim=2)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.irreps_in} -> {self.irreps_out}, bias={self.bias is not None}"


class LinearLayers:
    """Linear layers of the same features, all products of which are one call.

    Args:
        layers: with the same irreps_in.
    """

    def __init__(self, *layers: IrrepsLinear) -> None:
        self._layers = layers
        irreps = layers[0].irreps_in
        terms: list[Term] = []
        biases: list[tuple[int, slice]] = []
        weights = 0
        for place, layer in enumerate(layers):
            terms += _terms(layer, place, weights)
            weights += len(layer.weight)
            if layer.bias is not None:
                scalars = [ir for _, ir in layer.irreps_out].index(SCALAR)
                biases.append((place, layer.irreps_out.slices()[scalars]))
        results = tuple(layer.irreps_out.dim for layer in layers)
        self._layout = Layout(tuple(terms), (irreps.dim,), results, tuple(biases))

    def prepared(self) -> PreparedLayers:
        """The layers, to be called on any number of rows; their weights must not change."""
        return PreparedLayers(self._layers, self._layout)


class PreparedLayers:
    """Made by :class:`LinearLayers`."""

    def __init__(self, layers: Sequence[IrrepsLinear], layout: Layout) -> None:
        self._layers = layers
        self._places = places(layers[0].irreps_in)
        self._products: ColumnProducts | None = None
        weights = [weight for layer in layers for weight in layer.weight.values()]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        kernels = column_kernels(layout, *weights, *biases)
        if kernels is not None:
            self._products = ColumnProducts(kernels, layout, weights, biases)

    def __call__(self, x: Tensor, kept: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        """[n, irreps_in.dim] to [n, irreps_out.dim] of each layer.

        Args:
            x: rows.
            kept: where the results of these rows are, or are put; see ops/over_chunks.py.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        if self._products is not None and x.dtype == torch.float32 and not autocast:
            out = self._products(x, kept or ())
            if kept is not None and not kept:
                kept += out
            return out
        parts = blocks(x, self._places)
        return tuple(layer.of_blocks(parts) for layer in self._layers)

    def forget(self) -> None:
        """Drop what was made of the weights, which is made again when it is needed."""
        if self._products is not None:
            self._products.forget()


def _terms(layer: IrrepsLinear, place: int, first_weight: int) -> list[Term]:
    """Products of one of several layers: one for each component, and place of the input."""
    found = []
    keys = list(layer.weight)
    for (mul, ir), written in zip(layer.irreps_out, layer.irreps_out.slices(), strict=True):
        channel = 0
        for (mul_in, k), read in zip(layer.irreps_in, layer.irreps_in.slices(), strict=True):
            if k != ir:
                continue
            part = slice(channel, channel + mul_in)
            channel += mul_in
            found += [
                Term(
                    source=0,
                    read=_columns(read.start, component, mul_in),
                    weight=first_weight + keys.index(str(ir)),
                    part=part,
                    target=place,
                    written=_columns(written.start, component, mul),
                )
                for component in range(ir.dim)
            ]
    return found


def _columns(start: int, component: int, channels: int) -> slice:
    return slice(start + component * channels, start + (component + 1) * channels)
