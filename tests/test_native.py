"""The compiled kernels against the references that they stand for."""

from __future__ import annotations

import ctypes
import logging
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fairchem_equiformer.graph.edges import prepare_edges
from fairchem_equiformer.nn.irreps.activation import Gate
from fairchem_equiformer.ops import linear, native, so2_packed
from fairchem_equiformer.ops.aggregate import aggregate, aggregate_backward
from fairchem_equiformer.ops.attention_softmax import (
    attention_logits,
    attention_softmax,
    attention_softmax_backward,
)
from fairchem_equiformer.ops.choice import VARIABLE
from fairchem_equiformer.ops.depthwise_tensor_product import Ends, depthwise_tensor_product
from fairchem_equiformer.ops.edge_attention import AttentionSpec, AttentionWeights, edge_attention
from fairchem_equiformer.ops.edges import chunk_frames
from fairchem_equiformer.ops.grid_mlp import grid_mlp
from fairchem_equiformer.ops.head_sums import Targets, head_dot, head_sum
from fairchem_equiformer.ops.message import message, message_backward
from fairchem_equiformer.ops.native import interface, loader
from fairchem_equiformer.ops.norm import norm
from fairchem_equiformer.ops.radial import (
    EdgeScalars,
    GaussianBasis,
    RadialTables,
    RadialWeights,
    _first_layer,
    _norm_silu,
    radial_function,
)
from fairchem_equiformer.ops.s2_activation import s2_activation, separable_s2_activation
from fairchem_equiformer.so3.depthwise import depthwise_paths
from fairchem_equiformer.so3.grid import GridSpec
from fairchem_equiformer.so3.layout import layout
from tests.kernels import OF_EITHER, called_kernels, compiled_for, with_backward
from tests.test_ops import make_graph
from tests.tolerances import TOLERANCES, assert_close

CPU = torch.device("cpu")
SINGLE = torch.float32
MLP = with_backward("silu_samples", "integrate_silu")


@pytest.fixture(autouse=True, scope="module", params=[4, 3, 0], ids="for x86-64-v{}".format)
def _compiled_for(request):
    with compiled_for(request.param):
        yield


# The functions: each gives its value and its gradients, in float64 by the reference


