"""Each op against its formula in tests/reference.py: values, gradients, symmetries, precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from fairchem_equiformer.graph.edge_graph import EdgeGraph
from fairchem_equiformer.graph.edges import prepare_edges
from fairchem_equiformer.nn.feed_forward import FeedForward, FeedForwardConfig
from fairchem_equiformer.nn.norm import NORMS
from fairchem_equiformer.ops import s2_activation as s2_module
from fairchem_equiformer.ops.edge_attention import AttentionSpec, AttentionWeights, edge_attention
from fairchem_equiformer.ops.edge_degree import edge_degree_embedding
from fairchem_equiformer.ops.edges import NodeShare, chunk_frames, fitting_edges
from fairchem_equiformer.ops.gate import gate_activation
from fairchem_equiformer.ops.grid_mlp import grid_mlp
from fairchem_equiformer.ops.radial import (
    EdgeScalars,
    GaussianBasis,
    RadialTables,
    RadialWeights,
    gaussians,
    radial_function,
)
from fairchem_equiformer.ops.rotate import (
    rotate_back_and_sum,
    rotate_back_and_sum_backward,
    rotate_in,
    rotate_in_backward,
    scale_orders,
    scale_orders_backward,
)
from fairchem_equiformer.ops.s2_activation import s2_activation
from fairchem_equiformer.ops.segments import segment_softmax, segment_sum, target_chunks
from fairchem_equiformer.ops.so2_linear import SO2Weights, so2_linear, so2_linear_backward
from fairchem_equiformer.ops.so3_linear import so3_linear
from fairchem_equiformer.ops.touch import touch
from fairchem_equiformer.so3.grid import GridSpec
from fairchem_equiformer.so3.layout import Layout, layout
from tests import reference
from tests.reference import AttentionSizes, Parameters, under
from tests.tolerances import assert_all_close, assert_close, relative_error

DOUBLE = torch.float64
CHANNELS, HIDDEN, HEADS, ALPHA, VALUE = 4, 3, 2, 3, 2
ELEMENTS, EMBEDDING, EDGE_HIDDEN = 5, 2, 4
CUTOFF = 4.0

# Edges that each atom receives.
GRAPHS = {
    "one edge": [1],
    "atoms without edges": [0, 3, 0, 0, 5, 2, 0],
    "no edges": [0, 0],
    "no atoms": [],
}
GRAPH = GRAPHS["atoms without edges"]
graphs = pytest.mark.parametrize("degrees", GRAPHS.values(), ids=GRAPHS.keys())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


# Problems


def random(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE).to(device)


def random_rotation() -> Tensor:
    matrix = random(3, 3)
    return torch.matrix_exp(matrix - matrix.T)


def make_graph(degrees: list[int], device: torch.device | str = "cpu") -> EdgeGraph:
    """Random edges; the first two point along +y and -y."""
    atoms, edges = len(degrees), sum(degrees)
    degree = torch.tensor(degrees, dtype=torch.int64)
    vector = random(edges, 3)
    vector[:2] = torch.tensor([[0.0, 1.5, 0.0], [0.0, -2.0, 0.0]], dtype=DOUBLE)[:edges]
    graph = EdgeGraph(
        source=torch.randint(0, max(atoms, 1), (edges,)),
        target=torch.repeat_interleave(degree),
        target_ptr=F.pad(degree.cumsum(0), (1, 0)),
        vector=vector,
        distance=vector.norm(dim=1),
        atomic_numbers=torch.randint(0, ELEMENTS, (atoms,)),
        batch=(torch.arange(atoms) > 1).long(),
        natoms=torch.tensor([min(atoms, 2), max(atoms - 2, 0)]),
    )
    tensors = {name: value.to(device) for name, value in vars(graph).items() if name != "tags"}
    return replace(graph, **tensors)


def make_basis(num_basis: int, device: torch.device | str = "cpu") -> GaussianBasis:
    centers = torch.linspace(0, CUTOFF, num_basis, dtype=DOUBLE, device=device)
    return GaussianBasis(centers, -0.5 / (2 * (centers[1] - centers[0]).item()) ** 2)


def radial_parameters(num_basis: int, outputs: int, *, embeddings: bool) -> Parameters:
    """Of ``rad_func`` and the embeddings, named as in the model."""
    inputs = num_basis + (2 * EMBEDDING if embeddings else 0)
    parameters = {}
    for linear, size in ((0, inputs), (3, EDGE_HIDDEN)):
        parameters |= {
            f"rad_func.net.{linear}.weight": random(EDGE_HIDDEN, size),
            f"rad_func.net.{linear}.bias": random(EDGE_HIDDEN),
            f"rad_func.net.{linear + 1}.weight": random(EDGE_HIDDEN),
            f"rad_func.net.{linear + 1}.bias": random(EDGE_HIDDEN),
        }
    parameters["rad_func.net.6.weight"] = random(outputs, EDGE_HIDDEN)
    parameters["rad_func.net.6.bias"] = random(outputs)
    if embeddings:
        parameters["source_embedding.weight"] = random(ELEMENTS, EMBEDDING)
        parameters["target_embedding.weight"] = random(ELEMENTS, EMBEDDING)
    return parameters


def radial_weights(parameters: Parameters) -> RadialWeights:
    names = [f"rad_func.net.{n}.{kind}" for n in (0, 1, 3, 4, 6) for kind in ("weight", "bias")]
    ends = ("source_embedding.weight", "target_embedding.weight")
    return RadialWeights(
        *(parameters.get(name) for name in ends), *(parameters[name] for name in names)
    )


@dataclass(frozen=True)
class Case:
    """One attention layer, by its options."""

    layout: Layout
    activation: str
    resolution: int | None = None
    by_degree: bool = False
    embeddings: bool = True
    renormalize: bool = True
    dropout: bool = False
    num_basis: int = 40

    @property
    def sizes(self) -> AttentionSizes:
        return AttentionSizes(
            self.layout.lmax,
            self.layout.mmax,
            HEADS,
            ALPHA,
            self.activation,
            self.resolution,
            self.by_degree,
        )

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=HEADS,
            alpha_channels=ALPHA,
            value_channels=VALUE,
            hidden_channels=HIDDEN,
            activation=self.activation,
            grid_resolution=self.resolution,
            radial_by_degree=self.by_degree,
            out_layout=self.layout,
        )

    def parameters(self) -> Parameters:
        """Random ones, named as in the model."""
        counts = [self.layout.num_degrees(m) for m in range(self.layout.mmax + 1)]
        outputs = (self.layout.lmax + 1 if self.by_degree else sum(counts)) * 2 * CHANNELS
        radial = radial_parameters(self.num_basis, outputs, embeddings=self.embeddings)
        if not self.by_degree:
            radial = {
                f"so2_conv_1.{name}" if name.startswith("rad_func") else name: tensor
                for name, tensor in radial.items()
            }
        gates = {"gate": self.layout.lmax, "s2": 0, "separable_s2": 1}[self.activation] * HIDDEN
        parameters = radial | {"alpha_dot": random(HEADS, ALPHA)}
        for name, inputs, channels, scalars in (
            ("so2_conv_1", 2 * CHANNELS, HIDDEN, HEADS * ALPHA + gates),
            ("so2_conv_2", HIDDEN, HEADS * VALUE, 0),
        ):
            rows = counts[0] * channels + scalars
            parameters[f"{name}.fc_m0.weight"] = random(rows, counts[0] * inputs) / 3
            parameters[f"{name}.fc_m0.bias"] = random(rows)
            for m, count in enumerate(counts[1:]):
                weight = random(2 * count * channels, count * inputs) / 3
                parameters[f"{name}.so2_m_conv.{m}.fc.weight"] = weight
        if self.renormalize:
            parameters |= {"alpha_norm.weight": random(ALPHA), "alpha_norm.bias": random(ALPHA)}
        return parameters

    def weights(self, parameters: Parameters) -> AttentionWeights:
        radial = {name.removeprefix("so2_conv_1."): p for name, p in parameters.items()}
        norm = None
        if self.renormalize:
            norm = (parameters["alpha_norm.weight"], parameters["alpha_norm.bias"])
        return AttentionWeights(
            radial=radial_weights(radial),
            conv_1=conv_weights(under(parameters, "so2_conv_1.")),
            conv_1_bias=parameters["so2_conv_1.fc_m0.bias"],
            alpha_norm=norm,
            alpha_dot=parameters["alpha_dot"],
            conv_2=conv_weights(under(parameters, "so2_conv_2.")),
            conv_2_bias=parameters["so2_conv_2.fc_m0.bias"],
        )

    def mask(self, num_edges: int) -> Tensor | None:
        """Factors of dropout at 0.25, always the same ones."""
        generator = torch.Generator().manual_seed(3)
        drawn = torch.rand(num_edges, HEADS, generator=generator) > 0.25
        return drawn.double() / 0.75 if self.dropout else None


def conv_weights(parameters: Parameters) -> tuple[Tensor, ...]:
    orders = sum(name.startswith("so2_m_conv") for name in parameters)
    higher = (parameters[f"so2_m_conv.{m}.fc.weight"] for m in range(orders))
    return (parameters["fc_m0.weight"], *higher)


CASES = {
    "separable s2": Case(layout(4, 2), "separable_s2"),
    "separable s2, all orders": Case(layout(3, 3), "separable_s2", resolution=12, dropout=True),
    "s2": Case(layout(2, 1), "s2", dropout=True),
    "gate": Case(layout(3, 1), "gate", by_degree=True),
    "gate, no orders": Case(layout(2, 0), "gate", embeddings=False, renormalize=False),
    "lowest": Case(layout(1, 1), "separable_s2", by_degree=True, renormalize=False),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def attend(
    case: Case,
    graph: EdgeGraph,
    x: Tensor,
    parameters: Parameters,
    *,
    max_edges: int | None = None,
    rows: slice | None = None,
) -> Tensor:
    share = None if rows is None else NodeShare(rows, torch.clone, torch.clone)
    edges = prepare_edges(graph, case.layout, CHANNELS, x.dtype, max_edges=max_edges, share=share)
    basis = make_basis(case.num_basis, x.device)
    basis = basis._replace(centers=basis.centers.to(x.dtype))
    mask = case.mask(graph.num_edges)
    mask = None if mask is None else mask.to(x)
    return edge_attention(x, edges, basis, case.weights(parameters), case.spec, mask)


def embed(
    sizes: Layout, graph: EdgeGraph, parameters: Parameters, *, max_edges: int | None = None
) -> Tensor:
    dtype, where = graph.distance.dtype, graph.distance.device
    edges = prepare_edges(graph, sizes, CHANNELS, dtype, max_edges=max_edges)
    return edge_degree_embedding(edges, make_basis(40, where), radial_weights(parameters), 1.0)


def features(sizes: Layout, atoms: int, device: torch.device | str = "cpu") -> Tensor:
    return random(atoms, sizes.num_coefficients, CHANNELS, device=device)


def on(device: torch.device, parameters: Parameters) -> Parameters:
    """Leaves on a device."""
    return {name: p.to(device).requires_grad_() for name, p in parameters.items()}


def gradients(out: Tensor, leaves: Parameters) -> Parameters:
    """Of a sum in which every output has its own weight; zeros for what has no influence."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out.shape, generator=generator, dtype=DOUBLE).to(out)
    grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def rotated(graph: EdgeGraph, rotation: Tensor) -> EdgeGraph:
    return replace(graph, vector=graph.vector @ rotation.T)


