"""The compiled kernels against the references that they stand for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairchem_equiformer.ops import native
from fairchem_equiformer.ops.aggregate import aggregate, aggregate_backward
from fairchem_equiformer.ops.attention_weights import (
    attention_logits,
    attention_softmax,
    attention_softmax_backward,
)
from fairchem_equiformer.ops.edges import prepare_edges
from fairchem_equiformer.ops.grid_mlp import grid_mlp
from fairchem_equiformer.ops.message import message, message_backward
from fairchem_equiformer.ops.native import loader
from fairchem_equiformer.ops.radial import (
    EdgeScalars,
    GaussianBasis,
    RadialTables,
    RadialWeights,
    radial_function,
)
from fairchem_equiformer.ops.rotate import chunk_frames
from fairchem_equiformer.ops.s2_activation import s2_activation
from fairchem_equiformer.so3.grid import grid
from fairchem_equiformer.so3.layout import layout
from tests.test_ops import make_graph
from tests.tolerances import assert_close

CPU = torch.device("cpu")
SINGLE = torch.float32


@pytest.fixture(autouse=True)
def _the_library_is_there():
    assert loader.library() is not None


def in_both_ways(monkeypatch_context, function, *inputs):
    """Value and gradients with the kernels and without them."""
    found = []
    for kernels in (True, False):
        with monkeypatch_context() as patch:
            if not kernels:
                patch.setattr(loader, "library", lambda: None)
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            value = function(*leaves)
            flow = torch.linspace(-1, 1, value.numel()).view(value.shape)
            found.append((value, *torch.autograd.grad(value, leaves, flow)))
    return zip(*found, strict=True)


@settings(deadline=None, max_examples=50)
@given(
    degrees=st.tuples(st.integers(1, 6), st.integers(0, 6)).filter(lambda d: d[1] <= d[0]),
    resolution=st.sampled_from([None, 14, 18]),
    channels=st.sampled_from([16, 48, 64, 80]),
    items=st.integers(0, 5),
    wanted=st.sampled_from(["all", "scalars", "others"]),
    kind=st.sampled_from(["s2", "mlp"]),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_functions_on_the_grid(degrees, resolution, channels, items, wanted, kind, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = layout(*degrees)
    sphere = grid(sizes, resolution, SINGLE, CPU, wanted=wanted)
    # Rows with other columns before them, as the first SO(2) layer leaves them.
    x = torch.randn(items, 7 + sizes.num_rows * channels, generator=generator) * scale
    weight = torch.randn(channels, channels, generator=generator) / channels**0.5

    def function(x, weight):
        rows = x[:, 7:].unflatten(1, (sizes.num_rows, channels))
        if kind == "s2":
            return s2_activation(rows, sphere) + 0 * weight.sum()
        return grid_mlp(rows.contiguous(), weight, sphere)

    assert native.grid_kernels(sphere, x[:, 7:].unflatten(1, (-1, channels))) is not None
    for ours, expected in in_both_ways(pytest.MonkeyPatch.context, function, x, weight):
        assert_close(ours, expected, "activation")


@settings(deadline=None, max_examples=40)
@given(
    degrees=st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda d: d[1] <= d[0]),
    channels=st.sampled_from([16, 48, 64, 80]),
    by_degree=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_messages(degrees, channels, by_degree, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = layout(*degrees)
    edges = prepare_edges(make_graph([0, 3, 0, 5, 2]), sizes, channels, SINGLE, max_edges=5)
    weights = sizes.num_degrees(0) if by_degree else len({(d, abs(m)) for d, m in sizes.m_major})
    draw = partial(torch.randn, generator=generator)
    x = draw(5, sizes.num_coefficients, channels)
    for chunk in edges.chunks:
        frames = chunk_frames(edges, chunk)
        radial = draw(len(frames.source), weights, 2 * channels)
        grad = draw(len(frames.source), sizes.num_rows, 2 * channels)
        found = []
        for kernels in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not kernels:
                    patch.setattr(loader, "library", lambda: None)
                x_grad = torch.ones_like(x)
                scaled, sent = message(x, frames, radial, sizes, by_degree=by_degree)
                assert (sent.rotated is None) == kernels
                radial_grad = message_backward(grad, sent, x, x_grad, sizes, by_degree=by_degree)
            found.append((scaled, x_grad, radial_grad))
        for ours, expected in zip(*found, strict=True):
            assert_close(ours, expected, "rotate")


@settings(deadline=None, max_examples=40)
@given(
    degrees=st.tuples(st.integers(1, 6), st.integers(0, 6)).filter(lambda d: d[1] <= d[0]),
    wanted=st.sampled_from(["all", "vectors"]),
    heads=st.sampled_from([1, 3, 8]),
    channels=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**31),
)
def test_aggregate(degrees, wanted, heads, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    sizes = layout(*degrees)
    out = sizes if wanted == "all" else layout(1, min(1, sizes.mmax), 1)
    edges = prepare_edges(make_graph([0, 3, 0, 5, 2]), sizes, channels, SINGLE, max_edges=5)
    for chunk in edges.chunks:
        frames = chunk_frames(edges, chunk)
        values = draw(len(frames.source), out.num_rows, heads, channels)
        alpha = draw(len(frames.source), heads)
        grad = draw(frames.num_nodes, out.num_coefficients, heads * channels)
        assert native.aggregate_kernels(values, alpha, sizes, out) is not None
        found = []
        for kernels in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not kernels:
                    patch.setattr(loader, "library", lambda: None)
                result = aggregate(values, alpha, frames, out)
                found.append((result, *aggregate_backward(grad, values, alpha, frames, out)))
        for ours, expected in zip(*found, strict=True):
            assert_close(ours, expected, "rotate")


@settings(deadline=None, max_examples=40)
@given(
    heads=st.sampled_from([1, 3, 8]),
    channels=st.sampled_from([16, 32, 64]),
    edges=st.integers(0, 9),
    norm=st.booleans(),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_attention_logits(heads, channels, edges, norm, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    # With other columns after them, as the first SO(2) layer leaves them.
    scalars = draw(edges, heads * channels + 5) * scale
    weights = [draw(heads, channels)] + [draw(channels) for _ in range(2 * norm)]

    def function(scalars, dot, *norm):
        rows = scalars[:, :-5].unflatten(1, (heads, channels))
        return attention_logits(rows, norm or None, dot)

    rows = scalars[:, :-5].unflatten(1, (heads, channels))
    assert native.logit_kernels(rows, weights[1:] or None, weights[0], 1e-5) is not None
    for ours, expected in in_both_ways(pytest.MonkeyPatch.context, function, scalars, *weights):
        assert_close(ours, expected, "activation")


@settings(deadline=None, max_examples=30)
@given(
    degrees=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    heads=st.sampled_from([1, 3, 8]),
    scale=st.sampled_from([1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_attention_softmax(degrees, heads, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    edges = prepare_edges(make_graph(degrees), layout(1, 1), 16, SINGLE, max_edges=4)
    for chunk in edges.chunks:
        frames = chunk_frames(edges, chunk)
        if not len(frames.source):
            continue
        logits = torch.randn(len(frames.source), heads, generator=generator) * scale
        grad = torch.randn(logits.shape, generator=generator)
        found = []
        for kernels in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not kernels:
                    patch.setattr(loader, "library", lambda: None)
                alpha = attention_softmax(logits, frames)
                found.append((alpha, attention_softmax_backward(alpha, grad, frames)))
        (ours, ours_grad), (expected, expected_grad) = found
        assert_close(ours, expected, "segments")
        # Differences of numbers as large as `grad`, which all but cancel where one edge has it all.
        assert (ours_grad - expected_grad).abs().max() < 2e-6 * grad.abs().max()


@settings(deadline=None, max_examples=40)
@given(
    num_basis=st.sampled_from([2, 17, 50, 600]),
    hidden=st.sampled_from([16, 64, 128]),
    width=st.sampled_from([0.5, 2.0]),
    embeddings=st.booleans(),
    distances=st.lists(st.floats(0.01, 14), max_size=70),
    seed=st.integers(0, 2**31),
)
def test_radial_function(num_basis, hidden, width, embeddings, distances, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    spacing = 12 / (num_basis - 1)
    basis = GaussianBasis(torch.linspace(0, 12, num_basis), -0.5 / (width * spacing) ** 2)
    distance = torch.tensor(distances, dtype=SINGLE)
    elements = torch.randint(0, 9, (2, len(distances)), generator=generator)
    tables = [draw(9, 8), draw(9, 8)] if embeddings else []
    columns = num_basis + 8 * len(tables)
    shapes = [(hidden, columns), *[(hidden,)] * 3, (hidden, hidden), *[(hidden,)] * 3]
    weights = [*tables, *(draw(*shape) for shape in (*shapes, (6, hidden), (6,)))]

    def function(*weights):
        if not embeddings:
            weights = None, None, *weights
        scalars = EdgeScalars(distance, *elements)
        return radial_function(scalars, RadialTables.of(RadialWeights(*weights)), basis)

    for ours, expected in in_both_ways(pytest.MonkeyPatch.context, function, *weights):
        assert_close(ours, expected, "radial")


def test_kernels_of_the_radial_function_are_used():
    centers, matrix = torch.linspace(0, 12, 600), torch.zeros(600, 128)
    assert native.gaussian_kernels(centers[:3], matrix, centers, -312.0, -40.0) is not None
    x = torch.zeros(3, 128)
    assert native.norm_silu_kernels(x, x[0], x[0], 1e-5) is not None


def s2_of(x):
    return s2_activation(x.view(-1, 19, 64), grid(layout(4, 2), 18, SINGLE, CPU))


def logits_of(x):
    return attention_logits(x.view(-1, 8, 16), (x[0, :16], x[0, 16:32]), x[1, :128].view(8, 16))


def radial_of(x):
    basis = GaussianBasis(torch.linspace(0, 12, 600), -1250.0)
    distance = torch.linspace(0.5, 12, 150)
    weights = [x[:64, :600], *x[0, :192].view(3, 64), x[:64, :64], *x[1, :192].view(3, 64)]
    tables = RadialTables.of(RadialWeights(None, None, *weights, x[:7, :64], x[0, :7]))
    return radial_function(EdgeScalars(distance, None, None), tables, basis)


@pytest.mark.parametrize("function", [s2_of, logits_of, radial_of])
def test_threads_change_no_bit(function):
    x = torch.randn(64, 19 * 64)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            found.append((y, *torch.autograd.grad(y.sum(), leaf)))
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_not_a_number_stays_one():
    """A training that diverged must show it."""
    sphere = grid(layout(2, 1), None, SINGLE, CPU)
    x = torch.zeros(3, sphere.to_grid.shape[1], 16)
    x[1, 0, 5], x[2, 0, 5] = torch.nan, torch.inf
    y = s2_activation(x, sphere)
    assert y[0].isfinite().all()
    assert not y[1, :, 5].isfinite().any()
    assert not y[2, 0, 5].isfinite()


def test_loading_the_library_leaves_subnormal_numbers_alone():
    """Code built for speed may switch them off for the whole process."""
    smallest = torch.full((8,), 2.0**-149)
    assert (smallest + 0 > 0).all()
    assert (smallest * 1.0).sum() > 0


class TestChoice:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        loader.library.cache_clear()
        yield
        loader.library.cache_clear()

    def test_reference(self, monkeypatch):
        monkeypatch.setenv(loader.VARIABLE, "reference")
        assert loader.library() is None

    def test_unknown(self, monkeypatch):
        monkeypatch.setenv(loader.VARIABLE, "fast")
        with pytest.raises(ValueError, match="FAIRCHEM_EQUIFORMER_KERNELS is 'fast', it must be"):
            loader.library()

    def test_missing_library(self, monkeypatch, tmp_path, caplog):
        """`auto` says so once and goes on; `native` does not."""
        monkeypatch.setattr(loader, "__file__", str(tmp_path / "loader.py"))
        assert loader.library() is None
        assert loader.library() is None
        (record,) = caplog.records
        assert "install this package again" in record.message
        loader.library.cache_clear()
        monkeypatch.setenv(loader.VARIABLE, "native")
        with pytest.raises(RuntimeError, match="'native', but the compiled kernels cannot be load"):
            loader.library()
