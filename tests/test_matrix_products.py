"""Matrix products of our own, and the layers that are made of them, against torch's in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fairchem_equiformer.ops.choice import VARIABLE
from fairchem_equiformer.ops.linear import add_product, linear, product
from fairchem_equiformer.ops.native import (
    MatrixProducts,
    loader,
    pack,
    pack_in_bfloat16,
    product_kernels,
)
from fairchem_equiformer.ops.radial import (
    EdgeScalars,
    GaussianBasis,
    RadialTables,
    RadialWeights,
    radial_function,
)
from fairchem_equiformer.ops.so2_linear import SO2Weights, so2_linear, so2_linear_backward
from fairchem_equiformer.ops.so2_packed import PackedSO2Weights
from fairchem_equiformer.ops.so3_linear import so3_linear
from tests.kernels import PRODUCTS, called_kernels, compiled_for
from tests.tolerances import assert_close

WIDTHS = st.sampled_from([16, 32, 48, 64, 112, 176])
ROWS = st.integers(0, 40)
SIZES = st.integers(1, 70)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(autouse=True, scope="module", params=[4, 3, 0], ids="for x86-64-v{}".format)
def _by_own_products(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "native")
        with compiled_for(request.param):
            yield


@pytest.fixture
def _in_bfloat16():
    if not loader.library().has_bfloat16_products():
        pytest.skip("needs a processor with AVX512-BF16, and the library for it")


IN_BFLOAT16 = pytest.mark.usefixtures("_in_bfloat16")


def draws(seed):
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def within(x, before=3, behind=5):
    """The same numbers as columns of a wider matrix."""
    wide = torch.full((len(x), before + x.shape[1] + behind), torch.nan)
    wide[:, before : before + x.shape[1]] = x
    return wide[:, before : before + x.shape[1]]


@settings(deadline=None, max_examples=80)
@given(rows=ROWS, k=SIZES, n=WIDTHS, transposed=st.booleans(), packed=st.booleans(), seed=SEEDS)
def test_product(rows, k, n, transposed, packed, seed):
    draw, kernels = draws(seed), loader.library()
    a = within(draw(k, rows)).t() if transposed else within(draw(rows, k))
    b = within(draw(k, n), 16, 16)
    out = torch.empty(rows, n)
    products = MatrixProducts(kernels)
    products.add(a, pack(kernels, b) if packed else b, out)
    products.run()
    assert_close(out, a.double() @ b.double(), "product")


@settings(deadline=None, max_examples=60)
@given(
    rows=ROWS,
    k=SIZES,
    n=WIDTHS,
    sign=st.sampled_from([1, -1]),
    accumulate=st.booleans(),
    also=st.booleans(),
    seed=SEEDS,
)
def test_sum_of_operands_added_to_two_results(rows, k, n, sign, accumulate, also, seed):
    draw, kernels = draws(seed), loader.library()
    plus, minus = within(draw(rows, 2 * k)).chunk(2, dim=1)
    sums, bias, b = torch.empty(rows, k), draw(n), draw(n, k)
    outs = [within(draw(rows, n)) for _ in range(1 + also)]
    expected = sign * (plus.double() + minus.double()) @ b.double().t()
    wanted = [expected + (out.double() if accumulate else bias.double()) for out in outs]
    products = MatrixProducts(kernels)
    products.add(
        plus,
        pack(kernels, b.t()),
        outs[0],
        plus=minus,
        sums=sums,
        also=outs[1] if also else None,
        bias=None if accumulate else bias,
        sign=sign,
        accumulate=accumulate,
    )
    products.run()
    assert torch.equal(sums, plus + minus)
    for out, expected in zip(outs, wanted, strict=True):
        assert_close(out, expected, "product")


def rounded(x):
    """To bfloat16, in float64."""
    return x.bfloat16().double()


@IN_BFLOAT16
@settings(deadline=None, max_examples=80)
@given(
    rows=ROWS,
    k=SIZES,
    n=WIDTHS,
    transposed=st.booleans(),
    columns=st.booleans(),
    sign=st.sampled_from([1, -1]),
    start=st.sampled_from(["nothing", "bias", "out"]),
    seed=SEEDS,
)
def test_product_in_bfloat16(rows, k, n, transposed, columns, sign, start, seed):
    draw, kernels = draws(seed), loader.library()
    a = within(draw(k, rows)).t() if transposed else within(draw(rows, k))
    b = within(draw(n, k)).t() if columns else within(draw(k, n))
    out, bias = within(draw(rows, n)), draw(n)
    begun = {"nothing": 0, "bias": bias.double(), "out": out.double()}[start]
    expected = begun + sign * rounded(a) @ rounded(b)
    products = MatrixProducts(kernels)
    products.add(
        a,
        pack_in_bfloat16(kernels, b),
        out,
        bias=bias if start == "bias" else None,
        sign=sign,
        accumulate=start == "out",
    )
    products.run()
    assert_close(out, expected, "product")


@IN_BFLOAT16
def test_matrix_is_rounded_once_for_several_products():
    draw, kernels = draws(0), loader.library()
    a, b, c = draw(33, 50), draw(50, 48), draw(50, 16)
    outs = torch.empty(33, 48), torch.empty(33, 16)
    products = MatrixProducts(kernels)
    low = products.rounded(a)
    for factor, out in zip((b, c), outs, strict=True):
        products.add(low, pack_in_bfloat16(kernels, factor), out)
    products.run()
    for factor, out in zip((b, c), outs, strict=True):
        assert_close(out, rounded(a) @ rounded(factor), "product")


@IN_BFLOAT16
@pytest.mark.parametrize("where", [0, 17, 49])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_in_bfloat16(value, where):
    kernels = loader.library()
    a, b = torch.ones(7, 50), torch.ones(50, 16)
    a[3, where] = b[where, 5] = value
    out = torch.empty(7, 16)
    products = MatrixProducts(kernels)
    products.add(a, pack_in_bfloat16(kernels, b), out)
    products.run()
    torch.testing.assert_close(out, a @ b, equal_nan=True)


def test_matrices_in_bfloat16_have_dense_rows_or_columns():
    kernels, scattered = loader.library(), torch.zeros(32, 32)[::2, ::2]
    with pytest.raises(ValueError, match="a matrix to be packed lies at strides"):
        pack_in_bfloat16(kernels, scattered)
    with pytest.raises(ValueError, match="a matrix to be rounded lies at strides"):
        MatrixProducts(kernels).rounded(scattered)


@given(k=SIZES, n=WIDTHS, factor=st.sampled_from([1.0, -1.0]), seed=SEEDS)
def test_sum_of_matrices_is_packed_as_one(k, n, factor, seed):
    draw, kernels = draws(seed), loader.library()
    a, b = draw(n, 2 * k).chunk(2, dim=1)
    found = pack(kernels, a.t(), b.t(), factor)
    assert torch.equal(found.panels, pack(kernels, a.t() + factor * b.t()).panels)


def test_products_after_each_other_read_what_was_written():
    draw, kernels = draws(0), loader.library()
    a, b, c = draw(50, 32), draw(32, 48), draw(48, 16)
    middle, out = torch.empty(50, 48), torch.empty(50, 16)
    products = MatrixProducts(kernels)
    products.add(a, pack(kernels, b), middle)
    products.add(middle, pack(kernels, c), out)
    products.run()
    assert_close(out, a.double() @ b.double() @ c.double(), "product")


def test_bits_do_not_depend_on_threads():
    draw, before = draws(0), torch.get_num_threads()
    a, b = draw(101, 300), draw(300, 112)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(product(a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_must_be_dense():
    kernels = loader.library()
    products, x = MatrixProducts(kernels), torch.zeros(32, 32)
    with pytest.raises(ValueError, match="rows of b lie at strides"):
        products.add(x, x.t(), x)
    with pytest.raises(ValueError, match="rows of out lie at strides"):
        products.add(x, x, x.t())


def test_which_products_are_taken(monkeypatch):
    single, double = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    assert product_kernels(single, widths=[16, 48]) is loader.library()
    assert product_kernels(single, widths=[16, 40]) is None
    assert product_kernels(double, widths=[16]) is None
    monkeypatch.setenv(VARIABLE, "auto")
    preferred = product_kernels(single, widths=[16]) is not None
    assert preferred == bool(loader.library().prefers_own_products())
    monkeypatch.setenv(VARIABLE, "reference")
    loader.library.cache_clear()
    assert product_kernels(single, widths=[16]) is None
    loader.library.cache_clear()


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, k=WIDTHS, n=WIDTHS, bias=st.booleans(), seed=SEEDS)
def test_linear(rows, k, n, bias, seed):
    draw = draws(seed)
    inputs = [draw(rows, 2, k), draw(n, k), *([draw(n)] if bias else [])]
    flow = draw(rows, 2, n)

    def differentiated(layer, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = layer(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, flow.to(dtype))]

    with called_kernels() as called:
        found = differentiated(linear, torch.float32)
    assert called == PRODUCTS
    for ours, exactly in zip(found, differentiated(F.linear, torch.float64), strict=True):
        assert_close(ours, exactly, "product")


@pytest.mark.parametrize("edges", [0, 1, 50])
def test_radial_function_that_nobody_differentiates_is_two_calls(edges):
    draw = draws(edges)
    shapes = [(9, 8), (9, 8), (32, 50 + 16), *[(32,)] * 3, (32, 32), *[(32,)] * 3, (48, 32), (48,)]
    weights = RadialWeights(*(draw(*shape) / 4 for shape in shapes))
    basis = GaussianBasis(torch.linspace(0, 12, 50), -8.0)
    elements = [torch.randint(9, (edges,)) for _ in range(2)]
    scalars = EdgeScalars(12 * torch.rand(edges), *elements)
    tables = RadialTables.of(weights)
    with torch.no_grad(), called_kernels() as called:
        found = radial_function(scalars, tables, basis)
    assert called == {"gaussians_times", *PRODUCTS}
    assert_close(found, radial_function(scalars, tables, basis), "product", slack=2)


def test_linear_can_be_differentiated_twice():
    draw = draws(0)
    inputs = draw(7, 16), draw(32, 16), draw(32)

    def penalty(layer, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        first = torch.autograd.grad(layer(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found, expected = penalty(linear, torch.float32), penalty(F.linear, torch.float64)
    for ours, exactly in zip(found, expected, strict=True):
        assert_close(ours, exactly, "product", slack=10)  # sixth powers


def test_linear_leaves_out_gradients_that_nobody_wants():
    x, weight = torch.ones(3, 16), torch.ones(16, 16, requires_grad=True)
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((16, 16), 3.0))
    assert x.grad is None


def test_linear_under_autocast_is_torchs():
    draw = draws(0)
    x, weight = draw(5, 16), draw(32, 16)
    with torch.autocast("cpu", torch.bfloat16), called_kernels() as called:
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not called


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, k=SIZES, n=WIDTHS, seed=SEEDS)
def test_product_is_added(rows, k, n, seed):
    draw = draws(seed)
    total, a, b = draw(rows, n), draw(k, rows), draw(k, n)
    expected = total.double() + a.t().double() @ b.double()
    add_product(total, a.t(), b)
    assert_close(total, expected, "product")


def so2_layer(dtype, edges, outputs, inputs, bias, seed):
    """Result and gradients of one layer whose products are in a dtype, and of it in float64."""
    draw = draws(seed)
    sizes = list(zip(outputs, inputs, strict=False))
    matrices = [draw((1 + (m > 0)) * y, x) for m, (y, x) in enumerate(sizes)]
    offset = draw(outputs[0]) if bias else None
    x = draw(edges, sum((1 + (m > 0)) * x for m, (_, x) in enumerate(sizes)) + 16)
    grad = draw(edges, sum((1 + (m > 0)) * y for m, (y, _) in enumerate(sizes)))

    def computed(weights, dtype):
        totals = [torch.ones_like(m, dtype=dtype) for m in matrices]
        found = so2_linear(x.to(dtype), weights, None if offset is None else offset.to(dtype))
        x_grad = so2_linear_backward(grad.to(dtype), x.to(dtype), weights, totals)
        return [found, x_grad, *totals]

    weights = SO2Weights.of(matrices, dtype)
    exact = SO2Weights.of([m.double() for m in matrices], torch.float64, single=True)
    return weights, computed(weights, torch.float32), computed(exact, torch.float64)


LAYERS = given(
    edges=ROWS,
    outputs=st.lists(WIDTHS, min_size=1, max_size=4),
    inputs=st.lists(WIDTHS, min_size=4, max_size=4),
    bias=st.booleans(),
    seed=SEEDS,
)


@settings(deadline=None, max_examples=30)
@LAYERS
def test_so2_linear(edges, outputs, inputs, bias, seed):
    weights, found, expected = so2_layer(torch.float32, edges, outputs, inputs, bias, seed)
    assert isinstance(weights, PackedSO2Weights)
    for ours, exactly in zip(found, expected, strict=True):
        assert_close(ours, exactly, "so2_linear")


@IN_BFLOAT16
@settings(deadline=None, max_examples=30)
@LAYERS
def test_so2_linear_in_bfloat16(edges, outputs, inputs, bias, seed):
    weights, found, expected = so2_layer(torch.bfloat16, edges, outputs, inputs, bias, seed)
    assert isinstance(weights, PackedSO2Weights)
    for ours, exactly in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, exactly, "so2_linear", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_so2_linear_by_torch_in_few_digits(dtype, monkeypatch):
    """Where this processor has no such products of ours, or for another dtype."""
    monkeypatch.setattr(PackedSO2Weights, "of", lambda *_: None)
    weights, found, expected = so2_layer(dtype, 30, [32, 16], [48, 16, 32, 16], True, 0)
    assert weights.zero.dtype == dtype
    for ours, exactly in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, exactly, "so2_linear", dtype)


@settings(deadline=None, max_examples=20)
@given(atoms=st.integers(1, 30), lmax=st.integers(0, 4), c_in=WIDTHS, c_out=WIDTHS, seed=SEEDS)
def test_so3_linear(atoms, lmax, c_in, c_out, seed):
    draw = draws(seed)
    x, weight = draw(atoms, (lmax + 1) ** 2, c_in), draw(lmax + 1, c_out, c_in)
    flow = draw(atoms, (lmax + 1) ** 2, c_out)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        out = so3_linear(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, flow.to(dtype))))
    for ours, exactly in zip(*results, strict=True):
        assert_close(ours, exactly, "product")