# Chunks, segment sums and softmax


@pytest.mark.parametrize("max_edges", [1, 3, 5, 7, 100])
@graphs
def test_chunks_cover_targets_and_edges_in_order(degrees, max_edges):
    pointers = F.pad(torch.tensor(degrees, dtype=torch.int64).cumsum(0), (1, 0))
    chunks = target_chunks(pointers, max_edges, offset=10)
    assert [n for c in chunks for n in range(c.rows.start, c.rows.stop)] == [*range(len(degrees))]
    assert [n for c in chunks for n in range(c.edges.start, c.edges.stop)] == [*range(sum(degrees))]
    for chunk in chunks:
        assert (chunk.nodes.start, chunk.nodes.stop) == (
            chunk.rows.start + 10,
            chunk.rows.stop + 10,
        )
        assert chunk.edges == slice(int(pointers[chunk.rows.start]), int(pointers[chunk.rows.stop]))
        count = chunk.edges.stop - chunk.edges.start
        assert count <= max_edges or chunk.rows.stop == chunk.rows.start + 1
    for chunk, following in pairwise(chunks):  # none could have taken one more atom
        assert pointers[following.rows.start + 1] - pointers[chunk.rows.start] > max_edges


@graphs
def test_segment_sum(degrees, device):
    graph = make_graph(degrees, device)
    values = random(graph.num_edges, 2, 3, device=device)
    expected = values.new_zeros(graph.num_nodes, 2, 3)
    for edge, atom in enumerate(graph.target.tolist()):
        expected[atom] += values[edge]
    assert_close(segment_sum(values, graph.target, graph.num_nodes), expected, "segments")


