"""Sums over edges by heads, dot products with heads, and all their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from fairchem_equiformer.ops.head_sums import Targets, head_dot, head_sum
from tests.kernels import called_kernels
from tests.tolerances import assert_close

DOUBLE = torch.float64
GRAPHS = {
    "atoms without edges": [0, 3, 0, 0, 5, 2, 0],
    "one edge": [1],
    "no edges": [0, 0],
    "no atoms": [],
}
graphs = pytest.mark.parametrize("degrees", GRAPHS.values(), ids=GRAPHS.keys())


def targets_of(degrees):
    counts = torch.tensor(degrees, dtype=torch.int64)
    target = torch.arange(len(degrees)).repeat_interleave(counts)
    return Targets(target, functional.pad(counts.cumsum(0), (1, 0)))


def problem(degrees, heads, channels):
    targets = targets_of(degrees)
    edges, atoms = len(targets.target), len(degrees)
    shapes = (edges, heads), (edges, channels), (atoms, heads, channels)
    return targets, [torch.randn(*shape, dtype=DOUBLE, requires_grad=True) for shape in shapes]


@graphs
def test_formulas(degrees):
    targets, (alpha, x, atoms) = problem(degrees, 3, 5)
    member = functional.one_hot(targets.target, len(degrees)).double() if degrees else x[:, :0]
    expected = torch.einsum("ei,eh,ef->ihf", member, alpha, x)
    assert_close(head_sum(alpha, x, targets), expected, "segments")
    expected = torch.einsum("ei,ef,ihf->eh", member, x, atoms)
    assert_close(head_dot(x, atoms, targets), expected, "segments")


def test_derivatives():
    targets, (alpha, x, atoms) = problem([0, 2, 1], 2, 3)
    for function, inputs in (
        (lambda a, b: head_sum(a, b, targets), (alpha, x)),
        (lambda a, b: head_dot(a, b, targets), (x, atoms)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@graphs
@pytest.mark.parametrize(("heads", "channels"), [(1, 16), (8, 48), (13, 32)])
def test_kernels_equal_the_reference(degrees, heads, channels):
    targets, doubles = problem(degrees, heads, channels)

    def derivatives(alpha, x, atoms):
        """Values, and first and second derivatives of their squares."""
        values = head_sum(alpha, x, targets), head_dot(x, atoms, targets)
        square = sum(value.square().sum() for value in values)
        first = torch.autograd.grad(square, (alpha, x, atoms), create_graph=True)
        again = sum(grad.square().sum() for grad in first)
        return *values, *first, *torch.autograd.grad(again, (alpha, x, atoms))

    with called_kernels() as called:
        actual = derivatives(*(t.detach().float().requires_grad_() for t in doubles))
    assert called == {"head_sum", "head_dot", "head_spread"}
    for one, other in zip(actual, derivatives(*doubles), strict=True):
        assert_close(one, other, "head_sums", torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_atom(bad):
    targets, doubles = problem([2, 0, 3], 4, 16)
    alpha, x, atoms = (tensor.detach().float() for tensor in doubles)
    x[1, 3] = bad
    sums = head_sum(alpha, x, targets)
    assert sums.isfinite().flatten(1).all(1).tolist() == [False, True, True]
    dots = head_dot(x, atoms, targets)
    assert dots.isfinite().all(1).tolist() == [True, False, True, True, True]