def differentiated(function):
    """Value of a function of leaves, and their gradients."""

    def both(*inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        flow = torch.linspace(-1, 1, value.numel()).view(value.shape)
        return value.detach(), *torch.autograd.grad(value, leaves, flow)

    return both


def on_the_grid(kind, sizes, resolution, wanted="all"):
    """Of rows [B, 7 + R C]: other columns stand before, as the first SO(2) layer leaves them."""

    @differentiated
    def both(x, *weight):
        sphere = GridSpec(sizes, resolution, wanted=wanted)
        rows = x[:, 7:].unflatten(1, (sizes.num_rows, -1))
        return s2_activation(rows, sphere) if kind == "s2" else grid_mlp(rows, *weight, sphere)

    return both


def frames_of_chunks(degrees, sizes, max_edges):
    edges = prepare_edges(make_graph(degrees), sizes, 1, SINGLE, max_edges=max_edges)
    return [chunk_frames(edges, chunk) for chunk in edges.chunks]


def in_dtype(frames, dtype):
    return replace(frames, compact=frames.compact.to(dtype))


def messages(frames, sizes, *, by_degree):
    def both(x, radial, grad):
        x_grad = torch.ones_like(x)
        turned = in_dtype(frames, x.dtype)
        scaled, sent = message(x, turned, radial, sizes, by_degree=by_degree)
        radial_grad = message_backward(grad, sent, x, x_grad, sizes, by_degree=by_degree)
        return scaled, x_grad, radial_grad

    return both


def sums(frames, sizes):
    def both(values, alpha, grad):
        turned = in_dtype(frames, values.dtype)
        gradients = aggregate_backward(grad, values, alpha, turned, sizes)
        return aggregate(values, alpha, turned, sizes), *gradients

    return both


def softmax(frames):
    def both(logits, grad):
        alpha = attention_softmax(logits, frames)
        return alpha, attention_softmax_backward(alpha, grad, frames)

    return both


def logits(heads, channels):
    """Of scalars [E, heads A + 5]: other columns stand behind."""

    @differentiated
    def both(scalars, dot, *norm):
        return attention_logits(scalars[:, :-5].unflatten(1, (heads, channels)), norm or None, dot)

    return both


def radial(basis, elements, *, embeddings):
    def both(distance, *weights):
        centers = basis.centers.to(distance)

        @differentiated
        def of_weights(*weights):
            weights = weights if embeddings else (None, None, *weights)
            tables = RadialTables.of(RadialWeights(*weights))
            scalars = EdgeScalars(distance, *elements)
            return radial_function(scalars, tables, basis._replace(centers=centers))

        return of_weights(*weights)

    return both


def first_layer(basis, elements):
    """Of the radial function."""

    def both(distance, *weights):
        centers = basis.centers.to(distance)

        @differentiated
        def of_weights(matrix, source, target, bias):
            tables = RadialTables(matrix, source, target, bias, *[None] * 11)
            scalars = EdgeScalars(distance, *elements)
            return _first_layer(scalars, tables, basis._replace(centers=centers))

        return of_weights(*weights)

    return both


def radial_weights(draw, num_basis, hidden, *, embeddings):
    tables = [draw(9, 8), draw(9, 8)] if embeddings else []
    columns = num_basis + 8 * len(tables)
    shapes = [(hidden, columns), *[(hidden,)] * 3, (hidden, hidden), *[(hidden,)] * 3]
    return [*tables, *(draw(*shape) for shape in (*shapes, (6, hidden), (6,)))]


# Equal to the reference


def by_kernels_and_exactly(function, inputs, kernels):
    """Each result by the kernels, all of which must run, and by the reference in float64."""
    with called_kernels() as called:
        found = function(*inputs)
    assert called - OF_EITHER == kernels - OF_EITHER
    return zip(found, function(*(x.double() for x in inputs)), strict=True)


def draws(seed):
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


DEGREES = st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(lambda d: d[1] <= d[0])
POSITIVE_DEGREES = DEGREES.filter(lambda d: d[0] > 0)


@settings(deadline=None, max_examples=50)
@given(
    degrees=POSITIVE_DEGREES,
    finer=st.sampled_from([None, 0, 4]),
    channels=st.sampled_from([16, 48, 64, 80]),
    items=st.integers(0, 5),
    wanted=st.sampled_from(["all", "scalars", "others"]),
    kind=st.sampled_from(["s2", "mlp"]),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_functions_on_the_grid(degrees, finer, channels, items, wanted, kind, scale, seed):
    draw, sizes = draws(seed), layout(*degrees)
    resolution = None if finer is None else 2 * (sizes.lmax + 1) + finer
    inputs = [draw(items, 7 + sizes.num_rows * channels) * scale]
    kernels = with_backward("s2_activation")
    if kind == "mlp":
        inputs.append(draw(channels, channels) / channels**0.5)
        kernels = MLP if items else set()
    function = on_the_grid(kind, sizes, resolution, wanted)
    for ours, expected in by_kernels_and_exactly(function, inputs, kernels):
        assert_close(ours, expected, "activation")


@settings(deadline=None, max_examples=40)
@given(
    degrees=DEGREES,
    channels=st.sampled_from([16, 48, 64, 80]),
    by_degree=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_messages(degrees, channels, by_degree, seed):
    draw, sizes = draws(seed), layout(*degrees)
    weights = sizes.num_degrees(0) if by_degree else len({(d, abs(m)) for d, m in sizes.m_major})
    x = draw(5, sizes.num_coefficients, channels)
    for frames in frames_of_chunks([0, 3, 0, 5, 2], sizes, max_edges=5):
        edges = len(frames.source)
        inputs = x, draw(edges, weights, 2 * channels), draw(edges, sizes.num_rows, 2 * channels)
        function = messages(frames, sizes, by_degree=by_degree)
        for ours, expected in by_kernels_and_exactly(
            function, inputs, with_backward("edge_message")
        ):
            assert_close(ours, expected, "rotate")


@settings(deadline=None, max_examples=40)
@given(
    degrees=POSITIVE_DEGREES,
    wanted=st.sampled_from(["all", "vectors"]),
    heads=st.sampled_from([1, 3, 8]),
    channels=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**31),
)
def test_aggregate(degrees, wanted, heads, channels, seed):
    draw, sizes = draws(seed), layout(*degrees)
    out = sizes if wanted == "all" else layout(1, min(1, sizes.mmax), 1)
    for frames in frames_of_chunks([0, 3, 0, 5, 2], sizes, max_edges=5):
        inputs = (
            draw(len(frames.source), out.num_rows, heads, channels),
            draw(len(frames.source), heads),
            draw(frames.num_nodes, out.num_coefficients, heads * channels),
        )
        kernels = with_backward("edge_aggregate")
        for ours, expected in by_kernels_and_exactly(sums(frames, out), inputs, kernels):
            assert_close(ours, expected, "aggregate")


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
    draw = draws(seed)
    inputs = [draw(edges, heads * channels + 5) * scale, draw(heads, channels)]
    inputs += [draw(channels) for _ in range(2 * norm)]
    kernels = with_backward("attention_logits")
    for ours, expected in by_kernels_and_exactly(logits(heads, channels), inputs, kernels):
        assert_close(ours, expected, "logits")


@settings(deadline=None, max_examples=30)
@given(
    degrees=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    heads=st.sampled_from([1, 3, 8]),
    scale=st.sampled_from([1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_attention_softmax(degrees, heads, scale, seed):
    draw, allowed = draws(seed), TOLERANCES["segments"][SINGLE]
    for frames in frames_of_chunks(degrees, layout(1, 1), max_edges=4):
        if not len(frames.source):
            continue
        inputs = draw(len(frames.source), heads) * scale, draw(len(frames.source), heads)
        alpha, grad = by_kernels_and_exactly(softmax(frames), inputs, with_backward("edge_softmax"))
        assert_close(*alpha, "segments")
        # Differences of numbers as large as the gradient given, which all but cancel where one
        # edge has it all.
        assert (grad[0] - grad[1]).abs().max() < allowed * inputs[1].abs().max()


@settings(deadline=None, max_examples=20)
@given(
    kind=st.sampled_from(["layer_norm", "layer_norm_sh", "rms_norm_sh"]),
    lmax=st.integers(1, 8),
    channels=st.sampled_from([16, 48, 64]),
    atoms=st.integers(0, 9),
    scale=st.sampled_from([1.0, 1e-3]),
    seed=st.integers(0, 2**31),
)
def test_equivariant_norms(kind, lmax, channels, atoms, scale, seed):
    draw = draws(seed)
    rows = [(lmax, channels), (channels,)] if kind == "layer_norm_sh" else [(lmax + 1, channels)]
    inputs = [draw(atoms, (lmax + 1) ** 2, channels) * scale + scale]
    inputs += [draw(*shape) for shape in (*rows, (channels,))]
    kernels = with_backward("equivariant_norm")
    for ours, expected in by_kernels_and_exactly(equivariant_norm(kind), inputs, kernels):
        assert_close(ours, expected, "norm")


@settings(deadline=None, max_examples=40)
@given(
    num_basis=st.sampled_from([2, 17, 50, 600]),
    hidden=st.sampled_from([16, 32, 64, 128]),
    width=st.sampled_from([0.5, 2.0]),
    embeddings=st.booleans(),
    distances=st.lists(st.floats(0.01, 12), max_size=70),  # the cutoff is 12
    seed=st.integers(0, 2**31),
)
def test_radial_function(num_basis, hidden, width, embeddings, distances, seed):
    spacing = 12 / (num_basis - 1)
    basis = GaussianBasis(torch.linspace(0, 12, num_basis), -0.5 / (width * spacing) ** 2)
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randint(0, 9, (2, len(distances)), generator=generator)
    weights = radial_weights(draws(seed), num_basis, hidden, embeddings=embeddings)
    inputs = torch.tensor(distances, dtype=SINGLE), *weights
    function = radial(basis, elements, embeddings=embeddings)
    kernels = with_backward("gaussians_times", "layer_norm_silu")
    for ours, expected in by_kernels_and_exactly(function, inputs, kernels):
        assert_close(ours, expected, "radial")


@settings(deadline=None, max_examples=20)
@given(
    scalars=st.sampled_from([0, 16, 80]),
    gated=st.lists(st.sampled_from(["16x1e", "32x2o", "80x0o"]), unique=True),
    rows=st.integers(0, 5),
    scale=st.sampled_from([1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_gates_of_irreps(scalars, gated, rows, scale, seed):
    gate = Gate(o3.Irreps("+".join([f"{scalars}x0e", *gated])))
    x = scale * draws(seed)(rows, gate.irreps_in.dim)
    compared = by_kernels_and_exactly(differentiated(gate), [x], with_backward("irreps_gate"))
    for found, expected in compared:
        assert_close(found, expected, "activation", SINGLE)


def test_a_gate_of_irreps_twice_differentiated():
    gate = Gate(o3.Irreps("80x0e+16x1e"))

    def both(x):
        x = x.requires_grad_()
        (once,) = torch.autograd.grad(gate(x).square().sum(), x, create_graph=True)
        return once, *torch.autograd.grad(once.square().sum(), x)

    x = torch.randn(7, gate.irreps_in.dim)
    for found, expected in by_kernels_and_exactly(both, [x], with_backward("irreps_gate")):
        assert_close(found, expected, "activation", SINGLE)


# What holds for all of them


def grid_problem(kind):
    sizes = layout(4, 2)
    inputs = [torch.randn(9, 7 + sizes.num_rows * 80)]
    if kind == "mlp":
        inputs.append(torch.randn(80, 80) / 9)
    return on_the_grid(kind, sizes, None), inputs


def separable_problem():
    sizes = layout(3, 2)
    sphere = GridSpec(sizes, None, wanted="others")

    @differentiated
    def both(x, gates):
        return separable_s2_activation(x, gates, sphere)

    return both, [torch.randn(9, sizes.num_rows, 80), torch.randn(9, 80)]


def message_problem():
    sizes = layout(3, 2)
    (frames,) = frames_of_chunks([0, 3, 0, 5, 7], sizes, max_edges=20)
    shapes = (5, sizes.num_coefficients, 80), (15, 9, 160), (15, sizes.num_rows, 160)
    return messages(frames, sizes, by_degree=False), [torch.randn(*shape) for shape in shapes]


def aggregate_problem():
    sizes = layout(3, 2)
    (frames,) = frames_of_chunks([0, 3, 0, 5, 7], sizes, max_edges=20)
    shapes = (15, sizes.num_rows, 5, 16), (15, 5), (5, sizes.num_coefficients, 80)
    return sums(frames, sizes), [torch.randn(*shape) for shape in shapes]


def softmax_problem():
    (frames,) = frames_of_chunks([0, 3, 0, 5, 7], layout(1, 1), max_edges=20)
    return softmax(frames), [torch.randn(15, 3), torch.randn(15, 3)]


def logits_problem():
    shapes = (150, 8 * 32 + 5), (8, 32), (32,), (32,)
    return logits(8, 32), [torch.randn(*shape) for shape in shapes]


def first_layer_problem():
    basis, elements = GaussianBasis(torch.linspace(0, 12, 600), -1250.0), torch.zeros(2, 150).long()
    shapes = (600, 80), (9, 80), (9, 80), (80,)
    inputs = torch.linspace(0.5, 12, 150), *(torch.randn(*shape) for shape in shapes)
    return first_layer(basis, elements), inputs


def norm_problem():
    shapes = (150, 32), (32,), (32,)
    return differentiated(_norm_silu), [torch.randn(*shape) for shape in shapes]


def depthwise_problem():
    """Of the ends of 150 edges, with weights that these share."""
    paths = depthwise_paths(*map(o3.Irreps, ("32x0e+16x1e", "1x0e+1x1e", "1x0e+1x1e")))
    source, target = torch.randint(20, (2, 150))

    @differentiated
    def both(one, other, harmonics, weights):
        ends = Ends(one, other, source, target)
        return depthwise_tensor_product(ends, harmonics, weights, paths, channels_last=True)

    shapes = *[(20, paths.irreps_in.dim)] * 2, (150, 4), (paths.weight_numel,)
    return both, [torch.randn(*shape) for shape in shapes]


def head_problem():
    """Second derivatives too, which take what the first ones are made of."""
    degrees = torch.tensor([0, 30, 0, 50, 70])
    target = torch.arange(5).repeat_interleave(degrees)
    targets = Targets(target, functional.pad(degrees.cumsum(0), (1, 0)))

    @differentiated
    def both(alpha, x, atoms):
        (x_grad,) = torch.autograd.grad(head_dot(x, atoms, targets), x, alpha, create_graph=True)
        return head_sum(alpha, x, targets) + head_sum(alpha, x_grad, targets)

    return both, [torch.randn(*shape) for shape in ((150, 5), (150, 48), (5, 5, 48))]


def equivariant_norm(kind):
    @differentiated
    def both(x, *parameters):
        return norm(kind, x, *parameters)

    return both


def equivariant_norm_problem():
    shapes = (9, 16, 80), (3, 80), (80,), (80,)
    return equivariant_norm("layer_norm_sh"), [torch.randn(*shape) for shape in shapes]


def attention_problem():
    """A whole layer in chunks, whose kernels run together."""
    sizes = layout(2, 2)
    edges = prepare_edges(make_graph([0, 3, 0, 5, 7]), sizes, 16, SINGLE, max_edges=9)
    spec = AttentionSpec(
        num_heads=2,
        alpha_channels=16,
        value_channels=16,
        hidden_channels=16,
        activation="separable_s2",
        grid_resolution=None,
        radial_by_degree=False,
        out_layout=sizes,
    )

    @differentiated
    def both(x, *weights):
        of_type = {"rotations": edges.rotations.to(x)}
        of_type["scalars"] = edges.scalars._replace(distance=edges.scalars.distance.to(x))
        basis = GaussianBasis(torch.linspace(0, 4, 20).to(x), -12.0)
        learned = [None] * 3  # Gaussians
        taken = AttentionWeights.unflatten([*weights[:12], *learned, *weights[12:]], num_conv_1=3)
        return edge_attention(x, replace(edges, **of_type), basis, taken, spec)

    embeddings, hidden = [(9, 8)] * 2, [(16, 20 + 16), *[(16,)] * 3, (16, 16), *[(16,)] * 3]
    shapes = [*embeddings, *hidden, (192, 16), (192,)]

    def by_own_products(*inputs):  # the bits of MKL's depend on the number of threads
        with mock.patch.dict("os.environ", {VARIABLE: "native"}):
            return both(*inputs)

    layers = [(16,), (16,), (2, 16), (96,), (96,), (96, 96), (64, 64), (32, 32)]
    layers += [(96, 48), (128, 32), (64, 16)]
    weights = [torch.randn(*shape) / shape[-1] ** 0.5 for shape in (*shapes, *layers)]
    return by_own_products, [torch.randn(5, sizes.num_coefficients, 16), *weights]


def gate_problem():
    gate = Gate(o3.Irreps("80x0e+16x1e+32x2o"))

    @differentiated
    def both(x):
        return gate(x)

    return both, [torch.randn(150, gate.irreps_in.dim)]


PROBLEMS = {
    "S2 activation": partial(grid_problem, "s2"),
    "grid MLP": partial(grid_problem, "mlp"),
    "separable S2 activation": separable_problem,
    "message": message_problem,
    "aggregate": aggregate_problem,
    "softmax": softmax_problem,
    "logits": logits_problem,
    "radial, first layer": first_layer_problem,
    "radial, norm": norm_problem,
    "depth-wise tensor product": depthwise_problem,
    "sums by heads": head_problem,
    "equivariant norm": equivariant_norm_problem,
    "attention": attention_problem,
    "gate of irreps": gate_problem,
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
SINGLE_KERNELS = {name: problem for name, problem in PROBLEMS.items() if name != "attention"}


def test_the_problems_use_every_kernel():
    with called_kernels() as called:
        for problem in PROBLEMS.values():
            function, inputs = problem()
            function(*inputs)
    known = {name for name, (result, _) in interface.SIGNATURES.items() if result is None}
    assert called - OF_EITHER == known - OF_EITHER


@problems
def test_threads_change_no_bit(problem, monkeypatch):
    monkeypatch.setenv(loader.VARIABLE, "native")  # the products of others may
    function, inputs = problem()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(function(*inputs))
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("problem", SINGLE_KERNELS.values(), ids=SINGLE_KERNELS.keys())
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_result_hides_a_number_that_is_none(problem, value):
    """A training that diverged must show it, though the compiler may take all to be finite.

    What depends on the number is found by a change of it; what the reference makes of it is not
    always NaN either: far from all Gaussians there is none.
    """
    function, inputs = problem()
    before = function(*inputs)
    for i, x in enumerate(inputs):
        at = tuple(int(torch.randint(size, ())) for size in x.shape)
        changed, spoilt = ([y.clone() for y in inputs] for _ in range(2))
        changed[i][at] += 1
        spoilt[i][at] = value
        expected = function(*(y.double() for y in spoilt))
        found = zip(before, function(*changed), expected, function(*spoilt), strict=True)
        for old, new, wanted, ours in found:
            lost = (old != new) & ~wanted.isfinite()
            assert not ours[lost].isfinite().any(), i


def test_what_a_kernel_leaves_unwritten_shows(monkeypatch):
    """Here: all of it (conftest.py)."""
    function, inputs = softmax_problem()
    monkeypatch.setattr(loader.library(), "edge_softmax", lambda *_: None)
    assert all(found.isnan().all() for found in function(*inputs))


# Together


def test_kernels_that_wait_run_when_somebody_else_reads():
    logits = torch.randn(4, 2)
    kernels = native.softmax_kernels(logits)
    target_ptr = torch.tensor([0, 4])
    with native.together():
        waits = kernels.forward(logits, target_ptr)
        assert waits.isnan().all()  # memory is poisoned (conftest.py)
        assert native.softmax_kernels(logits.double()) is None  # PyTorch will read it
        assert_close(waits, logits.double().softmax(0), "segments")
        again = kernels.forward(logits, target_ptr)
    assert torch.equal(again, waits)


def test_products_of_torch_between_kernels(monkeypatch):
    """As on processors whose products MKL makes, and in half precision."""
    for module in (so2_packed, linear):
        monkeypatch.setattr(module, "product_kernels", lambda *_, **__: None)
    function, inputs = attention_problem()
    found = function(*inputs), function(*(x.double() for x in inputs))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "edge_attention")


def test_kernels_that_wait_are_dropped_by_an_error():
    logits = torch.randn(4, 2)
    kernels = native.softmax_kernels(logits)

    def fail():
        with native.together():
            found.append(kernels.forward(logits, torch.tensor([0, 4])))
            raise ValueError("between")

    found = []
    with pytest.raises(ValueError, match="between"):
        fail()
    assert found[0].isnan().all()
    assert not kernels.forward(logits, torch.tensor([0, 4])).isnan().any()


# The library


def exported():
    """C types of the result and of each argument, by function, as the sources declare them."""
    # Others begin with `template` or a macro.
    declaration = r'^(?:extern "C" )?((?:const )?\w+\*?) (\w+)\(([^)]*)\) \{'
    found = {}
    for path in Path(loader.__file__).parent.glob("*.cpp"):
        for result, name, arguments in re.findall(declaration, path.read_text(), re.MULTILINE):
            types = [re.sub(r"^const | \w+$", "", a.strip()) for a in arguments.split(",") if a]
            found[name] = result, types
    return found


def test_signatures_are_those_of_the_sources():
    names = {
        ctypes.c_int64: "int64_t",
        ctypes.c_int: "int",
        ctypes.c_float: "float",
        ctypes.c_char_p: "const char*",
        None: "void",
        interface.Indices: "int64_t*",
        interface.Floats: "float*",
        interface.Bfloat16s: "uint32_t*",
        **{ctypes.POINTER(struct): f"{name}*" for name, struct in interface.STRUCTS.items()},
    }
    declared = {
        name: (names[result], [names[argument] for argument in arguments])
        for name, (result, arguments) in interface.SIGNATURES.items()
    }
    assert declared == exported()


@pytest.mark.parametrize("name", interface.STRUCTS)
def test_structs_have_the_sizes_of_the_librarys(name):
    size = getattr(loader.library(), f"sizeof_{name}")()
    assert ctypes.sizeof(interface.STRUCTS[name]) == size


def test_a_tensor_of_another_type_is_refused():
    with pytest.raises(ctypes.ArgumentError, match=r"of torch\.float64 where"):
        loader.library().edge_softmax(torch.zeros(1, 1).double(), 1, None, None, 1, 1)


def test_loading_the_library_leaves_subnormal_numbers_alone():
    """Code built for speed may switch them off for the whole process."""
    smallest = torch.full((8,), 2.0**-149)
    assert (smallest + 0 > 0).all()
    assert (smallest * 1.0).sum() > 0


def test_a_width_that_does_not_fit_is_logged_once(caplog):
    caplog.set_level(logging.INFO)
    loader._log_misfit.cache_clear()
    for _ in range(2):
        assert native.softmax_kernels(torch.zeros(3, 2)) is not None
        assert native.logit_kernels(torch.zeros(3, 2, 24), None, torch.zeros(2, 24), 1e-5) is None
        assert native.norm_silu_kernels(torch.zeros(3, 48), *torch.zeros(2, 48), 1e-5) is None
    logits, norm = caplog.messages
    assert logits == (
        "attention logits of 24 channels run in PyTorch, slower than in a compiled kernel: "
        "their number is not 16, 32 or 64"
    )
    assert norm.endswith("not 16, 32, 64 or 128")


class TestChoice:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        loader.library.cache_clear()
        yield
        loader.library.cache_clear()

    @pytest.fixture
    def folder(self, monkeypatch, tmp_path):
        """Where the loader looks instead."""
        monkeypatch.setattr(loader, "__file__", str(tmp_path / "loader.py"))
        return tmp_path

    def test_reference(self, monkeypatch):
        monkeypatch.setenv(loader.VARIABLE, "reference")
        assert loader.library() is None

    def test_unknown(self, monkeypatch):
        monkeypatch.setenv(loader.VARIABLE, "fast")
        with pytest.raises(ValueError, match="FAIRCHEM_EQUIFORMER_KERNELS is 'fast', it must be"):
            loader.library()

    @pytest.mark.usefixtures("folder")
    def test_missing_library(self, monkeypatch, caplog):
        """`auto` says so once and goes on; `native` does not."""
        assert loader.library() is None
        assert loader.library() is None
        (record,) = caplog.records
        assert "install this package again" in record.message
        loader.library.cache_clear()
        monkeypatch.setenv(loader.VARIABLE, "native")
        with pytest.raises(RuntimeError, match="'native', but the compiled kernels cannot be used"):
            loader.library()

    def test_beside_other_sources(self, folder, caplog):
        shutil.copy(self.built(), folder)
        (folder / "message.cpp").write_text("int changed;\n")
        assert loader.library() is None
        (record,) = caplog.records
        assert "built from other sources than those beside it; run `make install`" in record.message

    def test_without_sources(self, folder):
        """As in a wheel."""
        shutil.copy(self.built(), folder)
        assert loader.library() is not None

    def test_of_another_version(self, folder, monkeypatch, caplog):
        shutil.copy(self.built(), folder)
        monkeypatch.setitem(interface.SIGNATURES, "edge_norm", (None, ()))
        assert loader.library() is None
        (record,) = caplog.records
        assert "undefined symbol: edge_norm" in record.message
        assert "run `make install`" in record.message

    @staticmethod
    def built() -> Path:
        return Path(native.__file__).with_name("_kernels.so")
