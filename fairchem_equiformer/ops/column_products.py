"""Linear layers between columns of rows, all products of several layers in one call.

    result_j[:, columns] += input_i[:, columns] W_k[:, part]^T        for each term

An equivariant linear layer has a term for each component of each irrep, on which it reads and
writes columns of the features where they stand: nothing is copied to be multiplied, nor joined
afterwards. The layers' transposes and the products that are the weights' gradients have the same
terms; each of the three is made of the other two when it is differentiated, as often as one likes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fairchem_equiformer.ops.native import MatrixProducts, Packed, pack, product_kernels

_T = TypeVar("_T")


class Term(NamedTuple):
    """One product."""

    source: int  # which input
    read: slice  # its columns
    weight: int  # which [columns written, columns]
    part: slice  # its columns
    target: int  # which result
    written: slice  # its columns


@dataclass(frozen=True)
class Layout:
    """What is multiplied with what. Columns of a result that no term writes are zero.

    Terms that share columns of a result, or of a weight, have the same ones.
    """

    terms: tuple[Term, ...]
    inputs: tuple[int, ...]  # columns of each
    results: tuple[int, ...]
    biases: tuple[tuple[int, slice], ...] = ()  # of which result, and which columns
    transposed: bool = False  # weights are [columns read, columns written]

    @cached_property
    def transpose(self) -> Layout:
        """From the results to the inputs, without biases."""
        terms = tuple(
            Term(t.target, t.written, t.weight, t.part, t.source, t.read) for t in self.terms
        )
        return Layout(terms, self.results, self.inputs, transposed=not self.transposed)

    @cached_property
    def without_biases(self) -> Layout:
        """The products alone."""
        return replace(self, biases=())

    @cached_property
    def adding(self) -> tuple[bool, ...]:
        """Of each term, whether it adds to what an earlier one wrote."""
        return _repeated([(term.target, term.written.start) for term in self.terms])

    @cached_property
    def adding_to_weights(self) -> tuple[bool, ...]:
        """The same for the products that are the weights' gradients."""
        return _repeated([(term.weight, term.part.start) for term in self.terms])

    @cached_property
    def unwritten(self) -> tuple[tuple[int, slice], ...]:
        """Columns of results that no term writes."""
        found = []
        for target, width in enumerate(self.results):
            parts = {(t.written.start, t.written.stop) for t in self.terms if t.target == target}
            end = 0
            for start, stop in [*sorted(parts), (width, width)]:
                if start > end:
                    found.append((target, slice(end, start)))
                end = stop
        return tuple(found)


def _repeated(keys: Sequence[object]) -> tuple[bool, ...]:
    return tuple(key in keys[:place] for place, key in enumerate(keys))


@dataclass(frozen=True)
class _Call:
    """A layout, and what its terms multiply with."""

    kernels: ctypes.CDLL
    layout: Layout
    packed: dict[tuple[bool, int, int], Packed] = field(default_factory=dict)

    def transpose(self) -> _Call:
        return replace(self, layout=self.layout.transpose)

    def of_other_weights(self) -> _Call:
        return _Call(self.kernels, self.layout.without_biases)

    def factor(self, term: Term, weights: Sequence[Tensor]) -> Packed:
        transposed = self.layout.transposed
        key = transposed, term.weight, term.part.start
        if key not in self.packed:
            part = weights[term.weight].detach()[:, term.part]
            self.packed[key] = pack(self.kernels, part if transposed else part.t())
        return self.packed[key]

    def split(self, values: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T], Sequence[_T]]:
        """What belongs to inputs, weights and biases."""
        first, last = len(self.layout.inputs), len(values) - len(self.layout.biases)
        return values[:first], values[first:last], values[last:]