def test_segment_sum_gives_the_same_bits_each_time(device):
    graph = make_graph([50] * 20, device)
    values = torch.randn(graph.num_edges, 7, device=device)
    first = segment_sum(values, graph.target, graph.num_nodes)
    assert all(
        torch.equal(segment_sum(values, graph.target, graph.num_nodes), first) for _ in range(3)
    )


@graphs
def test_segment_softmax(degrees, device):
    graph = make_graph(degrees, device)
    logits = random(graph.num_edges, HEADS, device=device) * 5
    found = segment_softmax(logits, graph.target, graph.num_nodes)
    assert_close(found, reference.segment_softmax(logits, graph.target), "segments")


def test_segment_softmax_of_logits_beyond_the_range_of_exp(device):
    target = torch.tensor([0, 0, 2], device=device)
    logits = torch.tensor([[1000.0], [1001.0], [-1000.0]], device=device)
    found = segment_softmax(logits, target, 3)
    expected = torch.cat([torch.softmax(torch.tensor([[0.0], [1.0]]), 0), torch.ones(1, 1)])
    assert_close(found.cpu(), expected, "segments")


# Radial function


@pytest.mark.parametrize("num_basis", [2, 40, 600])
def test_gaussians(num_basis, device):
    basis = make_basis(num_basis, device)
    distance = torch.linspace(0, 1.2 * CUTOFF, 301, dtype=DOUBLE, device=device)
    differences = distance[:, None] - basis.centers
    expected = torch.exp(basis.coefficient * differences.square())
    assert_close(gaussians(distance, basis), expected, "radial")


