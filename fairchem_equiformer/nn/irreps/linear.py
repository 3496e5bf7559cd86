"""Equivariant linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from e3nn import o3
from torch import Tensor, nn

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

    def forward(self, x: Tensor, terms: Tensor | None = None) -> Tensor:
        """[n, irreps_in.dim] to [n, irreps_out.dim].

        Args:
            x: rows.
            terms: [n], of how many rows each is the sum: so many times the bias is added. By
                default once.
        """
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
