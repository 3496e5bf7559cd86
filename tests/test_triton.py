"""Triton's kernels against the references that they stand for: on a GPU, or in the interpreter.

The interpreter runs the kernels on the CPU, one operation of NumPy for each of theirs. It does not
see a constexpr in annotations that are strings: no file with kernels imports annotations.
"""

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch.func import functional_call

from fairchem_equiformer.graph.edges import prepare_edges
from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.nn.radial import RadialFunction
from fairchem_equiformer.ops import triton as triton_kernels
from fairchem_equiformer.ops.aggregate import aggregate, aggregate_backward
from fairchem_equiformer.ops.attention_softmax import (
    attention_logits,
    attention_softmax,
    attention_softmax_backward,
)
from fairchem_equiformer.ops.choice import VARIABLE
from fairchem_equiformer.ops.edges import chunk_frames, truncation_rescale
from fairchem_equiformer.ops.gate import gate_activation
from fairchem_equiformer.ops.grid_mlp import grid_mlp
from fairchem_equiformer.ops.message import message, message_backward
from fairchem_equiformer.ops.radial import (
    EdgeScalars,
    GaussianBasis,
    RadialTables,
    _first_layer,
    _norm_silu,
)
from fairchem_equiformer.ops.rotate import rotate_back_and_sum
from fairchem_equiformer.ops.s2_activation import s2_activation, separable_s2_activation
from fairchem_equiformer.ops.triton import gaussians as gaussians_module
from fairchem_equiformer.ops.triton import grid_mlp as grid_mlp_module
from fairchem_equiformer.ops.triton import loader
from fairchem_equiformer.ops.triton import norm as norm_module
from fairchem_equiformer.ops.triton import radial as radial_module
from fairchem_equiformer.ops.triton.gaussians import _tf32
from fairchem_equiformer.so3.grid import GridSpec
from fairchem_equiformer.so3.layout import layout
from tests.test_ops import CASES, HEADS, attend, features, gradients, make_graph
from tests.tolerances import assert_close, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SINGLE, DOUBLE = torch.float32, torch.float64

# The interpreter of Triton 3.0, up to NumPy 2.3; from there on it is an error.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _kernels_or_nothing(monkeypatch):
    """What takes float32 runs by the kernels; float64 runs by the reference."""
    monkeypatch.setenv(VARIABLE, "triton")

    def refuse(op, reason):
        assert "float64" in reason, f"{op}: {reason}"

    monkeypatch.setattr(loader, "_log", refuse)


# What the tests believe


@triton.jit
def _operations(out, x, index, matrix, count, BLOCK: tl.constexpr):
    """What the kernels are made of: bounds from memory, masks, sums and products."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for j in range(tl.load(index), tl.load(index + 1)):
        row = tl.load(x + j * count + i, mask=i < count, other=0.0)
        tile = tl.load(matrix + i[:, None] * BLOCK + i[None, :])
        product = tl.dot(
            tile, tl.broadcast_to(row[:, None], [BLOCK, BLOCK]), input_precision="ieee"
        )
        total += tl.sum(row, axis=0) * tl.where(product > 0, product, tl.exp(product))
    tl.store(out + i[:, None] * BLOCK + i[None, :], total)


def test_the_interpreter_adds_up():
    x, matrix = torch.randn(5, 13, device=DEVICE), torch.randn(16, 16, device=DEVICE)
    index = torch.tensor([1, 4], device=DEVICE)
    out = torch.full((16, 16), torch.nan, device=DEVICE)
    _operations[(1,)](out, x, index, matrix, 13, BLOCK=16)
    expected = torch.zeros(16, 1, dtype=DOUBLE, device=DEVICE)
    for row in x[1:4].double():
        product = matrix[:, :13].double() @ row[:, None]
        expected += row.sum() * torch.where(product > 0, product, product.exp())
    assert_close(out, expected.expand(16, 16), "triton")


def by_kernels_and_exactly(function, *inputs):
    """Each result by the kernels in float32 against that by the reference, row by row."""
    drawn = [x.to(DEVICE, SINGLE) for x in inputs]
    found = function(*drawn)
    expected = function(*(x.double() for x in drawn))
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == SINGLE
        if ours.ndim < 3:
            assert_close(ours, exact, "triton")
            continue
        for row in range(ours.shape[1]):  # of each degree and order, whatever the others are
            assert_close(ours[:, row], exact[:, row], "triton", name=f"row {row}")


def launched_by(module, monkeypatch):
    """Names of a module's kernels, collected as they are started."""
    start, names = module.launch, set()

    def record(kernel, *arguments, **options):
        names.add(kernel.fn.__name__)
        start(kernel, *arguments, **options)

    monkeypatch.setattr(module, "launch", record)
    return names