class ColumnProducts:
    """Layers of one input with their weights, which are packed once for all rows.

    Args:
        kernels: of :func:`column_kernels`.
        layout: of the layers.
        weights: of its terms.
        biases: of its biases.
    """

    def __init__(
        self,
        kernels: ctypes.CDLL,
        layout: Layout,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
    ) -> None:
        self._call = _Call(kernels, layout)
        self._parameters = *weights, *biases

    def __call__(self, x: Tensor, known: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """[n, columns] to the results [n, columns]; differentiable any number of times.

        Args:
            x: rows.
            known: the results, where they were computed before.
        """
        out: tuple[Tensor, ...]
        out = _Forward.apply(self._call, known, _dense(x), *self._parameters)
        return out

    def forget(self) -> None:
        """Drop the packed weights, which are packed again when they are needed."""
        self._call.packed.clear()


def column_kernels(layout: Layout, *tensors: Tensor) -> ctypes.CDLL | None:
    """The library where its products are to be taken for such tensors; else None."""
    columns = [part for term in layout.terms for part in (term.read, term.written)]
    return product_kernels(*tensors, widths={part.stop - part.start for part in columns})


def _dense(x: Tensor) -> Tensor:
    """Rows of which are dense, and no two the same."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


class _Forward(torch.autograd.Function):
    """Results from inputs, weights and biases."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, known: Sequence[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        if known:
            return tuple(tensor.detach() for tensor in known)
        products = MatrixProducts(call.kernels)
        out = _add_products(products, call, *call.split(tensors))
        products.run()
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        inputs, weights, biases = call.split(ctx.saved_tensors)
        grads = tuple(map(_dense, grads))
        if torch.is_grad_enabled():  # what follows is differentiated, too
            input_grads = _Forward.apply(call.transpose(), (), *grads, *weights)
            weight_grads = _Outer.apply(call.of_other_weights(), weights, *inputs, *grads)
            bias_grads = [grads[i][:, part].sum(0) for i, part in call.layout.biases]
            return None, None, *input_grads, *weight_grads, *bias_grads
        of_inputs, of_weights, of_biases = map(any, call.split(ctx.needs_input_grad[2:]))
        products = MatrixProducts(call.kernels)
        found: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        found_inputs, found_weights, found_biases = call.split(found)
        if of_inputs:
            found_inputs = _add_products(products, call.transpose(), grads, weights, ())
        if of_weights:
            found_weights = _add_outer(products, call, inputs, grads, weights)
        if of_biases:
            found_biases = _add_sums(products, call, grads, biases)
        products.run()
        return None, None, *found_inputs, *found_weights, *found_biases


class _Outer(torch.autograd.Function):
    """Gradients of weights from inputs and the gradients of results."""

    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Sequence[Tensor], *rows: Tensor) -> Any:
        ctx.call = call
        ctx.save_for_backward(*rows)
        inputs, grads, _ = call.split(rows)
        products = MatrixProducts(call.kernels)
        out = _add_outer(products, call, inputs, grads, weights)
        products.run()
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call.of_other_weights()
        inputs, grads, _ = call.split(ctx.saved_tensors)
        of_inputs = _Forward.apply(call.transpose(), (), *grads, *weights)
        of_grads = _Forward.apply(call, (), *inputs, *weights)
        return None, None, *of_inputs, *of_grads


def _add_products(
    products: MatrixProducts,
    call: _Call,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """Where the results will be."""
    layout = call.layout
    out = [inputs[0].new_empty(len(inputs[0]), width) for width in layout.results]
    for target, columns in layout.unwritten:
        out[target][:, columns] = 0
    bias_of = {
        (target, columns.start): bias.detach()
        for (target, columns), bias in zip(layout.biases, biases, strict=True)
    }
    for term, adding in zip(layout.terms, layout.adding, strict=True):
        bias = None if adding else bias_of.get((term.target, term.written.start))
        products.add(
            inputs[term.source][:, term.read],
            call.factor(term, weights),
            out[term.target][:, term.written],
            bias=bias,
            accumulate=adding,
        )
    return out


def _add_outer(
    products: MatrixProducts,
    call: _Call,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Where the gradients of weights will be."""
    layout = call.layout
    out = [torch.empty_like(weight) for weight in weights]
    for term, adding in zip(layout.terms, layout.adding_to_weights, strict=True):
        read = inputs[term.source][:, term.read]
        grad = grads[term.target][:, term.written]
        rows, columns = (read, grad) if layout.transposed else (grad, read)
        products.add(rows.t(), columns, out[term.weight][:, term.part], accumulate=adding)
    return out


def _add_sums(
    products: MatrixProducts, call: _Call, grads: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Tensor]:
    """Where the gradients of biases will be: sums over rows."""
    out = [torch.empty_like(bias) for bias in biases]
    ones = grads[0].new_ones(1, len(grads[0]))
    for (target, columns), total in zip(call.layout.biases, out, strict=True):
        products.add(ones, grads[target][:, columns], total[None])
    return out