@pytest.mark.parametrize("embeddings", [True, False])
@graphs
def test_radial_function(degrees, embeddings, device):
    graph, basis = make_graph(degrees, device), make_basis(40, device)
    numbers = graph.atomic_numbers
    scalars = EdgeScalars(graph.distance, numbers[graph.source], numbers[graph.target])
    leaves = on(device, radial_parameters(40, 6, embeddings=embeddings))
    found = radial_function(scalars, RadialTables.of(radial_weights(leaves)), basis)
    expected = reference.radial_function(graph, basis, leaves, {})
    assert_close(found, expected, "radial")
    assert_all_close(gradients(found, leaves), gradients(expected, leaves), "radial")


def test_radial_function_in_float32():
    graph, leaves = make_graph(GRAPH), radial_parameters(40, 6, embeddings=True)
    numbers = graph.atomic_numbers
    single = {name: p.float() for name, p in leaves.items()}
    scalars = EdgeScalars(graph.distance.float(), numbers[graph.source], numbers[graph.target])
    basis = make_basis(40)
    found = radial_function(
        scalars,
        RadialTables.of(radial_weights(single)),
        basis._replace(centers=basis.centers.float()),
    )
    assert_close(found, reference.radial_function(graph, basis, leaves, {}), "radial")


# Linear layers


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("sizes", [layout(1, 0), layout(2, 2), layout(6, 2)], ids=str)
def test_so2_linear(sizes, single, device):
    extra, edges = 3, 5
    counts = [sizes.num_degrees(m) for m in range(sizes.mmax + 1)]
    leaves = {"fc_m0.bias": random(counts[0] * HIDDEN + extra)}
    leaves["fc_m0.weight"] = random(counts[0] * HIDDEN + extra, counts[0] * CHANNELS)
    for m, count in enumerate(counts[1:]):
        leaves[f"so2_m_conv.{m}.fc.weight"] = random(2 * count * HIDDEN, count * CHANNELS)
    leaves = on(device, leaves)
    x = random(edges, sizes.num_coefficients, CHANNELS, device=device).requires_grad_()
    rows = list(sizes.rows_in_l_major)
    scalars, coefficients = reference.so2_linear(x, leaves, sizes.mmax, extra)
    expected = torch.cat([scalars, coefficients[:, rows].flatten(1)], dim=1)
    flat = x.detach()[:, rows].flatten(1)
    weights = SO2Weights.of(conv_weights(leaves), DOUBLE, single=single)
    found = so2_linear(flat, weights, leaves["fc_m0.bias"].detach())
    assert_close(found, expected, "so2_linear")

    grad = random(*found.shape, device=device)
    weight_grads = [torch.ones_like(weight) for weight in conv_weights(leaves)]
    x_grad = so2_linear_backward(grad, flat, weights, weight_grads)
    wanted = torch.autograd.grad(expected, (x, *conv_weights(leaves)), grad)
    assert_close(x_grad, wanted[0][:, rows].flatten(1), "so2_linear")
    for got, want in zip(weight_grads, wanted[1:], strict=True):
        assert_close(got - 1, want, "so2_linear")  # added to what was there


def test_so2_linear_leaves_out_orders_that_have_no_weight():
    sizes, lower = layout(2, 2), layout(2, 1)
    x = random(4, sizes.num_rows * CHANNELS)
    tensors = [random(3 * HIDDEN, 3 * CHANNELS), random(4 * HIDDEN, 2 * CHANNELS)]
    weights = SO2Weights.of(tensors, DOUBLE)
    kept = x[:, : lower.num_rows * CHANNELS]
    assert torch.equal(so2_linear(x, weights, None), so2_linear(kept, weights, None))
    grad = random(4, lower.num_rows * HIDDEN)
    x_grad = so2_linear_backward(grad, x, weights, [torch.zeros_like(w) for w in tensors])
    assert x_grad[:, lower.num_rows * CHANNELS :].count_nonzero() == 0


@pytest.mark.parametrize("atoms", [0, 1, 5])
@pytest.mark.parametrize("lmax", [0, 1, 6])
def test_so3_linear(lmax, atoms, device):
    leaves = on(
        device,
        {
            "x": random(atoms, (lmax + 1) ** 2, CHANNELS),
            "weight": random(lmax + 1, 3, CHANNELS),
            "bias": random(3),
        },
    )
    found = so3_linear(leaves["x"], leaves["weight"], leaves["bias"])
    expected = reference.equivariant_linear(leaves["x"], leaves)
    assert_close(found, expected, "so3_linear")
    assert_all_close(gradients(found, leaves), gradients(expected, leaves), "so3_linear")