def frames_of(degrees, sizes, max_edges=7):
    """Of a chunk that neither begins with the first atom nor holds all edges."""
    edges = prepare_edges(make_graph(degrees, DEVICE), sizes, 1, DOUBLE, max_edges=max_edges)
    return chunk_frames(edges, edges.chunks[-1])


def in_dtype(frames, dtype):
    compact = frames.compact.to(torch.float32).to(dtype)
    return replace(frames, compact=compact, sorted_by_source=(0, {}))


# Atoms that receive edges; the last chunk has atoms without any, and one with more than the others.
DEGREES = [3, 0, 2, 0, 5, 0]
SIZES = [layout(1, 0), layout(2, 2), layout(3, 1)]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


@pytest.mark.parametrize("by_degree", [False, True])
@pytest.mark.parametrize("channels", [4, 5])
@each_size
def test_messages(sizes, channels, by_degree):
    frames = frames_of(DEGREES, sizes)
    edges = len(frames.source)

    def both(x, radial, grad):
        turned = in_dtype(frames, x.dtype)
        scaled, sent = message(x, turned, radial, sizes, by_degree=by_degree)
        x_grad = torch.ones_like(x)
        radial_grad = message_backward(grad, sent, x, x_grad, sizes, by_degree=by_degree)
        return scaled, radial_grad, x_grad

    weights = sizes.num_degrees(0) if by_degree else len({(d, abs(m)) for d, m in sizes.m_major})
    by_kernels_and_exactly(
        both,
        torch.randn(len(DEGREES), sizes.num_coefficients, channels),
        torch.randn(edges, weights, 2 * channels),
        torch.randn(edges, sizes.num_rows, 2 * channels),
    )


@pytest.mark.parametrize(("heads", "channels"), [(2, 4), (3, 3)])
@pytest.mark.parametrize("wanted", ["all", "vectors"])
@each_size
def test_aggregate(sizes, wanted, heads, channels):
    frames = frames_of(DEGREES, sizes)
    out = sizes if wanted == "all" else layout(1, min(1, sizes.mmax), 1)

    def both(values, alpha, grad):
        turned = in_dtype(frames, values.dtype)
        gradients = aggregate_backward(grad, values, alpha, turned, out)
        return aggregate(values, alpha, turned, out), *gradients

    edges = len(frames.source)
    by_kernels_and_exactly(
        both,
        torch.randn(edges, out.num_rows, heads, channels),
        torch.randn(edges, heads),
        torch.randn(frames.num_nodes, out.num_coefficients, heads * channels),
    )


