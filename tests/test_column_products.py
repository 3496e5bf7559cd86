"""Linear layers of irreps by our own products, in one call, against each layer by itself."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3

from fairchem_equiformer.nn.irreps.linear import IrrepsLinear, LinearLayers
from fairchem_equiformer.ops import column_products
from fairchem_equiformer.so3.irreps import blocks, places
from tests.kernels import PRODUCTS, called_kernels
from tests.tolerances import assert_close

# Irreps that stand twice in the input, that the result lacks, and that the input lacks.
READ = o3.Irreps("32x0e+16x1e+16x0e+16x2e+32x1e")
WRITTEN = ["48x0e+16x1e", "16x1e+16x0o+32x0e"]
ROWS = 37


@pytest.fixture(autouse=True)
def _our_products(monkeypatch):
    monkeypatch.setenv("FAIRCHEM_EQUIFORMER_KERNELS", "native")


@pytest.fixture
def layers():
    found = [IrrepsLinear(READ, o3.Irreps(irreps)) for irreps in WRITTEN]
    for layer in found:
        torch.nn.init.normal_(layer.bias)
    return found


def by_blocks(layers, x):
    return [layer.of_blocks(blocks(x, places(READ))) for layer in layers]


def together(layers, x):
    return LinearLayers(*layers).prepared()(x)


def differentiated(function, layers, x):
    """Results, gradients of a loss of them, and of a loss of these gradients."""
    parameters = [p for layer in layers for p in layer.parameters()]
    inputs = [x, *parameters]
    out = function(layers, x)
    loss = sum((part.tanh() * torch.arange(1.0, part.shape[1] + 1)).sum() for part in out)
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(part.square().sum() for part in first), inputs)
    once = torch.autograd.grad(sum(part.square().sum() for part in function(layers, x)), inputs)
    return [*out, *first, *second, *once]


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_equals_a_layer_after_the_other(layers, rows):
    x = torch.randn(rows, READ.dim, requires_grad=True)
    with called_kernels() as called:
        found = differentiated(together, layers, x)
    assert called == PRODUCTS
    copies = [IrrepsLinear(READ, o3.Irreps(irreps)).double() for irreps in WRITTEN]
    for copy, layer in zip(copies, layers, strict=True):
        copy.load_state_dict(layer.state_dict())
    exact = differentiated(by_blocks, copies, x.detach().double().requires_grad_())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, "product", torch.float32)


def test_rows_need_not_lie_together(layers):
    """Columns of something wider, components before rows, or the same row again and again."""
    wide = torch.randn(ROWS, READ.dim + 5)
    tall = torch.randn(READ.dim, ROWS)
    for x in (wide[:, 3:-2], tall.t(), wide[:1, :-5].expand(ROWS, -1)):
        expected = differentiated(by_blocks, layers, x.clone().requires_grad_())
        found = differentiated(together, layers, x.requires_grad_())
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, "product")
        x.requires_grad_(requires_grad=False)


def test_what_is_frozen_gets_no_gradient(layers):
    x = torch.randn(ROWS, READ.dim)
    for parameter in (layers[0].bias, *layers[1].parameters()):
        parameter.requires_grad_(requires_grad=False)
    sum(part.sum() for part in together(layers, x)).backward()
    for parameter in (p for layer in layers for p in layer.parameters()):
        assert (parameter.grad is not None) == parameter.requires_grad


def test_results_that_are_known_are_not_computed_again(layers, monkeypatch):
    x = torch.randn(ROWS, READ.dim, requires_grad=True)
    ready = LinearLayers(*layers).prepared()
    kept: list = []
    with torch.no_grad():
        expected = ready(x, kept)
    made = []
    original = column_products._add_products

    def counted(*arguments):
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(column_products, "_add_products", counted)
    found = ready(x, kept)
    assert not made
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    flow = [torch.randn_like(part) for part in expected]
    gradients = torch.autograd.grad(found, inputs, flow)
    assert len(made) == 1  # the input's
    wanted = torch.autograd.grad(by_blocks(layers, x), inputs, flow)
    for one, other in zip((*found, *gradients), (*expected, *wanted), strict=True):
        assert_close(one, other, "product")


def test_weights_are_packed_once(layers, monkeypatch):
    packed = []
    pack = column_products.pack
    monkeypatch.setattr(column_products, "pack", lambda *a: (packed.append(a), pack(*a))[1])
    ready = LinearLayers(*layers).prepared()
    ready(torch.randn(3, READ.dim))
    once = len(packed)
    assert once
    ready(torch.randn(5, READ.dim))
    assert len(packed) == once
    ready.forget()
    ready(torch.randn(5, READ.dim))
    assert len(packed) == 2 * once


def test_one_parallel_region_for_all(layers, monkeypatch):
    calls = []
    run = column_products.MatrixProducts.run
    monkeypatch.setattr(
        column_products.MatrixProducts, "run", lambda self: (calls.append(self), run(self))
    )
    out = together(layers, torch.randn(ROWS, READ.dim, requires_grad=True))
    assert len(calls) == 1
    sum(part.sum() for part in out).backward()
    assert len(calls) == 2