def test_so3_linear_without_bias():
    x, weight = random(2, 9, CHANNELS), random(3, 5, CHANNELS)
    expected = reference.equivariant_linear(x, {"weight": weight, "bias": weight.new_zeros(5)})
    assert_close(so3_linear(x, weight), expected, "so3_linear")


def test_so3_linear_under_autocast(device):
    x, weight = torch.randn(7, 9, 32, device=device), torch.randn(3, 8, 32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        low = so3_linear(x, weight, weight[0, :, 0])
    assert low.dtype == (torch.float32 if device.type == "cpu" else torch.bfloat16)
    assert_close(low, so3_linear(x, weight, weight[0, :, 0]), "so3_linear")


def test_so3_linear_reads_half_precision_under_autocast(device):
    x, weight = torch.randn(7, 9, 32, device=device), torch.randn(3, 8, 32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        low = so3_linear(x.bfloat16(), weight)
    assert_close(low, so3_linear(x, weight), "so3_linear", torch.bfloat16)


# Activations


@pytest.mark.parametrize("atoms", [0, 1, 5])
@pytest.mark.parametrize("lmax", [1, 4])
def test_gate_activation(lmax, atoms, device):
    leaves = on(
        device,
        {"x": random(atoms, (lmax + 1) ** 2, CHANNELS), "gates": random(atoms, lmax * CHANNELS)},
    )
    expected = reference.gate_activation(*leaves.values())
    found = gate_activation(*leaves.values(), layout(lmax, lmax).l_major)
    assert_close(found, expected, "activation")
    assert_all_close(gradients(found, leaves), gradients(expected, leaves), "activation")
    kept = layout(lmax, 1)
    rows = list(kept.rows_in_l_major)
    found = gate_activation(leaves["x"][:, rows], leaves["gates"], kept.m_major)
    assert_close(found, expected[:, rows], "activation")


def grid_case(kind: str, device: torch.device | str = "cpu", atoms: int = 5):
    """An op on the grid and its formula, both as functions of leaves, and the leaves."""
    sizes = layout(3, 2)
    sphere = GridSpec(sizes, wanted="others")
    rows = list(sizes.rows_in_l_major)
    dense = reference.sphere(3, 2, None)
    dense = dense._replace(to_grid=dense.to_grid[:, rows], from_grid=dense.from_grid[rows])
    leaves = {"x": random(atoms, sizes.num_rows, CHANNELS)}
    if kind == "s2":

        def op(x):
            return s2_activation(x, sphere)

        def formula(x):
            return dense.back(F.silu(dense.to(x)))[:, 1:]

    else:
        leaves["weight"] = random(CHANNELS, CHANNELS)

        def op(x, weight):
            return grid_mlp(x, weight, sphere)

        def formula(x, weight):
            return dense.back(F.silu(F.silu(dense.to(x)) @ weight.T))[:, 1:]

    return op, formula, on(torch.device(device), leaves)


@pytest.mark.parametrize("atoms", [0, 1, 5])
@pytest.mark.parametrize("kind", ["s2", "mlp"])
def test_functions_on_the_grid(kind, atoms, device):
    op, formula, leaves = grid_case(kind, device, atoms)
    found, expected = op(*leaves.values()), formula(*leaves.values())
    assert_close(found, expected, "activation")
    assert_all_close(gradients(found, leaves), gradients(expected, leaves), "activation")


@pytest.mark.parametrize("kind", ["s2", "mlp"])
def test_gradcheck_of_functions_on_the_grid(kind):
    op, _, leaves = grid_case(kind, atoms=2)
    assert gradcheck(op, tuple(leaves.values()), fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("kind", ["s2", "mlp"])
def test_pieces_of_the_grid_do_not_matter(kind, monkeypatch):
    op, _, leaves = grid_case(kind)
    whole = op(*leaves.values())
    grads = gradients(whole, leaves)
    monkeypatch.setattr(s2_module, "_CPU_GRID_BYTES", 2 * 8 * 40 * CHANNELS * 2)  # two atoms
    pieces = op(*leaves.values())
    assert_close(pieces, whole, "activation")
    assert_all_close(gradients(pieces, leaves), grads, "activation")


@pytest.mark.parametrize("kind", ["s2", "mlp"])
def test_functions_on_the_grid_in_float32(kind):
    _, formula, leaves = grid_case(kind)
    sizes = layout(3, 2)
    single = [leaf.detach().float() for leaf in leaves.values()]
    sphere = GridSpec(sizes, wanted="others")
    function = {"s2": s2_activation, "mlp": grid_mlp}[kind]
    found = function(*single, sphere)
    assert_close(found, formula(*leaves.values()), "activation")


# Rotation, radial weights, sums


@pytest.fixture
def frames(device):
    """Edges of a small problem and the frames of its second chunk."""
    sizes = layout(3, 1)
    edges = prepare_edges(make_graph(GRAPH, device), sizes, CHANNELS, DOUBLE, max_edges=5)
    assert len(edges.chunks) > 1
    return edges, chunk_frames(edges, edges.chunks[1])


def test_rotation_into_the_frames_of_a_chunk(frames):
    edges, of_chunk = frames
    x = features(edges.layout, len(GRAPH), edges.source.device).requires_grad_()
    chunk = edges.chunks[1].edges
    ends = (edges.source[chunk], edges.target[chunk])
    found = rotate_in(x, of_chunk)
    expected = [torch.einsum("erk,ekc->erc", of_chunk.rotation, x[end]) for end in ends]
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, "rotate")

    grads = [random(*want.shape, device=x.device) for want in expected]
    x_grad = torch.ones_like(x)
    rotate_in_backward(*grads, of_chunk, x_grad)
    wanted = torch.autograd.grad(expected, x, grads)[0]
    assert_close(x_grad - 1, wanted, "rotate")  # added to what was there


def test_rotation_back_and_sum(frames):
    edges, of_chunk = frames
    chunk = edges.chunks[1]
    count = chunk.edges.stop - chunk.edges.start
    messages = random(count, edges.layout.num_rows, CHANNELS, device=edges.source.device)
    messages.requires_grad_()
    rescale = messages.new_tensor(edges.layout.truncation_rescale)
    turned = torch.einsum("erk,erc->ekc", of_chunk.rotation, messages) * rescale[:, None]
    total = reference.segment_sum(turned, edges.target[chunk.edges], len(GRAPH))[chunk.nodes]
    assert_close(
        rotate_back_and_sum(messages, of_chunk, rescale, of_chunk.rotation), total, "rotate"
    )

    grad = random(*total.shape, device=messages.device)
    wanted = torch.autograd.grad(total, messages, grad)[0]
    found = rotate_back_and_sum_backward(grad, of_chunk, rescale, of_chunk.rotation)
    assert_close(found, wanted, "rotate")


@pytest.mark.parametrize("by_degree", [True, False])
@pytest.mark.parametrize("sizes", [layout(1, 0), layout(3, 2), layout(2, 2)], ids=str)
def test_scale_orders(sizes, by_degree):
    edges = 3
    width = sum(sizes.num_degrees(m) for m in range(1 if by_degree else sizes.mmax + 1))
    x, scale = random(edges, sizes.num_rows, CHANNELS), random(edges, width, CHANNELS)
    scale.requires_grad_()
    per_order = reference.spread_over_orders(scale, sizes.lmax, sizes.mmax, by_degree=by_degree)
    expected = x * per_order[:, list(sizes.rows_in_l_major)]
    found = torch.full_like(x, torch.nan)
    scale_orders(x, scale.detach(), sizes, by_degree=by_degree, out=found)
    assert torch.equal(found, expected)

    grad, scale_grad = random(*x.shape), torch.ones_like(scale)
    scale_orders_backward(grad, x, sizes, by_degree=by_degree, scale_grad=scale_grad)
    wanted = torch.autograd.grad(expected, scale, grad)[0]
    assert_close(scale_grad - 1, wanted, "rotate")  # added to what was there


# Edge-degree embedding


@pytest.mark.parametrize("max_edges", [None, 1, 7])
@graphs
def test_edge_degree_embedding(degrees, max_edges, device):
    sizes, graph = layout(3, 1), make_graph(degrees, device)
    leaves = on(device, radial_parameters(40, 4 * CHANNELS, embeddings=True))
    found = embed(sizes, graph, leaves, max_edges=max_edges)
    if not degrees:
        assert found.shape == (0, 16, CHANNELS)
        return
    expected = reference.edge_degree(graph, make_basis(40, device), leaves, {}, 3, 1)
    assert_close(found, expected, "edge_degree")
    assert_all_close(gradients(found, leaves), gradients(expected, leaves), "edge_degree")


def test_gradcheck_of_edge_degree_embedding():
    sizes, graph = layout(1, 0), make_graph([2, 0, 1])
    leaves = on(torch.device("cpu"), radial_parameters(40, 2 * CHANNELS, embeddings=True))

    def op(*tensors):
        return embed(sizes, graph, dict(zip(leaves, tensors, strict=True)), max_edges=1)

    assert gradcheck(op, tuple(leaves.values()), fast_mode=True, check_undefined_grad=False)


def test_edge_degree_embedding_is_equivariant():
    sizes, graph, rotation = layout(4, 2), make_graph(GRAPH), random_rotation()
    parameters = radial_parameters(40, 5 * CHANNELS, embeddings=True)
    turned = reference.wigner(rotation[None], 4)[0] @ embed(sizes, graph, parameters)
    assert_close(embed(sizes, rotated(graph, rotation), parameters), turned, "edge_degree")


def test_edge_degree_embedding_divides_by_the_degree():
    graph, sizes = make_graph(GRAPH), layout(1, 1)
    edges = prepare_edges(graph, sizes, CHANNELS, DOUBLE)
    weights = radial_weights(radial_parameters(40, 2 * CHANNELS, embeddings=False))
    one, four = (edge_degree_embedding(edges, make_basis(40), weights, d) for d in (1.0, 4.0))
    assert_close(4 * four, one, "edge_degree")


# Attention


@cases
@graphs
def test_edge_attention(case, degrees, device):
    graph = make_graph(degrees, device)
    leaves = on(device, case.parameters() | {"x": features(case.layout, len(degrees))})
    found = attend(case, graph, leaves["x"], leaves)
    if not degrees:
        assert found.shape == (0, case.layout.num_coefficients, HEADS * VALUE)
        return
    mask = case.mask(graph.num_edges)
    mask = None if mask is None else mask.to(device)
    basis = make_basis(case.num_basis, device)
    expected = reference.attention(leaves["x"], graph, basis, leaves, {}, case.sizes, mask)
    assert_close(found, expected, "edge_attention")
    assert_all_close(gradients(found, leaves), gradients(expected, leaves), "edge_attention")


@cases
@pytest.mark.parametrize("max_edges", [1, 7])
def test_chunks_of_edge_attention_do_not_matter(case, max_edges, device):
    graph = make_graph(GRAPH, device)
    leaves = on(device, case.parameters() | {"x": features(case.layout, len(GRAPH))})
    whole = attend(case, graph, leaves["x"], leaves)
    pieces = attend(case, graph, leaves["x"], leaves, max_edges=max_edges)
    assert_close(pieces, whole, "edge_attention")
    assert_all_close(gradients(pieces, leaves), gradients(whole, leaves), "edge_attention")


# The others have the gradients of the reference; a gradcheck that fails takes minutes on them.
@pytest.mark.parametrize("name", ["lowest", "s2", "gate, no orders"])
def test_gradcheck_of_edge_attention(name):
    case = replace(CASES[name], num_basis=3)
    graph = make_graph([2, 0, 1])
    leaves = on(
        torch.device("cpu"), case.parameters() | {"x": features(case.layout, graph.num_nodes)}
    )

    def op(*tensors):
        parameters = dict(zip(leaves, tensors, strict=True))
        return attend(case, graph, parameters["x"], parameters, max_edges=2)

    assert gradcheck(op, tuple(leaves.values()), fast_mode=True, check_undefined_grad=False)


@cases
def test_edge_attention_gives_the_same_bits_each_time_and_without_gradient(case):
    graph, x = make_graph(GRAPH), features(case.layout, len(GRAPH))
    leaves = on(torch.device("cpu"), case.parameters())
    first = attend(case, graph, x, leaves, max_edges=3)
    assert torch.equal(attend(case, graph, x, leaves, max_edges=3), first)
    with torch.no_grad():
        assert torch.equal(attend(case, graph, x, leaves, max_edges=3), first)


def test_edge_attention_for_some_of_the_atoms():
    case, graph = CASES["separable s2"], make_graph(GRAPH)
    x, parameters = features(case.layout, len(GRAPH)), case.parameters()
    whole = attend(case, graph, x, parameters)
    part = attend(case, graph, x, parameters, rows=slice(2, 6), max_edges=4)
    assert_close(part, whole[2:6], "edge_attention")


def test_edge_attention_of_one_degree():
    case, graph = CASES["gate"], make_graph(GRAPH)
    x, parameters = features(case.layout, len(GRAPH)), case.parameters()
    whole = attend(case, graph, x, parameters)
    width, weights = HEADS * VALUE, case.weights(parameters)
    rows = [[width * n + c for n in (1,) for c in range(width)]]  # of m = 0: l = 1 after l = 0
    size = 3 * width  # of m = 1: l = 1, 2, 3, in each half
    rows.append([*range(width), *range(size, size + width)])
    weights = weights._replace(
        conv_2=tuple(w[r] for w, r in zip(weights.conv_2, rows, strict=True)),
        conv_2_bias=weights.conv_2_bias[rows[0]],
    )
    edges = prepare_edges(graph, case.layout, CHANNELS, DOUBLE)
    spec = replace(case.spec, out_layout=layout(1, 1, 1))
    found = edge_attention(x, edges, make_basis(case.num_basis), weights, spec)
    assert_close(found, whole[:, 1:4], "edge_attention")


@pytest.mark.parametrize("name", ["gate", "gate, no orders"])
def test_gated_attention_is_equivariant(name):
    case, graph, rotation = CASES[name], make_graph(GRAPH), random_rotation()
    wigner = reference.wigner(rotation[None], case.layout.lmax)[0]
    x, parameters = features(case.layout, len(GRAPH)), case.parameters()
    turned = attend(case, rotated(graph, rotation), wigner @ x, parameters)
    assert_close(turned, wigner @ attend(case, graph, x, parameters), "edge_attention")


@pytest.mark.parametrize("activation", ["s2", "separable_s2"])
def test_s2_attention_is_equivariant_as_far_as_its_grid(activation):
    """The grid's own error falls with its resolution, to nothing."""
    graph, rotation = make_graph(GRAPH), random_rotation()
    case = Case(layout(2, 2), activation)
    wigner = reference.wigner(rotation[None], case.layout.lmax)[0]
    x, parameters = features(case.layout, len(GRAPH)), case.parameters()
    errors = []
    for resolution in (8, 18, 60):
        case = replace(case, resolution=resolution)
        straight = wigner @ attend(case, graph, x, parameters)
        turned = attend(case, rotated(graph, rotation), wigner @ x, parameters)
        errors.append(relative_error(turned, straight))
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 10
    assert errors[2] < 1e-7


def test_the_order_of_an_atoms_edges_does_not_matter():
    case, graph = CASES["separable s2"], make_graph(GRAPH)
    x, parameters = features(case.layout, len(GRAPH)), case.parameters()
    shuffled = torch.cat(
        [
            torch.randperm(count) + start
            for count, start in zip(GRAPH, graph.target_ptr.tolist(), strict=False)
        ]
    )
    edge_fields = ("source", "target", "vector", "distance")
    other = replace(graph, **{name: getattr(graph, name)[shuffled] for name in edge_fields})
    found = attend(case, other, x, parameters)
    assert_close(found, attend(case, graph, x, parameters), "edge_attention")


@cases
def test_edge_attention_in_float32(case, device):
    graph = make_graph(GRAPH, device)
    leaves = on(device, case.parameters() | {"x": features(case.layout, len(GRAPH))})
    single = {name: p.detach().float().requires_grad_() for name, p in leaves.items()}
    expected = attend(case, graph, leaves["x"], leaves)
    found = attend(case, graph, single["x"], single)
    assert found.dtype == torch.float32
    assert_close(found, expected, "edge_attention")
    assert_all_close(gradients(found, single), gradients(expected, leaves), "edge_attention")


@cases
def test_edge_attention_under_autocast(case, device):
    graph = make_graph(GRAPH, device)
    leaves = on(device, case.parameters() | {"x": features(case.layout, len(GRAPH))})
    single = {name: p.detach().float().requires_grad_() for name, p in leaves.items()}
    full = attend(case, graph, single["x"], single)
    with torch.autocast(device.type, torch.bfloat16):
        low = attend(case, graph, single["x"], single)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    assert_close(low, full, "edge_attention", torch.bfloat16)
    wanted = gradients(full, single)
    for name, grad in gradients(low, single).items():
        assert_close(grad, wanted[name], "edge_attention", torch.bfloat16, name=name)


# Layers on nodes


@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_equivariant(kind):
    norm = NORMS[kind](3, CHANNELS).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    x, wigner = random(4, 16, CHANNELS), reference.wigner(random_rotation()[None], 3)[0]
    assert_close(norm(wigner @ x), wigner @ norm(x), "so3_linear")


@pytest.mark.parametrize("kind", ["gate", "s2", "separable_s2", "separable_grid_mlp"])
def test_feed_forward_is_equivariant_as_far_as_its_grid(kind):
    config = FeedForwardConfig(
        lmax=2, channels=CHANNELS, hidden_channels=HIDDEN, activation=kind, grid_resolution=60
    )
    layer = FeedForward(config, CHANNELS).double()
    x, wigner = random(4, 9, CHANNELS), reference.wigner(random_rotation()[None], 2)[0]
    assert_close(layer(wigner @ x), wigner @ layer(x), "activation")


# touch


def test_touch_gives_unused_parameters_a_gradient_of_zero():
    x, used, unused = (random(3).requires_grad_() for _ in range(3))
    out = touch(x * used, unused)
    assert torch.equal(out, x * used)
    out.sum().backward()
    assert torch.equal(used.grad, x.detach())
    assert torch.equal(unused.grad, torch.zeros(3, dtype=DOUBLE))


def test_chunks_grow_with_threads(monkeypatch):
    found = []
    for threads in (1, 2, 8, 16, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(fitting_edges(1000, torch.float32, torch.device("cpu")))
    assert found == [1572, 1572, 6291, 12582, 12582]