@pytest.mark.parametrize("degrees", [DEGREES, [40, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_softmax(degrees, heads):
    frames = frames_of(degrees, layout(1, 0), max_edges=100)

    def both(logits, grad):
        alpha = attention_softmax(logits, frames)
        return alpha, attention_softmax_backward(alpha, grad, frames)

    edges = len(frames.source)
    by_kernels_and_exactly(both, 3 * torch.randn(edges, heads), torch.randn(edges, heads))


def differentiated(function):
    """Value of a function of leaves, and their gradients."""

    def both(*inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        flow = torch.linspace(-1, 1, value.numel(), device=DEVICE).view(value.shape)
        return value.detach(), *torch.autograd.grad(value, leaves, flow.to(value))

    return both


@pytest.mark.parametrize("edges", [0, 1, 40])
@pytest.mark.parametrize("norm", [True, False])
def test_logits(edges, norm):
    heads, channels = 2, 6

    @differentiated
    def both(scalars, dot, *weights):  # other columns stand behind
        scalars = scalars[:, : heads * channels].unflatten(1, (heads, channels))
        return attention_logits(scalars, weights or None, dot)

    weights = [torch.randn(channels) for _ in range(2 if norm else 0)]
    by_kernels_and_exactly(
        both, torch.randn(edges, heads * channels + 5), torch.randn(heads, channels), *weights
    )


@pytest.mark.parametrize("items", [0, 3])
@pytest.mark.parametrize(("kind", "wanted"), [("s2", "all"), ("s2", "scalars"), ("sep", "others")])
@pytest.mark.parametrize(("sizes", "resolution"), [(layout(2, 1), None), (layout(4, 2), 18)])
def test_s2_activation(sizes, resolution, kind, wanted, items):
    @differentiated
    def both(x, gates):  # other columns stand before
        sphere = GridSpec(sizes, resolution, wanted=wanted)
        rows = x[:, 7:].unflatten(1, (sizes.num_rows, -1))
        if kind == "s2":
            return s2_activation(rows, sphere) * (1 + 0 * gates[:, None, :1])
        return separable_s2_activation(rows, gates, sphere)

    by_kernels_and_exactly(both, torch.randn(items, 7 + sizes.num_rows * 5), torch.randn(items, 5))


@pytest.mark.parametrize(
    ("sizes", "resolution", "wanted", "channels", "atoms"),
    [
        (layout(1, 1), None, "all", 5, 0),
        (layout(1, 1), None, "others", 20, 3),
        (layout(1, 1), None, "scalars", 16, 3),
        (layout(3, 3), 8, "all", 20, 1),
        (layout(3, 3), 8, "others", 5, 3),
        (layout(3, 3), 8, "scalars", 20, 3),
        (layout(8, 8), None, "others", 3, 1),
    ],
)
def test_grid_mlp(sizes, resolution, wanted, channels, atoms, monkeypatch):
    monkeypatch.setattr(grid_mlp_module, "SPLITS", 2)  # fewer than atoms
    monkeypatch.setattr(grid_mlp_module, "CHANNELS", 32)  # 20 take two blocks of 16

    @differentiated
    def both(x, weight):  # other columns stand before
        sphere = GridSpec(sizes, resolution, l_major=True, wanted=wanted)
        rows = x[:, 3:].unflatten(1, (sizes.num_coefficients, channels))
        return grid_mlp(rows, weight.t(), sphere)

    x = torch.randn(atoms, 3 + sizes.num_coefficients * channels)
    by_kernels_and_exactly(both, x, torch.randn(channels, channels) / channels**0.5)


@pytest.mark.parametrize("l_major", [False, True])
@pytest.mark.parametrize(("items", "channels"), [(0, 4), (1, 3), (9, 8), (3, 130)])
def test_gates(items, channels, l_major):
    sizes = layout(3, 3 if l_major else 1)
    rows = sizes.l_major if l_major else sizes.m_major

    @differentiated
    def both(x):  # side by side, as the first SO(2) layer gives them
        gates, features = x.split([3 * channels, len(rows) * channels], dim=1)
        return gate_activation(features.unflatten(1, (len(rows), channels)), gates, rows)

    by_kernels_and_exactly(both, torch.randn(items, (3 + len(rows)) * channels))


@pytest.mark.parametrize(
    ("lmax", "channels", "atoms"), [(1, 5, 0), (1, 5, 5), (2, 8, 1), (2, 8, 5), (8, 3, 3)]
)
@pytest.mark.parametrize("kind", NORMS)
def test_norm(kind, lmax, channels, atoms, monkeypatch):
    launched = launched_by(norm_module, monkeypatch)
    monkeypatch.setattr(norm_module, "PROGRAMS", 2)  # fewer than atoms

    def both(x, *parameters):
        norm = NORMS[kind](lmax, channels).to(x.device, x.dtype)
        for parameter, value in zip(norm.parameters(), parameters, strict=True):
            parameter.data = value
        x = x.clone().requires_grad_()
        value = norm(x.transpose(0, 1))
        flow = torch.linspace(-1, 2, value.numel(), device=DEVICE).view(value.shape)
        wanted = [x, *norm.parameters()]
        x_grad, *others = torch.autograd.grad(value, wanted, flow.to(value))
        return value.detach(), x_grad.transpose(0, 1), *others

    x = torch.randn((lmax + 1) ** 2, atoms, channels)
    parameters = [torch.randn_like(p) for p in NORMS[kind](lmax, channels).parameters()]
    by_kernels_and_exactly(both, x, *parameters)
    assert launched == {"norm_forward", "norm_backward"}


@pytest.mark.parametrize("elements", [0, 4])
@pytest.mark.parametrize(("num_basis", "channels"), [(2, 5), (40, 20)])
@pytest.mark.parametrize("edges", [0, 1, 40])
def test_first_radial_layer(edges, num_basis, channels, elements, monkeypatch):
    launched = launched_by(gaussians_module, monkeypatch)
    monkeypatch.setattr(gaussians_module, "SPLITS", 2)  # fewer than blocks of edges
    monkeypatch.setattr(gaussians_module, "_EDGES", 32)  # half of it, by three of TF32
    monkeypatch.setattr(gaussians_module, "_COLUMNS", 16)  # 20 take two blocks
    numbers = [torch.randint(elements, (edges,), device=DEVICE) if elements else None] * 2
    distance = 6 * torch.rand(edges)

    def both(distance, centers, *weights):
        scalars = EdgeScalars(distance, *numbers)
        names = ["gaussians", "bias_1", "source", "target"][: len(weights)]

        @differentiated
        def layer(*weights):
            tables = RadialTables(**absent | dict(zip(names, weights, strict=True)))
            return _first_layer(scalars, tables, GaussianBasis(centers, -0.7))

        return layer(*weights)

    absent = dict.fromkeys(RadialTables._fields)
    weights = [torch.randn(num_basis, channels), torch.randn(channels)]
    weights += [torch.randn(elements, channels) for _ in range(2) if elements]
    by_kernels_and_exactly(both, distance, torch.linspace(0, 5, num_basis), *weights)
    assert launched == {"gaussians_forward", "gaussians_backward"}


@pytest.mark.parametrize(("setting", "allowed"), [("highest", 1e-5), ("high", 1e-2)])
def test_first_radial_layer_at_full_width(setting, allowed, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    distance = 6 * torch.rand(70, device=DEVICE)
    centers = torch.linspace(0, 6, 600, device=DEVICE)
    weights = [torch.randn(*shape, device=DEVICE) for shape in ((600, 128), (128,))]

    def layer(distance, centers, *weights):
        basis = GaussianBasis(centers, -1250.0)
        tables = RadialTables(
            **dict.fromkeys(RadialTables._fields) | dict(zip(names, weights, strict=True))
        )
        return _first_layer(EdgeScalars(distance, None, None), tables, basis)

    names = "gaussians", "bias_1"
    inputs = distance, centers, *weights
    found, expected = layer(*inputs), layer(*(x.double() for x in inputs))
    assert relative_error(found, expected) < allowed


@triton.jit
def _kept_by_tf32(out, x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, _tf32(tl.load(x + i)))


def test_what_tf32_keeps():
    x = torch.randn(64, device=DEVICE)
    kept = torch.empty_like(x)
    _kept_by_tf32[(1,)](kept, x, BLOCK=64)
    assert not (kept.view(torch.int32) & 0x1FFF).any()
    assert ((kept - x).abs() <= x.abs() * 2**-11).all()


@pytest.mark.parametrize(("channels", "edges"), [(5, 0), (5, 1), (24, 400), (64, 40), (130, 17)])
def test_norm_silu(channels, edges, monkeypatch):
    launched = launched_by(radial_module, monkeypatch)
    monkeypatch.setattr(radial_module, "PROGRAMS", 2)  # fewer than blocks of edges

    @differentiated
    def both(x, weight, bias):  # other columns stand before
        return _norm_silu(x[:, 3:], weight, bias)

    drawn = torch.randn(edges, 3 + channels), torch.randn(channels), torch.randn(channels)
    by_kernels_and_exactly(both, *drawn)
    assert launched == {"norm_silu_forward", "norm_silu_backward"}


def test_radial_function_of_v1_twice(monkeypatch):
    """Weights of edges and their gradient, differentiated again, as forces are in training."""
    launched = launched_by(radial_module, monkeypatch)
    radial = RadialFunction(7, 12, 10)

    def both(distances, *parameters):
        model = RadialFunction(7, 12, 10).to(distances)
        leaves = [p.clone().requires_grad_() for p in (distances, *parameters)]
        out = functional_call(
            model, dict(zip(radial.state_dict(), leaves[1:], strict=True)), leaves[0]
        )
        flow = torch.linspace(-1, 2, out.numel(), device=DEVICE).view(out.shape).to(out)
        (force,) = torch.autograd.grad(out, leaves[:1], flow, create_graph=True)
        return out.detach(), force.detach(), *torch.autograd.grad(force.square().sum(), leaves[:-1])

    by_kernels_and_exactly(both, torch.randn(9, 7), *radial.state_dict().values())
    assert launched == {"norm_silu_forward", "norm_silu_backward"}


def test_radial_function_of_v1_once(monkeypatch):
    launched = launched_by(radial_module, monkeypatch)
    radial = RadialFunction(7, 12, 10)

    @differentiated
    def both(distances, *parameters):
        named = dict(zip(radial.state_dict(), parameters, strict=True))
        return functional_call(RadialFunction(7, 12, 10).to(distances), named, distances)

    by_kernels_and_exactly(both, torch.randn(9, 7), *radial.state_dict().values())
    assert launched == {"norm_silu_forward", "norm_silu_backward"}


@pytest.mark.parametrize("degrees", [DEGREES, [0, 0]], ids=str)
@each_size
def test_edge_degree_embedding(sizes, degrees):
    frames = frames_of(degrees, sizes, max_edges=7 if any(degrees) else 100)

    @differentiated
    def both(messages):
        turned = in_dtype(frames, messages.dtype)
        ends = turned.compact, turned.target, turned.target_ptr, sizes
        found = triton_kernels.sum_over_edges(messages, *ends)
        if found is None:
            rescale = truncation_rescale(sizes, messages.dtype, DEVICE)
            rotation = turned.rotation[:, : sizes.num_degrees(0)]
            found = rotate_back_and_sum(messages, turned, rescale, rotation)
        return found

    by_kernels_and_exactly(both, torch.randn(len(frames.source), sizes.num_degrees(0), 6))


on_gpu = pytest.mark.gpu
# dtype, PyTorch's precision of float32, largest error over largest value. The interpreter makes all
# products in float32, and none of halves.
PRODUCTS = [
    pytest.param(SINGLE, "highest", 1e-5, id="float32"),
    pytest.param(SINGLE, "high", 1e-2, id="TF32"),
    pytest.param(torch.bfloat16, "highest", 8e-2, id="bfloat16", marks=on_gpu),
    pytest.param(torch.float16, "highest", 1e-2, id="float16", marks=on_gpu),
]


@pytest.mark.parametrize(("dtype", "setting", "allowed"), PRODUCTS)
@pytest.mark.parametrize(
    ("sizes", "channels", "items"),
    [
        (layout(2, 1), 8, 2),
        pytest.param(layout(6, 3), 128, 150, marks=on_gpu),  # as 153M
    ],
)
def test_products(sizes, channels, items, dtype, setting, allowed, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    full = layout(sizes.lmax, sizes.lmax)

    @differentiated
    def activation(x, gates):
        return separable_s2_activation(x, gates, GridSpec(sizes, 18, wanted="others"))

    @differentiated
    def hidden_layer(x, weight):
        return grid_mlp(x, weight, GridSpec(full, 18, l_major=True, wanted="others"))

    drawn = [
        torch.randn(*shape, device=DEVICE).to(dtype) / channels**0.25
        for shape in (
            *((items, sizes.num_rows, channels), (items, channels)),
            *((items, full.num_coefficients, channels), (channels, channels)),
        )
    ]
    for function, inputs in ((activation, drawn[:2]), (hidden_layer, drawn[2:])):
        exact = function(*(x.double() for x in inputs))
        for found, expected in zip(function(*inputs), exact, strict=True):
            assert found.dtype == dtype
            assert relative_error(found, expected) < allowed


@pytest.mark.long
def test_messages_and_sums_at_lmax_8():
    sizes = layout(8, 8)
    frames = frames_of([2, 0, 1], sizes)
    edges, weights = len(frames.source), sum(sizes.num_degrees(m) for m in range(9))

    def both(x, radial, grad):
        turned = in_dtype(frames, x.dtype)
        scaled, sent = message(x, turned, radial, sizes, by_degree=False)
        x_grad = torch.zeros_like(x)
        radial_grad = message_backward(grad, sent, x, x_grad, sizes, by_degree=False)
        values, alpha = scaled.unflatten(2, (2, 3)), radial[:, 0, :2]
        summed = aggregate(values, alpha, turned, sizes)
        gradients = aggregate_backward(summed, values, alpha, turned, sizes)
        return scaled, radial_grad, x_grad, summed, *gradients

    by_kernels_and_exactly(
        both,
        torch.randn(3, sizes.num_coefficients, 3),
        torch.randn(edges, weights, 6),
        torch.randn(edges, sizes.num_rows, 6),
    )


@pytest.mark.parametrize("name", ["separable s2", "gate", "s2"])
def test_attention(name):
    """All kernels of an attention layer together, through two chunks."""
    case, graph = CASES[name], make_graph([0, 3, 0, 4, 1], DEVICE)
    leaves = case.parameters() | {"x": features(case.layout, graph.num_nodes)}
    leaves = {key: p.to(DEVICE).float().requires_grad_() for key, p in leaves.items()}
    exact = {key: p.detach().double().requires_grad_() for key, p in leaves.items()}
    found, expected = (attend(case, graph, p["x"], p, max_edges=5) for p in (leaves, exact))
    assert_close(found, expected, "edge_attention")
    wanted = gradients(expected, exact)
    for key, gradient in gradients(found, leaves).items():
        if key == "x":
            for row in range(gradient.shape[1]):
                assert_close(gradient[:, row], wanted[key][:, row], "edge_attention", name=key)
        else:
            assert_close(gradient, wanted[key], "edge_attention", name=key)


def test_two_calls_give_the_same_bits():
    case, graph = CASES["separable s2"], make_graph([0, 3, 4], DEVICE)
    leaves = case.parameters() | {"x": features(case.layout, graph.num_nodes)}
    leaves = {key: p.to(DEVICE).float().requires_grad_() for key, p in leaves.items()}
    found = [gradients(attend(case, graph, leaves["x"], leaves), leaves) for _ in range(2)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in leaves)


# Which kernels run


class TestChoice:
    X = torch.zeros(2, HEADS, device=DEVICE)

    def test_reasons(self):
        assert loader.supports(self.X) is None
        assert "float64" in loader.supports(self.X, self.X.double())
        assert "meta" in loader.supports(self.X.to("meta"))

    @pytest.mark.parametrize("choice", ["auto", "reference", "native"])
    def test_they_run_only_where_they_are_named(self, choice, monkeypatch):
        """No GPU has run them yet."""
        monkeypatch.setenv(VARIABLE, choice)
        assert not loader.usable("sums", self.X)

    def test_a_fallback_is_logged_once(self, monkeypatch, caplog):
        monkeypatch.undo()
        monkeypatch.setenv(VARIABLE, "triton")
        loader._log.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert not loader.usable("sums over edges", self.X.double())
        (record,) = caplog.records
        assert "sums over edges" in record.getMessage()
        assert "float64" in record.getMessage()

    def test_asked_for_and_missing(self, monkeypatch):
        monkeypatch.setattr(loader, "_missing", lambda: "triton cannot be imported: no wheel")
        with pytest.raises(RuntimeError, match="no wheel"):
            loader.usable("sums", self.X)

    def test_a_cpu_does_not_import_the_kernels(self):
        check = (
            "import sys, fairchem_equiformer.models, fairchem_equiformer.ops.edge_attention;"
            "assert not [n for n in sys.modules if n.endswith(('triton.message', 'triton.grid'))]"
        )
        environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
        subprocess.run([sys.executable, "-c", check], check=True, env=environment)
